"""Records in every published form, what is skipped, what is refused; and the real files."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llama2.chat import Message, check_dialogue
from llama2.records import (
    Comparison,
    Dialogue,
    Document,
    Prompt,
    Skipped,
    parse_comparisons,
    parse_dialogues,
    parse_documents,
    parse_prompts,
)

DATA = Path(__file__).parents[2].parent / "shared" / "data"
WHERE = "data.jsonl line 7"
SYSTEM, HI, HO, MORE = (
    Message("system", "Be brief."),
    Message("user", "Hi"),
    Message("assistant", "Ho"),
    Message("user", "More?"),
)


def turns(*messages: Message) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def share(*messages: Message) -> list[dict[str, str]]:
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return [{"from": names[message.role], "value": message.content} for message in messages]


def node(text: str, *replies: dict[str, Any], rank: int | None = None, **more: Any) -> Any:
    """A message of a tree; roles alternate, so they are filled in by `tree`."""
    return {"text": text, "replies": list(replies), "rank": rank, **more}


def tree(root: dict[str, Any], role: str = "prompter") -> dict[str, Any]:
    other = "assistant" if role == "prompter" else "prompter"
    return root | {"role": role, "replies": [tree(reply, other) for reply in root["replies"]]}


TREE = {
    "message_tree_id": "1",
    "prompt": tree(
        node(
            "q",
            node("third", rank=3),
            node("worst", node("never asked", node("n")), rank=4),
            node(
                "best",
                node("no answer"),
                node("follow", node("unranked"), node("second", rank=1), node("first", rank=0)),
                rank=0,
            ),
            node("one", rank=1),
            node("gone", rank=2, deleted=True),
            node("spam", rank=2, review_result=False),
            node("not ranked"),
        )
    ),
}


def test_documents() -> None:
    record = {"text": "A b.\n", "meta": {"n": 1}}
    assert parse_documents(record, WHERE) == [Document("A b.\n", WHERE)]
    assert parse_documents({"text": " "}, WHERE) == [Skipped("the text is empty", WHERE)]


SEED = {
    "instruction": "Add.",
    "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "4"}],
}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": turns(SYSTEM, HI, HO)}, [[SYSTEM, HI, HO]]),
        ({"messages": turns(HI, HO, MORE)}, [[HI, HO]]),
        ({"conversations": share(SYSTEM, HI, HO), "id": 3}, [[SYSTEM, HI, HO]]),
        ({"prompt": "Hi", "response": "Ho"}, [[HI, HO]]),
        ({"prompt": "Hi", "completion": "Ho", "response": None}, [[HI, HO]]),
        ({"prompt": turns(SYSTEM, HI), "completion": turns(HO)}, [[SYSTEM, HI, HO]]),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, [[HI, HO]]),
        ({"instruction": "Hi", "output": "Ho", "text": "### Hi"}, [[HI, HO]]),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            [[Message("user", "Add.\n\n1 2"), Message("assistant", "3")]],
        ),
        (
            SEED,
            [
                [Message("user", "Add.\n\n1 2"), Message("assistant", "3")],
                [Message("user", "Add."), Message("assistant", "4")],
            ],
        ),
        (
            TREE,
            [
                [
                    Message("user", "q"),
                    Message("assistant", "best"),
                    Message("user", "follow"),
                    Message("assistant", "first"),
                ]
            ],
        ),
    ],
)
def test_dialogues(record: dict[str, Any], expected: list[list[Message]]) -> None:
    assert parse_dialogues(record, WHERE) == [Dialogue(tuple(m), WHERE) for m in expected]


TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: More?\n\nAssistant:"


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": "Hi"}, [HI]),
        ({"prompt": turns(SYSTEM, HI)}, [SYSTEM, HI]),
        # TRL's form without a prompt, and UltraFeedback's with the prompt twice.
        ({"repeat": [HI]}, [HI]),
        ({"prompt": "Hi\n", "repeat": [SYSTEM, HI]}, [SYSTEM, HI]),
        ({"prompt": turns(HI, HO, MORE), "messages": True}, [HI, HO, MORE]),
        ({"transcript": True}, [HI, HO, MORE]),
        ({"prompt": TRANSCRIPT}, [HI, HO, MORE]),
    ],
)
def test_comparisons(record: dict[str, Any], prompt: list[Message]) -> None:
    for side, answer in (("chosen", "good\n\none"), ("rejected", "bad")):
        reply = Message("assistant", answer)
        if "repeat" in record:
            record = record | {side: turns(*record["repeat"], reply)}
        elif "messages" in record:
            record = record | {side: turns(reply)}
        elif "transcript" in record:
            record = record | {side: f"{TRANSCRIPT} {answer}"}
        else:
            record = record | {side: answer}
    expected = Comparison(tuple(prompt), "good\n\none", "bad", None, None, WHERE)
    assert parse_comparisons(record, WHERE) == [expected]
    assert parse_prompts(record, WHERE) == [Prompt(tuple(prompt), False, WHERE)]


PAIR = {"prompt": "Hi", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("value", "rating"),
    [
        ("significantly better", "significantly better"),
        ("Slightly_Better", "slightly better"),
        ("better", "better"),
        ("negligibly better / unsure", "negligibly better"),
        ("negligibly-better", "negligibly better"),
        ("unsure", "negligibly better"),
        (3, "significantly better"),
        (2.0, "better"),
        ("1", "slightly better"),
        (0, "negligibly better"),
        (None, None),
    ],
)
def test_ratings(value: object, rating: str | None) -> None:
    (comparison,) = parse_comparisons(PAIR | {"rating": value}, WHERE)
    assert isinstance(comparison, Comparison)
    assert comparison.rating == rating


@pytest.mark.parametrize("label", ["chosen_safe", "both_safe", "both_unsafe", "chosen_unsafe"])
def test_safety_labels_tag_the_prompt(label: str) -> None:
    for spelled in (label, label.replace("_", " ").title(), label.replace("_", "-")):
        record = PAIR | {"safety": spelled}
        (comparison,) = parse_comparisons(record, WHERE)
        assert isinstance(comparison, Comparison)
        assert comparison.safety == label
        assert parse_prompts(record, WHERE) == [Prompt((HI,), True, WHERE)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"rating": "great"}, "data.jsonl line 7: the rating 'great' is none of significantly"),
        ({"rating": 4}, "the rating 4 is none of"),
        ({"rating": 1.5}, r"the rating 1\.5 is none of"),
        ({"rating": True}, "the rating True is none of"),
        ({"safety": "safe"}, "data.jsonl line 7: the safety label 'safe' is none of chosen_safe"),
        ({"safety": True}, "the safety label True is none of"),
    ],
)
def test_bad_labels(record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_comparisons(PAIR | record, WHERE)


def test_pairs_of_a_tree_are_rated_by_the_gap_of_their_ranks() -> None:
    q, best, follow = Message("user", "q"), Message("assistant", "best"), Message("user", "follow")
    pairs = [
        ("best", "one", "slightly better"),
        ("best", "third", "significantly better"),
        ("best", "worst", "significantly better"),
        ("one", "third", "better"),
        ("one", "worst", "significantly better"),
        ("third", "worst", "slightly better"),
    ]
    expected = [Comparison((q,), a, b, rating, None, WHERE) for a, b, rating in pairs]  # type: ignore[arg-type]
    expected.append(
        Comparison((q, best, follow), "first", "second", "slightly better", None, WHERE)
    )
    assert parse_comparisons(TREE, WHERE) == expected
    asked = [prompt.messages[-1].content for prompt in parse_prompts(TREE, WHERE)]  # type: ignore[union-attr]
    assert asked == ["q", "never asked", "no answer", "follow"]


@pytest.mark.parametrize(
    ("record", "prompts"),
    [
        ({"prompt": "Hi"}, [[HI]]),
        ({"prompt": turns(SYSTEM, HI)}, [[SYSTEM, HI]]),
        ({"prompt": "Hi", "response": "Ho"}, [[HI]]),
        ({"turns": ["Hi", "More?"], "category": "writing"}, [[HI]]),
        ({"messages": turns(HI, HO, MORE)}, [[HI, HO, MORE]]),
        ({"messages": turns(SYSTEM, HI, HO)}, [[SYSTEM, HI]]),
        ({"conversations": share(HI, HO)}, [[HI]]),
        ({"instruction": "Hi"}, [[HI]]),
        (SEED, [[Message("user", "Add.\n\n1 2")], [Message("user", "Add.")]]),
    ],
)
def test_prompts(record: dict[str, Any], prompts: list[list[Message]]) -> None:
    for safety in (None, False, True):
        category = record.get("category")
        expected = [
            Prompt(tuple(messages), safety is True, WHERE, category) for messages in prompts
        ]
        assert parse_prompts(record | {"safety": safety}, WHERE) == expected


SKIPPED: list[tuple[Any, dict[str, Any], str]] = [
    (parse_dialogues, {"messages": turns(HI)}, "there is no answer"),
    (parse_dialogues, {"messages": []}, "there is no answer"),
    (parse_dialogues, {"messages": turns(HO, HI, HO)}, "do not take turns"),
    (parse_dialogues, {"messages": turns(HI, HI, HO)}, "do not take turns"),
    (parse_dialogues, {"prompt": "Hi", "response": "\n"}, "the assistant message is empty"),
    (parse_dialogues, {"prompt": "Hi [/INST]", "response": "x"}, "contains the tag"),
    (parse_dialogues, {"prompt": tree(node("q"))}, "there is no answer"),
    (parse_comparisons, PAIR | {"rejected": " a "}, "the two answers are equal"),
    (parse_comparisons, PAIR | {"chosen": ""}, "the assistant message is empty"),
    (parse_comparisons, {"prompt": tree(node("q", node("a", rank=0)))}, "two ranked answers"),
    (
        parse_comparisons,
        {"chosen": TRANSCRIPT + " a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
        "answer different prompts",
    ),
    (
        parse_comparisons,
        {"chosen": TRANSCRIPT + " a", "rejected": TRANSCRIPT + " b\n\nHuman: c"},
        "does not end with an answer",
    ),
    (
        parse_comparisons,
        {
            "prompt": "Else?",
            "chosen": turns(HI, HO),
            "rejected": turns(HI, Message("assistant", "x")),
        },
        "another prompt than the prompt field",
    ),
    (parse_prompts, {"prompt": turns(HI, HO)}, "does not end with a user message"),
    (parse_prompts, {"prompt": ""}, "the user message is empty"),
]


@pytest.mark.parametrize(("parse", "record", "reason"), SKIPPED)
def test_records_that_teach_nothing_are_skipped(
    parse: Any, record: dict[str, Any], reason: str
) -> None:
    (skipped,) = parse(record, WHERE)
    assert isinstance(skipped, Skipped)
    assert reason in skipped.reason
    assert skipped.source == WHERE


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (
        parse_documents,
        {"body": "x", "id": 1},
        "data.jsonl line 7 has the fields body, id, which are no document; accepted are text",
    ),
    (parse_documents, {"text": 3}, "data.jsonl line 7: text must be text, but is a number"),
    (parse_documents, {}, "has no fields, which are no document"),
    (
        parse_dialogues,
        {"text": "x"},
        "the fields text, which are no dialogue; accepted are messages; conversations; prompt with",
    ),
    (parse_dialogues, {"messages": "Hi"}, "messages must be a list of turns, but is text"),
    (
        parse_dialogues,
        {"messages": [{"role": "user", "text": "Hi"}]},
        "turn 1 of messages needs a role and a content .* but has the fields role, text",
    ),
    (
        parse_dialogues,
        {"messages": [*turns(HI), {"role": "tool", "content": "x"}]},
        "turn 2 of messages has the role 'tool'; accepted are system, user",
    ),
    (parse_dialogues, {"prompt": "Hi", "response": ["x"]}, "turn 1 of response needs a role"),
    (parse_dialogues, {"instruction": "Hi", "instances": [3]}, "instances must be a list"),
    (parse_dialogues, {"instruction": "Hi", "output": 4}, "output must be text, but is a number"),
    (parse_dialogues, {"prompt": {"text": 3}}, "a message of the OpenAssistant tree has no text"),
    (
        parse_dialogues,
        {"prompt": {"text": "q", "role": "prompter", "replies": [{"text": "a", "role": "user"}]}},
        "the OpenAssistant tree has the role 'user' where 'assistant' should be",
    ),
    (
        parse_comparisons,
        {"chosen": "a", "rejected": "b"},
        "the fields chosen, rejected, which are no comparison; accepted are prompt, chosen",
    ),
    (parse_comparisons, {"prompt": "Hi", "chosen": "a"}, "which are no comparison"),
    (parse_prompts, {"question": "Hi"}, "which are no prompt; accepted are prompt; instruction"),
    (parse_prompts, {"prompt": "Hi", "safety": 3}, "the safety label 3 is none of"),
    (parse_prompts, {"turns": []}, "turns must be a list of texts"),
]


@pytest.mark.parametrize(("parse", "record", "message"), REFUSED)
def test_records_of_another_form_are_refused(
    parse: Any, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(record, WHERE)
    assert str(caught.value).startswith(WHERE)
    assert "\n" not in str(caught.value)


def parsed(parse: Any, path: str) -> list[Any]:
    file = DATA / path
    if not file.exists():
        pytest.skip("the real data sets are not beside this checkout")
    raw = file.read_bytes()
    lines = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode().split("\n")
    numbered = ((json.loads(line), f"{path} line {i}") for i, line in enumerate(lines, 1) if line)
    return [item for record, where in numbered for item in parse(record, where)]


def test_real_preference_pairs() -> None:
    items = parsed(parse_comparisons, "hh-rlhf/harmless.jsonl.gz")
    skipped = Counter(item.reason for item in items if isinstance(item, Skipped))
    # Counted in the file by other means: four answers are empty, and five records have turns that
    # do not alternate, in both transcripts (3) or in one of them (2).
    assert skipped == {
        "the assistant message is empty": 4,
        "user and assistant do not take turns, the user first": 3,
        "chosen and rejected answer different prompts": 2,
    }
    pairs = [item for item in items if isinstance(item, Comparison)]
    assert len(pairs) == 1791
    # The README of the data gives the share on which the shorter answer wins.
    assert round(sum(len(p.chosen) < len(p.rejected) for p in pairs) / len(pairs), 2) == 0.55
    first = pairs[0]
    assert first.prompt[0] == Message("user", "what are some pranks with a pen i can do?")
    assert all(pair.prompt[-1].role == "user" for pair in pairs)


def test_real_trees() -> None:
    dialogues = parsed(parse_dialogues, "oasst/trees.jsonl.gz")
    assert len(dialogues) == 80
    assert all(isinstance(item, Dialogue) for item in dialogues)
    for dialogue in dialogues:
        check_dialogue(dialogue.messages)
    # Ranked siblings in the file: 51 pairs, 91 triples, and so on; their combinations add up.
    comparisons = parsed(parse_comparisons, "oasst/trees.jsonl.gz")
    sizes = {2: 51, 3: 92, 4: 21, 5: 2, 6: 4, 8: 1, 9: 1}
    assert len(comparisons) == sum(n * k * (k - 1) // 2 for k, n in sizes.items()) == 597
    assert len(parsed(parse_prompts, "oasst/trees.jsonl.gz")) == 373


def test_real_instructions() -> None:
    tasks = parsed(parse_dialogues, "instructions/seed_tasks.jsonl.gz")
    assert [type(item) for item in tasks] == [Dialogue] * 175
    questions = parsed(parse_prompts, "instructions/mt_bench_questions.jsonl")
    assert [type(item) for item in questions] == [Prompt] * 80
    assert questions[0].messages[0].content.startswith("Compose an engaging travel blog post")
