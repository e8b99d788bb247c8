"""Data preparation: tokenizer, packed rows and prompts.

python jobs/prepare.py --preset tiny
python jobs/prepare.py --name mine --dialogues seed_tasks.jsonl --safety pairs.jsonl
"""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from actors.encoder import FileSource, Part, Source, decode_row, encode_part
from cluster.data import stream
from cluster.files import data_files, read_records
from cluster.placement import Workers, check_capacity
from cluster.run_directory import RunDirectory
from cluster.session import session
from jobs import cli
from jobs.configs import PrepareConfig
from llama2.batches import TokenSequence
from llama2.encoding import Encoded, is_held_out
from llama2.packing import best_fit
from llama2.records import (
    Comparison,
    Dialogue,
    Document,
    Prompt,
    Skipped,
    parse_prompts,
)
from llama2.shards import Kind, Manifest, ShardWriter
from llama2.sources import WorldSource, world_prompts
from llama2.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

KINDS: dict[Part, Kind] = {
    "pretrain": "pretrain",
    "sft": "sft",
    "helpfulness": "preference",
    "safety": "preference",
}
WINDOW = 4096  # rows' worth of documents that are packed together
TOKENIZER_SAMPLE = 20_000  # records that the small tokenizer is trained on


def sources(config: PrepareConfig) -> dict[Part, Source]:
    """What to prepare: the files given, else the whole of the synthetic world."""
    files: dict[Part, tuple[Path, ...]] = {
        "pretrain": config.text,
        "sft": config.dialogues,
        "helpfulness": config.helpfulness,
        "safety": config.safety,
    }
    given: dict[Part, Source] = {
        part: FileSource(part, tuple(f.absolute() for path in paths for f in data_files(path)))
        for part, paths in files.items()
        if paths
    }
    if given or config.prompts:
        return given
    sizes: dict[Part, int] = {
        "pretrain": config.world_documents,
        "sft": config.world_dialogues,
        "helpfulness": config.world_comparisons,
        "safety": config.world_comparisons,
    }
    return {part: WorldSource(part, config.world_seed, size) for part, size in sizes.items()}


def main(config: PrepareConfig) -> None:
    """Tokenize, pack and write the data of all stages."""
    run = RunDirectory(config.runs, config.run_name("data"))
    if run.is_finished:
        print(f"{run.name}: prepared already, in {run.path}.")
        return
    wanted = sources(config)
    check(config, wanted)
    run.open(cli.plain(config), may_change=("cluster", "cpus", "runs"))
    with session(config.cluster):
        check_capacity({"tokenizing": Workers(cpus=config.cpus)})
        prepare(config, wanted, run)


def check(config: PrepareConfig, wanted: dict[Part, Source]) -> None:
    """Read through users' files once, so that a bad record is named before any worker starts."""
    for part, source in wanted.items():
        if isinstance(source, FileSource):
            for number, path in enumerate(source.paths):
                used = sum(not isinstance(record, Skipped) for record in source.part(number))
                if not used:
                    raise ValueError(f"{path} holds no record that {part} could use.")
    file_prompts(config.prompts)
    if config.tokenizer is not None:
        load_tokenizer(config.tokenizer)


def prepare(config: PrepareConfig, wanted: dict[Part, Source], run: RunDirectory) -> None:
    """Write tokenizer, rows and prompts into the run's folder. A part that is there is kept."""
    folder = run.path
    tokenizer = _tokenizer(config, wanted, folder / "tokenizer")
    summary: dict[str, object] = {"vocabulary": tokenizer.vocab_size}
    for part, source in wanted.items():
        if not (folder / part / "heldout" / "manifest.json").is_file():
            manifests = _write_rows(config, part, source, tokenizer, folder)
        else:
            continue
        for split, manifest in manifests.items():
            summary[f"{part}/{split}"] = manifest.rows
            print(
                f"{part}/{split}: {manifest.rows} rows, {manifest.tokens} tokens, "
                f"{manifest.dropped} records dropped"
            )
    _write_prompts(config, wanted, folder / "prompts")
    run.finish(summary)
    print(f"Prepared data in {folder}.")


def _tokenizer(config: PrepareConfig, wanted: dict[Part, Source], folder: Path) -> Tokenizer:
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        tokenizer.save(folder)
        return tokenizer
    if not folder.is_dir():
        texts = list(islice(_texts(wanted, file_prompts(config.prompts)), TOKENIZER_SAMPLE))
        train_tokenizer(texts, config.vocab_size, folder)
    return load_tokenizer(folder)


