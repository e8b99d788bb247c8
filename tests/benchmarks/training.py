"""Training steps against Transformers: forward, backward and AdamW, side by side in one run.

python -m tests.benchmarks.training
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llama2.batches import TokenSequence, pack
from llama2.config import ModelConfig
from llama2.losses import IGNORE, next_token_loss
from llama2.model import Transformer, initialize
from llama2.packing import best_fit
from tests.benchmarks.side_by_side import (
    MATMUL_FLOPS,
    Contender,
    Step,
    matmul,
    measure,
    ratio,
    with_worker_environment,
)

MODES = ("float32", "bfloat16", "autocast", "bfloat16 compiled", "autocast compiled")
VOCABULARY = 32_000


@dataclass(frozen=True)
class Shape:
    """A model and a batch."""

    width: int
    layers: int
    heads: int
    wide: int
    rows: int
    tokens: int

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            intermediate_size=self.wide,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=1024,
        )

    @property
    def flops(self) -> float:
        """Of a step: 6 per matrix weight and token, and causal attention's products."""
        matrices = VOCABULARY * self.width + self.layers * (
            4 * self.width**2 + 3 * self.width * self.wide
        )
        attention = self.layers * self.width * self.tokens  # half of 2 products of 2 T D each
        return 6 * (matrices + attention) * self.rows * self.tokens


SHAPES = {"24M": Shape(288, 6, 6, 768, 8, 512), "134M": Shape(768, 12, 12, 2048, 4, 512)}


def batch(shape: Shape) -> Tensor:
    """Token ids, [B, T + 1]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (shape.rows, shape.tokens + 1), generator=generator)


def transformers_model(shape: Shape, mode: str) -> tuple[Any, Any, Any]:
    """Model, optimizer and a function from inputs and labels to the loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.width,
        intermediate_size=shape.wide,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=1024,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    if mode.startswith("bfloat16"):
        model = model.bfloat16()

    def loss(**inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode.startswith("autocast")):
            found: Tensor = model(**inputs).loss
        return found

    compiled = torch.compile(loss) if mode.endswith("compiled") else loss
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), compiled


def transformers_step(shape: Shape, mode: str) -> Step:
    _, optimizer, loss = transformers_model(shape, mode)
    tokens = batch(shape)[:, :-1].contiguous()

    def step() -> None:
        loss(input_ids=tokens, labels=tokens).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_model(shape: Shape) -> Transformer:
    model = Transformer(shape.config)
    initialize(model, shape.config, 0)
    return model.bfloat16()


