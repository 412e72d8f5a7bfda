"""Triton kernels: what the GPU would else do in many passes over memory, in one. Imported only where a GPU is used.

Each launcher has a plain twin in `policy/fused.py`, `policy/grouped.py` or `policy/head.py`, which defines it; tests
compare the two on the CPU (TRITON_INTERPRET=1) and on the GPU. Arithmetic is in fp32 whatever the tensors' dtype.

Shapes: N rows (tokens, or token-expert pairs), I inner width, H heads, P rotated width, D width before it, Q = D + P,
V value width, S width of a slice of the vocabulary, K experts per token, T = N*K token-expert pairs, C model width.
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
    KEPT: tl.constexpr, KEPT_BLOCK: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
    STEP: tl.constexpr, APART: tl.constexpr, SIGN: tl.constexpr,
):  # fmt: skip
    """One token, HEADS heads: KEPT numbers copied, then pairs turned; pair i is numbers i*STEP and i*STEP + APART."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = (head < heads)[:, None]
    source = x + row * row_stride + head[:, None] * head_stride
    target = out + (row * heads + head[:, None]) * (KEPT + 2 * HALF)
    if KEPT > 0:
        column = tl.arange(0, KEPT_BLOCK)[None, :]
        inside = is_head & (column < KEPT)
        tl.store(target + column, tl.load(source + column, mask=inside), mask=inside)
    pair = tl.arange(0, HALF_BLOCK)
    is_pair = pair < HALF
    c = tl.load(cos + row * HALF + pair, mask=is_pair)[None, :]
    s = tl.load(sin + row * HALF + pair, mask=is_pair)[None, :] * SIGN
    inside = is_head & is_pair[None, :]
    place = KEPT + pair[None, :] * STEP
    a = tl.load(source + place, mask=inside).to(tl.float32)
    b = tl.load(source + place + APART, mask=inside).to(tl.float32)
    tl.store(target + place, a * c - b * s, mask=inside)
    tl.store(target + place + APART, b * c + a * s, mask=inside)


def turn(x_NHQ: Tensor, cos_NP: Tensor, sin_NP: Tensor, *, is_interleaved: bool, is_inverse: bool = False) -> Tensor:
    """The last P numbers of each head turned, pair by pair, by its token's angle, or back; the ones before are kept.

    cos and sin are [N, P/2] fp32.
    """
    rows, heads, width = x_NHQ.shape
    out_NHQ = torch.empty(x_NHQ.shape, dtype=x_NHQ.dtype, device=x_NHQ.device)
    half = cos_NP.shape[1]
    kept = width - 2 * half
    if rows:
        at_once = min(8, triton.next_power_of_2(heads))
        _turn_kernel[(rows, triton.cdiv(heads, at_once))](
            x_NHQ, out_NHQ, cos_NP, sin_NP, x_NHQ.stride(0), x_NHQ.stride(1), heads,
            KEPT=kept, KEPT_BLOCK=triton.next_power_of_2(max(1, kept)), HALF=half,
            HALF_BLOCK=triton.next_power_of_2(half), HEADS=at_once, STEP=2 if is_interleaved else 1,
            APART=1 if is_interleaved else half, SIGN=-1 if is_inverse else 1, num_warps=2,
        )  # fmt: skip
    return out_NHQ


