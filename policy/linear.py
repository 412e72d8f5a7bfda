"""A linear layer that takes a decoding step's numbers as they lie on the CPU (policy/decode_layout.py).

Shapes: N tokens, I and O widths in and out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policy.decode_layout import lies_by_feature


class Linear(nn.Linear):
    """`nn.Linear`, by kernels of our own where rows lie feature by feature."""

    def forward(self, x_NI: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        if not (lies_by_feature(x_NI) and self.weight.dtype == torch.float32):
            return super().forward(x_NI)
        from policy import cpu_products

        out_NO = cpu_products.multiply(x_NI, self.weight)
        return out_NO if self.bias is None else out_NO + self.bias


def plain_matrices(*layers: nn.Module) -> list[Tensor] | None:
    """The layers' matrices, where they can be part of one kernel: no adapters, no biases, fp32, whole, and row by
    row."""
    matrices = [layer.weight for layer in layers if type(layer) is Linear and layer.bias is None]
    is_plain = len(matrices) == len(layers) > 0 and all(is_plain_matrix(matrix) for matrix in matrices)
    return matrices if is_plain else None


def is_plain_matrix(weight: Tensor) -> bool:
    """Whether a kernel for the CPU in fp32 finds this weight at its address."""
    is_own = type(weight) in (Tensor, nn.Parameter)  # not in pieces over ranks
    return is_own and weight.dtype == torch.float32 and weight.is_cpu and weight.is_contiguous()
