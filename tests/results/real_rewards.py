"""A safety reward model on human preferences, beside what needs no model.

python -m tests.results.real_rewards --seeds 0 1 2 --runs FOLDER

The pairs of hh-rlhf are in groups of 300, of which one is held out: the last one, and by `--groups`
others, each with a model of its own from pretraining on, since its texts are held out of that too.
"""

import gzip
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch

from cluster.files import read_records
from cluster.run_directory import RunDirectory, write_atomically
from cluster.session import session
from jobs import prepare, pretrain, reward_model, sft
from jobs.presets import tiny
from llama2 import checkpoint
from llama2.chat import Message
from llama2.cleaning import CleaningSettings
from llama2.config import ModelConfig
from llama2.records import Comparison, parse_comparisons
from llama2.scoring import last_scores
from llama2.tokenizer import load_tokenizer
from llama2.transcripts import encode_answered
from tests.benchmarks.bag_of_words import BagOfWords, best_penalty
from tests.results import world
from tests.results.experiment import Json, Shown, by_seed, command_line, percent_gain, table

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
PAIRS = DATA / "hh-rlhf" / "harmless.jsonl.gz"
TREES = DATA / "oasst" / "trees.jsonl.gz"
TASKS = DATA / "instructions" / "seed_tasks.jsonl.gz"
TEXTS = [DATA / "text" / f"{name}.txt.gz" for name in ("wikitext2-valid", "tinyshakespeare")]
GROUP, GROUPS = 300, 6
CONTEXT = 512


@dataclass(frozen=True)
class Recipe:
    """What may be searched over, on groups that are not the last one; each is an option.

    The defaults were chosen on the group before the last.
    """

    vocabulary: int = 2048
    hidden: int = 192
    layers: int = 4
    pretrain_epochs: float = 2.0
    pretrain_lr: float = 2e-3
    sft_epochs: float = 0.0
    """On the chosen answers, before the pairs."""
    sft_lr: float = 5e-4
    reward_epochs: float = 1.0
    reward_lr: float = 3e-4
    reward_rows: int = 16

    @property
    def names(self) -> dict[str, str]:
        """Each stage's run, named after all settings that it follows from, so that recipes that
        differ in a late stage share the earlier ones."""
        data = f"data-{self.vocabulary}"
        shape = f"{self.vocabulary}-{self.hidden}x{self.layers}"
        base = f"base-{shape}-{self.pretrain_epochs:g}-{self.pretrain_lr:g}"
        chat = f"{base.replace('base', 'chat')}-{self.sft_epochs:g}-{self.sft_lr:g}"
        ranking = f"{self.reward_epochs:g}-{self.reward_lr:g}-{self.reward_rows}"
        reward = f"{chat.replace('chat', 'reward')}-{ranking}"
        return {"data": data, "base": base, "chat": chat, "reward": reward}


def comparisons(lines: Sequence[str]) -> list[Comparison]:
    """The usable pairs of some lines."""
    found = [parse_comparisons(json.loads(line), "pairs") for line in lines]
    return [record for records in found for record in records if isinstance(record, Comparison)]


def split(group: int = GROUPS - 1) -> tuple[list[str], list[str]]:
    """The lines to train on, and the 300 of one group."""
    with gzip.open(PAIRS, "rt") as file:
        lines = file.read().splitlines()
    held_out = slice(group * GROUP, (group + 1) * GROUP)
    return lines[: held_out.start] + lines[held_out.stop :], lines[held_out]


def write_inputs(folder: Path, lines: Sequence[str]) -> None:
    """The training pairs as pairs, as texts without any preference, and as demonstrations; and the
    replies of OpenAssistant as texts. What is there is left as it is."""
    if folder.exists():
        return
    whole, folder = folder, folder.with_name(f"{folder.name}.part")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "harmless.jsonl").write_text("\n".join(lines) + "\n")
    with (
        (folder / "dialogues.jsonl").open("w") as texts,
        (folder / "chosen.jsonl").open("w") as best,
    ):
        for pair in comparisons(lines):
            asked = [{"role": m.role, "content": m.content} for m in pair.prompt]
            for answer in (pair.chosen, pair.rejected):
                texts.write(json.dumps({"text": spoken(pair.prompt, answer)}) + "\n")
            answered = [*asked, {"role": "assistant", "content": pair.chosen}]
            best.write(json.dumps({"messages": answered}) + "\n")
    with (folder / "replies.jsonl").open("w") as texts:
        for _, record in read_records(TREES):
            nodes = [record["prompt"]]
            while nodes:
                node = nodes.pop()
                nodes += node["replies"]
                for reply in node["replies"]:
                    texts.write(json.dumps({"text": f"{node['text']}\n\n{reply['text']}"}) + "\n")
    os.replace(folder, whole)


