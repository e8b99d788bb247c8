"""A product with one of the model's matrices. Shapes: N tokens, I inputs, O outputs."""

import torch
import torch.nn.functional as F
from torch import Tensor


class Product:
    """x W^T + b.

    A CPU multiplies a few rows by a bfloat16 matrix up to three times as fast where the matrix is
    laid out for it; the result is the same to the bit. So a copy laid out that way is kept there,
    made at the first product.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None) -> None:
        self._weight, self._bias = weight_OI, bias_O
        self._lays_out = (
            weight_OI.device.type == "cpu"
            and weight_OI.dtype == torch.bfloat16
            and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        self._laid_out: Tensor | None = None

    def __call__(self, x_NI: Tensor) -> Tensor:
        if not self._lays_out:
            return F.linear(x_NI, self._weight, self._bias)
        if self._laid_out is None:
            self._laid_out = torch.ops.mkldnn._reorder_linear_weight(self._weight)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_NI, self._laid_out, self._bias, "none", [], ""
        )
        return result
