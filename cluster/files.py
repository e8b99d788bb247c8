"""Users' data files, read as a stream of records, each with the place it came from.

Accepted are JSON lines (`.jsonl`, or `.json` with one object a line), a JSON list (`.json`),
Parquet, Arrow, and plain text (`.txt`), the text formats also gzipped (`.gz`); a folder of such
files; and what Hugging Face's `datasets` saves or caches.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any

Record = tuple[str, dict[str, Any]]

EXTENSIONS = (".jsonl", ".json", ".parquet", ".arrow", ".txt")
ACCEPTED = ".jsonl, .json, .txt (each also with .gz), .parquet and .arrow"
# What `datasets` keeps beside its data.
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
TRAINING = re.compile(r"(^|[-_.])train(ing)?([-_.]|$)")
HELD_OUT = re.compile(r"(^|[-_.])(test|valid|validation|val|dev|eval)([-_.]|$)")
# About 4,096 tokens of English: the context of Llama 2.
TEXT_BLOCK = 16_000
ROWS_AT_A_TIME = 1024


def read_records(path: str | Path) -> Iterator[Record]:
    """Yield (where, record) for every record of a file or folder, in a fixed order, as a stream.

    `where` names the place, as "data.jsonl line 12" or "data.parquet row 12", counted from 1. Plain
    text comes as {"text": ...}, in blocks of whole paragraphs of about `TEXT_BLOCK` characters, or
    cut there where a file has no paragraphs.

    Raises `FileNotFoundError` or `ValueError` at once where `data_files` does, and while reading
    `ValueError` where a record is malformed, a file is damaged, or there are no records at all.
    """
    return _read(path, data_files(path))


def count_records(path: str | Path) -> int:
    """The number of records, and the check that all can be read, with the errors of `read_records`.

    Text formats are parsed from end to end; of Parquet and Arrow only row counts are read.
    """
    count = 0
    for file in data_files(path):
        if extension(file) == ".parquet":
            with _parquet(file) as table:
                count += table.metadata.num_rows
        elif extension(file) == ".arrow":
            count += sum(batch.num_rows for batch in _arrow_batches(file))
        else:
            count += sum(1 for _ in READERS[extension(file)](file))
    if count == 0:
        raise _no_records(path)
    return count


def data_files(path: str | Path) -> list[Path]:
    """The data files that `path` stands for: itself, or those in the folder, sorted by name.

    Of a folder that names some files for training, those named test, validation, dev or eval are
    left out. Of splits in folders (`datasets.DatasetDict`), `train` is taken. Name a file or a
    split's folder to read another one.

    Raises `FileNotFoundError` where there is nothing at `path`, `ValueError` where a file has an
    unknown extension or a folder holds no data file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {path}; check the path.")
    if path.is_file():
        if not extension(path):
            raise ValueError(f"{path} has an unknown extension; accepted are {ACCEPTED}.")
        return [path]
    files = sorted(file for file in path.iterdir() if file.is_file() and _is_data(file))
    if files:
        if any(TRAINING.search(file.name.lower()) for file in files):
            files = [file for file in files if not HELD_OUT.search(file.name.lower())]
        return files
    for name in ("train", "data"):
        if (path / name).is_dir():
            return data_files(path / name)
    splits = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
    if splits:
        raise ValueError(f"{path} holds no data file; name one of its folders {', '.join(splits)}.")
    raise ValueError(f"{path} holds no data file; accepted are {ACCEPTED}.")


def _read(path: str | Path, files: list[Path]) -> Iterator[Record]:
    empty = True
    for file in files:
        for record in READERS[extension(file)](file):
            empty = False
            yield record
    if empty:
        raise _no_records(path)


def _no_records(path: str | Path) -> ValueError:
    return ValueError(f"{path} holds no records; give a file that is not empty.")


def extension(path: Path) -> str:
    """One of `EXTENSIONS`, without .gz, or nothing where the extension is unknown."""
    name = path.name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    zippable = inner in (".jsonl", ".json", ".txt") or not name.endswith(".gz")
    return inner if inner in EXTENSIONS and zippable else ""


def _is_data(path: Path) -> bool:
    hidden = path.name.startswith((".", "_"))
    # `datasets` leaves the results of `map` beside a cached data set.
    cache = path.name.startswith(("cache-", "tmp"))
    return bool(extension(path)) and path.name not in METADATA and not hidden and not cache


@contextmanager
def _opened(path: Path) -> Iterator[BufferedIOBase]:
    """The bytes of a file, unzipped; damage that shows while reading becomes a `ValueError`."""
    zipped = path.name.lower().endswith(".gz")
    try:
        with gzip.GzipFile(path) if zipped else path.open("rb") as handle:
            yield handle
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a damaged gzip file ({error}); fetch it again.") from error


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text; save the file as UTF-8.") from error


