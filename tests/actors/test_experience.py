"""From samples to advantages, against the arithmetic of one sample worked out by hand."""

from dataclasses import replace

import numpy as np
import torch

from actors.experience import (
    ExperienceBatch,
    collate,
    whiten_advantages,
    with_advantages,
    with_reference,
)
from actors.records import Experience, Sample
from cluster import training
from cluster.weights import Version


def experience(prompt: list[int], response: list[int], score: float) -> Experience:
    sample = Sample(
        id="0",
        prompt=np.array(prompt),
        response=np.array(response),
        logprobs=-np.arange(1, len(response) + 1, dtype=np.float32),
        version=Version(0, "x"),
        finish_reason="stop",
    )
    return Experience(sample, lambda: -np.ones(len(response), dtype=np.float32), score)


def told(*experiences: Experience) -> ExperienceBatch:
    return with_reference(collate(experiences, torch.device("cpu")), experiences)


def test_answers_lie_where_they_are_predicted() -> None:
    batch = collate(
        [experience([1, 5, 6], [7, 2], 1.0), experience([1], [9, 8, 2], -1.0)], torch.device("cpu")
    )
    assert batch.tokens_BT.tolist() == [[1, 5, 6, 7], [1, 9, 8, 0]]
    assert batch.mask_BT.tolist() == [[False, False, True, True], [True, True, True, False]]
    assert batch.sampled_logprobs_BT.tolist() == [[0, 0, -1, -2], [-1, -2, -3, 0]]
    assert batch.targets_BT[batch.mask_BT].tolist() == [7, 2, 9, 8, 2]


def test_rewards_and_advantages_of_one_sample() -> None:
    batch = told(experience([1, 5, 6], [7, 2], 3.0))
    old = torch.tensor([[0.0, 0.0, -0.5, -2.0]])
    values = torch.tensor([[0.0, 0.0, 0.25, 1.0]])
    batch = replace(batch, old_logprobs_BT=old, values_BT=values)
    found = with_advantages(batch, kl_coefficient=0.1, gamma=1.0, lam=0.5)
    # KL terms -0.5+1 and -2+1; rewards -0.05 and 0.1 + 3; the last error 3.1 - 1, the first
    # -0.05 + 1 - 0.25, with half of the last behind it.
    expected = torch.tensor([[0.0, 0.0, 0.7 + 0.5 * 2.1, 2.1]])
    torch.testing.assert_close(found.advantages_BT, expected)
    torch.testing.assert_close(found.returns_BT, expected + values)


def test_whitening_spans_all_minibatches(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(training, "all_reduce", lambda sums: sums)
    batches = []
    for score in (2.0, -1.0, 0.5):
        batch = told(experience([1, 4], [5, 6, 2], score))
        zeros = torch.zeros_like(batch.sampled_logprobs_BT)
        batch = replace(batch, old_logprobs_BT=zeros - 1)
        batches.append(with_advantages(batch, 0.1, 1.0, 0.9))
    found = whiten_advantages([[batches[0], batches[1]], [batches[2]]])
    flat = torch.cat([b.advantages_BT[b.mask_BT] for group in found for b in group])
    torch.testing.assert_close(flat.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(flat.square().mean(), torch.tensor(1.0), atol=1e-5, rtol=0)
    raw = torch.cat([b.advantages_BT[b.mask_BT] for b in batches])
    torch.testing.assert_close(flat, (raw - raw.mean()) / raw.std(correction=0))
