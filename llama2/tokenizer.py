"""Tokenizers: text to token ids and back (Llama 2 paper, section 2.2).

Two sources, one interface. A SentencePiece `tokenizer.model` is read by sentencepiece, as Meta's
reference code does. A Hugging Face folder is read by transformers, imported only then since the
import alone takes seconds.
"""

import hashlib
import io
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import sentencepiece

FILE_NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# SentencePiece drops sentences of more than 4,192 bytes without a word; a character has at most
# four bytes.
LONGEST_LINE = 1000
RESERVED_IDS = 259  # 256 bytes and unk, bos, eos
SMALLEST_VOCABULARY = 300

LEAD = "\ue000"
"""A character of private use, which no tokenizer joins with what follows."""


class Tokenizer(ABC):
    """What every stage needs of a tokenizer. Instances pickle, so that they can be sent to workers.

    `vocab_size` is one more than the largest id. `pad_id` only fills a batch: Llama has no padding
    token, and `eos_id` stands in for it. Where a tokenizer has no beginning-of-sequence token,
    `bos_id` is `eos_id`, which then parts one document from the next.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    _files: dict[str, bytes]

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos and eos. Text that spells a control token stays text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without control tokens (bos, eos) and ids that have no piece."""

    def files(self) -> dict[str, bytes]:
        """The contents, by file name, of the Hugging Face folder that loads as this tokenizer."""
        return dict(self._files)

    @property
    def fingerprint(self) -> str:
        """A hash of `files()`: token ids written with one tokenizer mean nothing to another."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files().items()):
            digest.update(name.encode() + b"\0" + content)
        return digest.hexdigest()[:16]

    def save(self, folder: str | Path) -> None:
        """Write `files()` into `folder`, which `load_tokenizer` and transformers then read."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            (Path(folder) / name).write_bytes(content)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model: Llama 1 and 2, Code Llama, and what `train_tokenizer` makes."""

    def __init__(self, files: dict[str, bytes]) -> None:
        """Raises `RuntimeError` where `tokenizer.model` among `files` is no SentencePiece model."""
        if not files["tokenizer.model"]:
            raise RuntimeError("The file is empty.")
        self._files = files
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=files["tokenizer.model"])
        self.vocab_size = self.processor.vocab_size()
        self.eos_id = self.processor.eos_id()
        self.bos_id = self.processor.bos_id() if self.processor.bos_id() >= 0 else self.eos_id
        self.pad_id = self.processor.pad_id() if self.processor.pad_id() >= 0 else self.eos_id

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.processor.decode([int(i) for i in ids if i < self.vocab_size])

    def files(self) -> dict[str, bytes]:
        if "tokenizer.json" in self._files:
            return dict(self._files)
        from llama2.tokenizer_files import hugging_face_files

        return hugging_face_files(self.processor) | self._files


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer that transformers reads: Llama 3, SmolLM, TinyLlama's chat models and the like.

    `has_chat_template` says whether the folder brings a chat format of its own, not Llama 2's;
    `control` matches what spells a control token.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises `ValueError` where transformers cannot read `folder` or it has no end token."""
        from transformers import AutoTokenizer

        self._files = _read_files(Path(folder))
        try:
            self.hugging_face: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"transformers cannot read the tokenizer in {folder} ({reason}); check its "
                "tokenizer.json."
            ) from error
        if self.hugging_face.eos_token_id is None:
            raise ValueError(
                f"The tokenizer in {folder} names no eos_token; add one to its "
                "tokenizer_config.json."
            )
        self.vocab_size = max(self.hugging_face.get_vocab().values()) + 1
        self.eos_id = self.hugging_face.eos_token_id
        bos, pad = self.hugging_face.bos_token_id, self.hugging_face.pad_token_id
        self.bos_id = self.eos_id if bos is None else bos
        self.pad_id = self.eos_id if pad is None else pad
        self.has_chat_template = _has_own_template(self._files)
        added = self.hugging_face.added_tokens_decoder.values()
        spelled = [re.escape(token.content) for token in added if token.special]
        # The longest first, as one may begin like another.
        self.control = re.compile("|".join(sorted(spelled, key=len, reverse=True)) or "(?!)")

    def encode(self, text: str) -> list[int]:
        return self.hugging_face.encode(text, add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        known = [int(i) for i in ids if i < self.vocab_size]
        return self.hugging_face.decode(
            known, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        """The dialogue as the folder's own chat template writes it.

        The date that Llama 3's template mentions is held fixed, so that a replay sees the same
        tokens. Raises `ValueError` where the template refuses the dialogue (some know no system
        message).
        """
        from jinja2 import TemplateError

        try:
            return self.hugging_face.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                date_string="26 Jul 2024",
            )
        except TemplateError as error:
            raise ValueError(
                f"The tokenizer's chat template refuses this dialogue: {error}."
            ) from error

    def encode_rendered(
        self, text: str, spelled: Sequence[tuple[int, int]] = ()
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a rendered dialogue, control tokens read as such, and characters [start, end).

        spelled: characters of control tokens that are text.
        """
        edges = [0, *(place for span in spelled for place in span), len(text)]
        tokens: list[int] = []
        spans: list[tuple[int, int]] = []
        for number, (start, end) in enumerate(pairwise(edges)):
            # Behind something that is dropped again, or a space would be put before each part.
            lead = LEAD if number else ""
            encoded = self.hugging_face(
                lead + text[start:end], add_special_tokens=False, return_offsets_mapping=True,
                split_special_tokens=bool(number % 2),
            )  # fmt: skip
            before = start - len(lead)
            for token, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
                if b > len(lead):
                    tokens.append(token)
                    spans.append((before + a, before + b))
        return tokens, spans


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer from a `tokenizer.model`, a `tokenizer.json`, or a folder with either.

    Of a folder with both (Llama 2's), SentencePiece is taken, for it is what Meta's code runs;
    unless the folder adds tokens beyond the SentencePiece vocabulary or brings a chat template that
    is not Llama 2's: those only transformers honours. Raises `FileNotFoundError` where there is no
    tokenizer and `ValueError` where it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no tokenizer at {path}; give a folder or a tokenizer.model."
        )
    if path.is_file() and path.suffix == ".model":
        return _sentencepiece({"tokenizer.model": path.read_bytes()}, path)
    folder = path.parent if path.is_file() else path
    files = _read_files(folder)
    if "tokenizer.model" not in files and "tokenizer.json" not in files:
        raise FileNotFoundError(
            f"{folder} holds neither a tokenizer.model nor a tokenizer.json; give a folder "
            "with one of them."
        )
    if "tokenizer.model" in files and not _has_own_template(files):
        try:
            plain = SentencePieceTokenizer(files)
        except RuntimeError:
            if "tokenizer.json" not in files:
                return _sentencepiece(files, folder / "tokenizer.model")
        else:
            if _largest_added_id(files) < plain.vocab_size:
                return plain
    return HuggingFaceTokenizer(folder)


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: str | Path) -> Tokenizer:
    """Train a tokenizer of exactly `vocab_size` ids on `texts` and save it in `folder`.

    SentencePiece with the paper's settings (section 2.2): byte-pair encoding, numbers split into
    digits, bytes for unknown characters, text untouched by normalisation, unk/bos/eos = 0/1/2, no
    padding token. All of `texts` is held in memory, so give a sample of a large corpus. The same
    texts give the same tokenizer. Characters take at most half of the ids that are not reserved;
    rarer ones are written as bytes.

    Raises `ValueError` where `texts` are too few for `vocab_size`, or `vocab_size` leaves no room
    for characters.
    """
    lines = [line for text in texts for line in _lines(text)]
    if not lines:
        raise ValueError(
            "There is no text to train the tokenizer on; give at least a few thousand words."
        )
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"A vocabulary of {vocab_size} is too small, since bytes and control tokens take "
            f"{RESERVED_IDS}; set vocab_size to {SMALLEST_VOCABULARY} or more."
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_frequent_characters_only(lines, (vocab_size - RESERVED_IDS) // 2),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            split_digits=True,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=True,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if limit is None:
            raise
        raise ValueError(
            f"The texts yield at most {limit[1]} tokens, fewer than the vocabulary of "
            f"{vocab_size}; give more text or a smaller vocabulary."
        ) from error
    SentencePieceTokenizer({"tokenizer.model": model.getvalue()}).save(folder)
    return load_tokenizer(folder)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise `ValueError` where `tokenizer` has ids that a model of `vocab_size` embeddings lacks.

    A model with more embeddings than ids is in order: many are padded to a round number.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} ids, but the model's vocabulary has only "
            f"{vocab_size}; use the tokenizer that the model was trained with."
        )


