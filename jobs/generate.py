"""Answers of a model: to one prompt, or to a file of them.

python jobs/generate.py --model runs/tiny-ppo/model --prompt "Who is Ada?" --temperature 0
python jobs/generate.py --model MODEL --input prompts.jsonl --output answers.jsonl --num-samples 4
"""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
from ray import serve
from tqdm import tqdm

from actors.backend import OwnBackend
from actors.generator import FROM_FOLDER, check_backend, deploy
from actors.records import Request, Sample
from actors.served_model import CHUNK, ServedModel
from cluster.placement import check_capacity
from cluster.session import session
from jobs import options
from jobs.completions import Question, asks_chat, line, opened, question, questions, text
from jobs.generate_config import GenerateConfig
from llama2.generation import Sampling
from llama2.prompting import Prompting, sample_seed
from llama2.text_stream import TextStream


def main(config: GenerateConfig) -> None:
    """Answer one prompt, or a file of them, with a model."""
    prompting = Prompting.read(config.model)
    check_backend(config.generator)
    if config.input is None:
        answer_prompt(config, prompting)
    else:
        answer_file(config, prompting)


def answer_prompt(config: GenerateConfig, prompting: Prompting) -> None:
    """Print the answers to `config.prompt`; a single one as it is written."""
    asked = question("0", config.prompt, asks_chat(config, prompting), prompting)
    requests = list(samples_of(asked, config, range(config.num_samples)))
    if config.where == "here" and config.num_samples == 1:
        print_as_written(config, requests[0], asked, prompting)
        return
    for number, sample in enumerate(answers(config, iter(requests), prompting)):
        if config.num_samples > 1:
            print(f"── {number + 1} of {config.num_samples}")
        print(text(sample, asked.chat, prompting), flush=True)


def print_as_written(
    config: GenerateConfig, request: Request, asked: Question, prompting: Prompting
) -> None:
    """Print an answer token by token."""
    backend = OwnBackend(config.model, config.generator, config.precision)
    backend.submit(
        request.id, request.prompt.tolist(), config.sampling(prompting.stop_ids), request.seed
    )
    stream = TextStream(prompting.tokenizer, trim=asked.chat)
    while backend.busy:
        for token in backend.step():
            if token.token not in prompting.stop_ids:
                print(stream.add(token.token), end="", flush=True)
    print(stream.close(), flush=True)


def answer_file(config: GenerateConfig, prompting: Prompting) -> None:
    """Write the answers to all prompts of a file, in their order, behind those that are there."""
    count = sum(1 for _ in questions(config, prompting))  # all are checked before work starts
    total = count * config.num_samples
    with opened(config) as (file, written):
        wanted = sample_ids(config, prompting)
        for place, id in enumerate(written, 1):
            if next(wanted, None) != id:
                raise ValueError(
                    f"{config.output} line {place} answers {id!r}, which is not what --input asks "
                    "there; name another --output."
                )
        if len(written) == total:
            print(f"{config.output} has all {total} answers already.")
            return
        asked: deque[Question] = deque()
        requests = (
            request
            for number, found in enumerate(questions(config, prompting))
            for request in _waiting(found, asked, config, len(written), number)
        )
        bar = tqdm(total=total, initial=len(written), unit="answer", disable=None)
        with bar:
            for sample in answers(config, requests, prompting):
                file.write(line(asked.popleft(), sample, prompting))
                file.flush()
                bar.update()
    print(f"{total} answers to {count} prompts are in {config.output}.")


def sample_ids(config: GenerateConfig, prompting: Prompting) -> Iterator[str]:
    """The ids of all answers, in their order."""
    for found in questions(config, prompting):
        for number in range(config.num_samples):
            yield f"{found.id}/{number}"


def _waiting(
    found: Question, asked: "deque[Question]", config: GenerateConfig, written: int, number: int
) -> Iterator[Request]:
    """Requests of the samples that are not written, remembered until their answers are."""
    first = min(config.num_samples, max(0, written - number * config.num_samples))
    for request in samples_of(found, config, range(first, config.num_samples)):
        asked.append(found)
        yield request