@triton.jit
def _join_kernel(
    nope, rope, key, row_stride, head_stride, rope_stride, heads,
    D: tl.constexpr, P: tl.constexpr, D_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    target = key + (row * heads + head) * (D + P)
    column = tl.arange(0, D_BLOCK)[None, :]
    inside = (head < heads) & (column < D)
    tl.store(target + column, tl.load(nope + row * row_stride + head * head_stride + column, mask=inside), mask=inside)
    place = tl.arange(0, P_BLOCK)[None, :]
    shared = tl.load(rope + row * rope_stride + place, mask=place < P)
    tl.store(target + D + place, tl.broadcast_to(shared, (HEADS, P_BLOCK)), mask=(head < heads) & (place < P))


@triton.jit
def _part_kernel(
    key_grad, value_grad, nope_value_grad, rope_grad, key_row, key_head, value_row, value_head, heads,
    D: tl.constexpr, P: tl.constexpr, V: tl.constexpr, D_BLOCK: tl.constexpr, P_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d, p, v = tl.arange(0, D_BLOCK)[None, :], tl.arange(0, P_BLOCK)[None, :], tl.arange(0, V_BLOCK)[None, :]
    total = tl.zeros((P_BLOCK,), dtype=tl.float32)
    for tile in range(TILES):
        head = (tile * HEADS + tl.arange(0, HEADS))[:, None]
        is_head = head < heads
        keys = key_grad + row * key_row + head * key_head
        values = value_grad + row * value_row + head * value_head
        target = nope_value_grad + (row * heads + head) * (D + V)
        tl.store(target + d, tl.load(keys + d, mask=is_head & (d < D)), mask=is_head & (d < D))
        tl.store(target + D + v, tl.load(values + v, mask=is_head & (v < V)), mask=is_head & (v < V))
        total += tl.sum(tl.load(keys + D + p, mask=is_head & (p < P), other=0.0).to(tl.float32), axis=0)
    place = tl.arange(0, P_BLOCK)
    tl.store(rope_grad + row * P + place, total, mask=place < P)


def join_keys(k_nope_NHD: Tensor, k_rope_NP: Tensor) -> Tensor:
    """Keys [N, H, D + P]: each head's own part, then the part that all heads share."""
    (rows, heads, own), shared = k_nope_NHD.shape, k_rope_NP.shape[1]
    key_NHQ = torch.empty(rows, heads, own + shared, dtype=k_nope_NHD.dtype, device=k_nope_NHD.device)
    if rows:
        at_once = min(8, triton.next_power_of_2(heads))
        strides = (k_nope_NHD.stride(0), k_nope_NHD.stride(1), k_rope_NP.stride(0))
        _join_kernel[(rows, triton.cdiv(heads, at_once))](
            k_nope_NHD, k_rope_NP, key_NHQ, *strides, heads, D=own, P=shared, D_BLOCK=triton.next_power_of_2(own),
            P_BLOCK=triton.next_power_of_2(shared), HEADS=at_once,
        )  # fmt: skip
    return key_NHQ


def part_gradients(key_grad_NHQ: Tensor, value_grad_NHV: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Back through `join_keys`: gradients of own parts and values, side by side, and of the shared part [N, P]."""
    rows, heads, width = key_grad_NHQ.shape
    value, shared = value_grad_NHV.shape[-1], width - own
    options = {"dtype": key_grad_NHQ.dtype, "device": key_grad_NHQ.device}
    nope_value_grad = torch.empty(rows, heads, own + value, **options)
    rope_grad_NP = torch.empty(rows, shared, **options)
    if rows:
        at_once = min(4, triton.next_power_of_2(heads))
        strides = (*key_grad_NHQ.stride()[:2], *value_grad_NHV.stride()[:2])
        _part_kernel[(rows,)](
            key_grad_NHQ, value_grad_NHV, nope_value_grad, rope_grad_NP, *strides, heads, D=own, P=shared, V=value,
            D_BLOCK=triton.next_power_of_2(own), P_BLOCK=triton.next_power_of_2(shared),
            V_BLOCK=triton.next_power_of_2(value), HEADS=at_once, TILES=triton.cdiv(heads, at_once),
        )  # fmt: skip
    return nope_value_grad, rope_grad_NP


@triton.jit
def _mix_kernel(rows, places, weights, out, width, PER: tl.constexpr, IS_WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(PER):
        place = tl.load(places + token * PER + k)
        x = tl.load(rows + place * width + column, mask=inside).to(tl.float32)
        if IS_WEIGHTED:
            x *= tl.load(weights + token * PER + k)
        total += x
    tl.store(out + token * width + column, total, mask=inside)


@triton.jit
def _mix_backward_kernel(
    grad, rows, places, weights, rows_grad, weights_grad, width, PER: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for k in range(PER):
        place = tl.load(places + token * PER + k)
        weight = tl.load(weights + token * PER + k)
        product = tl.zeros((BLOCK,), dtype=tl.float32)
        for block in range(BLOCKS):
            column = block * BLOCK + tl.arange(0, BLOCK)
            inside = column < width
            g = tl.load(grad + token * width + column, mask=inside, other=0.0).to(tl.float32)
            x = tl.load(rows + place * width + column, mask=inside, other=0.0).to(tl.float32)
            product += g * x
            tl.store(rows_grad + place * width + column, g * weight, mask=inside)
        tl.store(weights_grad + token * PER + k, tl.sum(product, axis=0))


def mix_rows(rows_TC: Tensor, places_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    """Of each token its K rows, at the places given, added up with its weights (fp32; None: all 1), [N, C]."""
    count, per_token = places_NK.shape
    width = rows_TC.shape[1]
    out_NC = torch.empty(count, width, dtype=rows_TC.dtype, device=rows_TC.device)
    if count:
        block = _block(width)
        _mix_kernel[(count, triton.cdiv(width, block))](
            rows_TC, places_NK, places_NK if weights_NK is None else weights_NK, out_NC, width, PER=per_token,
            IS_WEIGHTED=weights_NK is not None, BLOCK=block,
        )  # fmt: skip
    return out_NC


def mix_rows_backward(grad_NC: Tensor, rows_TC: Tensor, places_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows [T, C] and of the weights [N, K] fp32; each of the T places belongs to one token."""
    count, per_token = places_NK.shape
    width = rows_TC.shape[1]
    rows_grad_TC, weights_grad_NK = torch.empty_like(rows_TC), torch.empty_like(weights_NK)
    if count:
        block = _block(width)
        _mix_backward_kernel[(count,)](
            grad_NC, rows_TC, places_NK, weights_NK, rows_grad_TC, weights_grad_NK, width, PER=per_token,
            BLOCKS=triton.cdiv(width, block), BLOCK=block,
        )  # fmt: skip
    return rows_grad_TC, weights_grad_NK


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


@triton.jit
def _join_softmaxes_kernel(
    out, log_total, more, more_log_total, total_stride, more_total_stride, heads,
    V: tl.constexpr, V_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head = head < heads
    a = tl.load(log_total + head * total_stride + row, mask=is_head, other=0.0)
    b = tl.load(more_log_total + head * more_total_stride + row, mask=is_head, other=0.0)
    peak = tl.maximum(a, b)
    joined = peak + tl.log(tl.exp(a - peak) + tl.exp(b - peak))
    column = tl.arange(0, V_BLOCK)[None, :]
    place = (row * heads + head[:, None]) * V + column
    inside = is_head[:, None] & (column < V)
    x = tl.load(out + place, mask=inside, other=0.0).to(tl.float32) * tl.exp(a - joined)[:, None]
    y = tl.load(more + place, mask=inside, other=0.0).to(tl.float32) * tl.exp(b - joined)[:, None]
    tl.store(out + place, x + y, mask=inside)
    tl.store(log_total + head * total_stride + row, joined, mask=is_head)


def join_softmaxes(out_NHV: Tensor, log_total_HN: Tensor, more_NHV: Tensor, more_log_total_HN: Tensor) -> None:
    """See `policy.fused.join_softmaxes`."""
    rows, heads, width = out_NHV.shape
    if rows:
        at_once = min(8, triton.next_power_of_2(heads))
        _join_softmaxes_kernel[(rows, triton.cdiv(heads, at_once))](
            out_NHV, log_total_HN, more_NHV, more_log_total_HN, log_total_HN.stride(0), more_log_total_HN.stride(0),
            heads, V=width, V_BLOCK=triton.next_power_of_2(width), HEADS=at_once, num_warps=2,
        )  # fmt: skip


def _block(width: int) -> int:
    return min(COLUMNS, triton.next_power_of_2(width))
