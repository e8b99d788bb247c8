"""A model as lm-evaluation-harness sees it: text in, likelihoods or text out.

Pairs of context and continuation are split into tokens by the harness's own rules, so that its
published results can be compared with ours.
"""

import re
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from actors.measured_model import MeasuredModel, Question
from llama2.generation import Sampling
from llama2.prompting import Prompting, sample_seed
from llama2.tokenizer import HuggingFaceTokenizer

DEFAULT_ANSWER_TOKENS = 256
"""Of tasks that name no limit; the harness's own default."""
# How a chat reads as one text, which the harness wants to have: control tokens stand as these.
OPENED, CLOSED = "\x02", "\x03"


class HarnessModel(TemplateLM):
    """Answers the harness's three kinds of requests."""

    def __init__(self, model: MeasuredModel, prompting: Prompting, seed: int = 0) -> None:
        super().__init__()
        self._model, self._prompting, self._seed = model, prompting, seed
        self._tokenizer = prompting.tokenizer
        self.shortened = 0
        """Contexts so far that lost their beginning, as they did not fit."""

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens of the context."""
        return self._prompting.context

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer from others."""
        return self._tokenizer.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text or of a chat's text; a text begins with bos unless told otherwise."""
        if string.startswith(OPENED):
            return self._encode_chat(string)
        tokens = self._tokenizer.encode(string)
        return tokens if add_special_tokens is False else [self._tokenizer.bos_id, *tokens]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as one text that `tok_encode` turns into the tokens that the model was trained on.

        Without `add_generation_prompt` the last message is the beginning of the answer.
        """
        begun = "" if add_generation_prompt else chat_history[-1]["content"]
        turns = chat_history if add_generation_prompt else chat_history[:-1]
        tokenizer = self._tokenizer
        if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.has_chat_template:
            # All of it is marked as rendered text, in which control tokens are spelled out.
            return f"{OPENED}{tokenizer.render(turns, add_generation_prompt=True)}{begun}"
        return f"{_llama_chat(turns)} {begun}"

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what the model would say."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        for (_, text), _, tokens in requests:
            if not tokens:
                raise ValueError(
                    f"A task asks for the likelihood of {text!r}, which is no token of its own; "
                    "this tokenizer cannot take that task."
                )
        self.shortened += sum(len(c) + len(n) > self.max_length + 1 for c, n in pairs)
        return [(found.logprob, found.greedy) for found in self._model.continuations(pairs)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of whole texts; a long one is read in windows as wide as the context."""
        pairs: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self._tokenizer.encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, found in zip(owners, self._model.continuations(pairs), strict=True):
            sums[number] += found.logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """What the model writes behind each context, up to a string that ends it."""
        asked = [self._question(number, *r.args) for number, r in enumerate(requests)]
        return [answer.text for answer in self._model.answer(asked)]

    def _question(self, number: int, context: str, settings: dict[str, Any]) -> Question:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(settings, DEFAULT_ANSWER_TOKENS))
        tokens = self.tok_encode(context.rstrip(" ") if context.startswith(OPENED) else context)
        limit = min(int(wanted["max_gen_toks"]), self.max_length - 1)
        room = self.max_length - limit
        self.shortened += len(tokens) > room
        sampling = Sampling(
            temperature=float(wanted.get("temperature", 1.0)) if wanted["do_sample"] else 0.0,
            top_p=float(wanted.get("top_p", 1.0)),
            top_k=int(wanted.get("top_k", 0)),
            max_new_tokens=limit,
            stop_ids=self._prompting.stop_ids,
        )
        stop = tuple(text for text in wanted["until"] if text)
        return Question(tokens[-room:], sampling, sample_seed(self._seed, number), stop)

    def _encode_chat(self, text: str) -> list[int]:
        tokenizer = self._tokenizer
        if isinstance(tokenizer, HuggingFaceTokenizer) and tokenizer.has_chat_template:
            return tokenizer.encode_rendered(text.removeprefix(OPENED))[0]
        controls = {OPENED: [tokenizer.bos_id], CLOSED: [tokenizer.eos_id]}
        parts = [part for part in re.split(f"([{OPENED}{CLOSED}])", text) if part]
        return [token for part in parts for token in controls.get(part) or tokenizer.encode(part)]


def _llama_chat(turns: Sequence[dict[str, str]]) -> str:
    """Llama 2's chat format (`llama2/chat.py`) up to where the next answer begins, with marks for
    bos and eos."""
    contents = [turn["content"].strip() for turn in turns]
    if turns[0]["role"] == "system":
        contents = [f"<<SYS>>\n{contents[0]}\n<</SYS>>\n\n{contents[1]}", *contents[2:]]
    text = ""
    for question, answer in zip(contents[::2], [*contents[1::2], None], strict=True):
        text += f"{OPENED}[INST] {question.strip()} [/INST]"
        text += "" if answer is None else f" {answer} {CLOSED}"
    return text
