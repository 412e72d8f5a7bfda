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
        from policy import cpu_decode_kernels

        out_NO = cpu_decode_kernels.multiply(x_NI, self.weight)
        return out_NO if self.bias is None else out_NO + self.bias
