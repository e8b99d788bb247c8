"""Answers of OpenAI's API: from pieces of tokens to text, and from text to its JSON objects."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.openai_requests import Asked
from actors.records import Piece
from llama2.prompting import Prompting
from llama2.text_stream import BROKEN, TextStream

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Alternative:
    """A token that may stand at some place: how it reads there, and its log-probability."""

    text: str
    logprob: float

    @property
    def json(self) -> dict[str, Any]:
        """As a chat tells it; the UTF-8 bytes are unknown where it is a part of a character."""
        data = None if BROKEN in self.text else list(self.text.encode())
        return {"token": self.text, "logprob": self.logprob, "bytes": data}


@dataclass(frozen=True)
class TokenText(Alternative):
    """The token that was drawn, where in the answer it stands, and the likeliest at that place."""

    offset: int
    likeliest: tuple[Alternative, ...]


@dataclass(frozen=True)
class Part:
    """What has become certain of one answer; the last part says how it ended."""

    choice: int
    text: str
    tokens: tuple[TokenText, ...]
    finish_reason: FinishReason | None


class Answer:
    """One answer while it is written. Parts put together are the answer, however it is cut."""

    def __init__(self, choice: int, asked: Asked, prompting: Prompting) -> None:
        self._choice, self._ends = choice, prompting.stop_ids
        self._stream = TextStream(prompting.tokenizer, asked.stop, trim=asked.chat)
        self._offset = 0

    def add(self, piece: Piece) -> Part:
        """What is known with this piece more. A stop string ends the answer before its model
        does."""
        text, tokens = "", []
        told = piece.alternatives or [()] * len(piece.tokens)
        for token, logprob, found in zip(piece.tokens, piece.logprobs, told, strict=True):
            shown = self._text(token)
            likeliest = tuple(Alternative(self._text(other), value) for other, value in found)
            tokens.append(TokenText(shown, logprob, self._offset, likeliest))
            self._offset += len(shown)
            text += self._stream.add(token) if token not in self._ends else ""
            if self._stream.stopped:
                return Part(self._choice, text, tuple(tokens), "stop")
        if piece.finish_reason is not None:
            text += self._stream.close()
        return Part(self._choice, text, tuple(tokens), piece.finish_reason)

    def _text(self, token: int) -> str:
        """How a token reads here; one that ends answers reads as nothing."""
        return "" if token in self._ends else self._stream.text([token])


@dataclass
class Written:
    """An answer as it stands, of the parts so far."""

    text: str = ""
    tokens: list[TokenText] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, part: Part) -> None:
        """Take another part."""
        self.text += part.text
        self.tokens += part.tokens
        self.finish_reason = part.finish_reason


class Format:
    """The JSON objects of one response, of either endpoint."""

    def __init__(self, asked: Asked, model: str) -> None:
        self._asked, self._model = asked, model
        self._id = f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    def whole(self, answers: Sequence[Written]) -> dict[str, Any]:
        """All answers at once."""
        name = "message" if self._asked.chat else "text"
        choices = []
        for i, answer in enumerate(answers):
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            choices.append(
                {
                    "index": i,
                    name: message if self._asked.chat else answer.text,
                    "logprobs": self._logprobs(answer.tokens),
                    "finish_reason": answer.finish_reason,
                }
            )
        drawn = sum(len(answer.tokens) for answer in answers)
        kind = "chat.completion" if self._asked.chat else "text_completion"
        return self._object(kind, choices) | {"usage": self._usage(drawn)}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first part: who speaks, in a chat."""
        if not self._asked.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(i, delta, [], None) for i in range(self._asked.n)]

    def parts(self, part: Part) -> list[dict[str, Any]]:
        """Chunks of a part; none where it says nothing that was asked for."""
        if not self._asked.chat:
            silent = not part.text and part.finish_reason is None
            if silent and not (self._asked.logprobs and part.tokens):
                return []
            return [self._chunk(part.choice, part.text, part.tokens, part.finish_reason)]
        chunks = []
        if part.text or (self._asked.logprobs and part.tokens):
            chunks.append(self._chunk(part.choice, {"content": part.text}, part.tokens, None))
        if part.finish_reason is not None:
            chunks.append(self._chunk(part.choice, {}, [], part.finish_reason))
        return chunks

    def closing(self, drawn: int) -> list[dict[str, Any]]:
        """Chunks behind the last part: the usage, where it was asked for."""
        if not self._asked.include_usage:
            return []
        return [self._object(self._chunk_kind, []) | {"usage": self._usage(drawn)}]

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._asked.chat else "text_completion"

    def _chunk(
        self,
        choice: int,
        content: str | dict[str, str],
        tokens: Sequence[TokenText],
        finish_reason: FinishReason | None,
    ) -> dict[str, Any]:
        found = {
            "index": choice,
            "delta" if self._asked.chat else "text": content,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": finish_reason,
        }
        usage = {"usage": None} if self._asked.include_usage else {}
        return self._object(self._chunk_kind, [found]) | usage

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _usage(self, drawn: int) -> dict[str, int]:
        given = sum(map(len, self._asked.prompts))
        return {
            "prompt_tokens": given,
            "completion_tokens": drawn,
            "total_tokens": given + drawn,
        }

    def _logprobs(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        if not self._asked.logprobs:
            return None
        if self._asked.chat:
            content = [t.json | {"top_logprobs": [x.json for x in t.likeliest]} for t in tokens]
            return {"content": content, "refusal": None}
        asked = self._asked.sampling.alternatives > 0
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "text_offset": [t.offset for t in tokens],
            "top_logprobs": [_by_text(t) for t in tokens] if asked else None,
        }


def _by_text(token: TokenText) -> dict[str, float]:
    """The likeliest tokens and the drawn one; of those that read alike the likeliest."""
    found: dict[str, float] = {}
    for one in (*token.likeliest, token):
        found.setdefault(one.text, one.logprob)
    return found
