"""What preparation makes of users' files; run in this process, one task after the other."""

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.sources import FileSource
from cluster import data
from cluster.run_directory import RunDirectory
from jobs import prepare
from jobs.prepare_config import PrepareConfig
from jobs.presets import preset
from llama2 import shard_files
from llama2.batches import pack
from llama2.shards import Manifest, Shards, read_manifest
from llama2.tokenizer import load_tokenizer, train_tokenizer
from tests.benchmarks import preparation as benchmark
from tests.corpora import documents, write_corpus

TINY = preset("tiny").prepare
SENTENCE = "the quick answer to question {} about the river and the old bridge"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(step: Any, count: int, cpus: float) -> Iterator[str]:
        for number in range(count):
            yield step({"id": number})["error"]

    monkeypatch.setattr(data, "_run", run)


def run(config: PrepareConfig) -> Path:
    """All of the job but the Ray session."""
    wanted = prepare.sources(config)
    prepare.check(config, wanted)
    directory = RunDirectory(config.runs, config.run_name("data"))
    prepare.prepare(config, wanted, directory)
    return directory.path


def small_tokenizer(folder: Path) -> None:
    train_tokenizer(
        (f"{a} {b} and {a}{b} " * 5 for a in "abcdefgh" for b in "ijklmnop"), 300, folder
    )


def jsonl(path: Path, records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def texts(folder: Path, split: str = "train", kind: str = "pretrain") -> list[str]:
    """The documents of prepared rows, decoded."""
    tokenizer, shards = load_tokenizer(folder / "tokenizer"), Shards(folder / kind / split)
    return [
        tokenizer.decode([int(token) for token in sequence.tokens])
        for index in range(len(shards))
        for sequence in shards.row(index)
    ]


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below the folder but the config, which has the run's name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "config.yaml"
    }


def corpus_config(runs: Path, **options: Any) -> PrepareConfig:
    """Three sources of text in many parts, and some chat data."""
    given = runs / "given"
    if not given.exists():
        given.mkdir()
        write_corpus(given / "wiki.jsonl", 120_000, seed=1)
        write_corpus(given / "web.jsonl", 240_000, seed=2)
        pairs = ({"prompt": f"Who sees it {n}?", "response": f"Dog {n}."} for n in range(60))
        jsonl(given / "chat.jsonl", pairs)
    return replace(
        TINY, runs=runs, vocab_size=400, context=128, part_bytes=60_000, shard_tokens=40_000,
        text=(given / "wiki.jsonl", given / "web.jsonl"), mix={"wiki": 1.0, "web": 1.0},
        dialogues=(given / "chat.jsonl",), **options,
    )  # fmt: skip


def test_nothing_is_lost_and_nothing_is_new(tmp_path: Path) -> None:
    """Without a mix and rules, rows hold the documents of the file, each once."""
    path = write_corpus(tmp_path / "wiki.jsonl", 150_000, seed=3)
    given = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    folder = run(
        replace(TINY, runs=tmp_path, text=(path,), context=4096, part_bytes=40_000, vocab_size=400)
    )
    found = texts(folder) + texts(folder, "heldout")
    assert sorted(found) == sorted(given)
    manifest = read_manifest(folder / "pretrain" / "train")
    counts = manifest.sources["wiki"]
    assert counts.records == len(given)
    assert counts.documents + len(texts(folder, "heldout")) == len(given)
    assert (manifest.layout.token_bytes, manifest.layout.marks_targets) == (2, False)
    shards = Shards(folder / "pretrain" / "train")
    shards.verify()
    lengths = shards.lengths(range(len(shards)))
    assert max(lengths) <= 4096
    assert sum(lengths) == manifest.targets == manifest.tokens - manifest.sequences
    # Documents stay apart: each begins a segment of its own.
    batch = pack([shards.row(0)])
    assert int(batch.segments_BT.max()) == len(shards.row(0)) > 1
    assert torch.equal(
        batch.tokens_BT[0] == 1, batch.segments_BT[0].diff(prepend=torch.zeros(1)) > 0
    )