def samples_of(asked: Question, config: GenerateConfig, numbers: range) -> Iterator[Request]:
    """The requests for samples of one prompt, each with an id and a seed of its own."""
    prompt = np.array(asked.tokens, dtype=np.int64)
    for number in numbers:
        yield Request(f"{asked.id}/{number}", prompt, sample_seed(config.seed, asked.id, number))


def answers(
    config: GenerateConfig, requests: Iterator[Request], prompting: Prompting
) -> Iterator[Sample]:
    """The answers to all requests, in their order, computed where the config says."""
    sampling = config.sampling(prompting.stop_ids)
    if config.where == "here":
        yield from answers_here(config, requests, sampling)
    else:
        yield from answers_on_cluster(config, requests, sampling)


def answers_here(
    config: GenerateConfig, requests: Iterator[Request], sampling: Sampling
) -> Iterator[Sample]:
    """Answers of an engine in this process.

    Up to four full batches are begun beyond the oldest answer that is not finished, so that one
    long answer does not empty the batch.
    """
    backend = OwnBackend(config.model, config.generator, config.precision)
    begun: dict[str, tuple[Request, list[int], list[float]]] = {}
    ended: dict[str, Sample] = {}
    while True:
        for request in islice(requests, 4 * config.generator.max_batch_size - len(begun)):
            backend.submit(request.id, request.prompt.tolist(), sampling, request.seed)
            begun[request.id] = (request, [], [])
        if not begun:
            return
        for token in backend.step():
            request, tokens, logprobs = begun[token.id]
            tokens.append(token.token)
            logprobs.append(token.logprob)
            if token.finish_reason is not None:
                ended[token.id] = Sample(
                    id=token.id,
                    prompt=request.prompt,
                    response=np.array(tokens, dtype=np.int64),
                    logprobs=np.array(logprobs, dtype=np.float32),
                    version=FROM_FOLDER,
                    finish_reason=token.finish_reason,
                )
        while begun and (oldest := next(iter(begun))) in ended:
            del begun[oldest]
            yield ended.pop(oldest)


def answers_on_cluster(
    config: GenerateConfig, requests: Iterator[Request], sampling: Sampling
) -> Iterator[Sample]:
    """Answers of replicas on Ray Serve, which live for the time of this call."""
    with session(config.cluster):
        check_capacity({"generator": replace(config.generator, count=config.generator.most)})
        name = f"generate-{uuid.uuid4().hex[:8]}"
        try:
            handle = deploy(name, config.model.absolute(), None, config.precision, config.generator)
            at_once = 2 * config.generator.most * config.generator.max_batch_size
            chunks = in_order(ServedModel(handle), requests, sampling, at_once, config.timeout)
            with asyncio.Runner() as runner:
                while (samples := runner.run(_next(chunks))) is not None:
                    yield from samples
        finally:
            serve.delete(name)


async def in_order(
    model: ServedModel,
    requests: Iterator[Request],
    sampling: Sampling,
    at_once: int,
    timeout: float,
) -> AsyncIterator[list[Sample]]:
    """Answers in chunks, in the order of their requests, of which about `at_once` are under way.

    Raises `TimeoutError` where a chunk takes longer than `timeout` seconds once it is its turn.
    """
    under_way: deque[tuple[str, asyncio.Task[list[Sample]]]] = deque()
    while True:
        while len(under_way) * CHUNK < at_once and (chunk := list(islice(requests, CHUNK))):
            task = asyncio.create_task(model.generate(chunk, sampling))
            under_way.append((chunk[0].id, task))
        if not under_way:
            return
        first, task = under_way.popleft()
        try:
            yield await asyncio.wait_for(task, timeout)
        except TimeoutError as error:
            raise TimeoutError(
                f"The generators did not answer {first} and the {CHUNK - 1} behind it within "
                f"{timeout:g} s; give them more time with --timeout."
            ) from error


async def _next(chunks: AsyncIterator[list[Sample]]) -> list[Sample] | None:
    return await anext(chunks, None)


if __name__ == "__main__":
    options.run(main, GenerateConfig)
