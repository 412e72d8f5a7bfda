"""Triton kernels that join what lies between the matrix products of a decoding step's layer, and for few tokens the
experts' products too. Imported only where a GPU is used, without gradients.

At a few sequences a step takes as long as its kernels take to follow each other, some 3 us each. The plain twins are
`Block.forward` (policy/block.py), `LatentAttention._absorbed` (policy/latent_attention.py) and
`MixtureOfExperts.forward` (policy/moe.py); tests compare the two on the CPU (TRITON_INTERPRET=1). Sums stay in fp32
where the twins round between their steps.

Shapes: N tokens, C model width, H heads, D qk_nope, P rope, Q = D + P, R kv_lora_rank, W = R + P cache width, K experts
per token, I expert width, J shared experts' width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 8
"""Heads whose rotated part one program turns."""
GATES = 16
"""Rows of an expert's gate and up matrices that one program multiplies."""
DOWNS = 4
"""Rows of its down matrix, the same: there are fewer programs, each for all experts of a token."""
STEP = 1024
"""Columns of gates and ups at once."""
DOWN_STEP = 256
"""Columns of a down matrix at once."""


@triton.jit
def _add_normalise_kernel(x, more, weight, total, out, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    place = row * WIDTH + column
    a = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    a += tl.load(more + place, mask=inside, other=0.0).to(tl.float32)
    rounded = a.to(total.dtype.element_ty)
    tl.store(total + place, rounded, mask=inside)
    a = rounded.to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(a * a, axis=0) / WIDTH + eps)
    tl.store(out + place, a * inverse * w, mask=inside)