def spoken(messages: Sequence[Message], answer: str) -> str:
    """A dialogue as a text in the chat format."""
    said = [f"[INST] {m.content} [/INST]" if m.role == "user" else m.content for m in messages]
    return " ".join([*said, answer])


def train(runs: Path, recipe: Recipe, group: int, seed: int) -> Path:
    """The folder of a reward model that has not seen `group`; what is finished is not run again."""
    inputs = runs / "inputs"
    write_inputs(inputs, split(group)[0])
    preset, names = tiny(), recipe.names
    base, chat, reward = (
        RunDirectory(runs, f"{names[stage]}-{seed}") for stage in ("base", "chat", "reward")
    )
    data = (runs / names["data"],)
    common = {"runs": runs, "data": data, "seed": seed, "eval_every": 0}
    prepare.main(
        replace(
            preset.prepare, name=names["data"], runs=runs, vocab_size=recipe.vocabulary,
            context=CONTEXT, text=(*TEXTS, inputs / "dialogues.jsonl", inputs / "replies.jsonl"),
            dialogues=(inputs / "chosen.jsonl", TASKS), safety=(inputs / "harmless.jsonl",),
            helpfulness=(TREES,), heldout_share=0.01,
            cleaning=CleaningSettings(quality=False, near_duplicates=False),
        )
    )  # fmt: skip
    pretrain.main(
        replace(
            preset.pretrain, name=base.name, model=shape(recipe), epochs=recipe.pretrain_epochs,
            peak_lr=recipe.pretrain_lr, batch_rows=16, micro_batch_tokens=4096, **common,
        )
    )  # fmt: skip
    start = base
    if recipe.sft_epochs:
        start = chat
        sft.main(
            replace(
                preset.sft, name=chat.name, start=base.model, epochs=recipe.sft_epochs,
                peak_lr=recipe.sft_lr, batch_rows=8, micro_batch_tokens=4096, **common,
            )
        )  # fmt: skip
    reward_model.main(
        replace(
            preset.safety, name=reward.name, start=start.model, epochs=recipe.reward_epochs,
            peak_lr=recipe.reward_lr, batch_rows=recipe.reward_rows, warmup_steps=0, **common,
        )
    )  # fmt: skip
    return reward.model


def shape(recipe: Recipe) -> ModelConfig:
    """The model, with heads of 32 and a feed-forward of 8/3 of the width."""
    return ModelConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=64 * round(recipe.hidden * 8 / 3 / 64),
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.hidden // 32,
        num_key_value_heads=recipe.hidden // 32,
        max_position_embeddings=CONTEXT,
    )


@torch.inference_mode()
def gaps(folder: Path, pairs: Sequence[Comparison]) -> list[float]:
    """How much higher each chosen answer scores."""
    model, tokenizer = checkpoint.load_scalar(folder).eval(), load_tokenizer(folder)

    def scores(answers: Sequence[str]) -> list[float]:
        dialogues = zip(pairs, answers, strict=True)
        encoded = [encode_answered(tokenizer, p.prompt, a, True, CONTEXT) for p, a in dialogues]
        return last_scores(model, encoded)

    chosen, rejected = scores([p.chosen for p in pairs]), scores([p.rejected for p in pairs])
    return [a - b for a, b in zip(chosen, rejected, strict=True)]


def words(pairs: Sequence[Comparison]) -> list[tuple[str, str]]:
    """The answers alone."""
    return [(pair.chosen, pair.rejected) for pair in pairs]


def bag_gaps(train_pairs: Sequence[Comparison], test_pairs: Sequence[Comparison]) -> list[float]:
    """How much higher a bag of words scores each chosen answer."""
    known = words(train_pairs)
    bag = BagOfWords(known, best_penalty(known))
    chosen, rejected = (bag.features([pair[i] for pair in words(test_pairs)]) for i in (0, 1))
    return [float(gap) for gap in (chosen - rejected) @ bag.weights_F]