def _record(value: object, where: str) -> Record:
    if not isinstance(value, dict):
        kind = "list" if isinstance(value, list) else "single value"
        raise ValueError(f"{where} is a {kind}, not an object with fields; write {{...}} there.")
    return where, value


def _read_json_lines(path: Path) -> Iterator[Record]:
    with _opened(path) as handle:
        yield from json_records(handle, path)


def json_records(lines: Iterable[bytes], path: Path, first: int = 1) -> Iterator[Record]:
    """The records of JSON lines of a file, of which the first to come has the number `first`."""
    for number, raw in enumerate(lines, first):
        where = f"{path} line {number}"
        line = _decoded(raw, where)
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where} is not valid JSON ({error.msg} at column {error.colno}); correct or "
                "remove that line."
            ) from error
        except (ValueError, RecursionError) as error:  # a number too long, too many brackets
            raise ValueError(f"{where} cannot be read as JSON ({error}); correct it.") from error
        yield _record(value, where)


def _read_json(path: Path) -> Iterator[Record]:
    with _opened(path) as handle:
        if not re.match(rb"(\xef\xbb\xbf)?\s*\[", handle.read(1024)):
            yield from _read_json_lines(path)
            return
        handle.seek(0)
        text = _decoded(handle.read(), str(path))
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} line {error.lineno} is not valid JSON ({error.msg} at column {error.colno}); "
            "correct it."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); correct it.") from error
    for number, value in enumerate(values, 1):
        yield _record(value, f"{path} item {number}")


def _read_text(path: Path) -> Iterator[Record]:
    with _opened(path) as handle:
        yield from text_records(handle, path)


def text_records(lines: Iterable[bytes], path: Path, first: int = 1) -> Iterator[Record]:
    """Blocks of a text's lines, of which the first to come has the number `first`."""
    block: list[str] = []
    size, start = 0, first
    for number, raw in enumerate(lines, first):
        line = _decoded(raw, f"{path} line {number}").replace("\r\n", "\n")
        between_paragraphs = size >= TEXT_BLOCK and not line.strip()
        if between_paragraphs or size + len(line) > 2 * TEXT_BLOCK:
            yield from _text_records("".join(block), f"{path} line {start}")
            block, size = [], 0
        if block or line.strip():
            start = start if block else number
            block.append(line)
            size += len(line)
    yield from _text_records("".join(block), f"{path} line {start}")


def _text_records(text: str, where: str) -> Iterator[Record]:
    """One record, or several where a single line is longer than any block may be."""
    for start in range(0, len(text), 2 * TEXT_BLOCK):
        piece = text[start : start + 2 * TEXT_BLOCK].strip("\n")
        if piece.strip():
            yield where, {"text": piece}


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield table
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, "Parquet", error) from error


def _read_parquet(path: Path) -> Iterator[Record]:
    return read_row_groups(path, 0, len(row_group_sizes(path)))


def row_group_sizes(path: Path) -> list[int]:
    """Bytes of every row group of a Parquet file, before compression."""
    with _parquet(path) as table:
        footer = table.metadata
        return [footer.row_group(i).total_byte_size for i in range(footer.num_row_groups)]


def read_row_groups(path: Path, start: int, stop: int) -> Iterator[Record]:
    """The records of row groups `start` to `stop` - 1 of a Parquet file."""
    with _parquet(path) as table:
        row = sum(table.metadata.row_group(i).num_rows for i in range(start))
        for batch in table.iter_batches(ROWS_AT_A_TIME, row_groups=list(range(start, stop))):
            for record in batch.to_pylist():
                row += 1
                yield f"{path} row {row}", record


def _arrow_batches(path: Path) -> Iterator[Any]:
    """Batches of rows. `datasets` writes Arrow's stream format; its file format is read as well."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                table = pyarrow.ipc.open_file(source)
                yield from (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, "Arrow", error) from error


def _read_arrow(path: Path) -> Iterator[Record]:
    row = 0
    for batch in _arrow_batches(path):
        for start in range(0, batch.num_rows, ROWS_AT_A_TIME):
            for record in batch.slice(start, ROWS_AT_A_TIME).to_pylist():
                row += 1
                yield f"{path} row {row}", record


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    reason = str(error).split("\n")[0].rstrip(".")
    return ValueError(f"{path} cannot be read as {kind} ({reason}); fetch or write it again.")


READERS = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".txt": _read_text,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
