"""Triton kernels of `policy/norm.py`: RMSNorm from one dtype to another. Imported only where a GPU is used.

Arithmetic is in fp32. Gradients of the weight are added up in a fixed order, so that runs repeat.

Shapes: N tokens, C model width, P programs of the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528
"""Of the backward pass, each with a gradient of the weight of its own: four for each of an H100's processors."""


@triton.jit
def _normalise_kernel(x, weight, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    a = tl.load(x + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(a * a, axis=0) / WIDTH + eps)
    tl.store(out + row * WIDTH + column, a * inverse * w, mask=inside)


@triton.jit
def _normalise_backward_kernel(
    x, weight, grad, x_grad, weight_grads, rows, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Every P-th row: with n = x / rms and g = grad * weight, dx = (g - n * mean(g n)) / rms, dw = sum of grad * n."""
    first = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    place = first.to(tl.int64) * WIDTH + column
    for _ in range(first, rows, tl.num_programs(0)):
        a = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(a * a, axis=0) / WIDTH + eps)
        n = a * inverse
        total += g * n
        g = g * w
        tl.store(x_grad + place, (g - n * (tl.sum(g * n, axis=0) / WIDTH)) * inverse, mask=inside)
        place += tl.num_programs(0) * WIDTH
    tl.store(weight_grads + first.to(tl.int64) * WIDTH + column, total, mask=inside)


def normalise(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """RMSNorm of contiguous rows, [N, C] in the dtype of the weight."""
    rows, width = x_NC.shape
    out_NC = torch.empty(x_NC.shape, dtype=weight_C.dtype, device=x_NC.device)
    if rows:
        block = triton.next_power_of_2(width)
        _normalise_kernel[(rows,)](x_NC, weight_C, out_NC, eps, WIDTH=width, BLOCK=block, num_warps=_warps(block))
    return out_NC


def normalise_backward(
    x_NC: Tensor, weight_C: Tensor, grad_NC: Tensor, eps: float, *, programs: int = PROGRAMS
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows, in their dtype, and of the weight, in fp32."""
    rows, width = x_NC.shape
    x_grad_NC = torch.empty_like(x_NC)
    programs = min(rows, programs)
    if not rows:
        return x_grad_NC, torch.zeros(width, dtype=torch.float32, device=x_NC.device)
    weight_grads_PC = torch.empty(programs, width, dtype=torch.float32, device=x_NC.device)
    block = triton.next_power_of_2(width)
    _normalise_backward_kernel[(programs,)](
        x_NC, weight_C, grad_NC, x_grad_NC, weight_grads_PC, rows, eps,
        WIDTH=width, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return x_grad_NC, weight_grads_PC.sum(0)


def _warps(block: int) -> int:
    return max(1, min(16, block // 256))
