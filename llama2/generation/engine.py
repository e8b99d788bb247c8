"""Batched generation with a key/value cache. Shapes: B rows, T tokens, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llama2.attention import KeyValueCache
from llama2.generation.sampling import Sampling, draw
from llama2.model import Transformer


@dataclass(frozen=True)
class Completion:
    """An answer: token ids, and the log-probability of each at temperature 1 without truncation."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]


class Engine:
    """Generates for batches of up to `max_batch_size` prompts, dropping each row once it has
    ended."""

    def __init__(self, model: Transformer, max_batch_size: int = 256) -> None:
        self.model = model
        self.max_batch_size = max_batch_size

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
    ) -> list[Completion]:
        """One completion per prompt of token ids, in order.

        seeds: one per prompt; its draws depend on nothing else, whatever is in the same batch.
        By default they are counted up from `sampling.seed`.
        Raises `ValueError` for a prompt that is empty, holds ids outside the vocabulary, or leaves
        no room in the context.
        """
        sampling = sampling or Sampling()
        seeds = range(sampling.seed, sampling.seed + len(prompts)) if seeds is None else seeds
        assert len(seeds) == len(prompts)
        self._check(prompts)
        # Prompts of like length share a batch, so that little padding is computed.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.max_batch_size):
            batch = order[start : start + self.max_batch_size]
            completions.update(_Batch(self.model, prompts, batch, sampling, seeds).run())
        return [completions[i] for i in range(len(prompts))]

    def _check(self, prompts: Sequence[Sequence[int]]) -> None:
        context, vocabulary = (
            self.model.config.max_position_embeddings,
            self.model.config.vocab_size,
        )
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"Prompt {i} is empty; give at least the beginning-of-text token.")
            if len(prompt) >= context:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens, which leaves no room for an answer "
                    f"in the context of {context}; shorten it."
                )
            if min(prompt) < 0 or max(prompt) >= vocabulary:
                raise ValueError(
                    f"Prompt {i} holds a token id outside the vocabulary of {vocabulary}; "
                    "use the model's own tokenizer."
                )


class _Batch:
    """Rows that are generated together: prompts padded left, so that all write the same column."""

    def __init__(
        self,
        model: Transformer,
        prompts: Sequence[Sequence[int]],
        batch: list[int],
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> None:
        self.model, self.sampling = model, sampling
        self.device = model.lm_head.weight.device
        self.rows = torch.tensor(batch, device=self.device)
        width = max(len(prompts[i]) for i in batch)
        context = model.config.max_position_embeddings
        self.limits = torch.tensor(
            [min(sampling.max_new_tokens, context - len(prompts[i])) for i in batch],
            device=self.device,
        )
        self.steps = int(self.limits.max())
        self.inputs = torch.zeros(len(batch), width, dtype=torch.long)
        self.segments = torch.zeros(len(batch), width, dtype=torch.long)
        for row, i in enumerate(batch):
            self.inputs[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            self.segments[row, width - len(prompts[i]) :] = 1
        self.inputs, self.segments = self.inputs.to(self.device), self.segments.to(self.device)
        self.cache = KeyValueCache(
            model.config, len(batch), width + self.steps, model.lm_head.weight.dtype, self.device
        )
        self.uniforms = torch.stack([self._uniforms(seeds[i]) for i in batch]).to(self.device)
        self.stop = torch.tensor(sampling.stop_ids, device=self.device)
        self.alive = torch.ones(len(batch), dtype=torch.bool, device=self.device)
        self.tokens: dict[int, list[int]] = {i: [] for i in batch}
        self.logprobs: dict[int, list[float]] = {i: [] for i in batch}
        self.stopped: set[int] = set()

    def _uniforms(self, seed: int) -> Tensor:
        return torch.rand(self.steps, generator=torch.Generator().manual_seed(seed))

    def run(self) -> dict[int, Completion]:
        for step in range(self.steps):
            tokens, logprobs = self._step(step)
            self._record(tokens, logprobs)
            stops = torch.isin(tokens, self.stop) & self.alive
            self.stopped.update(self.rows[stops].tolist())
            self.alive &= ~stops & (self.limits > step + 1)
            if not self.alive.any():
                break
            self._advance(tokens)
        return {
            i: Completion(
                self.tokens[i], self.logprobs[i], "stop" if i in self.stopped else "length"
            )
            for i in self.tokens
        }

    def _step(self, step: int) -> tuple[Tensor, Tensor]:
        hidden = self.model.model(self.inputs, self.segments, self.cache)
        logits = self.model.lm_head(hidden[:, -1]).float()
        tokens = draw(logits, self.sampling, self.uniforms[:, step])
        chosen = logits.gather(1, tokens[:, None])[:, 0]
        return tokens, chosen - logits.logsumexp(dim=-1)

    def _record(self, tokens: Tensor, logprobs: Tensor) -> None:
        columns = (self.rows, tokens, logprobs)
        for i, token, logprob in zip(*(c[self.alive].tolist() for c in columns), strict=True):
            self.tokens[i].append(token)
            self.logprobs[i].append(logprob)

    def _advance(self, tokens: Tensor) -> None:
        # Dropping rows copies the cache, which costs about a step: wait until a quarter is idle.
        if self.alive.float().mean() < 0.75:
            kept = self.alive.nonzero()[:, 0]
            self.cache.keep(kept)
            self.rows, self.limits = self.rows[kept], self.limits[kept]
            self.uniforms, self.alive, tokens = self.uniforms[kept], self.alive[kept], tokens[kept]
        self.inputs = tokens[:, None]
        self.segments = torch.ones_like(self.inputs)