def test_the_mix_decides_the_shares(tmp_path: Path) -> None:
    folder = run(corpus_config(tmp_path))
    sources = read_manifest(folder / "pretrain" / "train").sources
    assert sources["web"].passes == 1.0
    assert 1.5 < sources["wiki"].passes < 2.5
    assert sources["wiki"].share == pytest.approx(0.5, abs=0.03)
    assert (sources["wiki"].weight, sources["web"].weight) == (1.0, 1.0)
    heldout = read_manifest(folder / "pretrain" / "heldout").sources
    assert heldout["wiki"].passes == 1.0
    # Held-out texts are passed by no source.
    assert not set(texts(folder)) & set(texts(folder, "heldout"))
    counts: dict[str, int] = {}
    for text in texts(folder):
        counts[text] = counts.get(text, 0) + 1
    assert set(counts.values()) <= {1, 2, 3}
    too_much = corpus_config(tmp_path, name="much", max_passes=1.5)
    with pytest.raises(ValueError, match=r"would pass wiki .* more than max_passes 1\.5 allows"):
        run(too_much)
    with pytest.raises(ValueError, match="The mix names 'books', but the sources of text are: wi"):
        run(replace(too_much, name="absent", mix={"books": 1.0}))
    assert not (tmp_path / "absent").exists()


def test_what_is_dropped_and_why(tmp_path: Path) -> None:
    good = list(islice(documents(5), 60))
    mail = ", ".join(f"person{n}@mail{n}.org" for n in range(20))
    personal = [f"{text}\nWrite to {mail}." for text in islice(documents(7), 12)]
    near = [text.replace(" the ", " The ", 1) for text in good[:4]]
    web = [*good, *near, "Too short.", good[9] + "\n" + SENTENCE.format(7) + "."]
    questions = [{"question": SENTENCE.format(n)} for n in range(10)]
    chat = [{"prompt": f"Who is {n}?", "response": f"It is {n}."} for n in range(30)]
    chat += [chat[3], {"prompt": SENTENCE.format(3), "response": "A bridge."}]
    chat += [{"prompt": "Is it \u00e2\u20ac\u0153so\u00e2\u20ac\x9d?", "response": "Yes."}]
    asked = [{"prompt": text} for text in ("Who is 1?", SENTENCE.format(2), "Who is 2?")]
    folder = run(
        replace(
            TINY, runs=tmp_path, vocab_size=400, context=4096, part_bytes=30_000,
            text=(
                jsonl(tmp_path / "web.jsonl", ({"text": text} for text in web)),
                jsonl(tmp_path / "people.jsonl", ({"text": text} for text in personal)),
            ),
            dialogues=(jsonl(tmp_path / "chat.jsonl", chat),),
            prompts=(jsonl(tmp_path / "prompts.jsonl", asked),),
            benchmarks=(jsonl(tmp_path / "quiz.jsonl", questions),),
        )
    )  # fmt: skip
    manifest = read_manifest(folder / "pretrain" / "train")
    web_counts, people = manifest.sources["web"], manifest.sources["people"]
    assert web_counts.records == 66
    assert web_counts.dropped["contaminated: quiz"] == 1
    assert web_counts.dropped["nearly the same as another text"] == 4
    assert sum(n for why, n in web_counts.dropped.items() if why.startswith("quality")) == 1
    assert people.records == 12
    assert people.dropped == {"personal information": 12}
    assert (people.documents, people.tokens) == (0, 0)
    assert manifest.dropped == 6 + 12
    kept = {t for split in ("train", "heldout") for t in texts(folder, split)}
    assert kept == set(good)
    chat_counts = read_manifest(folder / "sft" / "train").sources["chat"]
    assert chat_counts.dropped == {
        "contaminated: quiz": 1,
        "the same as another record": 1,
    }
    said = " ".join(texts(folder, "train", "sft") + texts(folder, "heldout", "sft"))
    assert "Is it \u201cso\u201d?" in said
    prompts = [
        json.loads(line)["messages"][0]["content"]
        for split in ("heldout", "train")
        for line in (folder / "prompts" / f"{split}.jsonl").read_text().splitlines()
        if line
    ]
    assert sorted(prompts) == ["Who is 1?", "Who is 2?"]


