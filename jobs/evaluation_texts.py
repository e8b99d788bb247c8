"""Perplexity of held-out texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.measured_model import MeasuredModel
from cluster.files import data_files, read_records
from cluster.lineage import stamp
from jobs.evaluate_config import EvaluateConfig
from llama2.batches import TokenSequence
from llama2.encoding import encode
from llama2.evaluation import Measure, ratio_of
from llama2.prompting import Prompting
from llama2.records import Dialogue, Document, parse_dialogues, parse_documents
from llama2.shards import Shards, read_manifest

Texts = list["Document | Dialogue"]
DEFAULT_PARTS = ("pretrain", "sft")


@dataclass(frozen=True)
class TextSet:
    """Texts of one kind: records that each model's tokenizer encodes, or rows prepared with the
    tokenizer of that fingerprint."""

    name: str
    path: Path
    stamp: str
    """Changes when the files do."""
    records: tuple["Document | Dialogue", ...] = ()
    tokenizer: str = ""


@dataclass(frozen=True)
class Encoded:
    """A text as a model reads it, in pieces that fit its context."""

    pieces: tuple[TokenSequence, ...]
    bytes: int
    """Of the text, where all of it is predicted; else 0."""


def find_texts(config: EvaluateConfig) -> list[TextSet]:
    """What perplexity is measured on. Raises `ValueError` where a file holds nothing of use."""
    if not config.most_texts:
        return []
    if config.texts:
        return [_text_set(path, path.absolute().name, config.most_texts) for path in config.texts]
    given = config.prompts[:1] if config.prompts and config.prompts[0].is_dir() else ()
    data = given[0] if given else config.runs / f"{config.preset}-data"
    folders = {part: data / part / "heldout" for part in DEFAULT_PARTS}
    return [
        _text_set(folder, part, config.most_texts)
        for part, folder in folders.items()
        if (folder / "manifest.json").is_file()
    ]


def encoded(texts: TextSet, prompting: Prompting, most: int) -> list[Encoded] | None:
    """The texts as a model reads them; None for rows that were prepared with another tokenizer.

    Raises `ValueError` where not one text can be used.
    """
    found: list[Encoded] = []
    if texts.tokenizer:
        if texts.tokenizer != prompting.tokenizer.fingerprint:
            return None
        shards = Shards(texts.path)
        for row in range(len(shards)):
            pieces = [_cut(piece, prompting.context) for piece in shards.row(row)]
            found += [Encoded((piece,), 0) for piece in pieces if piece.is_target.any()]
            if len(found) >= most:
                break
        return found[:most]
    for record in texts.records:
        rows = list(encode(record, prompting.tokenizer, prompting.context))
        pieces = [piece for row in rows for piece in row.sequences]
        size = len(record.text.encode()) if isinstance(record, Document) else 0
        if pieces:
            found.append(Encoded(tuple(pieces), size))
    if not found:
        raise ValueError(
            f"No text of {texts.path} fits the model's context of {prompting.context} tokens."
        )
    return found


def perplexity(model: MeasuredModel, texts: Sequence[Encoded]) -> dict[str, Measure]:
    """Perplexity per token, and bits per byte where the texts are raw, which models with different
    tokenizers can be compared by. Intervals are over texts."""
    pieces = [piece for text in texts for piece in text.pieces]
    logprobs = iter(model.sequence_logprobs(pieces))
    nats = [-sum(next(logprobs) for _ in text.pieces) for text in texts]
    targets = [float(sum(piece.is_target[1:].sum() for piece in text.pieces)) for text in texts]
    loss = ratio_of(nats, targets)
    found = {
        "perplexity": Measure(
            math.exp(loss.value),
            None if loss.low is None else math.exp(loss.low),
            None if loss.high is None else math.exp(loss.high),
            loss.count,
        )
    }
    if all(text.bytes for text in texts):
        bits = [value / math.log(2) for value in nats]
        found["bits_per_byte"] = ratio_of(bits, [float(text.bytes) for text in texts])
    return found


def _text_set(path: Path, name: str, most: int) -> TextSet:
    if (path / "manifest.json").is_file():
        manifest = read_manifest(path)
        if manifest.kind == "preference":
            raise ValueError(f"{path} holds comparisons; name texts or dialogues with --texts.")
        return TextSet(name, path, stamp(path), tokenizer=manifest.tokenizer)
    data_files(path)
    records: Texts = []
    for where, record in read_records(path):
        if isinstance(record.get("text"), str):
            records += [d for d in parse_documents(record, where) if isinstance(d, Document)]
        else:
            records += [d for d in parse_dialogues(record, where) if isinstance(d, Dialogue)]
        if len(records) >= most:
            break
    if not records:
        raise ValueError(f"{path} holds no text that could be used; give another file.")
    return TextSet(name, path, stamp(path), tuple(records[:most]))


def _cut(sequence: TokenSequence, context: int) -> TokenSequence:
    return TokenSequence(sequence.tokens[: context + 1], sequence.is_target[: context + 1])
