"""Ghost Attention: dialogues that teach to keep an instruction over many turns.

python jobs/ghost_attention.py --preset tiny
python jobs/sft.py --name next --start runs/tiny-sft/model \\
    --data runs/tiny-ghost_attention/dataset.jsonl
"""

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from actors.conversing import Answered, Conversation, converse, dialogue
from actors.sampling import Sampler, read_chunks, run_chunks
from cluster.report import write_report
from cluster.run_directory import RunDirectory, append_json
from jobs import cli
from jobs.conversations import digest, read_conversations
from jobs.ghost_attention_config import GhostAttentionConfig
from jobs.sampling import Cast, cut, find_cast, identity, sampler
from jobs.sampling_config import MAY_CHANGE
from llama2.ghost_attention import adherence_by_turn, training_records
from llama2.rejection_sampling import Candidate
from llama2.whole_files import whole_file

Json = dict[str, Any]
DATASET = "dataset.jsonl"
EXAMPLES = 5


def main(config: GhostAttentionConfig) -> None:
    """Hold conversations with the instruction in every turn, and write them with it in the first
    one."""
    run = RunDirectory(config.runs, config.run_name("ghost_attention"))
    if run.is_finished:
        print(f"{run.name}: finished already; the data set is {run.path / DATASET}.")
        return
    cast = find_cast(config, scored=config.samples > 1)
    _check_tokenizers(cast)
    conversations = read_conversations(config, "train")
    if run.config.exists():  # told before a cluster starts
        run.open(cli.plain(config), may_change=MAY_CHANGE)
    with sampler(config, cast, run.name) as source:
        run.open(cli.plain(config), may_change=MAY_CHANGE)
        asyncio.run(hold(config, run, cast, conversations, source))
    finish(config, run, conversations)


def _check_tokenizers(cast: Cast) -> None:
    """What is scored grows with the conversation, so that rewards cannot look it up as text."""
    rewards = cast.rewards
    for source in () if rewards is None else (rewards.helpfulness, rewards.safety):
        if not source.shares_tokenizer(cast.policy):
            raise ValueError(
                f"Conversations are scored by reward models with the policy's tokenizer alone, not "
                f"by {source.function or source.model}; name others, or draw with --samples 1."
            )


async def hold(
    config: GhostAttentionConfig,
    run: RunDirectory,
    cast: Cast,
    conversations: list[Conversation],
    source: Sampler,
) -> None:
    """Fill the run's folder of conversations."""

    async def work(chunk: Sequence[Conversation]) -> list[Json]:
        held = await converse(
            source, chunk, config.temperature, config.samples, config.max_new_tokens
        )
        return [
            {"id": one.id, "turns": [asdict(turn) for turn in turns]}
            for one, turns in zip(chunk, held, strict=True)
        ]

    known = identity(
        config, cast, [],
        conversations=digest(conversations), temperature=config.temperature, samples=config.samples,
    )  # fmt: skip
    chunks = cut(conversations, config.chunk)
    await run_chunks(run.path / "conversations", known, chunks, work, config.chunks_at_once)


def finish(
    config: GhostAttentionConfig, run: RunDirectory, conversations: list[Conversation]
) -> None:
    """Write the data set and the report from what was held. Raises `ValueError` where no answer can
    be learned from."""
    lines: list[Json] = []
    kept: list[list[bool]] = []
    held = read_chunks(run.path / "conversations")
    for one, said in zip(conversations, held, strict=True):
        assert one.id == said["id"]
        turns = [_turn(turn) for turn in said["turns"]]
        kept.append([turn.kept for turn in turns if turn.kept is not None])
        lines += records(config.seed, one, turns)
    if not lines:
        raise ValueError(
            f"{run.name}: no answer in {len(held)} conversations ended by itself and kept to its "
            "instruction; take a better policy, more --samples, or a larger --max-new-tokens."
        )
    with whole_file(run.path / DATASET) as file:
        file.writelines(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
    run.samples.unlink(missing_ok=True)
    for line in [line for line in lines if line["turn"] > 1][:EXAMPLES]:
        shown = [f"{message['role']}: {message['content']}" for message in line["messages"]]
        append_json(run.samples, {"step": 0, "dialogue": "\n".join(shown)})
    run.finish(
        {
            "Adherence with the instruction in every turn": [
                {"turn": turn, **asdict(found)} for turn, found in adherence_by_turn(kept).items()
            ],
            "conversations": len(held),
            "turns held": sum(len(said["turns"]) for said in held),
            "answers that broke their instruction": sum(not k for one in kept for k in one),
            "answers to learn from": len(lines),
            "of them under the shortened instruction": sum(line["shortened"] for line in lines),
        }
    )
    write_report(run, f"{run.name}: Ghost Attention")
    print(f"{run.name}: {len(lines)} answers to learn from, in {run.path / DATASET}.")


def records(seed: int, conversation: Conversation, turns: Sequence[Answered]) -> list[Json]:
    """SFT records of a conversation, one for every answer that is not known to break the
    instruction, with the answer's provenance."""
    rng = random.Random(f"wording {seed} {conversation.id}")
    several = training_records(conversation.instruction, dialogue(turns), rng)
    return [
        {**record, "prompt_id": conversation.id, "sample": asdict(turn.answer)}
        for record, turn in zip(several, turns, strict=True)
        if turn.kept is not False
    ]


def _turn(fields: Json) -> Answered:
    return Answered(**(fields | {"answer": Candidate(**fields["answer"])}))


if __name__ == "__main__":
    cli.run(main, GhostAttentionConfig.of)