def test_a_few_records_with_details_do_not_drop_a_source(tmp_path: Path) -> None:
    """The whole source goes only above the share that is set; below, its documents do."""
    good = [{"text": text} for text in islice(documents(8), 40)]
    mail = ", ".join(f"person{n}@mail{n}.org" for n in range(30))
    bad = [{"text": f"{text}\nWrite to {mail}."} for text in islice(documents(9), 4)]
    path = jsonl(tmp_path / "web.jsonl", [*good, *bad])
    config = replace(TINY, runs=tmp_path, vocab_size=400, text=(path,))
    counts = read_manifest(run(config) / "pretrain" / "train").sources["web"]
    assert counts.dropped == {"personal information": 4}
    strict = replace(
        config, name="strict", cleaning=replace(TINY.cleaning, max_personal_source=0.05)
    )
    with pytest.raises(
        ValueError,
        match=r"record of pretrain each, .*4: personal information, 40: the source has too",
    ):
        run(strict)


def test_comparisons_are_rows_of_their_own(tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"Where is {n}?", "chosen": f"In house {n}.", "rejected": "No.", "rating": n % 4}
        for n in range(80)
    ]
    unsafe = pairs[0] | {"safety": "chosen_unsafe", "prompt": "Whose?"}
    equal = pairs[1] | {"chosen": "No.", "prompt": "Which?"}
    path = jsonl(tmp_path / "pairs.jsonl", [*pairs, pairs[5], unsafe, equal])
    config = replace(TINY, runs=tmp_path, helpfulness=(path,), part_bytes=2000)
    small_tokenizer(tmp_path / "tokenizer")
    folder = run(replace(config, tokenizer=tmp_path / "tokenizer"))
    total = 0
    for split in ("train", "heldout"):
        shards = Shards(folder / "helpfulness" / split)
        total += len(shards)
        for index in range(len(shards)):
            chosen, rejected = shards.row(index)
            number = int(
                load_tokenizer(folder / "tokenizer")
                .decode(chosen.tokens.tolist())
                .partition("house ")[2]
                .partition(".")[0]
            )
            assert shards.rating(index) == number % 4
            assert shards.lengths([index]) == [max(len(chosen.tokens), len(rejected.tokens))]
    assert total == 80
    assert read_manifest(folder / "helpfulness" / "train").sources["pairs"].dropped == {
        "the chosen answer is the unsafe one": 1,
        "the same as another record": 1,
        "the two answers are equal": 1,
    }


def test_the_smallest_data_sets(tmp_path: Path) -> None:
    def two(count: int) -> tuple[Manifest, Manifest]:
        records = ({"prompt": f"Who is it {n}?", "response": "A dog."} for n in range(count))
        path = jsonl(tmp_path / f"few{count}.jsonl", records)
        config = replace(TINY, runs=tmp_path, name=f"few{count}", dialogues=(path,))
        folder = run(replace(config, tokenizer=tmp_path / "tokenizer"))
        return read_manifest(folder / "sft" / "train"), read_manifest(folder / "sft" / "heldout")

    small_tokenizer(tmp_path / "tokenizer")
    train, heldout = two(2)
    assert (train.sequences, heldout.sequences) == (1, 1)
    with pytest.raises(ValueError, match="need a record of sft each, and too few could be used"):
        two(1)


def test_a_bad_record_far_into_a_file_is_named(tmp_path: Path) -> None:
    """Beyond what is looked at first, and beyond the first part: line numbers count from the file's
    beginning."""
    path = write_corpus(tmp_path / "web.jsonl", 900_000, seed=4)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) > 150
    place = len(lines) - 5
    config = replace(TINY, runs=tmp_path, text=(path,), part_bytes=400_000)
    for bad, message in (("{'text': 1}\n", "is not valid JSON"), ('{"body": "x"}\n', "the field")):
        path.write_text("".join([*lines[:place], bad, *lines[place + 1 :]]))
        with pytest.raises(ValueError, match=message) as caught:
            run(replace(config, name=message.split()[-1]))
        assert str(caught.value).startswith(f"{path} line {place + 1} ")
        assert "\n" not in str(caught.value)


