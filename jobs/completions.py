"""The files of `jobs/generate.py`: prompts in, answers out, and where a stopped job goes on."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import xxhash

from actors.records import Sample
from cluster.files import data_files, read_records
from cluster.lineage import stamp
from jobs.generate_config import GenerateConfig
from llama2.chat import Message
from llama2.prompting import Prompting
from llama2.records import Skipped, parse_prompts
from llama2.text_stream import TextStream
from llama2.whole_files import whole_file

Json = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One prompt: what the answer's line repeats of it, and its tokens."""

    id: str
    said: Json
    tokens: list[int]
    chat: bool


def asks_chat(config: GenerateConfig, prompting: Prompting) -> bool:
    """Whether a plain prompt is asked as a user's message."""
    if config.format == "auto":
        return prompting.has_chat_template
    return config.format == "chat"


def question(id: str, prompt: str, chat: bool, prompting: Prompting) -> Question:
    """A plain prompt. Raises `ValueError` where the model cannot be asked it."""
    tokens = (
        prompting.encode_chat([Message("user", prompt)]) if chat else prompting.encode_text(prompt)
    )
    return Question(id, {"prompt": prompt}, tokens, chat)


def questions(config: GenerateConfig, prompting: Prompting) -> Iterator[Question]:
    """The prompts of `config.input`, in order. Raises `ValueError`, naming file and line, for one
    that cannot be asked, and for an id that occurs twice."""
    assert config.input is not None
    chat = asks_chat(config, prompting)
    seen: set[str] = set()
    for number, (where, record) in enumerate(read_records(config.input)):
        named = record.get("id")
        id = str(number if named is None else named)
        found = _question(id, record, where, chat, prompting)
        if found.id in seen:
            raise ValueError(f"{where}: the id {found.id!r} occurs before; make ids unique.")
        seen.add(found.id)
        yield found


def _question(id: str, record: Json, where: str, chat: bool, prompting: Prompting) -> Question:
    try:
        if isinstance(record.get("prompt"), str) and "messages" not in record:
            return question(id, record["prompt"], chat, prompting)
        parsed = parse_prompts(record, where)
        if len(parsed) > 1:
            raise ValueError("it holds several prompts; give each a line of its own.")
        if isinstance(parsed[0], Skipped):
            raise ValueError(f"{parsed[0].reason}; correct or remove that line.")
        messages = parsed[0].messages
        tokens = prompting.encode_chat(messages)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error
    return Question(id, {"messages": [asdict(message) for message in messages]}, tokens, chat=True)


def text(sample: Sample, chat: bool, prompting: Prompting) -> str:
    """An answer's text. That of a chat has no white space around it; a continued text keeps it."""
    stream = TextStream(prompting.tokenizer, trim=chat)
    tokens = [token for token in sample.response.tolist() if token not in prompting.stop_ids]
    return "".join(map(stream.add, tokens)) + stream.close()


def line(asked: Question, sample: Sample, prompting: Prompting) -> bytes:
    """An answer as a line of the output, which is a record for SFT as well."""
    answer = text(sample, asked.chat, prompting)
    said = dict(asked.said)
    if "messages" in said:
        said["messages"] = [*said["messages"], {"role": "assistant", "content": answer}]
    record = {
        "id": sample.id,
        **said,
        "response": answer,
        "finish_reason": sample.finish_reason,
        "tokens": len(sample.response),
        "logprob": float(sample.logprobs.sum(dtype="float64")),
    }
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


@contextmanager
def opened(config: GenerateConfig) -> Iterator[tuple[IO[bytes], list[str]]]:
    """The output, open for more lines, and the ids of those that it has; a torn last line is cut
    off.

    Raises `ValueError` where it was written with other settings, is no output of this job, or is
    being written by another one.
    """
    assert config.output is not None
    settings = _settings(config)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with config.output.open("ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{config.output} is being written by another job; wait for it or name another "
                "--output."
            ) from error
        settings_file = _settings_file(config.output)
        if config.output.stat().st_size:
            _compare(settings, settings_file, config.output)
        else:
            with whole_file(settings_file) as new:
                new.write(json.dumps(settings, indent=2).encode())
        file.seek(0)
        ids, end = _written(file, config.output)
        file.truncate(end)
        yield file, ids


def _settings_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.settings.json")


def _written(file: IO[bytes], path: Path) -> tuple[list[str], int]:
    """Ids of whole lines, and where they end."""
    ids: list[str] = []
    end = 0
    for number, raw in enumerate(file, 1):
        if not raw.endswith(b"\n"):
            break
        try:
            ids.append(json.loads(raw)["id"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} is no answer that this job wrote; name another --output."
            ) from error
        end += len(raw)
    return ids, end


def _compare(settings: Json, file: Path, output: Path) -> None:
    if not file.is_file():
        raise ValueError(
            f"{output} exists and is not of this job, for {file.name} is missing beside it; name "
            "another --output or remove it."
        )
    before = json.loads(file.read_bytes())
    for name, value in settings.items():
        if before.get(name) != value:
            raise ValueError(
                f"{output} was written with another {name} ({before.get(name)!r}, now {value!r}); "
                "name another --output, remove it, or take the same."
            )


def _settings(config: GenerateConfig) -> Json:
    """All that answers follow from, besides their prompts, which are compared by id."""
    assert config.output is not None
    return {
        "model": str(config.model.resolve()),
        "files of the model": stamp(config.model, (config.output, _settings_file(config.output))),
        "input": _digest(config),
        "format": config.format,
        "num_samples": config.num_samples,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed,
        "precision": config.precision,
        "backend": config.generator.backend,
    }


def _digest(config: GenerateConfig) -> str:
    assert config.input is not None
    digest = xxhash.xxh3_128()
    for path in data_files(config.input):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
