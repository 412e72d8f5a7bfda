"""Triton kernels for a decoding step of few tokens, where starting a kernel takes longer than its work: what is several
small operations in torch is one here. Imported only where a GPU is used, without gradients.

The plain twins are `rotation_of` (policy/rope.py), `Absorbed.at` (policy/paged_attention.py), `write_cache`
(policy/attention.py), `Router.forward` (policy/router.py) and `sort_by_group` (policy/grouped.py); tests compare the
two on the CPU (TRITON_INTERPRET=1).

Shapes: N tokens, B sequences, M blocks of the longest sequence, P rotated width, W numbers of a cache entry, E experts,
G groups of them, K experts per token, T = N*K token-expert pairs, H heads, V value width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.config import PolicyConfig

BLOCK = 128
"""Numbers that a program of the smallest kernels holds."""
PAIRS = 64
"""Token-expert pairs whose places one program finds."""


@triton.jit
def _rotation_kernel(positions, frequencies, cos, sin, growth, half, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < half
    angle = tl.load(positions + row).to(tl.float32) * tl.load(frequencies + column, mask=inside, other=0.0)
    tl.store(cos + row * half + column, tl.cos(angle) * growth, mask=inside)
    tl.store(sin + row * half + column, tl.sin(angle) * growth, mask=inside)


def rotation(position_ids_N: Tensor, frequencies: Tensor, growth: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, P/2] of position * frequency, fp32, times `growth`."""
    rows, half = len(position_ids_N), len(frequencies)
    cos, sin = (torch.empty(rows, half, dtype=torch.float32, device=frequencies.device) for _ in range(2))
    if rows:
        block = triton.next_power_of_2(half)
        _rotation_kernel[(rows,)](position_ids_N.contiguous(), frequencies, cos, sin, growth, half, BLOCK=block)
    return cos, sin


