"""Near-duplicates: edited copies go, the first stays, and files do not depend on the order of
tasks."""

import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.cleaning import (
    BUCKETS,
    cluster_duplicates,
    duplicates,
    find_duplicates,
    near_duplicates,
    write_signatures,
)
from llama2.cleaning.near_duplicates import SHINGLE
from llama2.cleaning.quality import EnglishTokenizer
from llama2.cleaning.words import ngram_hashes, normalized_words, word_hashes


def prose(seed: int, words: int = 300) -> list[str]:
    draw = random.Random(seed)
    pool = ["".join(draw.choices("aeioubcdfgklmnprst", k=draw.randint(2, 8))) for _ in range(2000)]
    return [draw.choice(pool) for _ in range(words)]


def edited(words: list[str], changes: int, seed: int) -> str:
    draw = random.Random(seed)
    words = list(words)
    for place in draw.sample(range(len(words)), changes):
        words[place] = "otherwise"
    return " ".join(words)


def deduplicate(folder: Path, parts: list[list[str]], order: int = 0) -> list[list[int]]:
    """The indices to drop of each part, with tasks in an order of their own."""
    draw = random.Random(order)
    for part in draw.sample(range(len(parts)), len(parts)):
        write_signatures(iter(parts[part]), folder, part)
    for bucket in draw.sample(range(BUCKETS), BUCKETS):
        find_duplicates(folder, len(parts), bucket)
    cluster_duplicates(folder, len(parts))
    return [duplicates(folder, part).tolist() for part in range(len(parts))]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_edited_copies_go_and_the_first_stays(tmp_path: Path) -> None:
    a, b, c = prose(1), prose(2), prose(3)
    parts = [
        [" ".join(a), " ".join(b), edited(a, 3, 1)],
        [],
        [edited(b, 4, 2), " ".join(c), " ".join(a).upper().replace(" ", ",  "), edited(c, 150, 3)],
    ]
    assert deduplicate(tmp_path, parts) == [[2], [], [0, 2]]


def test_different_texts_stay(tmp_path: Path) -> None:
    """Even with the same words in another order, and with a common paragraph of a third."""
    words = prose(4)
    third = prose(5, 150)
    texts = [
        " ".join(words),
        " ".join(reversed(words)),
        " ".join([*third, *prose(6, 300)]),
        " ".join([*third, *prose(7, 300)]),
    ]
    assert deduplicate(tmp_path, [texts]) == [[]]


def test_short_and_wordless_texts_only_where_equal(tmp_path: Path) -> None:
    texts = [
        "yes",
        "Yes!",
        "no",
        "two words",
        "words two",
        "",
        "",
        "...",
        "?!",
        "...",
        "four words a b",
    ]
    assert deduplicate(tmp_path, [texts, ["YES", "no"]]) == [[1, 6, 9], [0, 1]]


def test_a_chain_of_edits_is_one_cluster(tmp_path: Path) -> None:
    """The last has little in common with the first, but each with the one before."""
    words = prose(8)
    chain = []
    for step in range(12):
        chain.append(" ".join(words))
        words[step * 20 : step * 20 + 10] = prose(100 + step, 10)
    shuffled = [chain[i] for i in (5, 11, 0, 7, 2, 9, 1, 4, 10, 3, 8, 6)]
    assert deduplicate(tmp_path, [shuffled[:4], shuffled[4:]]) == [[1, 2, 3], list(range(8))]


def test_bytes_do_not_depend_on_the_order_or_number_of_runs(tmp_path: Path) -> None:
    originals = [prose(seed, 80) for seed in range(12)]
    draw = random.Random(0)
    parts = [[edited(draw.choice(originals), 1, draw.random()) for _ in range(9)] for _ in range(5)]
    first = deduplicate(tmp_path / "one", parts, order=1)
    assert deduplicate(tmp_path / "two", parts, order=2) == first
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert deduplicate(tmp_path / "one", parts, order=3) == first
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sum(map(len, first)) == 45 - len(originals)


