"""A linear layer that on the CPU takes a decoding step's numbers as they lie (policy/decode_layout.py), or tiles of our
own for an update's; and where these tiles are taken.

Shapes: N tokens, I and O widths in and out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policy.decode_layout import lies_by_feature


class Linear(nn.Linear):
    """`nn.Linear`, by kernels of our own where rows lie feature by feature, and for the update on one thread."""

    def forward(self, x_NI: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        if lies_by_feature(x_NI) and self.weight.dtype == torch.float32:
            from policy import cpu_products

            out_NO = cpu_products.multiply(x_NI, self.weight)
        elif takes_on_cpu(x_NI, self.weight):
            from policy import cpu_training_products

            out_NO = cpu_training_products.linear(x_NI, self.weight)
        else:
            return super().forward(x_NI)
        return out_NO if self.bias is None else out_NO + self.bias


def has_tiles(num_threads: int | None = None) -> bool:
    """Whether the kernels of an update on the CPU are worth taking: one thread, and registers for their tiles.

    `num_threads` are those that there will be; None: those that there are.
    """
    return (num_threads or torch.get_num_threads()) == 1 and torch.backends.cpu.get_cpu_capability() == "AVX512"


def takes_on_cpu(x: Tensor, weight: Tensor) -> bool:
    """Whether products with a gradient are for `policy/cpu_training_products.py`: fp32, widths of whole vectors."""
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and has_tiles()
        and x.dtype == weight.dtype == torch.float32
        and weight.shape[-1] % LANES == weight.shape[-2] % LANES == 0
        and x.numel() > 0
    )


LANES = 16
"""Numbers of the vectors that these kernels take."""


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
