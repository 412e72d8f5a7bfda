"""Triton kernels: what the GPU would else do in many passes over memory, in one. Imported only where a GPU is used.

Each launcher has a plain twin in `policy/fused.py` or `policy/head.py`, which defines it; tests compare the two on the
CPU (TRITON_INTERPRET=1) and on the GPU. Arithmetic is in fp32 whatever the tensors' dtype.

Shapes: N rows (tokens, or token-expert pairs), I inner width, H heads, P rotated width, S width of a slice of the
vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024
"""Most numbers of a row that a program holds at once."""


@triton.jit
def _silu_gate_kernel(gate, up, out, gate_stride, up_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    a = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    b = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    tl.store(out + row * width + column, a * tl.sigmoid(a) * b, mask=inside)


@triton.jit
def _silu_gate_backward_kernel(
    gate, up, grad, gate_grad, up_grad, gate_stride, up_stride, grad_stride, result_stride, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    a = tl.load(gate + row * gate_stride + column, mask=inside).to(tl.float32)
    b = tl.load(up + row * up_stride + column, mask=inside).to(tl.float32)
    g = tl.load(grad + row * grad_stride + column, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(a)
    tl.store(gate_grad + row * result_stride + column, g * b * sigmoid * (1 + a * (1 - sigmoid)), mask=inside)
    tl.store(up_grad + row * result_stride + column, g * a * sigmoid, mask=inside)


def silu_gate_forward(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """silu(gate) * up, [N, I]; rows may lie apart (halves of one tensor), numbers of a row may not."""
    out_NI = torch.empty(gate_NI.shape, dtype=gate_NI.dtype, device=gate_NI.device)
    rows, width = out_NI.shape
    if rows:
        block = _block(width)
        grid = (rows, triton.cdiv(width, block))
        _silu_gate_kernel[grid](gate_NI, up_NI, out_NI, gate_NI.stride(0), up_NI.stride(0), width, BLOCK=block)
    return out_NI


def silu_gate_backward(gate_NI: Tensor, up_NI: Tensor, grad_NI: Tensor) -> Tensor:
    """Gradients of gate and up side by side, [N, 2I]."""
    rows, width = gate_NI.shape
    both = torch.empty(rows, 2 * width, dtype=gate_NI.dtype, device=gate_NI.device)
    gate_grad, up_grad = both.chunk(2, dim=-1)
    if rows:
        block = _block(width)
        grid = (rows, triton.cdiv(width, block))
        strides = (gate_NI.stride(0), up_NI.stride(0), grad_NI.stride(0), both.stride(0))
        _silu_gate_backward_kernel[grid](gate_NI, up_NI, grad_NI, gate_grad, up_grad, *strides, width, BLOCK=block)
    return both


@triton.jit
def _turn_kernel(
    x, out, cos, sin, row_stride, head_stride, heads,
    HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, STEP: tl.constexpr, APART: tl.constexpr,
    SIGN: tl.constexpr,
):  # fmt: skip
    """One token, HEADS heads; pair i is numbers i*STEP and i*STEP + APART."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, PAIRS)
    is_pair = pair < HALF
    c = tl.load(cos + row * HALF + pair, mask=is_pair)[None, :]
    s = tl.load(sin + row * HALF + pair, mask=is_pair)[None, :] * SIGN
    inside = (head < heads)[:, None] & is_pair[None, :]
    source = x + row * row_stride + head[:, None] * head_stride + pair[None, :] * STEP
    a = tl.load(source, mask=inside).to(tl.float32)
    b = tl.load(source + APART, mask=inside).to(tl.float32)
    target = out + (row * heads + head[:, None]) * (2 * HALF) + pair[None, :] * STEP
    tl.store(target, a * c - b * s, mask=inside)
    tl.store(target + APART, b * c + a * s, mask=inside)


