"""Bodies of OpenAI's API: which of its parameters are taken, and what they ask of the model."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from actors.openai_errors import ApiError, from_validation
from llama2.chat import Message
from llama2.generation import Sampling
from llama2.generation.sampling import MOST_TOP_K
from llama2.prompting import Prompting, TooLong

# Parameters that are not implemented, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
# They label a request for its sender, and change no answer.
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "user")
MOST_ANSWERS = 128
MOST_STOPS = 16
MOST_ALTERNATIVES = 20
DEFAULT_COMPLETION = 16


@dataclass(frozen=True)
class Asked:
    """A checked request: prompts as token ids, each to be answered `n` times."""

    prompts: tuple[list[int], ...]
    n: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    chat: bool
    logprobs: bool
    stream: bool
    include_usage: bool


class StreamOptions(BaseModel):
    """What a stream holds besides the answer."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Body(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str
    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=MOST_TOP_K)] = 0
    """Not OpenAI's: draw from that many likeliest tokens; 0 keeps all."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        """Absent is what is null, labels, or asks for nothing."""
        if not isinstance(given, dict):
            raise ValueError("the body must be a JSON object")
        return {
            name: value
            for name, value in given.items()
            if value is not None
            and name not in LABELS
            and not any(value == neutral for neutral in NEUTRAL.get(name, ()))
        }

    @field_validator("stop", mode="plain")
    @classmethod
    def _stops(cls, given: Any) -> tuple[str, ...]:
        found = [given] if isinstance(given, str) else given
        if not isinstance(found, list) or not all(isinstance(s, str) and s for s in found):
            raise ValueError("must be a string or a list of strings, none of them empty")
        if len(found) > MOST_STOPS:
            raise ValueError(f"must hold at most {MOST_STOPS} strings, not {len(found)}")
        return tuple(found)

    @model_validator(mode="after")
    def _streams(self) -> "Body":
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is for streams only; set stream to true")
        return self

    def asked(
        self,
        prompts: Sequence[list[int]],
        prompting: Prompting,
        most: int | None,
        default: int,
        alternatives: int | None,
    ) -> Asked:
        """most: the longest answer that is asked for. alternatives: to each token, None for no
        log-probabilities at all. Raises `ApiError` where it does not fit."""
        if len(prompts) * self.n > MOST_ANSWERS:
            raise ApiError(
                400,
                f"{len(prompts)} prompts with n = {self.n} are more than {MOST_ANSWERS} answers; "
                "split them over several requests.",
                "n",
                "invalid_value",
            )
        longest = max(map(len, prompts))
        room = prompting.context - longest
        if most is not None and most > room:
            raise ApiError(
                400,
                f"The model's context has {prompting.context} tokens, and {longest} of the prompt "
                f"with {most} of the answer are more; ask for at most {room}.",
                "max_tokens",
                "context_length_exceeded",
            )
        return Asked(
            prompts=tuple(prompts),
            n=self.n,
            sampling=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                max_new_tokens=most or min(default, room),
                stop_ids=prompting.stop_ids,
                alternatives=alternatives or 0,
            ),
            seed=secrets.randbits(62) if self.seed is None else self.seed,
            stop=self.stop,
            chat=isinstance(self, ChatBody),
            logprobs=alternatives is not None,
            stream=self.stream,
            include_usage=bool(self.stream_options and self.stream_options.include_usage),
        )


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: tuple[str, ...] | tuple[list[int], ...]
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, given: Any) -> tuple[str, ...] | tuple[list[int], ...]:
        found = [given] if isinstance(given, str) or _is_ids(given) else given
        if isinstance(found, list) and found:
            if all(isinstance(prompt, str) for prompt in found):
                return tuple(found)
            if all(_is_ids(prompt) for prompt in found):
                return tuple(found)
        raise ValueError("must be a text, a list of texts, token ids, or a list of token ids")

    def read(self, prompting: Prompting) -> Asked:
        """What is asked of the model. Raises `ApiError` for prompts that do not fit it."""
        prompts = []
        for prompt in self.prompt:
            with _refused("prompt"):
                prompts.append(
                    prompting.encode_text(prompt)
                    if isinstance(prompt, str)
                    else prompting.check_ids(prompt)
                )
        return self.asked(prompts, prompting, self.max_tokens, DEFAULT_COMPLETION, self.logprobs)


class Turn(BaseModel):
    """One message. Newer models' "developer" is what the system is here."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        """Answers of this API, sent back as they came, have fields with null."""
        if not isinstance(given, dict):
            raise ValueError("must be an object with role and content")
        return {name: value for name, value in given.items() if value is not None}

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        texts = [
            part["text"]
            for part in given
            if isinstance(part, dict)
            and part.keys() == {"type", "text"}
            and part["type"] == "text"
            and isinstance(part["text"], str)
        ]
        if len(texts) < len(given):
            raise ValueError("only parts of the type text are supported")
        return "".join(texts)


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] = 0
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_length(self) -> "ChatBody":
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        return self

    @model_validator(mode="after")
    def _alternatives_of_something(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs is for log-probabilities only; set logprobs to true")
        return self

    def read(self, prompting: Prompting) -> Asked:
        """What is asked of the model. Raises `ApiError` for a dialogue that does not fit it."""
        messages = [
            Message("system" if turn.role == "developer" else turn.role, turn.content)
            for turn in self.messages
        ]
        with _refused("messages"):
            prompt = prompting.encode_chat(messages)
        return self.asked(
            [prompt],
            prompting,
            self.max_completion_tokens or self.max_tokens,
            prompting.context,
            self.top_logprobs if self.logprobs else None,
        )


def parse(body: bytes, kind: type[CompletionBody] | type[ChatBody]) -> CompletionBody | ChatBody:
    """A request's body. Raises `ApiError` naming the first thing wrong."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise from_validation(error, NEUTRAL) from error


@contextmanager
def _refused(param: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        code = "context_length_exceeded" if isinstance(error, TooLong) else "invalid_value"
        raise ApiError(400, str(error), param, code) from error


def _is_ids(given: Any) -> bool:
    return isinstance(given, list) and bool(given) and all(type(i) is int for i in given)
