"""Forward passes that only measure: how likely texts are, and what reward models say of them.

Sequences lie one behind the other in a single row, so nothing is padded, and attention keeps to
each (`llama2/documents.py`). Shapes: B rows (here 1), T tokens, D model width, N tokens whose
likelihood is asked.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from llama2.at_once import at_a_time, at_once
from llama2.batches import FloatArray, TokenArray, TokenSequence
from llama2.model import ScalarModel, Transformer
from llama2.packing import balance

T = TypeVar("T")
Tokens = Sequence[int] | TokenArray
BATCH_TOKENS = 16_384
"""Tokens whose activations are held at a time; a longer sequence goes by itself."""
GREEDY_LOGITS = 1 << 25
"""Logits that are computed at a time to find the likeliest tokens."""


@dataclass(frozen=True)
class Likelihood:
    """Log-probability of some tokens given all before them, in nats, and whether each of them was
    the likeliest."""

    logprob: float
    greedy: bool


def continuations(
    model: Transformer,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_tokens: int = BATCH_TOKENS,
) -> list[Likelihood]:
    """How likely each continuation is behind its context; both are token ids, neither is empty.

    Pairs that differ in their last token alone, as the letters that answer a question, share one
    pass. Raises `ValueError` for a continuation that does not fit the model's context, before
    anything is computed; a context that is too long loses its beginning.
    """
    room = model.config.max_position_embeddings
    longest = max((len(continuation) for _, continuation in pairs), default=0)
    if longest > room:
        raise ValueError(
            f"A continuation of {longest} tokens is longer than the model's context of {room}; "
            "leave that task out, or take a model with a longer context."
        )
    asked: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        assert len(context) and len(continuation)
        asked.setdefault(tuple([*context, *continuation][-room - 1 : -1]), []).append(index)
    inputs = list(asked)

    def measure(numbers: list[int]) -> dict[int, Likelihood]:
        batch = [inputs[i] for i in numbers]
        starts = _starts(batch)
        owners = [i for tokens in batch for i in asked[tokens]]
        lasts = [s + len(t) for t, s in zip(batch, starts, strict=True) for _ in asked[t]]
        counts = [len(pairs[i][1]) for i in owners]
        places = [p for last, n in zip(lasts, counts, strict=True) for p in range(last - n, last)]
        targets = [token for i in owners for token in pairs[i][1]]
        logprobs, greedy = _likelihoods(model, _hidden(model, batch, places), targets)
        ends = np.cumsum(counts).tolist()
        parts = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
        return {
            i: Likelihood(sum(logprobs[part]), all(greedy[part]))
            for i, part in zip(owners, parts, strict=True)
        }

    found = _by_batch([len(tokens) for tokens in inputs], batch_tokens, measure)
    return [found[i] for i in range(len(pairs))]


def sequence_logprobs(
    model: Transformer, sequences: Sequence[TokenSequence], batch_tokens: int = BATCH_TOKENS
) -> list[float]:
    """Log-probability of each sequence's targets given all before them, in nats."""
    found = target_logprobs(model, sequences, batch_tokens)
    return [float(of_targets.sum(dtype=np.float64)) for of_targets in found]


def target_logprobs(
    model: Transformer, sequences: Sequence[TokenSequence], batch_tokens: int = BATCH_TOKENS
) -> list[FloatArray]:
    """Log-probability of each of a sequence's targets given all before it, in nats."""
    inputs = [sequence.tokens[:-1] for sequence in sequences]

    def measure(numbers: list[int]) -> dict[int, FloatArray]:
        batch = [inputs[i] for i in numbers]
        wanted = [np.flatnonzero(sequences[i].is_target[1:]) for i in numbers]
        places = np.concatenate([w + s for w, s in zip(wanted, _starts(batch), strict=True)])
        targets = [
            int(t) for i, w in zip(numbers, wanted, strict=True) for t in sequences[i].tokens[1:][w]
        ]
        logprobs_N = _logprobs(model, _hidden(model, batch, places.tolist()), targets)
        parts = logprobs_N.cpu().split([len(w) for w in wanted])
        return {i: part.numpy() for i, part in zip(numbers, parts, strict=True)}

    found = _by_batch([len(tokens) for tokens in inputs], batch_tokens, measure)
    return [found[i] for i in range(len(sequences))]


