"""Files cut into parts: every record is in one of them, whatever the size of a part."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.chunks import Chunk, cut, lines_before, read_chunk
from cluster.files import Record, read_records


def records(parts: list[tuple[Chunk, ...]], exact: bool = False) -> list[Record]:
    return [
        record
        for part in parts
        for chunk in part
        for record in read_chunk(chunk, lines_before(chunk) + 1 if exact else 1)
    ]


@settings(deadline=None, max_examples=60)
@given(
    lines=st.lists(
        st.one_of(
            st.just(b""), st.integers(0, 60).map(lambda n: json.dumps({"a": "é" * n}).encode())
        ),
        max_size=12,
    ),
    end=st.sampled_from([b"\n", b"\r\n"]),
    last=st.booleans(),
    size=st.integers(1, 300),
)
def test_lines_are_in_one_chunk_each(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], end: bytes, last: bool, size: int
) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    path.write_bytes(end.join(lines) + (end if last else b""))
    whole = list(read_records(path)) if any(lines) else []
    assert records(cut([path], size), exact=True) == whole


def test_parts_are_of_about_the_size_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": n, "pad": "x" * 80}) + "\n" for n in range(1000)))
    parts = cut([path], 10_000)
    assert len(parts) == -(-path.stat().st_size // 10_000)
    counts = [sum(1 for chunk in part for _ in read_chunk(chunk)) for part in parts]
    assert sum(counts) == 1000
    assert max(counts) - min(counts[:-1]) <= 10
    assert cut([path], 10_000) == parts


def test_small_files_share_a_part_and_zipped_ones_stay_whole(tmp_path: Path) -> None:
    names = [f"{n}.jsonl" for n in range(6)]
    for name in names:
        (tmp_path / name).write_text(json.dumps({"name": name}) + "\n")  # 19 bytes
    (tmp_path / "large.jsonl.gz").write_bytes(gzip.compress(b'{"name": "large"}\n' * 500))
    (tmp_path / "list.json").write_text('[{"name": "list"}]')
    (tmp_path / "empty.txt").write_text("")
    files = [*(tmp_path / name for name in names), tmp_path / "empty.txt"]
    files += [tmp_path / "large.jsonl.gz", tmp_path / "list.json"]
    parts = cut(files, 40)
    shape = [[chunk.path.name for chunk in part] for part in parts]
    assert shape == [names[:2], names[2:4], names[4:], ["large.jsonl.gz"], ["list.json"]]
    found = [record["name"] for _, record in records(parts)]
    assert found == [*names, *["large"] * 500, "list"]


def test_parquet_is_cut_between_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"n": n, "pad": f"{n}" * 50} for n in range(100)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    parts = cut([path], 3000)
    assert 3 <= len(parts) <= 10
    assert records(parts) == list(read_records(path))
    assert len(cut([path], 1)) == 10
    assert len(cut([path], 1 << 20)) == 1


def test_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    lines = [f"Line {n} says that it is line {n}." for n in range(5000)]
    path.write_text("\n".join(lines))
    parts = cut([path], 20_000)
    assert len(parts) == -(-path.stat().st_size // 20_000) > 5
    found = "\n".join(record["text"] for _, record in records(parts))
    assert found.split("\n") == lines
    # The number of a block's first line is found where it is asked for.
    for where, record in records(parts, exact=True):
        number = int(where.split()[-1])
        assert record["text"].startswith(f"Line {number - 1} says")


def test_a_line_longer_than_a_part(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"a": "x" * n}) + "\n" for n in (5, 5000, 7)))
    parts = cut([path], 100)
    assert [len(record["a"]) for _, record in records(parts)] == [5, 5000, 7]
