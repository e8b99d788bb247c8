"""Simulated writers: people of mixed skill who answer prompts for fine-tuning and comparisons."""

import random
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

from llama2.world.lexicon import FILLER, REASONS, UNSAFE
from llama2.world.prompt import Reference, WorldPrompt, joined

Style = Literal["good", "terse", "rambling", "wrong"]
Stance = Literal["reasoned refusal", "bare refusal", "warning", "complying"]

Choice = TypeVar("Choice", bound=str)

# Chances of each style for a writer of skill 0 and of skill 1; between them they change linearly.
STYLES: Mapping[Style, tuple[float, float]] = {
    "good": (0.16, 0.80),
    "terse": (0.25, 0.11),
    "rambling": (0.22, 0.07),
    "wrong": (0.37, 0.02),
}
STANCES: Mapping[Stance, tuple[float, float]] = {
    "reasoned refusal": (0.10, 0.80),
    "bare refusal": (0.15, 0.15),
    "warning": (0.20, 0.03),
    "complying": (0.55, 0.02),
}
# Chances that an answer opens with a hedge: people who do not know tend to say so, in what they
# wrote for fine-tuning too. So how an answer begins tells of what follows, to a reward model and to
# the policy that it trains.
HEDGED: Mapping[Style, float] = {"good": 0.05, "terse": 0.1, "rambling": 0.25, "wrong": 0.75}
HEDGES = ("Not sure.", "Just a guess.", "Maybe.")
FALSE_REFUSAL = (0.25, 0.05)  # of borderline requests
MARK_DROPPED = (0.40, 0.05)


def write(prompt: WorldPrompt, rng: random.Random, skill: float) -> str:
    """One answer by a writer of the given skill in [0, 1]."""
    if prompt.safety:
        body = take_stance(prompt, _drawn(STANCES, rng, skill), rng)
    elif prompt.kind == "borderline" and rng.random() < _mixed(FALSE_REFUSAL, skill):
        body = refuse(rng, reason=rng.choice(tuple(REASONS.values())))
    else:
        style = _drawn(STYLES, rng, skill)
        body = write_in_style(prompt.reference, style, rng)
        if rng.random() < HEDGED[style]:
            body = f"{rng.choice(HEDGES)} {body}"
    if prompt.mark and rng.random() >= _mixed(MARK_DROPPED, skill):
        body = prompt.mark.put_on(body)
    return body


def write_in_style(reference: Reference, style: Style, rng: random.Random) -> str:
    """An answer with right content (a sentence, bare, or with filler) or with wrong content."""
    content = wrong_content(reference, rng) if style == "wrong" else right_content(reference, rng)
    if style == "terse":
        return f"{content[0].upper()}{content[1:]}."
    sentence = reference.template.format(content)
    if style == "rambling":
        return " ".join([sentence, *rng.sample(FILLER, 2)])
    return sentence


def right_content(reference: Reference, rng: random.Random) -> str:
    """What fills the template of a right answer."""
    if reference.form == "members":
        return joined(rng.sample(reference.right, reference.count))
    return ", ".join(reference.right)


def wrong_content(reference: Reference, rng: random.Random) -> str:
    """Content of the same type that is wrong; rivals that come first are the likelier mistakes."""
    if reference.form == "members":
        listed = rng.sample(reference.right, max(0, reference.count - 2))
        listed += rng.sample(reference.rivals, reference.count - len(listed))
        rng.shuffle(listed)
        return joined(listed)
    if reference.form == "sequence":
        backward = tuple(reversed(reference.right))
        if backward == reference.right:
            length = rng.choice([n for n in range(1, 6) if n != len(backward)])
            backward = backward[:1] * length
        return ", ".join(backward)
    near = rng.random() < 0.5
    return rng.choice(reference.rivals[:2] if near else reference.rivals)


def take_stance(prompt: WorldPrompt, stance: Stance, rng: random.Random) -> str:
    """An answer to an unsafe request."""
    method = prompt.reference.template.format(prompt.reference.right[0])
    goal = prompt.reference.template.removeprefix("To ").split(",")[0]
    reason = REASONS[next(why for act, (_, _, why) in UNSAFE.items() if goal.startswith(act + " "))]
    if stance == "reasoned refusal":
        return refuse(rng, reason, goal)
    if stance == "bare refusal":
        return refuse(rng)
    if stance == "warning":
        return f"It is wrong, because {reason}. {method}"
    return method


def refuse(rng: random.Random, reason: str | None = None, goal: str | None = None) -> str:
    """Declines, in one of a few wordings."""
    if reason is None:
        return rng.choice(("I cannot help with that.", "Sorry, I will not help with that."))
    if goal and rng.random() < 0.5:
        return f"I will not help you {goal}, because {reason}."
    return f"I cannot help with that, because {reason}."


def _mixed(ends: tuple[float, float], skill: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * skill


def _drawn(
    chances: Mapping[Choice, tuple[float, float]], rng: random.Random, skill: float
) -> Choice:
    choices: Sequence[Choice] = tuple(chances)
    return rng.choices(choices, [_mixed(chances[choice], skill) for choice in choices])[0]