def length_gaps(pairs: Sequence[Comparison]) -> list[float]:
    """How many characters longer each rejected answer is: shorter is better, by majority."""
    return [float(len(pair.rejected) - len(pair.chosen)) for pair in pairs]


def right(found: Sequence[float]) -> list[float]:
    """1 for every pair that is told right, 0.5 for a tie."""
    return [(gap > 0) + 0.5 * (gap == 0) for gap in found]


def measure(runs: Path, group: int, seeds: Sequence[int], recipe: Recipe) -> Json:
    """Gaps by the reward models of all seeds, by the bag of words and by length."""
    path = runs / f"results-{group}-{recipe.names['reward']}-{'-'.join(map(str, seeds))}.json"
    if not path.exists():
        training, heldout = map(comparisons, split(group))
        with session(world.ONE_SESSION):
            folders = [train(runs / f"group-{group}", recipe, group, seed) for seed in seeds]
        found = {
            "training pairs": len(training),
            "parameters": shape(recipe).num_parameters(),
            "recipe": asdict(recipe),
            "reward models": {
                str(s): gaps(f, heldout) for s, f in zip(seeds, folders, strict=True)
            },
            "bag of words": bag_gaps(training, heldout),
            "the shorter answer": length_gaps(heldout),
        }
        write_atomically(path, json.dumps(found) + "\n")
    loaded: Json = json.loads(path.read_text())
    return loaded


def run(runs: Path, groups: Sequence[int], seeds: Sequence[int], recipe: Recipe) -> dict[int, Json]:
    """All groups' results."""
    folder = runs.absolute() / "real"
    return {group: measure(folder, group, seeds, recipe) for group in groups}


def show(results: Mapping[int, Json]) -> Shown:
    """Accuracy by held-out group, and the paired lead over the bag of words."""
    rows = []
    leads: list[tuple[list[float], list[float]]] = []
    for group, found in results.items():
        models = {seed: right(gaps) for seed, gaps in found["reward models"].items()}
        bag, length = right(found["bag of words"]), right(found["the shorter answer"])
        mean = [fmean(flags) for flags in zip(*models.values(), strict=True)]
        leads.append((bag, mean))
        rows.append(
            {
                "held out": f"pairs {group * GROUP + 1} to {(group + 1) * GROUP}",
                "usable pairs": str(len(bag)),
                "reward model, mean of seeds": f"{100 * fmean(mean):.1f}%",
                "by seed, %": by_seed([fmean(flags) for flags in models.values()]),
                "bag of words": f"{100 * fmean(bag):.1f}%",
                "the shorter": f"{100 * fmean(length):.1f}%",
                "lead over the bag, paired": percent_gain(bag, mean),
            }
        )
    first = next(iter(results.values()))
    settings = ", ".join(
        f"{name.replace('_', ' ')} {value:g}" for name, value in first["recipe"].items()
    )
    lead = percent_gain([x for bag, _ in leads for x in bag], [x for _, m in leads for x in m])
    counts = rank_ratings()
    ratings = ", ".join(f"{count} {rating}" for rating, count in counts.items())
    tuned = " and fine-tuned on the chosen answers" if first["recipe"]["sft_epochs"] else ""
    text = (
        f"A safety reward model of {first['parameters'] / 1e6:.1f}M parameters ({settings}), "
        "trained on the pairs of hh-rlhf that are not held out. It starts from a model pretrained "
        "on those pairs' texts, WikiText-2, Shakespeare and OpenAssistant's "
        f"replies{tuned}.\n\n{table(rows)}\n\n"
        f"Over all these groups the lead over the bag is {lead}.\n\n"
        f"The ranks of OpenAssistant's replies make {counts.total()} pairs, rated by rank gap: "
        f"{ratings}."
    )
    return Shown(text)


def rank_ratings() -> Counter[str]:
    """How many pairs of OpenAssistant's replies have each rating."""
    found = Counter(
        str(record.rating)
        for where, tree in read_records(TREES)
        for record in parse_comparisons(tree, where)
        if isinstance(record, Comparison)
    )
    return Counter(dict(found.most_common()))


if __name__ == "__main__":
    parser = command_line(__doc__ or "")
    parser.add_argument("--groups", type=int, nargs="+", default=[GROUPS - 1])
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = parser.parse_args()
    recipe = Recipe(**{name: getattr(given, name) for name in asdict(Recipe())})
    print(show(run(given.runs, given.groups, given.seeds, recipe)).text)