def test_pairs_are_the_same_in_ranges_that_fit_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [[" ".join(prose(seed % 40, 30)) for seed in range(s, s + 50)] for s in (0, 13, 31)]
    whole = deduplicate(tmp_path / "whole", parts)
    monkeypatch.setattr(near_duplicates, "_RECORDS_AT_A_TIME", 7)
    assert deduplicate(tmp_path / "ranges", parts) == whole
    assert contents(tmp_path / "ranges") == contents(tmp_path / "whole")
    assert sum(map(len, whole)) == 150 - 40


def test_a_killed_task_leaves_nothing_under_its_name(tmp_path: Path) -> None:
    def texts() -> object:
        yield "one text"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_signatures(texts(), tmp_path, 0)  # type: ignore[arg-type]
    assert contents(tmp_path) == {}


def test_finished_tasks_are_not_done_again(tmp_path: Path) -> None:
    deduplicate(tmp_path, [["a b", "a b"], ["a b"]])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    for bucket in range(BUCKETS):
        find_duplicates(tmp_path, 2, bucket)
    cluster_duplicates(tmp_path, 2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    (tmp_path / "duplicates-00001.npy").unlink()
    cluster_duplicates(tmp_path, 2)
    assert duplicates(tmp_path, 1).tolist() == [0]


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    write_signatures(["a"], tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="signatures-00001"):
        find_duplicates(tmp_path, 2, 0)
    find_duplicates(tmp_path, 1, 0)
    with pytest.raises(FileNotFoundError, match="pairs-01"):
        cluster_duplicates(tmp_path, 1)
    with pytest.raises(FileNotFoundError, match="duplicates-00000"):
        duplicates(tmp_path, 0)


def test_signatures_are_datatroves_minima(tmp_path: Path) -> None:
    """Cut into pieces or not, a text's signature is what datatrove makes of all its shingles."""
    text = " ".join(prose(9, 1500))
    config = MinhashConfig(n_grams=SHINGLE, num_buckets=14, hashes_per_bucket=8, seed=1)
    reference = MinhashDedupSignature(str(tmp_path), config, language=EnglishTokenizer())
    shingles = ngram_hashes(word_hashes(normalized_words(text)), SHINGLE)
    expected = np.array(reference.get_signature(shingles[:, None]), "<u8")
    assert near_duplicates._signature(shingles).tolist() == expected.tolist()


@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
@settings(max_examples=100, deadline=None)
def test_clusters_are_those_of_a_plain_search(edges: list[tuple[int, int]]) -> None:
    """Lowest document of each connected component, whatever the pairs."""
    expected = list(range(30))
    for _ in range(30):
        for a, b in edges:
            expected[a] = expected[b] = min(expected[a], expected[b])
    pairs = np.array(edges, np.int64).reshape(-1, 2)
    halves = [pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]]
    assert near_duplicates._first_of_cluster(lambda: iter(halves), 30).tolist() == expected


@pytest.mark.parametrize(("similarity", "low", "high"), [(0.5, 0.0, 0.15), (0.85, 0.95, 1.0)])
def test_found_as_often_as_the_formula_says(similarity: float, low: float, high: float) -> None:
    """1 - (1 - s^8)^14 is 0.05 for s = 0.5 and 0.99 for 0.85; pairs of documents with just so
    many shingles in common."""
    found, pairs, total = 0, 60, 400
    shared = round(total * 2 * similarity / (1 + similarity))
    for seed in range(pairs):
        draw = np.random.default_rng(seed)
        common = draw.integers(0, 2**63, shared, np.uint64)
        rows = [
            near_duplicates._signature(
                np.concatenate([common, draw.integers(0, 2**63, total - shared, np.uint64)])
            )
            for _ in range(2)
        ]
        found += any(np.array_equal(x, y) for x, y in zip(*rows, strict=True))
    assert low <= found / pairs <= high


def test_shingles_of_different_texts_differ() -> None:
    """No two of many runs of five words share a hash."""
    words = prose(10, 3000)
    hashes = ngram_hashes(word_hashes(words), SHINGLE)
    runs = {tuple(words[i : i + SHINGLE]) for i in range(len(words) - SHINGLE + 1)}
    assert len(set(hashes.tolist())) == len(runs)
    assert all(a != b for a, b in combinations(hashes[:50].tolist(), 2))