@triton.jit(do_not_specialize=["rows", "stride"])
def _place_kernel(table, positions, slots, lengths, rows, stride, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    position = tl.load(positions + row, mask=inside, other=0)
    own = tl.load(table + row.to(tl.int64) * stride + position // SIZE, mask=inside, other=0)
    tl.store(slots + row, own * SIZE + position % SIZE, mask=inside)
    tl.store(lengths + row, position + 1, mask=inside)


def place(block_table_BM: Tensor, position_B: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Flat cache position of each sequence's new token, and its positions with that one, int64 [B] each."""
    assert block_table_BM.stride(1) == 1
    position_B = position_B.contiguous()
    slot_B, length_B = torch.empty_like(position_B), torch.empty_like(position_B)
    rows = len(position_B)
    if rows:
        _place_kernel[(triton.cdiv(rows, BLOCK),)](
            block_table_BM, position_B, slot_B, length_B, rows, block_table_BM.stride(0), SIZE=block_size, BLOCK=BLOCK
        )
    return slot_B, length_B


@triton.jit
def _write_kernel(
    first, second, blocks, slots, first_stride, second_stride, width, FIRST: tl.constexpr, SECOND: tl.constexpr,
    FIRST_BLOCK: tl.constexpr, SECOND_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    target = blocks + tl.load(slots + row) * width
    column = tl.arange(0, FIRST_BLOCK)
    x = tl.load(first + row * first_stride + column, mask=column < FIRST, other=0.0)
    tl.store(target + column, tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0), mask=column < FIRST)
    column = tl.arange(0, SECOND_BLOCK)
    x = tl.load(second + row * second_stride + column, mask=column < SECOND, other=0.0)
    tl.store(target + FIRST + column, tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0), mask=column < SECOND)


def write(blocks: Tensor, slot_N: Tensor, first_NX: Tensor, second_NY: Tensor) -> None:
    """Entries of the two parts side by side at flat positions of [blocks, block_size, W], 0 for what is no number."""
    (rows, first), second = first_NX.shape, second_NY.shape[1]
    assert blocks.is_contiguous()
    assert first_NX.stride(1) == second_NY.stride(1) == 1
    if rows:
        _write_kernel[(rows,)](
            first_NX, second_NY, blocks, slot_N, first_NX.stride(0), second_NY.stride(0), blocks.shape[2],
            FIRST=first, SECOND=second, FIRST_BLOCK=triton.next_power_of_2(first),
            SECOND_BLOCK=triton.next_power_of_2(second),
        )  # fmt: skip


@triton.jit
def _route_kernel(
    logits, bias, experts, weights, scale,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, PER: tl.constexpr, PER_BLOCK: tl.constexpr, GROUPS: tl.constexpr,
    KEPT: tl.constexpr, BEST: tl.constexpr, IS_SIGMOID: tl.constexpr, IS_BIASED: tl.constexpr,
    IS_NORMALISED: tl.constexpr,
):  # fmt: skip
    """One token. GROUPS is 1 where all experts compete; else experts and groups are powers of two."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < EXPERTS
    x = tl.load(logits + row * EXPERTS + lane, mask=inside, other=float("-inf"))
    if IS_SIGMOID:
        score = tl.sigmoid(x)
    else:
        weight = tl.exp(x - tl.max(x, axis=0))
        score = weight / tl.sum(weight, axis=0)
    rating = score
    if IS_BIASED:
        rating += tl.load(bias + lane, mask=inside, other=0.0)
    # What is no number comes last: the token is given up by its weights, and must name experts that there are.
    rating = tl.where(inside & (rating == rating), rating, float("-inf"))
    if GROUPS > 1:
        group = tl.arange(0, GROUPS)
        grouped = tl.reshape(rating, (GROUPS, EXPERTS // GROUPS))
        within = tl.arange(0, EXPERTS // GROUPS)[None, :]
        best = tl.max(grouped, axis=1)
        if BEST == 2:
            highest = tl.min(tl.where(grouped == best[:, None], within, EXPERTS), axis=1)
            best += tl.max(tl.where(within == highest[:, None], float("-inf"), grouped), axis=1)
        is_open = group >= 0
        for _ in range(KEPT):
            left = tl.where(is_open, best, float("-inf"))
            at = tl.min(tl.where(is_open & (left == tl.max(left, axis=0)), group, GROUPS), axis=0)
            is_open = is_open & (group != at)
        rating = tl.reshape(tl.where(is_open[:, None], float("-inf"), grouped), (BLOCK,))
    place = tl.arange(0, PER_BLOCK)
    chosen = tl.zeros([PER_BLOCK], tl.int64)
    own = tl.zeros([PER_BLOCK], tl.float32)
    is_open = inside
    for k in range(PER):
        left = tl.where(is_open, rating, float("-inf"))
        at = tl.min(tl.where(is_open & (left == tl.max(left, axis=0)), lane, BLOCK), axis=0)
        is_open = is_open & (lane != at)
        chosen = tl.where(place == k, at.to(tl.int64), chosen)
        own = tl.where(place == k, tl.sum(tl.where(lane == at, score, 0.0), axis=0), own)
    if IS_NORMALISED:
        own = own / (tl.sum(own, axis=0) + 1e-20)
    tl.store(experts + row * PER + place, chosen, mask=place < PER)
    tl.store(weights + row * PER + place, own * scale, mask=place < PER)


def can_route(config: PolicyConfig) -> bool:
    """Whether `route` knows this way of choosing: groups are cut out of a row of experts by powers of two."""
    sizes = (config.n_routed_experts, config.n_group)
    return config.n_group == 1 or config.topk_method == "greedy" or all(size & (size - 1) == 0 for size in sizes)


def route(logits_NE: Tensor, bias_E: Tensor | None, config: PolicyConfig) -> tuple[Tensor, Tensor]:
    """Experts [N, K] int64, the best first, and their weights [N, K] fp32, of the router's logits, fp32.

    Of equal ratings the expert of the lower number is taken, and of equal groups the lower one. torch's top-k promises
    no order there.
    """
    rows, experts = logits_NE.shape
    per_token, groups = config.num_experts_per_tok, 1 if config.topk_method == "greedy" else config.n_group
    experts_NK = torch.empty(rows, per_token, dtype=torch.int64, device=logits_NE.device)
    weights_NK = torch.empty(rows, per_token, dtype=torch.float32, device=logits_NE.device)
    if rows:
        _route_kernel[(rows,)](
            logits_NE.contiguous(), logits_NE if bias_E is None else bias_E, experts_NK, weights_NK,
            config.routed_scaling_factor, EXPERTS=experts, BLOCK=triton.next_power_of_2(experts), PER=per_token,
            PER_BLOCK=triton.next_power_of_2(per_token), GROUPS=groups, KEPT=config.topk_group,
            BEST=min(2, experts // groups) if config.topk_method == "noaux_tc" else 1,
            IS_SIGMOID=config.scoring_func == "sigmoid", IS_BIASED=bias_E is not None,
            IS_NORMALISED=config.norm_topk_prob, num_warps=1 if experts <= 64 else 4,
        )  # fmt: skip
    return experts_NK, weights_NK


@triton.jit(do_not_specialize=["count", "first_of_ends"])  # else compiled anew for other numbers of pairs
def _sort_kernel(
    groups, sources, places, ends, count, first_of_ends, num_groups, per_row, PAIRS: tl.constexpr, STEP: tl.constexpr
):
    """Where some pairs go, counted by all that come before them; or where some groups end."""
    program = tl.program_id(0)
    if program < first_of_ends:
        pair = program * PAIRS + tl.arange(0, PAIRS)
        own = tl.load(groups + pair, mask=pair < count, other=0)
        place = tl.zeros([PAIRS], tl.int64)
        for start in range(0, count, STEP):
            other = start + tl.arange(0, STEP)
            theirs = tl.load(groups + other, mask=other < count, other=num_groups)[None, :]
            is_before = (theirs < own[:, None]) | ((theirs == own[:, None]) & (other[None, :] < pair[:, None]))
            place += tl.sum(is_before.to(tl.int64), axis=1)
        tl.store(places + pair, place, mask=pair < count)
        tl.store(sources + place, (pair // per_row).to(tl.int64), mask=pair < count)
    else:
        group = (program - first_of_ends) * PAIRS + tl.arange(0, PAIRS)
        end = tl.zeros([PAIRS], tl.int32)
        for start in range(0, count, STEP):
            other = start + tl.arange(0, STEP)
            theirs = tl.load(groups + other, mask=other < count, other=num_groups)[None, :]
            end += tl.sum((theirs <= group[:, None]).to(tl.int32), axis=1)
        tl.store(ends + group, end, mask=group < num_groups)


def sort_pairs(experts_NK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs sorted by expert, in the order in which they come within one: the token of each place [T], the place of
    each pair [N, K], both int64, and where each expert's end, int32 [E]. The work grows with the square of the pairs.
    """
    experts_NK = experts_NK.contiguous()
    count, device = experts_NK.numel(), experts_NK.device
    source_T, places_NK = torch.empty(count, dtype=torch.int64, device=device), torch.empty_like(experts_NK)
    ends_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    first_of_ends = triton.cdiv(count, PAIRS)
    _sort_kernel[(first_of_ends + triton.cdiv(num_experts, PAIRS),)](
        experts_NK, source_T, places_NK, ends_E, count, first_of_ends, num_experts, experts_NK.shape[1],
        PAIRS=PAIRS, STEP=BLOCK,
    )  # fmt: skip
    return source_T, places_NK, ends_E


@triton.jit(do_not_specialize=["rows"])
def _add_halves_kernel(halves, out, rows, VALUE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < VALUE
    source = halves + (head * 2 * rows + row) * VALUE + column
    total = tl.load(source, mask=inside, other=0.0) + tl.load(source + rows * VALUE, mask=inside, other=0.0)
    tl.store(out + (row * tl.num_programs(1) + head) * VALUE + column, total, mask=inside)


def add_halves(halves_H2BV: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, V] in `dtype`: the sums of the halves of [H, 2B, V], fp32."""
    heads, both, width = halves_H2BV.shape
    out_BHV = torch.empty(both // 2, heads, width, dtype=dtype, device=halves_H2BV.device)
    if both:
        _add_halves_kernel[(both // 2, heads)](
            halves_H2BV.contiguous(), out_BHV, both // 2, VALUE=width, BLOCK=triton.next_power_of_2(width)
        )
    return out_BHV
