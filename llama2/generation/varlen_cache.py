"""Keys and values in pages, and torch's attention of variable length over them: for GPUs.

Shapes: N tokens, H query heads, G key/value heads, K head width, R rows, P tokens of a page.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama2.config import ModelConfig
from llama2.generation.decoder import Span

PAGE = 256  # what flash attention asks of pages


class Reading(NamedTuple):
    """What a forward pass writes and reads. slots_N: where its tokens' keys and values go.
    starts: first token of each row and the end. bounds: the same of what the rows' pages hold.
    lengths_R: tokens that a row sees. pages: of each row, [R, most]. longest_query, longest: bounds
    of what the rows compute and see."""

    slots_N: Tensor
    starts: Tensor
    bounds: Tensor
    lengths_R: Tensor
    pages: Tensor
    longest_query: int
    longest: int


def reads_pages(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch's attention of variable length does, for such keys: on GPUs, from torch 2.13
    on, by flash attention, which knows no float32."""
    known = dtype in (torch.bfloat16, torch.float16) and device.type == "cuda"
    return known and bool(torch.__version__ >= "2.13")


def bounds(rows: int, most: int, device: torch.device) -> Tensor:
    """Where each row's tokens would begin, were its `most` pages one behind the other; and the end.
    Flash attention asks for it, and computes by pages and lengths."""
    return torch.arange(rows + 1, dtype=torch.int32, device=device) * (most * PAGE)


class VarlenCache:
    """`pages` pages of keys and values for every layer, in bfloat16 or float16, and one more that
    idle rows of a captured graph write to."""

    page_size = PAGE

    def __init__(
        self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        groups, width = config.num_key_value_heads, config.head_width
        shape = (config.num_hidden_layers, pages + 1, PAGE, groups, width)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.reading: Reading | None = None
        self._device = device

    def clear(self) -> None:
        """Zero all pages."""
        self.keys.zero_()
        self.values.zero_()

    def copy(self, source: int, target: int) -> None:
        """Give one page the content of another."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def begin(self, spans: Sequence[Span]) -> None:
        """Prepare a forward pass over the tokens of `spans`."""
        starts, slots = [0], []
        for pages, past, length, _ in spans:
            positions = range(past, past + length)
            slots += [pages[position // PAGE] * PAGE + position % PAGE for position in positions]
            starts.append(starts[-1] + length)
        lengths = [span.past + span.length for span in spans]
        most = max(len(span.pages) for span in spans)
        table = [[*span.pages, *[0] * (most - len(span.pages))] for span in spans]
        self.reading = Reading(
            torch.tensor(slots, device=self._device),
            self._int32(starts),
            bounds(len(spans), most, self._device),
            self._int32(lengths),
            self._int32(table),
            max(span.length for span in spans),
            max(lengths),
        )

    def attend(self, layer: int, query_NHK: Tensor, key_value_NGK: Tensor) -> Tensor:
        """Store keys and values of the batch's tokens and return what their queries see, NHK."""
        # Only there is it needed, and importing it takes a while.
        from torch.nn.attention.varlen import varlen_attn

        assert self.reading is not None
        slots_N, starts, ends, lengths_R, pages, longest_query, longest = self.reading
        keys, values = self.keys[layer], self.values[layer]
        key_NGK, value_NGK = key_value_NGK.chunk(2, dim=1)
        keys.flatten(0, 1).index_copy_(0, slots_N, key_NGK)
        values.flatten(0, 1).index_copy_(0, slots_N, value_NGK)
        mixed_NHK = varlen_attn(
            query_NHK.contiguous(),
            keys,
            values,
            starts,
            ends,
            longest_query,
            longest,
            window_size=(-1, 0),
            enable_gqa=query_NHK.shape[1] != key_NGK.shape[1],
            seqused_k=lengths_R,
            block_table=pages,
            # Rows do not depend on each other, and parts of packed rows are not joined aright.
            num_splits=1,
        )
        assert isinstance(mixed_NHK, Tensor)
        return mixed_NHK

    def _int32(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)
