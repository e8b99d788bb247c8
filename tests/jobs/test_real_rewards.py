"""A safety reward model on human preferences, beside what needs no model.

Prints its numbers: pytest -m slow -s tests/jobs/test_real_rewards.py
"""

import gzip
import json
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch

from cluster.files import read_records
from cluster.run_directory import RunDirectory
from cluster.session import ClusterConfig, session
from jobs import prepare, pretrain, reward_model
from jobs.presets import tiny
from llama2 import checkpoint
from llama2.chat import Message
from llama2.cleaning import CleaningSettings
from llama2.config import ModelConfig
from llama2.records import Comparison, Skipped, parse_comparisons
from llama2.scoring import last_scores
from llama2.tokenizer import load_tokenizer
from llama2.transcripts import encode_answered
from tests.benchmarks.bag_of_words import BagOfWords, best_penalty

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PAIRS = DATA / "hh-rlhf" / "harmless.jsonl.gz"
TEXTS = [DATA / "text" / f"{name}.txt.gz" for name in ("wikitext2-valid", "tinyshakespeare")]
TREES = DATA / "oasst" / "trees.jsonl.gz"
pytestmark = pytest.mark.skipif(not PAIRS.is_file(), reason=f"the real data is not at {DATA}")
HELD_OUT, CONTEXT, VOCABULARY = 300, 512, 4096


def comparisons(lines: list[str]) -> list[Comparison]:
    found = [parse_comparisons(json.loads(line), "pairs") for line in lines]
    return [record for records in found for record in records if isinstance(record, Comparison)]


def split() -> tuple[list[str], list[str]]:
    """The lines to train on, and the last 300."""
    with gzip.open(PAIRS, "rt") as file:
        lines = file.read().splitlines()
    return lines[:-HELD_OUT], lines[-HELD_OUT:]


def spoken(messages: tuple[Message, ...]) -> str:
    return "\n\n".join(message.content for message in messages)


@pytest.mark.slow
def test_it_beats_length_and_bag_of_words(tmp_path: Path) -> None:
    training, heldout = split()
    train, test = comparisons(training), comparisons(heldout)
    (tmp_path / "harmless.jsonl").write_text("\n".join(training) + "\n")
    with (tmp_path / "dialogues.jsonl").open("w") as file:
        for pair in train:  # as text without any preference
            for answer in (pair.chosen, pair.rejected):
                file.write(json.dumps({"text": f"{spoken(pair.prompt)}\n\n{answer}"}) + "\n")
    preset, run = tiny(), RunDirectory(tmp_path, "reward")
    model = ModelConfig(
        vocab_size=VOCABULARY, hidden_size=192, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=CONTEXT,
    )  # fmt: skip
    data = (tmp_path / "data",)
    with session(ClusterConfig(local_cpus=2)):
        prepare.main(
            replace(
                preset.prepare, name="data", runs=tmp_path, vocab_size=VOCABULARY, context=CONTEXT,
                text=(*TEXTS, tmp_path / "dialogues.jsonl"), safety=(tmp_path / "harmless.jsonl",),
                cleaning=CleaningSettings(quality=False, near_duplicates=False),
            )
        )  # fmt: skip
        pretrain.main(
            replace(
                preset.pretrain, name="base", runs=tmp_path, data=data, model=model, epochs=1,
                peak_lr=2e-3, batch_rows=16, micro_batch_tokens=4096,
            )
        )  # fmt: skip
        reward_model.main(
            replace(
                preset.safety, name="reward", runs=tmp_path, data=data, epochs=2, batch_rows=32,
                start=RunDirectory(tmp_path, "base").model, peak_lr=5e-4, warmup_steps=5,
            )
        )  # fmt: skip
    words = [(pair.chosen, pair.rejected) for pair in train]
    bag = BagOfWords(words, best_penalty(words))
    found = {
        "reward model": accuracy(run.model, test),
        "bag of words": bag.accuracy([(pair.chosen, pair.rejected) for pair in test]),
        "the shorter answer": shorter(test),
    }
    print(f"\n{len(train)} pairs to train on, {len(test)} held out: {found}")
    assert found["reward model"] > max(0.55, found["bag of words"], found["the shorter answer"])


@torch.inference_mode()
def accuracy(folder: Path, pairs: list[Comparison]) -> float:
    """How often the chosen answer scores higher."""
    model, tokenizer = checkpoint.load_scalar(folder).eval(), load_tokenizer(folder)
    scores = [
        last_scores(
            model,
            [encode_answered(tokenizer, p.prompt, text(p), True, CONTEXT) for p in pairs],
        )
        for text in (lambda p: p.chosen, lambda p: p.rejected)
    ]
    return sum(a > b for a, b in zip(*scores, strict=True)) / len(pairs)


def shorter(pairs: list[Comparison]) -> float:
    """How often the chosen answer is the shorter one, a tie being half."""
    return sum(
        (len(p.chosen) < len(p.rejected)) + 0.5 * (len(p.chosen) == len(p.rejected)) for p in pairs
    ) / len(pairs)


def test_bag_of_words_learns_words_not_pairs() -> None:
    """It finds the one word that decides, gets it right where it is alone, and knows no others."""
    train = [(f"thank you {i}", f"stupid thing {i}") for i in range(20)]
    bag = BagOfWords(train, penalty=0.01)
    assert bag.accuracy([("thank the cat", "stupid dog"), ("thank", "the")]) == 1.0
    assert bag.accuracy([("stupid", "thank")]) == 0.0
    assert bag.accuracy([("cat", "dog")]) == 0.5


def test_ranks_of_replies_become_ratings() -> None:
    """A gap of one rank is "slightly better", of two "better", of more "significantly better"."""
    found: Counter[str | None] = Counter()
    expected: Counter[str] = Counter()
    names = {1: "slightly better", 2: "better"}
    for where, record in read_records(TREES):
        pairs = parse_comparisons(record, where)
        found.update(p.rating for p in pairs if not isinstance(p, Skipped))
        nodes = [record["prompt"]]
        while nodes:
            node = nodes.pop()
            kept = [
                reply
                for reply in node["replies"]
                if not reply.get("deleted") and reply.get("review_result") is not False
            ]
            nodes += kept
            answers = kept if node["role"] == "prompter" else []
            ranked = [(a["rank"], a["text"].strip()) for a in answers if a.get("rank") is not None]
            for (a, better), (b, worse) in permutations(ranked, 2):
                if b > a and better and worse and better != worse:
                    expected[names.get(b - a, "significantly better")] += 1
    assert sum(found.values()) > 50
    assert found == expected