def add_normalise(x_NC: Tensor, more_NC: Tensor, weight_C: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + more in the dtype of x, and its RMSNorm in that of the weight."""
    rows, width = x_NC.shape
    total_NC = torch.empty_like(x_NC)
    out_NC = torch.empty(rows, width, dtype=weight_C.dtype, device=x_NC.device)
    if rows:
        block = triton.next_power_of_2(width)
        _add_normalise_kernel[(rows,)](
            x_NC.contiguous(), more_NC.contiguous(), weight_C, total_NC, out_NC, eps, WIDTH=width, BLOCK=block,
            num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
    return total_NC, out_NC


@triton.jit
def _join_normed_kernel(
    first, second, first_weight, second_weight, out, first_stride, second_stride, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    source = first + row * first_stride
    weight = first_weight
    if side == 1:
        source = second + row * second_stride
        weight = second_weight
    a = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(a * a, axis=0) / WIDTH + eps)
    tl.store(out + (row * 2 + side) * WIDTH + column, a * inverse * w, mask=inside)


def join_normed(
    first_NC: Tensor, second_NC: Tensor, first_weight_C: Tensor, second_weight_C: Tensor, eps: float
) -> Tensor:
    """RMSNorms of both, side by side, [N, 2C] in the dtype of the weights."""
    rows, width = first_NC.shape
    assert first_NC.stride(1) == second_NC.stride(1) == 1
    out = torch.empty(rows, 2 * width, dtype=first_weight_C.dtype, device=first_NC.device)
    if rows:
        block = triton.next_power_of_2(width)
        _join_normed_kernel[(rows, 2)](
            first_NC, second_NC, first_weight_C, second_weight_C, out, first_NC.stride(0), second_NC.stride(0), eps,
            WIDTH=width, BLOCK=block, num_warps=max(1, min(16, block // 256)),
        )  # fmt: skip
    return out


@triton.jit
def _turned(source, cos, sin, row, inside, pair, is_pair, HALF: tl.constexpr, NEXT: tl.constexpr, APART: tl.constexpr):
    """Both numbers of some pairs, turned by the token's angles."""
    c = tl.load(cos + row * HALF + pair, mask=is_pair, other=0.0)
    s = tl.load(sin + row * HALF + pair, mask=is_pair, other=0.0)
    a = tl.load(source + pair * NEXT, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + pair * NEXT + APART, mask=inside, other=0.0).to(tl.float32)
    return a * c - b * s, b * c + a * s


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _enter_kernel(
    query, latent, weight, cos, sin, slots, blocks, out, query_stride, latent_stride, heads, eps,
    OWN: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr,
    NEXT: tl.constexpr, APART: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One token: some heads' rotated queries, or, in the last program, the entry of the cache."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    pair = tl.arange(0, HALF_BLOCK)
    is_pair = pair < HALF
    if tile < tl.num_programs(1) - 1:
        head = (tile * HEADS + tl.arange(0, HEADS))[:, None]
        inside = (head < heads) & is_pair[None, :]
        source = query + row * query_stride + head * (OWN + 2 * HALF) + OWN
        a, b = _turned(source, cos, sin, row, inside, pair[None, :], is_pair[None, :], HALF, NEXT, APART)
        target = out + (row * heads + head) * (RANK + 2 * HALF) + RANK + pair[None, :] * NEXT
        tl.store(target, a, mask=inside)
        tl.store(target + APART, b, mask=inside)
    else:
        own = latent + row * latent_stride
        entry = blocks + tl.load(slots + row) * (RANK + 2 * HALF)
        column = tl.arange(0, RANK_BLOCK)
        is_latent = column < RANK
        x = tl.load(own + column, mask=is_latent, other=0.0).to(tl.float32)
        w = tl.load(weight + column, mask=is_latent, other=0.0).to(tl.float32)
        x = x * tl.rsqrt(tl.sum(x * x, axis=0) / RANK + eps) * w
        tl.store(entry + column, _finite(x.to(blocks.dtype.element_ty).to(tl.float32)), mask=is_latent)
        first, second = _turned(own + RANK, cos, sin, row, is_pair, pair, is_pair, HALF, NEXT, APART)
        key = entry + RANK + pair * NEXT
        tl.store(key, _finite(first.to(blocks.dtype.element_ty).to(tl.float32)), mask=is_pair)
        tl.store(key + APART, _finite(second.to(blocks.dtype.element_ty).to(tl.float32)), mask=is_pair)


def enter_latent(
    query_NX: Tensor,
    latent_NW: Tensor,
    norm_weight_R: Tensor,
    eps: float,
    cos_NP: Tensor,
    sin_NP: Tensor,
    slot_N: Tensor,
    blocks: Tensor,
    heads: int,
    *,
    is_interleaved: bool,
) -> Tensor:
    """Queries [N, H, W] whose last P numbers are those of `query_NX` [N, H * Q], rotated; the others are still to come.

    Writes what latent attention caches to one layer's blocks [blocks, block_size, W] at flat positions: the latent,
    the first R numbers of `latent_NW`, under its norm, and the rotated key; 0 for what is no number.
    """
    rows, half, rank = len(query_NX), cos_NP.shape[1], len(norm_weight_R)
    width = rank + 2 * half
    assert blocks.is_contiguous()
    assert blocks.shape[-1] == latent_NW.shape[1] == width
    out_NHW = torch.empty(rows, heads, width, dtype=query_NX.dtype, device=query_NX.device)
    if rows:
        _enter_kernel[(rows, triton.cdiv(heads, HEADS) + 1)](
            query_NX, latent_NW, norm_weight_R, cos_NP, sin_NP, slot_N, blocks, out_NHW, query_NX.stride(0),
            latent_NW.stride(0), heads, eps, OWN=query_NX.shape[1] // heads - 2 * half, HALF=half,
            HALF_BLOCK=triton.next_power_of_2(half), RANK=rank, RANK_BLOCK=triton.next_power_of_2(rank),
            NEXT=2 if is_interleaved else 1, APART=1 if is_interleaved else half, HEADS=HEADS,
        )  # fmt: skip
    return out_NHW


@triton.jit
def _expand_kernel(
    x, experts, gate_up, shared_gate, shared_up, inner, width, own, shared, most,
    PER: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """silu(gate x) * (up x) of one token, some rows of one of its experts' matrices, or of the shared ones'."""
    row = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    at = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    size = own
    if which < PER:
        expert = tl.load(experts + row * PER + which)
        gates = gate_up + expert * 2 * own * width
        ups = gates + own * width
    else:
        size = shared
        gates = shared_gate
        ups = shared_up
    is_row = at < size
    gate = tl.zeros([ROWS], tl.float32)
    up = tl.zeros([ROWS], tl.float32)
    for start in range(0, width, STEP):
        column = start + tl.arange(0, STEP)
        is_column = column < width
        a = tl.load(x + row * width + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        place = at[:, None].to(tl.int64) * width + column[None, :]
        inside = is_row[:, None] & is_column[None, :]
        gate += tl.sum(tl.load(gates + place, mask=inside, other=0.0).to(tl.float32) * a, axis=1)
        up += tl.sum(tl.load(ups + place, mask=inside, other=0.0).to(tl.float32) * a, axis=1)
    target = inner + (row * tl.num_programs(1) + which) * most + at
    tl.store(target, gate * tl.sigmoid(gate) * up, mask=is_row)


@triton.jit
def _contract_kernel(
    x, inner, experts, weights, down, shared_down, out, width, own, shared, most,
    PER: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """x and of one token its experts' outputs, weighed, some columns of them."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = at < width
    # Of all matrices at once, each by its weight: one sum over columns at the end.
    products = tl.zeros([ROWS, STEP], tl.float32)
    for which in tl.static_range(PER + SHARED):
        if which < PER:
            size = own
            weight = tl.load(weights + row * PER + which)
            matrix = down + tl.load(experts + row * PER + which) * own * width
        else:
            size = shared
            weight = 1.0
            matrix = shared_down
        source = inner + (row * (PER + SHARED) + which) * most
        for start in range(0, size, STEP):
            column = start + tl.arange(0, STEP)
            is_column = column < size
            a = tl.load(source + column, mask=is_column, other=0.0)[None, :] * weight
            place = at[:, None].to(tl.int64) * size + column[None, :]
            inside = is_row[:, None] & is_column[None, :]
            products += tl.load(matrix + place, mask=inside, other=0.0).to(tl.float32) * a
    total = tl.load(x + row * width + at, mask=is_row, other=0.0).to(tl.float32) + tl.sum(products, axis=1)
    tl.store(out + row * width + at, total, mask=is_row)


def mix_experts(
    x_NC: Tensor,
    inner_NC: Tensor,
    experts_NK: Tensor,
    weights_NK: Tensor,
    gate_up_E2IC: Tensor,
    down_ECI: Tensor,
    shared: tuple[Tensor, Tensor, Tensor] | None,
) -> Tensor:
    """x + the experts of `inner_NC`, weighed (fp32), + the shared ones: gate and up [J, C], down [C, J].

    Every token reads its experts' matrices by itself: for few tokens, which hardly share any.
    """
    (rows, width), per_token, own = x_NC.shape, experts_NK.shape[1], down_ECI.shape[2]
    out_NC = torch.empty_like(x_NC)
    wide = 0 if shared is None else shared[2].shape[1]
    most, count = max(own, wide), per_token + (shared is not None)
    middle = torch.empty(rows, count, most, dtype=torch.float32, device=x_NC.device)
    gate_JC, up_JC, down_CJ = (down_ECI, down_ECI, down_ECI) if shared is None else shared
    if rows:
        _expand_kernel[(rows, count, triton.cdiv(most, GATES))](
            inner_NC, experts_NK, gate_up_E2IC, gate_JC, up_JC, middle, width, own, wide, most,
            PER=per_token, ROWS=GATES, STEP=min(STEP, triton.next_power_of_2(width)), num_warps=8,
        )  # fmt: skip
        _contract_kernel[(rows, triton.cdiv(width, DOWNS))](
            x_NC, middle, experts_NK, weights_NK, down_ECI, down_CJ, out_NC, width, own, wide, most,
            PER=per_token, SHARED=count - per_token, ROWS=DOWNS,
            STEP=min(DOWN_STEP, triton.next_power_of_2(own)), num_warps=2,
        )  # fmt: skip
    return out_NC


@triton.jit
def _gather_kernel(
    x, sorted_rows, places, weights, shared, out, width, PER: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.load(x + row * width + column, mask=inside, other=0.0).to(tl.float32)
    for k in range(PER):
        place = tl.load(places + row * PER + k)
        y = tl.load(sorted_rows + place * width + column, mask=inside, other=0.0).to(tl.float32)
        total += y * tl.load(weights + row * PER + k)
    if SHARED:
        total += tl.load(shared + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, total, mask=inside)


def gather_into(
    x_NC: Tensor, sorted_TC: Tensor, places_NK: Tensor, weights_NK: Tensor, shared_NC: Tensor | None
) -> Tensor:
    """x + of each token its K rows, at the places given, weighed (fp32), + what the shared experts give."""
    (rows, width), per_token = x_NC.shape, places_NK.shape[1]
    out_NC = torch.empty_like(x_NC)
    if rows:
        block = min(STEP, triton.next_power_of_2(width))
        _gather_kernel[(rows, triton.cdiv(width, block))](
            x_NC, sorted_TC, places_NK, weights_NK, x_NC if shared_NC is None else shared_NC, out_NC, width,
            PER=per_token, SHARED=shared_NC is not None, BLOCK=block,
        )  # fmt: skip
    return out_NC
