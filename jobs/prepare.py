"""Data preparation: cleaning, tokenizer, packed rows and prompts.

python jobs/prepare.py --preset tiny
python jobs/prepare.py --name mine --dialogues seed_tasks.jsonl --safety pairs.jsonl
python jobs/prepare.py --name corpus --text wiki/ web/ --mix wiki 2 web 1 --benchmarks mmlu.jsonl
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from actors.sources import FileSource, Part, Source, Usable, benchmark_texts
from actors.work_folder import read_lines
from cluster.data import full_disk_named
from cluster.files import data_files, read_records
from cluster.placement import Workers, check_capacity
from cluster.run_directory import RunDirectory, write_atomically
from cluster.session import session
from jobs import cli
from jobs.assembly import assemble
from jobs.preparation import WORK, Counts, Preparation, Wanted, clean, encode
from jobs.prepare_config import PrepareConfig
from llama2.chat import check_text
from llama2.cleaning import Decontamination
from llama2.encoding import first_words, is_held_out
from llama2.mixing import check_mix
from llama2.records import Comparison, Dialogue, Document, Prompt, Skipped, parse_prompts
from llama2.shards import Manifest
from llama2.sources import WorldSource, world_prompts
from llama2.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TOKENIZER_RECORDS = 20_000  # that the small tokenizer is trained on
TOKENIZER_CHARACTERS = 20_000_000
MAY_CHANGE = ("cluster", "cpus", "runs")


def sources(config: PrepareConfig) -> Wanted:
    """What to prepare: the files given, else the whole of the synthetic world."""
    files: dict[Part, tuple[Path, ...]] = {
        "pretrain": config.text,
        "sft": config.dialogues,
        "helpfulness": config.helpfulness,
        "safety": config.safety,
    }
    given = {part: _named(part, paths, config.part_bytes) for part, paths in files.items() if paths}
    if given or config.prompts:
        return given
    sizes: dict[Part, int] = {
        "pretrain": config.world_documents,
        "sft": config.world_dialogues,
        "helpfulness": config.world_comparisons,
        "safety": config.world_comparisons,
    }
    return {
        part: {"world": WorldSource(part, config.world_seed, size)} for part, size in sizes.items()
    }


def _named(part: Part, paths: Sequence[Path], part_bytes: int) -> dict[str, Source]:
    """Sources by the name of their path, without extensions."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        name = path.absolute().name.lstrip(".").partition(".")[0]
        files.setdefault(name, []).extend(file.absolute() for file in data_files(path))
    return {name: FileSource.of(part, found, part_bytes) for name, found in files.items()}


def main(config: PrepareConfig) -> None:
    """Clean, tokenize, mix and pack the data of all stages."""
    run = RunDirectory(config.runs, config.run_name("data"))
    if run.is_finished:
        _remove_work(run)
        print(f"{run.name}: prepared already, in {run.path}.")
        return
    wanted = sources(config)
    check(config, wanted)
    run.open(cli.plain(config), may_change=MAY_CHANGE)
    with session(config.cluster):
        check_capacity({"preparation": Workers(cpus=config.cpus)})
        prepare(config, wanted, run)


def check(config: PrepareConfig, wanted: Wanted) -> None:
    """Look at the beginning of every file, and at all of benchmarks and prompts, so that what is
    wrong there is named before any worker starts."""
    for named in wanted.values():
        for source in named.values():
            if isinstance(source, FileSource):
                source.check()
    check_mix(config.mix, list(wanted.get("pretrain", {})))
    benchmarks = _benchmarks(config)
    if config.prompts:
        _asked(file_prompts(config.prompts), benchmarks, config.heldout_share)
    if config.tokenizer is not None:
        load_tokenizer(config.tokenizer)


