"""Likelihoods and scores against transformers, one sequence at a time, without packing."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from llama2 import checkpoint, scoring
from llama2.batches import TokenSequence
from tests.llama2.model_folders import SMALL, causal, sequence_classifier

VOCABULARY, CONTEXT = SMALL["vocab_size"], SMALL["max_position_embeddings"]


@pytest.fixture(autouse=True, params=[1, 2, 3])
def number_of_threads(threads: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """With more than one parts of the sequences are scored at the same time."""
    torch.set_num_threads(request.param)
    yield
    assert torch.get_num_threads() == request.param


def drawn(draw: random.Random, least: int, most: int) -> list[int]:
    return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(least, most))]


@pytest.mark.parametrize("batch_tokens", [1, 150, 10_000])
def test_continuations(tmp_path: Path, batch_tokens: int) -> None:
    """Also where contexts lose their beginning, and where pairs share all but their last token."""
    reference = causal()
    reference.save_pretrained(tmp_path)
    draw = random.Random(0)
    pairs = [(drawn(draw, 1, 70), drawn(draw, 1, 6)) for _ in range(12)]
    pairs += [(pairs[0][0], [token]) for token in range(4, 9)]
    pairs += [pairs[1], (pairs[2][0], drawn(draw, CONTEXT, CONTEXT))]
    with torch.no_grad():  # the likeliest next tokens of one pair
        context = pairs[3][0][-CONTEXT:]
        pairs.append((context, [int(reference(torch.tensor([context])).logits[0, -1].argmax())]))
    found = scoring.continuations(checkpoint.load(tmp_path), pairs, batch_tokens)
    for (context, continuation), likelihood in zip(pairs, found, strict=True):
        tokens = torch.tensor([*context, *continuation][-CONTEXT - 1 :])
        with torch.no_grad():
            logits = reference(tokens[None, :-1]).logits[0, -len(continuation) :]
        wanted = tokens[-len(continuation) :]
        expected = logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
        assert likelihood.logprob == pytest.approx(expected, abs=1e-3)
        assert likelihood.greedy == bool((logits.argmax(-1) == wanted).all())
    assert found[-1].greedy


def test_a_continuation_beyond_the_context(tmp_path: Path) -> None:
    causal().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens is longer than .* {CONTEXT}"):
        scoring.continuations(checkpoint.load(tmp_path), [([1], [5] * (CONTEXT + 1))])


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_sequences(tmp_path: Path, batch_tokens: int) -> None:
    """Only targets count, of which a sequence may have none."""
    reference = causal()
    reference.save_pretrained(tmp_path)
    draw = random.Random(1)
    sequences = []
    for _ in range(9):
        tokens = np.array(drawn(draw, 2, 50))
        mask = np.array([False, *(draw.random() < 0.6 for _ in tokens[1:])])
        sequences.append(TokenSequence(tokens, mask))
    sequences.append(TokenSequence(np.array([5, 6, 7]), np.zeros(3, dtype=bool)))
    found = scoring.sequence_logprobs(checkpoint.load(tmp_path), sequences, batch_tokens)
    for sequence, logprob in zip(sequences, found, strict=True):
        tokens = torch.from_numpy(sequence.tokens)
        with torch.no_grad():
            logprobs = reference(tokens[None, :-1]).logits[0].log_softmax(-1)
        chosen = logprobs.gather(1, tokens[1:, None])[:, 0]
        assert logprob == pytest.approx(float(chosen[sequence.is_target[1:]].sum()), abs=1e-3)
    each = scoring.target_logprobs(checkpoint.load(tmp_path), sequences, batch_tokens)
    for sequence, logprobs in zip(sequences, each, strict=True):
        tokens = torch.from_numpy(sequence.tokens)
        with torch.no_grad():
            expected = reference(tokens[None, :-1]).logits[0].log_softmax(-1)
        chosen = expected.gather(1, tokens[1:, None])[:, 0][sequence.is_target[1:]]
        np.testing.assert_allclose(logprobs, chosen.numpy(), atol=1e-3)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_scores_are_read_at_the_last_token(tmp_path: Path, batch_tokens: int) -> None:
    reference = sequence_classifier()
    reference.save_pretrained(tmp_path)
    draw = random.Random(2)
    sequences = [drawn(draw, 1, 50) for _ in range(9)]
    model = checkpoint.load_scalar(tmp_path)
    found = scoring.last_scores(model, sequences, batch_tokens)
    with pytest.raises(AssertionError, match="without a last token"):
        scoring.last_scores(model, [[5, 6], []], batch_tokens)
    for tokens, score in zip(sequences, found, strict=True):
        with torch.no_grad():
            assert score == pytest.approx(reference(torch.tensor([tokens])).logits.item(), abs=1e-3)
