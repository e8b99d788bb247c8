"""Token ids as text while they come: whole characters only, up to a stop string."""

import re
from collections.abc import Sequence

from llama2.tokenizer import Tokenizer

# A character is spread over at most four tokens; more that still end in none are garbage.
LONGEST_WAIT = 8
BROKEN = "\ufffd"


class TextStream:
    """The text of one answer, token by token.

    What `add` and `close` return, put together, depends on the tokens alone, so an answer that is
    streamed and one that comes whole are the same. Text is held back while it may still turn out
    to be half of a character or the beginning of a stop string.

    Text continues other text: a word keeps the space before it, which SentencePiece drops from the
    first word that it decodes. stop: the answer ends before the first of these strings, and
    `stopped` says so. trim: leave white space at both ends out, as the chat format does.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), trim: bool = False) -> None:
        assert all(stop)
        self.stopped = False
        self._tokenizer = tokenizer
        self._before = tokenizer.encode("x")
        self._behind = len(tokenizer.decode(self._before))
        self._stop, self._trim = tuple(stop), trim
        self._found = re.compile("|".join(map(re.escape, stop))) if stop else None
        self._pending: list[int] = []
        self._held = ""
        self._begun = False

    def add(self, token: int) -> str:
        """The text that has become certain with this token; nothing after a stop string."""
        if self.stopped:
            return ""
        self._pending.append(token)
        text = self.text(self._pending)
        if text.endswith(BROKEN) and len(self._pending) < LONGEST_WAIT:
            return ""
        self._pending.clear()
        self._held += text
        match = self._found.search(self._held) if self._found else None
        if match:
            self.stopped = True
            self._held = self._held[: match.start()]
            return self._release(len(self._held))
        return self._release(len(self._held) - self._maybe_stop())

    def close(self) -> str:
        """The rest, once no token comes any more."""
        if not self.stopped:
            self._held += self.text(self._pending)
            self._pending.clear()
        return self._release(len(self._held))

    def text(self, tokens: Sequence[int]) -> str:
        """These tokens as they read behind other text."""
        return self._tokenizer.decode([*self._before, *tokens])[self._behind :]

    def _maybe_stop(self) -> int:
        """Characters at the end that a stop string may begin with."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, min(len(stop), len(self._held) + 1))
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )

    def _release(self, length: int) -> str:
        given = self._held[:length]
        if self._trim:
            given = given.rstrip()
        self._held = self._held[len(given) :]
        if self._trim and not self._begun:
            given = given.lstrip()
        self._begun = self._begun or bool(given)
        return given