def _texts(wanted: dict[Part, Source], prompts: Sequence[Prompt]) -> Iterator[str]:
    """Texts for the tokenizer: the first part of every source, and of prompts where that is all."""
    for source in wanted.values():
        for record in source.part(0):
            if isinstance(record, Document):
                yield record.text
            elif isinstance(record, Dialogue):
                yield " ".join(f"[INST] {message.content} [/INST]" for message in record.messages)
            elif isinstance(record, Comparison):
                yield from (record.chosen, record.rejected)
    yield from (message.content for prompt in prompts for message in prompt.messages)


def _write_rows(
    config: PrepareConfig, part: Part, source: Source, tokenizer: Tokenizer, folder: Path
) -> dict[str, Manifest]:
    empty = Manifest(KINDS[part], tokenizer.fingerprint, config.context)
    writers = {split: ShardWriter(folder / part / split, empty) for split in ("train", "heldout")}
    packers = {split: _Packer(writer, config.context) for split, writer in writers.items()}
    produce = partial(encode_part, source, folder / "tokenizer", config.context)
    dropped, seen = 0, 0
    for row in stream(source.parts, produce, config.cpus):
        encoded = decode_row(row)
        if not encoded.sequences:
            dropped += 1
            continue
        # The very first goes to evaluation, so that the smallest data set has something there.
        held_out = seen == 0 or is_held_out(encoded.key, config.heldout_share)
        packers["heldout" if held_out else "train"].add(encoded)
        seen += 1
    for packer in packers.values():
        packer.flush()
    return {split: writer.close(dropped) for split, writer in writers.items()}


class _Packer:
    """Packs a window of documents at a time; pairs are rows of their own."""

    def __init__(self, writer: ShardWriter, context: int) -> None:
        self._writer, self._context = writer, context
        self._window: list[TokenSequence] = []
        self._tokens = 0

    def add(self, encoded: Encoded) -> None:
        if self._writer.manifest.kind == "preference":
            self._writer.add(encoded.sequences, encoded.rating, encoded.safety)
            return
        self._window.extend(encoded.sequences)
        self._tokens += sum(len(sequence.tokens) for sequence in encoded.sequences)
        if self._tokens >= WINDOW * self._context:
            self.flush()

    def flush(self) -> None:
        places = [len(sequence.tokens) - 1 for sequence in self._window]
        for row in best_fit(places, self._context):
            self._writer.add([self._window[i] for i in row])
        self._window, self._tokens = [], 0


def file_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """The prompts in users' files. Raises `ValueError` where a file holds none."""
    prompts: list[Prompt] = []
    for path in paths:
        found = [
            prompt
            for where, record in read_records(path)
            for prompt in parse_prompts(record, where)
            if isinstance(prompt, Prompt)
        ]
        if not found:
            raise ValueError(f"{path} holds no prompt.")
        prompts += found
    return prompts


def split_prompts(prompts: Sequence[Prompt], share: float) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, no text in both; the first text is always held out."""

    def key(prompt: Prompt) -> str:
        return " ".join(message.content for message in prompt.messages)

    first = key(prompts[0])
    split: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in prompts:
        held_out = key(prompt) == first or is_held_out(key(prompt), share)
        split[held_out].append(prompt)
    return split


def _write_prompts(config: PrepareConfig, wanted: dict[Part, Source], folder: Path) -> None:
    if config.prompts:
        train, heldout = split_prompts(file_prompts(config.prompts), config.heldout_share)
        world_seed = None
    elif any(isinstance(source, WorldSource) for source in wanted.values()):
        world_seed = config.world_seed
        train = world_prompts(world_seed, "train", config.world_prompts, draw=1)
        heldout = world_prompts(world_seed, "heldout", config.world_heldout_prompts, draw=2)
    else:
        return
    folder.mkdir(exist_ok=True)
    for name, prompts in (("train", train), ("heldout", heldout)):
        lines = (
            json.dumps(
                {
                    "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
                    "safety": prompt.safety,
                }
            )
            for prompt in prompts
        )
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "world.json").write_text(json.dumps({"seed": world_seed}))


if __name__ == "__main__":
    cli.run(main, lambda preset: preset.prepare)