def prepare(config: PrepareConfig, wanted: Wanted, run: RunDirectory) -> None:
    """Write tokenizer, rows and prompts into the run's folder. What an earlier attempt finished is
    not done again.

    Raises `ValueError` for a malformed record, a full disk, input that is not that of the earlier
    attempt, or where too little is left of it.
    """
    if run.is_finished:
        _remove_work(run)
        return
    preparation = Preparation(config, wanted, run.path)
    work = preparation.work
    with full_disk_named(run.path):
        work.make()
        _check_input(preparation)
        if config.benchmarks:
            _benchmarks(config).save(work.benchmarks)
        cleaned = clean(preparation)
        tokenizer = _tokenizer(preparation, cleaned)
        encoded = encode(preparation, cleaned, tokenizer)
        manifests = assemble(preparation, encoded, tokenizer)
        _write_prompts(preparation)
        rows = {name: manifest.rows for name, manifest in manifests.items()}
        run.finish({"vocabulary": tokenizer.vocab_size, **rows})
        _remove_work(run)  # last, since half of it would mislead the next attempt
    for name, manifest in manifests.items():
        print(shown(name, manifest))
    print(f"Prepared data in {run.path}.")


def _remove_work(run: RunDirectory) -> None:
    shutil.rmtree(run.path / WORK, ignore_errors=True)


def shown(name: str, manifest: Manifest) -> str:
    """What a manifest says, for a person."""
    lines = [
        f"{name}: {manifest.rows} rows, {manifest.tokens} tokens, "
        f"{manifest.dropped} records dropped"
    ]
    if name.endswith("/train"):
        for source, counts in manifest.sources.items():
            reasons = "; ".join(f"{count} {reason}" for reason, count in counts.dropped.items())
            lines.append(
                f"  {source}: {counts.share:.1%} of the tokens, {counts.passes:g} passes"
                + (f", dropped: {reasons}" if reasons else "")
            )
    return "\n".join(lines)


def _check_input(preparation: Preparation) -> None:
    """Raise `ValueError` where files are not those of the attempt that is continued."""
    paths = [
        path
        for named in preparation.wanted.values()
        for source in named.values()
        if isinstance(source, FileSource)
        for path in source.files
    ]
    config = preparation.config
    for given in (*config.benchmarks, *config.prompts):
        paths += data_files(given)
    sizes = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}
    path = preparation.work.path / "input.json"
    if path.exists():
        before = json.loads(path.read_text())
        for name in before | sizes:
            if before.get(name) != sizes.get(name):
                raise ValueError(
                    f"{name} is not what it was when the preparation in {preparation.folder} "
                    "began; put it back, or prepare under another name."
                )
        return
    write_atomically(path, json.dumps(sizes))


def _benchmarks(config: PrepareConfig) -> Decontamination:
    texts: dict[str, list[str]] = {}
    for path in config.benchmarks:
        texts.setdefault(path.name.partition(".")[0], []).extend(benchmark_texts(path))
    return Decontamination(texts)


def _tokenizer(preparation: Preparation, cleaned: Counts) -> Tokenizer:
    """The tokenizer given, or a small one; in the run's folder, whole or not at all."""
    config, folder = preparation.config, preparation.folder / "tokenizer"
    if not folder.is_dir():
        unfinished = preparation.work.path / "tokenizer"
        shutil.rmtree(unfinished, ignore_errors=True)
        if config.tokenizer is not None:
            load_tokenizer(config.tokenizer).save(unfinished)
        else:
            train_tokenizer(_texts(preparation, cleaned), config.vocab_size, unfinished)
        os.replace(unfinished, folder)
    return load_tokenizer(folder)