def turn(x_NHP: Tensor, cos_NP: Tensor, sin_NP: Tensor, *, is_interleaved: bool, is_inverse: bool = False) -> Tensor:
    """Each pair of numbers turned by its token's angle, or back; cos and sin are [N, P/2], fp32."""
    rows, heads, width = x_NHP.shape
    out_NHP = torch.empty(x_NHP.shape, dtype=x_NHP.dtype, device=x_NHP.device)
    if rows:
        half = width // 2
        at_once = min(8, triton.next_power_of_2(heads))
        _turn_kernel[(rows, triton.cdiv(heads, at_once))](
            x_NHP, out_NHP, cos_NP, sin_NP, x_NHP.stride(0), x_NHP.stride(1), heads,
            HALF=half, HEADS=at_once, PAIRS=triton.next_power_of_2(half), STEP=2 if is_interleaved else 1,
            APART=1 if is_interleaved else half, SIGN=-1 if is_inverse else 1, num_warps=2,
        )  # fmt: skip
    return out_NHP


@triton.jit
def _fold_kernel(
    logits, targets, peak, total, moment, picked, inverse_temperature, first, width, stride,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: the slice's logits into its running maximum, sum of exponentials and first moment of these."""
    row = tl.program_id(0).to(tl.int64)
    highest = tl.load(peak + row)
    mass = tl.load(total + row)
    mean = tl.load(moment + row)
    target = tl.load(targets + row) - first
    for block in range(BLOCKS):
        column = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * stride + column, mask=column < width, other=float("-inf")) * inverse_temperature
        higher = tl.maximum(highest, tl.max(x, axis=0))
        old = tl.exp(highest - higher)
        weight = tl.exp(x - higher)
        mean = old * (mean + mass * (highest - higher)) + tl.sum(
            tl.where(weight > 0, weight * (x - higher), 0.0), axis=0
        )
        mass = old * mass + tl.sum(weight, axis=0)
        highest = higher
    tl.store(peak + row, highest)
    tl.store(total + row, mass)
    tl.store(moment + row, mean)
    is_here = (target >= 0) & (target < width)
    tl.store(picked + row, tl.load(logits + row * stride + target, mask=is_here) * inverse_temperature, mask=is_here)


def fold_logits(
    logits_NS: Tensor,
    first: int,
    token_ids_N: Tensor,
    inverse_temperature: float,
    running: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """See `policy.head.fold`; updates `running` (peak, total, moment, picked, each [N] fp32) in place."""
    rows, width = logits_NS.shape
    block = _block(width)
    if rows:
        # A power of two, since a kernel is compiled for every number of blocks.
        blocks = triton.next_power_of_2(triton.cdiv(width, block))
        numbers = (inverse_temperature, first, width, logits_NS.stride(0))
        _fold_kernel[(rows,)](logits_NS, token_ids_N, *running, *numbers, BLOCKS=blocks, BLOCK=block)


@triton.jit
def _logit_gradient_kernel(
    logits, targets, log_total, entropy, logprob_grad, entropy_grad, out, inverse_temperature, first, width, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    log_p = tl.load(logits + row * stride + column, mask=inside, other=0.0) * inverse_temperature - tl.load(
        log_total + row
    )
    p = tl.exp(log_p)
    g = tl.load(logprob_grad + row)
    h = tl.load(entropy_grad + row)
    is_target = column == tl.load(targets + row) - first
    gradient = tl.where(is_target, g, 0.0) - p * (g + h * (log_p + tl.load(entropy + row)))
    tl.store(out + row * width + column, gradient * inverse_temperature, mask=inside)


def logit_gradient(
    logits_NS: Tensor,
    first: int,
    token_ids_N: Tensor,
    inverse_temperature: float,
    log_total_N: Tensor,
    entropy_N: Tensor,
    logprob_grad_N: Tensor,
    entropy_grad_N: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """See `policy.head.gradient_of_logits`."""
    rows, width = logits_NS.shape
    out_NS = torch.empty(rows, width, dtype=dtype, device=logits_NS.device)
    block = _block(width)
    if rows:
        known = (log_total_N, entropy_N, logprob_grad_N, entropy_grad_N)
        numbers = (inverse_temperature, first, width, logits_NS.stride(0))
        grid = (rows, triton.cdiv(width, block))
        _logit_gradient_kernel[grid](logits_NS, token_ids_N, *known, out_NS, *numbers, BLOCK=block)
    return out_NS


def _block(width: int) -> int:
    return min(COLUMNS, triton.next_power_of_2(width))
