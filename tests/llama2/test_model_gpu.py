"""The model on a GPU against the same model on the CPU."""

import pytest
import torch

from llama2.batches import TokenSequence, pack
from llama2.config import ModelConfig
from llama2.losses import next_token_loss
from llama2.model import Transformer, initialize

pytestmark = pytest.mark.gpu
CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=256,
)


@pytest.mark.parametrize(
    ("dtype", "loss_tolerance", "gradient_tolerance"),
    [(torch.float32, 1e-5, 1e-3), (torch.bfloat16, 1e-2, 3e-2)],
)
def test_packed_documents_give_the_cpus_loss_and_gradients(
    dtype: torch.dtype, loss_tolerance: float, gradient_tolerance: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(512, (n,), generator=generator).numpy() for n in (3, 250, 40, 41, 9)]
    documents = [TokenSequence(tokens, tokens >= 0) for tokens in drawn]
    batch = pack([documents[:1] + documents[2:4], documents[1:2], documents[4:]])
    results = []
    for device, precision in (("cpu", torch.float32), ("cuda", dtype)):
        model = Transformer(CONFIG)
        initialize(model, CONFIG, 0)
        model = model.to(device, precision)
        there = batch.to(torch.device(device))
        logprobs = model(there.tokens_BT, there.segments_BT, targets_BT=there.targets_BT)
        loss = next_token_loss(logprobs, len(logprobs))
        loss.backward()
        gradients = [parameter.grad.cpu().float() for parameter in model.parameters()]
        results.append((float(loss), gradients))
    (expected, theirs), (found, ours) = results
    assert abs(found - expected) < loss_tolerance * expected
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < gradient_tolerance * other.norm()