def last_scores(
    model: ScalarModel, sequences: Sequence[Tokens], batch_tokens: int = BATCH_TOKENS
) -> list[float]:
    """What a reward model says at the last token of each sequence, before the sigmoid."""
    assert all(len(tokens) for tokens in sequences), "a sequence without a last token"

    def measure(numbers: list[int]) -> dict[int, float]:
        batch = [sequences[i] for i in numbers]
        tokens_BT, segments_BT = _row(batch)
        device = model.score.weight.device
        ends = [start + len(s) - 1 for start, s in zip(_starts(batch), batch, strict=True)]
        is_end_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        is_end_BT[0, ends] = True
        scores_T = model(tokens_BT.to(device), segments_BT.to(device), is_end_BT.to(device))[0]
        return dict(zip(numbers, scores_T.cpu()[ends].tolist(), strict=True))

    found = _by_batch([len(tokens) for tokens in sequences], batch_tokens, measure)
    return [found[i] for i in range(len(sequences))]


def _by_batch(
    lengths: Sequence[int], batch_tokens: int, measure: Callable[[list[int]], dict[int, T]]
) -> dict[int, T]:
    """What `measure` finds for batches of indices, as many of them at once as there are CPU
    threads."""
    room = batch_tokens // max([1, *lengths])  # for whole sequences at a time
    parts = balance(lengths, at_a_time(min(len(lengths), room)))

    def work(part: list[int]) -> Iterator[dict[int, T]]:
        for batch in _batches(part, lengths, batch_tokens // len(parts)):
            with torch.inference_mode():  # which a thread has for itself
                found = measure(batch)
            yield found

    found = at_once([work(part) for part in parts])
    return {i: value for of_work in found for batch in of_work for i, value in batch.items()}


def _batches(part: list[int], lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices by batch, longest first, of at most `batch_tokens` unless one alone is longer."""
    batch: list[int] = []
    held = 0
    for index in sorted(part, key=lambda i: -lengths[i]):
        if batch and held + lengths[index] > batch_tokens:
            yield batch
            batch, held = [], 0
        batch.append(index)
        held += lengths[index]
    if batch:
        yield batch


def _starts(sequences: Sequence[Tokens]) -> list[int]:
    """Where each sequence begins, one behind the other."""
    return [0, *np.cumsum([len(tokens) for tokens in sequences]).tolist()[:-1]]


def _row(sequences: Sequence[Tokens]) -> tuple[Tensor, Tensor]:
    """tokens_BT and segments_BT of one row that holds all sequences."""
    lengths = [len(tokens) for tokens in sequences]
    tokens_T = np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in sequences])
    segments_T = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return torch.from_numpy(tokens_T)[None], torch.from_numpy(segments_T)[None]


def _hidden(model: Transformer, sequences: Sequence[Tokens], places: Sequence[int]) -> Tensor:
    """Hidden states [N, D] of the tokens at `places` of the row."""
    device = model.lm_head.weight.device
    places_N = torch.tensor(places, dtype=torch.long, device=device)
    hidden: Tensor = model.model(*(x.to(device) for x in _row(sequences)), places_N)
    return hidden


def _logprobs(model: Transformer, hidden_ND: Tensor, targets: Sequence[int]) -> Tensor:
    """Log-probability of each target behind its token, float32 [N]."""
    targets_N = torch.tensor(targets, dtype=torch.long, device=hidden_ND.device)
    logprobs_N: Tensor = model.lm_head(hidden_ND, targets_N)
    return logprobs_N


def _likelihoods(
    model: Transformer, hidden_ND: Tensor, targets: Sequence[int]
) -> tuple[list[float], list[bool]]:
    logprobs_N = _logprobs(model, hidden_ND, targets)
    size = max(1, GREEDY_LOGITS // model.config.vocab_size)
    likeliest_N = torch.cat([model.lm_head(part).argmax(dim=-1) for part in hidden_ND.split(size)])
    greedy = [a == b for a, b in zip(likeliest_N.tolist(), targets, strict=True)]
    return logprobs_N.tolist(), greedy
