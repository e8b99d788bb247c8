"""Forward passes that only measure: how likely texts are, and what reward models say of them.

Sequences lie one behind the other in a single row, so nothing is padded, and attention keeps to
each (`llama2/documents.py`). Shapes: B rows (here 1), T tokens, D model width, N tokens whose
likelihood is asked.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama2.batches import TokenSequence
from llama2.model import ScalarModel, Transformer

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


@torch.inference_mode()
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
    found: dict[int, Likelihood] = {}
    inputs = list(asked)
    for numbers in _numbered([len(tokens) for tokens in inputs], batch_tokens):
        batch = [inputs[i] for i in numbers]
        hidden_TD, starts = _hidden(model, batch)
        owners = [i for tokens in batch for i in asked[tokens]]
        lasts = [s + len(t) for t, s in zip(batch, starts, strict=True) for _ in asked[t]]
        counts = [len(pairs[i][1]) for i in owners]
        places = [p for last, n in zip(lasts, counts, strict=True) for p in range(last - n, last)]
        targets = [token for i in owners for token in pairs[i][1]]
        logprobs, greedy = _likelihoods(model, hidden_TD, places, targets)
        ends = np.cumsum(counts)
        for i, end, n in zip(owners, ends.tolist(), counts, strict=True):
            part = slice(end - n, end)
            found[i] = Likelihood(sum(logprobs[part]), all(greedy[part]))
    return [found[i] for i in range(len(pairs))]


@torch.inference_mode()
def sequence_logprobs(
    model: Transformer, sequences: Sequence[TokenSequence], batch_tokens: int = BATCH_TOKENS
) -> list[float]:
    """Log-probability of each sequence's targets given all before them, in nats."""
    found: dict[int, float] = {}
    inputs = [tuple(sequence.tokens[:-1].tolist()) for sequence in sequences]
    for numbers in _numbered([len(tokens) for tokens in inputs], batch_tokens):
        hidden_TD, starts = _hidden(model, [inputs[i] for i in numbers])
        wanted = [np.flatnonzero(sequences[i].is_target[1:]) for i in numbers]
        places = np.concatenate([w + s for w, s in zip(wanted, starts, strict=True)])
        targets = [
            int(t) for i, w in zip(numbers, wanted, strict=True) for t in sequences[i].tokens[1:][w]
        ]
        logprobs_N = _logprobs(model, hidden_TD, places.tolist(), targets)
        parts = logprobs_N.cpu().double().split([len(w) for w in wanted])
        found.update({i: float(part.sum()) for i, part in zip(numbers, parts, strict=True)})
    return [found[i] for i in range(len(sequences))]


@torch.inference_mode()
def last_scores(
    model: ScalarModel, sequences: Sequence[Sequence[int]], batch_tokens: int = BATCH_TOKENS
) -> list[float]:
    """What a reward model says at the last token of each sequence, before the sigmoid."""
    found: dict[int, float] = {}
    for numbers in _numbered([len(tokens) for tokens in sequences], batch_tokens):
        tokens_BT, segments_BT, starts = _row([sequences[i] for i in numbers])
        device = model.score.weight.device
        ends = [start + len(sequences[i]) - 1 for start, i in zip(starts, numbers, strict=True)]
        is_end_BT = torch.zeros_like(tokens_BT, dtype=torch.bool)
        is_end_BT[0, ends] = True
        scores_T = model(tokens_BT.to(device), segments_BT.to(device), is_end_BT.to(device))[0]
        found.update(zip(numbers, scores_T.cpu()[ends].tolist(), strict=True))
    return [found[i] for i in range(len(sequences))]


def _numbered(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices by batch, longest first, of at most `batch_tokens` unless one alone is longer."""
    batch: list[int] = []
    held = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and held + lengths[index] > batch_tokens:
            yield batch
            batch, held = [], 0
        batch.append(index)
        held += lengths[index]
    if batch:
        yield batch


def _row(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, list[int]]:
    """tokens_BT and segments_BT of one row that holds all sequences, and where each begins."""
    lengths = [len(tokens) for tokens in sequences]
    tokens_T = np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in sequences])
    segments_T = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    starts = [0, *np.cumsum(lengths).tolist()[:-1]]
    return torch.from_numpy(tokens_T)[None], torch.from_numpy(segments_T)[None], starts


def _hidden(model: Transformer, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    tokens_BT, segments_BT, starts = _row(sequences)
    device = model.lm_head.weight.device
    return model.model(tokens_BT.to(device), segments_BT.to(device))[0], starts


def _logprobs(
    model: Transformer, hidden_TD: Tensor, places: Sequence[int], targets: Sequence[int]
) -> Tensor:
    """Log-probability of each target behind the token at its place, float32 [N]."""
    at = torch.tensor(places, device=hidden_TD.device)
    logprobs_N: Tensor = model.lm_head(hidden_TD[at], torch.tensor(targets, device=at.device))
    return logprobs_N


def _likelihoods(
    model: Transformer, hidden_TD: Tensor, places: Sequence[int], targets: Sequence[int]
) -> tuple[list[float], list[bool]]:
    logprobs_N = _logprobs(model, hidden_TD, places, targets)
    greedy: list[bool] = []
    size = max(1, GREEDY_LOGITS // model.config.vocab_size)
    for start in range(0, len(places), size):
        at = torch.tensor(places[start : start + size], device=hidden_TD.device)
        likeliest_N = model.lm_head(hidden_TD[at]).argmax(dim=-1)
        wanted = targets[start : start + size]
        greedy += [a == b for a, b in zip(likeliest_N.tolist(), wanted, strict=True)]
    return logprobs_N.tolist(), greedy
