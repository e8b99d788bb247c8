"""The fields of users' records: text, turns, transcripts, ratings and safety labels.

Each reader takes the record's fields and `where` it was read ("data.jsonl line 12"), and raises
`ValueError` that names both where a field is not what it should be.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from llama2.chat import LossOn, Message, Role

Fields = Mapping[str, Any]
Rating = Literal["significantly better", "better", "slightly better", "negligibly better"]
SafetyLabel = Literal["chosen_safe", "both_safe", "both_unsafe", "chosen_unsafe"]

ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
}
RATINGS: dict[str, Rating] = {
    "3": "significantly better",
    "significantly": "significantly better",
    "2": "better",
    "1": "slightly better",
    "slightly": "slightly better",
    "0": "negligibly better",
    "negligibly": "negligibly better",
    "unsure": "negligibly better",
    "negligibly better/unsure": "negligibly better",
}
RATINGS |= {rating: rating for rating in get_args(Rating)}
TRANSCRIPT_ROLE = re.compile(r"\n\n(Human|Assistant):")


def present(record: Fields) -> dict[str, Any]:
    """The fields that are not null: tables fill absent fields with null."""
    return {name: value for name, value in record.items() if value is not None}


def text_field(fields: Fields, name: str, where: str) -> str:
    """A field that must be text."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text, but is {_kind(value)}.")
    return value


def messages_field(fields: Fields, name: str, where: str) -> list[Message]:
    """A list of turns, each with `role` and `content`, or `from` and `value` as in ShareGPT."""
    turns = fields.get(name)
    if not isinstance(turns, list):
        raise ValueError(f"{where}: {name} must be a list of turns, but is {_kind(turns)}.")
    messages = []
    for number, turn in enumerate(turns, 1):
        given = present(turn) if isinstance(turn, Mapping) else {}
        role = given.get("role", given.get("from"))
        content = given.get("content", given.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(
                f"{where}: turn {number} of {name} needs a role and a content (or from and value) "
                f"of text, but has {_listed(given)}."
            )
        if role not in ROLES:
            raise ValueError(
                f"{where}: turn {number} of {name} has the role {role!r}; accepted are "
                f"{', '.join(ROLES)}."
            )
        messages.append(Message(ROLES[role], content))
    return messages


def prompt_field(fields: Fields, where: str) -> list[Message]:
    """`prompt` as the turns it stands for: text from the user, a list of turns, or a transcript."""
    prompt = fields["prompt"]
    if isinstance(prompt, list):
        return messages_field(fields, "prompt", where)
    text = text_field(fields, "prompt", where)
    if not is_transcript(text):
        return [Message("user", text)]
    turns = transcript(text)
    # Transcript prompts end with "Assistant:", where the answer goes.
    return turns[:-1] if turns[-1] == Message("assistant", "") else turns


def is_transcript(text: str) -> bool:
    """Whether `text` is written as in hh-rlhf: "\\n\\nHuman: ... \\n\\nAssistant: ..."."""
    return text.startswith("\n\nHuman:")


def transcript(text: str) -> list[Message]:
    """The turns of a transcript, without the white space around them."""
    parts = TRANSCRIPT_ROLE.split(text)[1:]
    return [
        Message("user" if role == "Human" else "assistant", content.strip())
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]


def rating_field(fields: Fields, where: str) -> Rating | None:
    """`rating`, how much better the chosen answer is, in words or as 3, 2, 1, 0; None if absent."""
    value = fields.get("rating")
    if value is None:
        return None
    number = int(value) if isinstance(value, float) and value.is_integer() else value
    spelled = re.sub(r"[\s_-]+", " ", str(number)).strip().lower().replace(" / ", "/")
    if isinstance(value, bool) or spelled not in RATINGS:
        raise ValueError(
            f"{where}: the rating {value!r} is none of {', '.join(get_args(Rating))} (or 3, 2, 1 "
            "and 0)."
        )
    return RATINGS[spelled]


def safety_field(fields: Fields, where: str) -> SafetyLabel | None:
    """`safety`, which of the two answers are safe; None where absent."""
    value = fields.get("safety")
    if value is None:
        return None
    spelled = re.sub(r"[\s_-]+", "_", str(value)).strip("_").lower()
    for label in get_args(SafetyLabel):
        if spelled == label:
            return label
    raise ValueError(
        f"{where}: the safety label {value!r} is none of {', '.join(get_args(SafetyLabel))}."
    )


def safety_tag(fields: Fields, where: str) -> bool:
    """Whether a prompt is one of safety: `safety` true, or a label that the answers to it got."""
    value = fields.get("safety", False)
    return value if isinstance(value, bool) else safety_field(fields, where) is not None


def loss_field(fields: Fields, where: str) -> LossOn:
    """`loss_on`, which answers of a dialogue are to be learned: "all", also where absent, or
    "last"."""
    value = fields.get("loss_on", "all")
    for known in get_args(LossOn):
        if value == known:
            found: LossOn = known
            return found
    raise ValueError(
        f"{where}: loss_on is {value!r}; accepted are {', '.join(get_args(LossOn))} (answers)."
    )


def category_field(fields: Fields) -> str | None:
    """`category`, the kind of a prompt; None where absent or, as in some data sets, no text."""
    value = fields.get("category")
    return value if isinstance(value, str) else None


def wrong_fields(fields: Fields, where: str, wanted: str, forms: str) -> ValueError:
    """The error for a record of none of the `forms` that hold what is `wanted`."""
    return ValueError(
        f"{where} has {_listed(fields)}, which are no {wanted}; accepted are {forms}."
    )


def _listed(fields: Fields) -> str:
    return f"the fields {', '.join(sorted(fields))}" if fields else "no fields"


def _kind(value: object) -> str:
    kinds = {type(None): "absent", str: "text", bool: "true or false", list: "a list"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "an object")
