"""Operators of a training step, forward and backward, for bfloat16 on a CPU. Their callers compute
the same with torch's operators where these do not fit.

Shapes: N tokens, B rows, T tokens, D model width, H heads, K head width, V vocabulary.
"""

from ctypes import CDLL, Structure, byref, c_int32, c_void_p

import torch
from torch import Tensor

from llama2.cpu.kernels import kernels


class _Heads(Structure):
    _fields_ = [
        *[(name, c_void_p) for name in ("query", "key", "value", "mixed", "logs")],
        *[(f"grad_{name}", c_void_p) for name in ("mixed", "query", "key", "value")],
        *[(name, c_int32) for name in ("rows", "tokens", "heads", "width", "threads")],
    ]


def fits(*tensors: Tensor) -> bool:
    """Whether this machine computes these in compiled code."""
    bfloat16 = all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)
    return bfloat16 and kernels() is not None


def normalize(x: Tensor, scale_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * scale, and one over the root mean square, [..., 1] in float32."""
    assert x.shape[-1:] == scale_D.shape
    x, scale_D = x.contiguous(), scale_D.contiguous()
    y, inverses = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    pointers = _pointers(x, scale_D, y, inverses)
    _kernels().normalize(*pointers, inverses.numel(), len(scale_D), eps, _threads())
    return y, inverses


def normalize_back(
    x: Tensor, inverses: Tensor, scale_D: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by x and by the scale."""
    assert x.shape[-1:] == scale_D.shape and x.shape == grad.shape
    x, scale_D, grad = x.contiguous(), scale_D.contiguous(), grad.contiguous()
    grad_x, grad_scale_D = torch.empty_like(x), torch.empty_like(scale_D, dtype=torch.float32)
    pointers = _pointers(x, inverses, scale_D, grad, grad_x, grad_scale_D)
    _kernels().normalize_back(*pointers, inverses.numel(), len(scale_D), _threads())
    return grad_x, grad_scale_D.to(scale_D.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    assert gate.shape == up.shape
    gate, up = gate.contiguous(), up.contiguous()
    mixed = torch.empty_like(gate)
    _kernels().swiglu(*_pointers(gate, up, mixed), gate.numel(), _threads())
    return mixed


def swiglu_back(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by gate and up, and silu(gate) * up again."""
    assert gate.shape == up.shape == grad.shape
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    made = torch.empty_like(gate), torch.empty_like(gate), torch.empty_like(gate)
    _kernels().swiglu_back(*_pointers(gate, up, grad, *made), gate.numel(), _threads())
    return made


def turn(x_BTHK: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    """Heads turned to their positions, or with `direction` -1 back. cos, sin: [B or 1, T, H K], the
    sines of a head's first half with a minus."""
    x_BTHK = x_BTHK.contiguous()
    turned_BTHK = torch.empty_like(x_BTHK)
    batch, tokens, heads, width = x_BTHK.shape
    assert cos.shape == sin.shape and cos.shape[1] == tokens and cos.shape[2] >= heads * width
    if cos.stride() != sin.stride() or cos.stride()[1:] != (cos.stride(1), 1):
        cos, sin = cos.contiguous(), sin.contiguous()
    assert len(cos) == 1 or (len(cos), cos.stride(0)) == (batch, tokens * cos.stride(1))
    _kernels().turn(
        *_pointers(x_BTHK, cos, sin, turned_BTHK), batch * tokens, heads * width, width,
        len(cos) * tokens, cos.stride(1), direction < 0, _threads(),
    )  # fmt: skip
    return turned_BTHK


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of [B, T, H, K] each, and the logarithms of each query's sum of
    exponentials, [B, H, T] in float32."""
    assert query.shape == key.shape == value.shape
    batch, tokens, heads, _ = query.shape
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    mixed = torch.empty_like(query)
    logs_BHT = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    pointers = _pointers(query, key, value, mixed, logs_BHT)
    _kernels().attend(byref(_Heads(*pointers, *[None] * 4, *query.shape, _threads())))
    return mixed, logs_BHT


def attend_back(
    query: Tensor, key: Tensor, value: Tensor, mixed: Tensor, logs_BHT: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by query, key and value."""
    assert query.shape == key.shape == value.shape == grad.shape
    query, key, value, grad = (x.contiguous() for x in (query, key, value, grad))
    made = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    pointers = _pointers(query, key, value, mixed, logs_BHT, grad, *made)
    _kernels().attend_back(byref(_Heads(*pointers, *query.shape, _threads())))
    return made


def softmax(logits_NV: Tensor, targets_N: Tensor, becomes_error: bool) -> Tensor:
    """Log-probabilities [N] of targets, in float32. With `becomes_error`, softmax - onehot takes
    the place of the logits.

    Raises `IndexError` for targets outside the vocabulary.
    """
    tokens, vocabulary = logits_NV.shape
    if tokens and not 0 <= targets_N.min() <= targets_N.max() < vocabulary:
        raise IndexError(f"There are targets outside the vocabulary of {vocabulary}.")
    targets_N = targets_N.contiguous()
    assert logits_NV.is_contiguous() and targets_N.dtype == torch.int64
    logprobs_N = logits_NV.new_empty(tokens, dtype=torch.float32)
    pointers = _pointers(logits_NV, targets_N, logprobs_N)
    _kernels().softmax(*pointers, tokens, vocabulary, becomes_error, _threads())
    return logprobs_N


def _kernels() -> CDLL:
    found = kernels()
    assert found is not None, "these tensors do not fit"
    return found


def _pointers(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]


def _threads() -> int:
    return torch.get_num_threads()
