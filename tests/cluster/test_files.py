"""Data files of every accepted kind give the same records, and bad ones say what is wrong where."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from cluster.files import TEXT_BLOCK, count_records, data_files, read_records

DATA = Path(__file__).parents[2].parent / "shared" / "data"
ROWS: list[dict[str, Any]] = [
    {"prompt": "naïve?\u2028", "messages": [{"role": "user", "content": "a"}], "n": 1},
    {"prompt": "", "messages": [], "n": None},
    {"prompt": "三", "messages": [{"role": "user", "content": "b\n"}], "n": 3},
]


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def write_stream(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink:
        writer = pyarrow.ipc.new_stream(sink, table.schema)
        writer.write_table(table, max_chunksize=2)
        writer.close()


def write_arrow_file(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "data.jsonl": ("line", lambda p: p.write_bytes(json_lines(ROWS))),
    "data.jsonl.gz": ("line", lambda p: p.write_bytes(gzip.compress(json_lines(ROWS) + b"\n"))),
    "lines.json": ("line", lambda p: p.write_bytes(b"\xef\xbb\xbf" + json_lines(ROWS))),
    "list.json": ("item", lambda p: p.write_text(json.dumps(ROWS, indent=2))),
    "list.json.gz": ("item", lambda p: p.write_bytes(gzip.compress(json.dumps(ROWS).encode()))),
    "DATA.JSONL": ("line", lambda p: p.write_bytes(json_lines(ROWS).replace(b"\n{", b"\r\n{"))),
    "data.parquet": (
        "row",
        lambda p: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), p, row_group_size=2),
    ),
    "stream.arrow": ("row", lambda p: write_stream(p, ROWS)),
    "file.arrow": ("row", lambda p: write_arrow_file(p, ROWS)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_records(name: str, tmp_path: Path) -> None:
    unit, write = WRITERS[name]
    path = tmp_path / name
    write(path)
    places, records = zip(*read_records(path), strict=True)
    assert list(records) == ROWS
    assert list(places) == [f"{path} {unit} {number}" for number in (1, 2, 3)]
    assert count_records(str(path)) == 3


def test_blank_lines_are_no_records_but_are_counted_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}\n\n')
    assert [where.split()[-1] for where, _ in read_records(path)] == ["1", "4"]


def test_text_comes_in_blocks_of_whole_paragraphs(tmp_path: Path) -> None:
    paragraph = "word " * 500 + "end.\nsecond line\n"
    for name, write in (("a.txt", bytes), ("a.txt.gz", gzip.compress)):
        path = tmp_path / name
        path.write_bytes(write(("\n" + "\n\n".join([paragraph] * 40)).encode()))
        records = list(read_records(path))
        # Each paragraph takes 2,519 characters with the blank lines behind it: seven reach 16,000.
        assert [r["text"].count("end.") for _, r in records] == [7, 7, 7, 7, 7, 5]
        for _, record in records:
            assert record["text"].startswith("word")
            assert record["text"].endswith("second line")
        lines = ("\n" + "\n\n".join([paragraph] * 40)).split("\n")
        for where, _ in records:
            assert lines[int(where.split()[-1]) - 1].startswith("word")


def test_text_without_paragraphs_or_lines_is_cut_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one line\n" * 20_000)
    (tmp_path / "one.txt").write_text("é" * 200_001)
    blocks = [record["text"] for _, record in read_records(tmp_path / "lines.txt")]
    assert "\n".join(blocks) + "\n" == "one line\n" * 20_000
    assert min(map(len, blocks[:-1])) > 2 * TEXT_BLOCK - 20
    pieces = [record["text"] for _, record in read_records(tmp_path / "one.txt")]
    assert "".join(pieces) == "é" * 200_001
    assert max(map(len, pieces)) == 2 * TEXT_BLOCK


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"from": "b"}\n')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"from": "a"}\n'))
    write_stream(tmp_path / "c.arrow", [{"from": "c"}])
    (tmp_path / "empty.jsonl").write_text("")
    for other in ("README.md", "dataset_info.json", "state.json", ".hidden.jsonl", "cache-1.arrow"):
        (tmp_path / other).write_text("no data")
    assert [record["from"] for _, record in read_records(tmp_path)] == ["a", "b", "c"]
    assert count_records(tmp_path) == 3


def test_held_out_splits_stay_out_of_training(tmp_path: Path) -> None:
    names = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    for name in [*names, "test-00000-of-00001.parquet", "validation-0.parquet"]:
        pyarrow.parquet.write_table(pyarrow.table({"name": [name]}), tmp_path / name)
    assert [record["name"] for _, record in read_records(tmp_path)] == names
    # Without files for training nothing is left out, and a file that is named is always read.
    for name in names:
        (tmp_path / name).unlink()
    assert [file.name for file in data_files(tmp_path)] == [
        "test-00000-of-00001.parquet",
        "validation-0.parquet",
    ]
    assert count_records(tmp_path / "validation-0.parquet") == 1


def test_folders_that_datasets_saves(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "state.json").write_text('{"_data_files": []}')
        for shard in (0, 1):
            file = tmp_path / split / f"data-0000{shard}-of-00002.arrow"
            write_stream(file, [{"text": f"{split} {shard}"}])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert [r["text"] for _, r in read_records(tmp_path)] == ["train 0", "train 1"]
    assert [r["text"] for _, r in read_records(tmp_path / "test")] == ["test 0", "test 1"]
    (tmp_path / "train").rename(tmp_path / "learn")
    with pytest.raises(ValueError, match="name one of its folders learn, test"):
        read_records(tmp_path)


BAD: dict[str, tuple[str, bytes, str]] = {
    "malformed": (
        "a.jsonl",
        b'{"a": 1}\n{"a": }\n',
        r"a\.jsonl line 2 is not valid JSON \(.*column 7",
    ),
    "truncated line": ("a.jsonl", b'{"a": 1}\n{"a": "x', r"a\.jsonl line 2 is not valid JSON"),
    "list in a line": ("a.jsonl", b"{}\n[1]\n", "line 2 is a list, not an object"),
    "number in a line": ("a.jsonl", b"3\n", "line 1 is a single value, not an object"),
    "malformed list": ("a.json", b'[{"a": 1},\n {"b" 2}]', r"a\.json line 2 is not valid JSON"),
    "value in a list": ("a.json", b'[{"a": 1}, "b"]', "item 2 is a single value"),
    "latin-1": ("a.jsonl", b'{}\n{"a": "\xe9"}\n', "line 2 is not UTF-8"),
    "latin-1 text": ("a.txt", b"fine\ncaf\xe9\n", "line 2 is not UTF-8"),
    "no gzip": ("a.jsonl.gz", b'{"a": 1}\n', "damaged gzip file"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-12], "damaged gzip file"),
    "no parquet": ("a.parquet", b"PAR1 not really", r"a\.parquet cannot be read as Parquet \("),
    "no arrow": ("a.arrow", b"not arrow at all", r"a\.arrow cannot be read as Arrow \("),
    "empty": ("a.jsonl", b"", r"a\.jsonl holds no records"),
    "blank": ("a.txt", b"\n \n", r"a\.txt holds no records"),
    "empty list": ("a.json", b"[]", r"a\.json holds no records"),
    "unknown": ("a.csv", b"a,b\n", r"a\.csv has an unknown extension; accepted are \.jsonl"),
    "zipped table": ("a.parquet.gz", b"", r"unknown extension"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    for read in (lambda path: list(read_records(path)), count_records):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_damage_inside_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_stream(path, [{"a": "x" * 1000}] * 100)
    path.write_bytes(path.read_bytes()[:-60_000])
    with pytest.raises(ValueError, match="cannot be read as Arrow"):
        list(read_records(path))


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        read_records(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="holds no data file; accepted are"):
        read_records(tmp_path)


@pytest.mark.parametrize(
    ("path", "count"),
    [
        ("hh-rlhf", 1800),
        ("oasst/trees.jsonl.gz", 80),
        ("instructions/seed_tasks.jsonl.gz", 175),
        ("instructions/mt_bench_questions.jsonl", 80),
    ],
)
def test_real_files(path: str, count: int) -> None:
    if not (DATA / path).exists():
        pytest.skip("the real data sets are not beside this checkout")
    assert count_records(DATA / path) == count


def test_real_text_is_read_whole() -> None:
    path = DATA / "text" / "tinyshakespeare.txt.gz"
    if not path.exists():
        pytest.skip("the real data sets are not beside this checkout")
    blocks = [record["text"] for _, record in read_records(path)]
    whole = gzip.decompress(path.read_bytes()).decode()
    assert "".join(blocks).replace("\n", "") == whole.replace("\n", "")


@pytest.mark.parametrize("value", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_json_that_is_too_deep_or_long_is_named(tmp_path: Path, name: str, value: str) -> None:
    path = tmp_path / name
    path.write_text(f'{{"text": "a"}}\n{value}\n' if name.endswith("l") else f"[{value}]")
    with pytest.raises(ValueError, match=f"{name}.* cannot be read as JSON"):
        list(read_records(path))
