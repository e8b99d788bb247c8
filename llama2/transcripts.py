"""Samples as dialogues again, for what judges text and does not know the policy's tokens: a reward
model with a tokenizer of its own, or a user's reward function."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from llama2.batches import TokenArray
from llama2.chat import Message, Unlearnable, dialogue_fault, encode_dialogue, encode_prompt
from llama2.records import Prompt
from llama2.tokenizer import Tokenizer

Messages = tuple[Message, ...]


class Transcripts:
    """Finds the messages that a policy's prompt tokens were made of, and reads its answers.

    Prompts are looked up, not decoded: of a chat template's text alone it could not be told what is
    markup and what was said.
    """

    def __init__(self, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> None:
        self._tokenizer = tokenizer
        self._messages = {
            _key(encode_prompt(tokenizer, prompt.messages)): prompt.messages for prompt in prompts
        }

    def prompt(self, tokens: TokenArray) -> Messages:
        """The messages of a prompt, by its tokens [T] as `encode_prompt` gives them. They must be
        of one of the prompts that this was made with."""
        found = self._messages.get(_key(tokens))
        assert found is not None, "the prompt is none of those that the policy is asked"
        return found

    def answer(self, tokens: TokenArray) -> str:
        """The text of an answer's tokens [T], without white space around it."""
        return self._tokenizer.decode(tokens.tolist()).strip()


def encode_answered(
    tokenizer: Tokenizer, prompt: Messages, answer: str, finished: bool, context: int
) -> list[int]:
    """Token ids of a dialogue as a reward model was trained on them, its last `context` ones.

    An answer that was cut off (not `finished`) has no end token. One that no dialogue may hold, as
    a policy may write it (empty, with the format's tags, or control tokens that a template hides),
    stands behind its prompt as it is.
    """
    dialogue = (*prompt, Message("assistant", answer))
    tokens: list[int] = []
    if dialogue_fault(dialogue) is None:
        with suppress(Unlearnable):
            tokens = encode_dialogue(tokenizer, dialogue, "last").scored().tokens
    if not tokens:
        asked = encode_prompt(tokenizer, prompt)
        tokens = [*asked, *tokenizer.encode(answer.strip()), tokenizer.eos_id]
    if not finished and tokenizer.eos_id in tokens:
        tokens = tokens[: len(tokens) - 1 - tokens[::-1].index(tokenizer.eos_id)]
    return tokens[-context:]


def _key(tokens: Sequence[int] | TokenArray) -> bytes:
    return np.asarray(tokens, dtype="<i8").tobytes()