def test_a_full_disk_while_writing_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = corpus_config(tmp_path)
    expected = tree(run(replace(config, name="whole")))
    opened = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if path.name.startswith(".shard-00001") and "w" in mode:
            return opened(Path("/dev/full"), mode, *arguments, **options)
        return opened(path, mode, *arguments, **options)

    monkeypatch.setattr(shard_files.Path, "open", full)
    with pytest.raises(ValueError, match="is full; make room") as caught:
        run(replace(config, name="full"))
    assert str(tmp_path / "full") in str(caught.value)
    folder = tmp_path / "full" / "pretrain" / "train"
    assert [file.name for file in folder.iterdir()] == ["shard-00000.bin"]
    monkeypatch.setattr(shard_files.Path, "open", opened)
    assert tree(run(replace(config, name="full"))) == expected


class Killed(BaseException):
    """Nothing of the program catches this."""


def test_killed_at_any_file_it_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attempts die when one to eight more files are whole, before the next one is."""
    config = corpus_config(tmp_path)
    expected = tree(run(replace(config, name="whole")))
    move = os.replace
    moved = 0

    def dying(source: Any, target: Any) -> None:
        nonlocal moved
        if moved == attempts % 8 + 1:
            raise Killed
        moved += 1
        move(source, target)

    monkeypatch.setattr(os, "replace", dying)
    attempts = 0
    while True:
        moved, attempts = 0, attempts + 1
        assert attempts < 200, "it does not get on"
        try:
            folder = run(replace(config, name="killed"))
            break
        except Killed:
            continue
    assert attempts > 15
    assert tree(folder) == expected
    assert not (folder / "work").exists()


def test_input_that_changed_between_attempts(tmp_path: Path) -> None:
    config = corpus_config(tmp_path, max_passes=1.1)
    with pytest.raises(ValueError, match="more than max_passes"):
        run(config)
    with config.text[1].open("a") as file:
        file.write('{"text": "More."}\n')
    with pytest.raises(ValueError, match=r"web\.jsonl is not what it was when the preparation"):
        run(config)
    shutil.rmtree(tmp_path / "tiny-data")
    with pytest.raises(ValueError, match="more than max_passes"):
        run(config)


def test_sources_are_named_by_their_paths(tmp_path: Path) -> None:
    (tmp_path / "wiki.en").mkdir()
    for path in ("wiki.en/a.jsonl", "web.jsonl.gz", "wiki.txt"):
        (tmp_path / path).write_text("")
    paths = tuple(tmp_path / name for name in ("wiki.en", "web.jsonl.gz", "wiki.txt"))
    named = prepare.sources(replace(TINY, text=paths))["pretrain"]
    found = {
        name: [path.name for path in source.files]
        for name, source in named.items()
        if isinstance(source, FileSource)
    }
    assert found == {
        "wiki": ["a.jsonl", "wiki.txt"],
        "web": ["web.jsonl.gz"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [False, True], ids=["cut", "whole"])
def test_memory_is_flat(tmp_path: Path, zipped: bool) -> None:
    """Ten parts take what one takes, and so does a file of their size that cannot be cut."""
    growth = {}
    for parts in (1, 10):
        path = write_corpus(tmp_path / f"parts{parts}.jsonl", parts * benchmark.PART, seed=3)
        if zipped:
            path = path.rename(path.with_suffix(".txt")).with_name(f"parts{parts}.jsonl.gz")
            path.write_bytes(gzip.compress(path.with_name(f"parts{parts}.txt").read_bytes(), 1))
        before, peak = benchmark.memory(benchmark.config(tmp_path, f"run{parts}", path))
        growth[parts] = peak - before
    # Ten parts are 19 MB more of text, of which not one may be held.
    assert growth[10] - growth[1] < 9 * benchmark.PART / 2
