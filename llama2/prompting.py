"""How the model in a folder is asked: tokenizer, chat format, context, and where it stops."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2 import checkpoint
from llama2.chat import Message, check_text, encode_prompt
from llama2.config import ModelConfig
from llama2.tokenizer import Tokenizer, check_vocabulary, load_tokenizer


class TooLong(ValueError):
    """A prompt leaves no room for an answer in the model's context."""


@dataclass(frozen=True)
class Prompting:
    """What a caller needs to know of a model besides its weights."""

    tokenizer: Tokenizer
    vocab_size: int
    context: int
    """Most tokens of prompt and answer together."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer: the tokenizer's, those of `config.json`, and those of
    `generation_config.json`, which is where Llama 3's chat models name theirs."""
    has_chat_template: bool
    """Whether the folder says how dialogues are written; else Llama 2's format is taken."""

    @classmethod
    def read(cls, folder: Path) -> "Prompting":
        """What a model folder says. Raises `FileNotFoundError` or `ValueError` where it holds no
        causal language model, no tokenizer, or one that does not fit the model."""
        config = checkpoint.check_folder(folder, scalar=False)
        tokenizer = load_tokenizer(folder)
        check_vocabulary(tokenizer, config.vocab_size)
        return cls(
            tokenizer,
            config.vocab_size,
            config.max_position_embeddings,
            _stop_ids(folder, config, tokenizer),
            _has_chat_template(folder),
        )

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text to be continued. Raises `ValueError` where it is empty, too long, or
        no text."""
        if not text:
            raise ValueError("The prompt is empty; give some text to continue.")
        check_text(text, "The prompt")
        return self._checked([self.tokenizer.bos_id, *self.tokenizer.encode(text)])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a dialogue to be answered. Raises `ValueError` where it is none, does not
        end with the user, is too long, or holds what is no text."""
        for message in messages:
            check_text(message.content, "The prompt")
        return self._checked(encode_prompt(self.tokenizer, messages))

    def check_ids(self, tokens: Sequence[int]) -> list[int]:
        """Token ids that a caller made. Raises `ValueError` for none, unknown ones, or too many."""
        if not tokens:
            raise ValueError("The prompt is empty; give at least one token.")
        if min(tokens) < 0 or max(tokens) >= self.vocab_size:
            raise ValueError(
                f"The prompt holds a token id outside the vocabulary of {self.vocab_size}; use the "
                "model's own tokenizer."
            )
        return self._checked(list(tokens))

    def _checked(self, tokens: list[int]) -> list[int]:
        if len(tokens) >= self.context:
            raise TooLong(
                f"The prompt has {len(tokens)} tokens, which leaves no room for an answer in the "
                f"model's context of {self.context}; shorten it."
            )
        return tokens


def sample_seed(seed: int, *place: str | int) -> int:
    """A seed of 63 bits for the sample at this place, so that no two samples share their draws.

    Counting up would give sample 1 of seed 0 the draws of sample 0 of seed 1.
    """
    digest = hashlib.blake2b(json.dumps([seed, *place]).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _stop_ids(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    found = {tokenizer.eos_id, *_ids(config.eos_token_id)}
    path = folder / "generation_config.json"
    if path.is_file():
        try:
            found.update(_ids(json.loads(path.read_bytes()).get("eos_token_id")))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); correct it, or remove it to stop where the "
                "tokenizer says."
            ) from error
    return tuple(sorted(i for i in found if 0 <= i < config.vocab_size))


def _ids(value: Any) -> list[int]:
    """One id, several, or none, as the files state them."""
    found = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
    if not all(type(i) is int for i in found):
        raise TypeError(f"eos_token_id must be one or several token ids, not {value!r}")
    return found


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_bytes()).get("chat_template"))
