"""How the numbers of a decoding step lie on the CPU: feature by feature, feature c of all rows side by side.

A tensor [N, C] with strides (1, N) says so itself. Whatever meets one with no gradient wanted can take the kernels that
are made for it (`policy/cpu_products.py`); to all else it is a tensor like any other.

Shapes: N rows (one token of each sequence), C width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

LEAST_ROWS = 8
"""Rows of the narrowest vector: fewer are filled up for a product, and half a layer in one call needs so many."""


def lies_by_feature(x_NC: Tensor) -> bool:
    """Whether the kernels for decoding on the CPU take it: fp32, on a CPU, feature by feature, no gradient wanted."""
    return (
        x_NC.ndim == 2
        and (x_NC.stride(0) == 1 or x_NC.shape[0] == 1)
        and x_NC.dtype == torch.float32
        and x_NC.is_cpu
        and not torch.is_grad_enabled()
        and x_NC.shape[0] > 0
    )


def by_feature(x_NC: Tensor) -> Tensor:
    """The same numbers, laid feature by feature."""
    if x_NC.stride(0) == 1 or x_NC.shape[0] == 1:
        return x_NC
    return x_NC.t().contiguous().t()


@functools.cache
def has_bf16_products() -> bool:
    """Whether this processor multiplies pairs of bf16 numbers (AVX-512's extension for it), as kernels in bf16 do."""
    import llvmlite.binding

    return bool(llvmlite.binding.get_host_cpu_features().get("avx512bf16", False))