def _texts(preparation: Preparation, cleaned: Counts) -> Iterator[str]:
    """Texts for the tokenizer: the beginning of every source, and of prompts where that is all."""
    several = [
        _beginning(preparation, kind, name, cleaned)
        for kind, named in preparation.wanted.items()
        for name in named
    ]
    for records in several:
        room = TOKENIZER_CHARACTERS // len(several)
        for record in islice(records, TOKENIZER_RECORDS // len(several)):
            for text in _said(record):
                check_text(text, f"{record.source}: the text")
                yield text[:room]
                room -= len(text)
            if room <= 0:
                break
    for prompt in file_prompts(preparation.config.prompts):
        yield from (message.content for message in prompt.messages)


def _beginning(
    preparation: Preparation, kind: Part, name: str, cleaned: Counts
) -> Iterator[Usable | Skipped]:
    """The records of a source's first part that has any."""
    for part in preparation.parts:
        if (part.kind, part.name) != (kind, name):
            continue
        counts = cleaned.get(part.number)
        if counts is None:
            yield from part.records()
            return
        if counts["records"] > sum(counts["dropped"].values()):
            yield from read_lines(preparation.work.records(part), kind)
            return


def _said(record: Usable | Skipped) -> Iterator[str]:
    if isinstance(record, Document):
        yield record.text
    elif isinstance(record, Dialogue):
        yield " ".join(f"[INST] {message.content} [/INST]" for message in record.messages)
    elif isinstance(record, Comparison):
        yield from (record.chosen, record.rejected)


def file_prompts(paths: Sequence[Path]) -> list[Prompt]:
    """The prompts in users' files. Raises `ValueError` where a file holds none, or one that is no
    text."""
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
        for prompt in found:
            for message in prompt.messages:
                check_text(message.content, f"{prompt.source}: the prompt")
        prompts += found
    return prompts


def split_prompts(prompts: Sequence[Prompt], share: float) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, parted by what the user says first, as dialogues and
    comparisons are: no conversation is on both sides. The first one is always held out."""

    def key(prompt: Prompt) -> str:
        return " ".join(first_words(prompt.messages).lower().split())  # what `is_held_out` reads

    first = key(prompts[0])
    split: tuple[list[Prompt], list[Prompt]] = ([], [])
    for prompt in prompts:
        split[key(prompt) == first or is_held_out(key(prompt), share)].append(prompt)
    return split


def _asked(
    prompts: Sequence[Prompt], benchmarks: Decontamination, heldout_share: float
) -> tuple[list[Prompt], list[Prompt]]:
    """Users' prompts without those of benchmarks, for training and held out. Raises `ValueError`
    where none is left for training."""
    kept = [
        prompt
        for prompt in prompts
        if not any(benchmarks.hit(m.content) for m in prompt.messages if m.role == "user")
    ]
    if not kept:
        raise ValueError(f"All {len(prompts)} prompts are those of the benchmarks; give others.")
    train, heldout = split_prompts(kept, heldout_share)
    if not train:
        raise ValueError(
            f"All {len(heldout)} prompts are held out, as they begin alike or are too few; give "
            "more that begin otherwise."
        )
    return train, heldout


def _write_prompts(preparation: Preparation) -> None:
    config, wanted = preparation.config, preparation.wanted
    if config.prompts:
        given = file_prompts(config.prompts)
        train, heldout = _asked(given, _benchmarks(config), config.heldout_share)
        left_out = len(given) - len(train) - len(heldout)
        if left_out:
            print(f"{left_out} prompts are of benchmarks and left out.")
        world_seed = None
    elif any(isinstance(source, WorldSource) for n in wanted.values() for source in n.values()):
        world_seed = config.world_seed
        train = world_prompts(world_seed, "train", config.world_prompts, draw=1)
        heldout = world_prompts(world_seed, "heldout", config.world_heldout_prompts, draw=2)
    else:
        return
    folder = preparation.folder / "prompts"
    folder.mkdir(exist_ok=True)
    for name, prompts in (("train", train), ("heldout", heldout)):
        lines = (
            json.dumps(
                {
                    "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
                    "safety": prompt.safety,
                    **({} if prompt.category is None else {"category": prompt.category}),
                }
            )
            for prompt in prompts
        )
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "world.json").write_text(json.dumps({"seed": world_seed}))


if __name__ == "__main__":
    cli.run(main, lambda preset: preset.prepare)