class Masters:
    """AdamW on float32 copies of bfloat16 weights, as our trainer's engine keeps them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.weights = list(model.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        torch._foreach_copy_(self.weights, self.masters)


def our_step(shape: Shape, masters: bool) -> Step:
    model, tokens = our_model(shape), batch(shape)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if masters:
        optimizer = Masters(model)

    def step() -> None:
        logprobs = model(tokens[:, :-1], targets_BT=tokens[:, 1:])
        next_token_loss(logprobs, len(logprobs)).backward()
        optimizer.step()
        if not masters:
            optimizer.zero_grad()

    return step


def dialogues(count: int) -> list[TokenSequence]:
    """Dialogues of 20 to 500 tokens, most of them short, the second half of each an answer."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(count, generator=generator) * 0.8 + 4.6
    found = []
    for length in spread.exp().clamp(20, 500).int().tolist():
        tokens = torch.randint(VOCABULARY, (length,), generator=generator).numpy()
        found.append(TokenSequence(tokens, torch.arange(length).ge(length // 2).numpy()))
    return found


SFT_DIALOGUES, SFT_ROWS, SFT_WIDTH = 32, 8, 512


def transformers_sft(shape: Shape, mode: str) -> Step:
    """Right-padded batches of 8 dialogues, in the order they come."""
    _, optimizer, loss = transformers_model(shape, mode)
    batches = []
    every = dialogues(SFT_DIALOGUES)
    for start in range(0, len(every), SFT_ROWS):
        some = every[start : start + SFT_ROWS]
        padded = [
            torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=fill)
            for columns, fill in (
                ([torch.from_numpy(d.tokens) for d in some], 0),
                ([torch.ones(len(d.tokens), dtype=torch.long) for d in some], 0),
                ([torch.where(torch.from_numpy(d.is_target), torch.from_numpy(d.tokens), IGNORE)
                  for d in some], IGNORE),
            )
        ]  # fmt: skip
        names = ("input_ids", "attention_mask", "labels")
        batches.append(dict(zip(names, padded, strict=True)))

    def step() -> None:
        for inputs in batches:
            loss(**inputs).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def our_sft(shape: Shape) -> Step:
    """The same dialogues packed into rows of 512, in as many steps."""
    model, every = our_model(shape), dialogues(SFT_DIALOGUES)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = best_fit([len(d.tokens) - 1 for d in every], SFT_WIDTH)
    steps = SFT_DIALOGUES // SFT_ROWS
    batches = [
        pack([[every[i] for i in row] for row in rows[first::steps]]) for first in range(steps)
    ]

    def step() -> None:
        for part in batches:
            logprobs = model(part.tokens_BT, part.segments_BT, targets_BT=part.targets_BT)
            next_token_loss(logprobs, len(logprobs)).backward()
            optimizer.step()
            optimizer.zero_grad()

    return step


def best_mode(make: Any, shape: Shape, modes: tuple[str, ...]) -> str:
    """The mode in which Transformers is fastest, each tried alone."""
    found = {}
    for mode in modes:
        found[mode] = measure([Contender(mode, make, (shape, mode))], steps=3)[mode].best
        print(f"    transformers, {mode}: {found[mode] * 1e3:.0f} ms", flush=True)
    return min(found, key=lambda mode: found[mode])


def compare(name: str, shape: Shape, steps: int) -> None:
    """Pretraining steps."""
    tokens = shape.rows * shape.tokens
    print(f"{name}: {shape.rows} x {shape.tokens} tokens", flush=True)
    best = best_mode(transformers_step, shape, MODES)
    timings = measure(
        [
            Contender("transformers", transformers_step, (shape, best)),
            Contender("ours", our_step, (shape, False)),
            Contender("ours, float32 masters", our_step, (shape, True)),
            Contender("matmul", matmul),
        ],
        steps,
    )
    peak = MATMUL_FLOPS / timings.pop("matmul").best / 1e9
    for who, timing in timings.items():
        label = f"{who} ({best})" if who == "transformers" else who
        rate = shape.flops / timing.best / 1e9
        print(
            f"  {label:34} {tokens / timing.median:7.0f} tokens/s  best {tokens / timing.best:7.0f}"
            f"  x{ratio(timings['transformers'], timing):.2f}  {rate:4.0f} GFLOP/s = "
            f"{rate / peak:.0%} of a matmul's {peak:.0f}  peak {timing.peak_mib:5.0f} MiB",
            flush=True,
        )


def compare_sft(name: str, shape: Shape, steps: int) -> None:
    """SFT on dialogues of mixed length: useful tokens, without padding."""
    useful = sum(len(d.tokens) for d in dialogues(SFT_DIALOGUES))
    print(f"{name}: SFT on {SFT_DIALOGUES} dialogues, {useful} tokens", flush=True)
    # Compiled graphs would be compiled again for the width of every batch.
    best = best_mode(transformers_sft, shape, ("bfloat16", "autocast"))
    timings = measure(
        [
            Contender("transformers", transformers_sft, (shape, best)),
            Contender("ours", our_sft, (shape,)),
        ],
        steps,
    )
    for who, timing in timings.items():
        label = f"{who} ({best}, padded)" if who == "transformers" else f"{who} (packed)"
        print(
            f"  {label:34} {useful / timing.median:7.0f} tokens/s"
            f"  x{ratio(timings['transformers'], timing):.2f}  peak {timing.peak_mib:5.0f} MiB",
            flush=True,
        )


def main() -> None:
    """Print a table per shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12, help="steps of each contender")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    with_worker_environment()
    for name in options.shapes:
        compare(name, SHAPES[name], options.steps)
    compare_sft("24M", SHAPES["24M"], options.steps)


if __name__ == "__main__":
    main()