def _sentencepiece(files: dict[str, bytes], path: Path) -> SentencePieceTokenizer:
    try:
        return SentencePieceTokenizer(files)
    except RuntimeError as error:
        raise ValueError(
            f"{path} is not a SentencePiece model; for Llama 3 give the Hugging Face folder with "
            "its tokenizer.json."
        ) from error


def _read_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILE_NAMES if (folder / name).is_file()}


def _json(files: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(
            f"The tokenizer's {name} is not valid JSON ({error}); fetch it again."
        ) from error
    return content


def _has_own_template(files: dict[str, bytes]) -> bool:
    """Whether the folder has a chat template without the tags that mark Llama 2's."""
    template = _json(files, "tokenizer_config.json").get("chat_template")
    template = template or _json(files, "chat_template.json").get("chat_template")
    text = files.get("chat_template.jinja", b"").decode() or json.dumps(template or "")
    return text != '""' and not ("[INST]" in text and "<<SYS>>" in text)


def _largest_added_id(files: dict[str, bytes]) -> int:
    ids = [int(i) for i in _json(files, "tokenizer_config.json").get("added_tokens_decoder", {})]
    ids += [token["id"] for token in _json(files, "tokenizer.json").get("added_tokens", [])]
    ids += _json(files, "added_tokens.json").values()
    return max(ids, default=-1)


def _lines(text: str) -> Iterator[str]:
    """Lines no longer than `LONGEST_LINE`. A newline is a byte token, so no piece spans it."""
    for line in text.split("\n"):
        rest = line
        while len(rest) > LONGEST_LINE:
            space = rest.rfind(" ", 1, LONGEST_LINE)
            cut = LONGEST_LINE if space < 0 else space
            yield rest[:cut]
            # The space at the cut comes back as the prefix space of the next line.
            rest = rest[cut:].removeprefix(" ")
        if rest.strip():
            yield rest


def _frequent_characters_only(lines: list[str], most: int) -> Iterator[str]:
    """Lines cut at rare characters: beyond the `most` frequent, or Llama's 99.995% of all text.

    SentencePiece's own setting refuses to leave out more than 2%, which Chinese needs in a small
    vocabulary.
    """
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    covered, frequent = 0, set()
    for character, count in counts.most_common(most):
        if covered >= 0.99995 * counts.total():
            break
        frequent.add(character)
        covered += count
    cut = {ord(character): "\n" for character in counts.keys() - frequent}
    for line in lines:
        yield from (part for part in line.translate(cut).split("\n") if part.strip())
