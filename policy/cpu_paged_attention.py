"""Attention over a paged cache on the CPU in fp32: the new token of each sequence, its cache entry written first.

Numbers lie feature by feature; see `policy/cpu_products.py`, whose products these kernels are made of.

Shapes: N rows (one token of each sequence), C model width, H heads, G key-value heads, Q key width, R kv_lora_rank,
P rotated width, D width before it, V value width, W numbers of a cache entry, M blocks of the longest sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from torch import Tensor

from policy.cpu_compiler import ONE, ZERO, exp, floats, integers, kernel, operation
from policy.cpu_operations import COS, LENGTHS, ROOM, ROWS, SIN, SLOTS, TABLE_WIDTH, TABLES, Operation, X, arguments_of
from policy.cpu_products import (
    KEYS,
    LANES,
    QUERIES,
    add_middle,
    add_narrow,
    add_rows,
    filled_up,
    normalise_rows,
    product,
    score,
)  # fmt: skip
from policy.decode_layout import LEAST_ROWS, by_feature
from policy.paged_attention import Absorbed, CacheLayout

if TYPE_CHECKING:
    from policy.rope import Rotation

LARGEST = np.finfo(np.float32).max


@njit(error_model="numpy")
def _kept(number, cleans):
    """What is no number is 0 in the cache: see `policy.attention.write_cache`."""
    return ZERO if cleans and not abs(number) <= LARGEST else number


@njit(error_model="numpy", fastmath={"contract"})
def _turn(x, stride, rows, cos, sin, half, is_interleaved, out, starts, offset, cleans):
    """One head's pairs turned; row n's numbers go to starts[n] + offset, side by side."""
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if is_interleaved else (i, i + half)
        for n in range(rows):
            real, imaginary, c, s = x[a * stride + n], x[b * stride + n], cos[n * half + i], sin[n * half + i]
            out[starts[n] + offset + a] = _kept(real * c - imaginary * s, cleans)
            out[starts[n] + offset + b] = _kept(real * s + imaginary * c, cleans)


@njit(error_model="numpy")
def _clear(numbers, count):
    for at in range(count):
        numbers[at] = ZERO


@njit(error_model="numpy")
def _copy(x, stride, rows, width, out, starts, offset, cleans):
    for c in range(width):
        for n in range(rows):
            out[starts[n] + offset + c] = _kept(x[c * stride + n], cleans)


@njit(error_model="numpy")
def _score_all(query, width, keys, entry, size, table, length, scores, capacity, following):
    """scores[q, l] of QUERIES queries at all positions, and at some beyond, within their block. The block `following`
    will be wanted after these."""
    whole, blocks = width // LANES, (length + size - 1) // size
    query_numbers, score_numbers = floats(query), floats(scores)
    for block in range(blocks):
        begin = block * size
        ahead = 4 * entry * size * ((table[block + 1] if block + 1 < blocks else following) - table[block])
        for at in range(0, min(size, length - begin), KEYS):
            first = min(at, size - KEYS)
            key = keys + 4 * entry * (size * table[block] + first)
            score(query, width, key, entry, scores + 4 * (begin + first), capacity, whole, ahead)
            numbers = floats(key)
            for q in range(QUERIES):
                for k in range(KEYS):
                    rest = ZERO
                    for w in range(whole * LANES, width):
                        rest += query_numbers[q * width + w] * numbers[k * entry + w]
                    score_numbers[q * capacity + begin + first + k] += rest


@njit(error_model="numpy", fastmath={"contract", "reassoc"})
def _weigh(scores, length, scale):
    """Softmax of scale * score, in place."""
    highest, total = scores[0], ZERO
    for at in range(1, length):
        highest = max(highest, scores[at])
    for at in range(length):
        weight = exp((scores[at] - highest) * np.float32(scale))
        scores[at] = weight
        total += weight
    share = ONE / total
    for at in range(length):
        scores[at] *= share


@njit(error_model="numpy")
def _mix(weights, capacity, values, entry, size, table, length, out, width):
    """out[q, v] += sum_l weights[q, l] values[l, v] of QUERIES queries."""
    weight_numbers, out_numbers = floats(weights), floats(out)
    for block in range((length + size - 1) // size):
        begin = block * size
        count = min(size, length - begin)
        value, weight, v = values + 4 * entry * size * table[block], weights + 4 * begin, 0
        while width - v >= 16:
            add_middle(value + 4 * v, entry, weight, capacity, 1, out + 4 * v, width, count, value)
            v += 16
        if width - v >= 8:
            add_narrow(value + 4 * v, entry, weight, capacity, 1, out + 4 * v, width, count, value)
            v += 8
        value_numbers = floats(value)
        for rest in range(v, width):
            for q in range(QUERIES):
                for at in range(count):
                    weight_number = weight_numbers[q * capacity + begin + at]
                    out_numbers[q * width + rest] += weight_number * value_numbers[at * entry + rest]


@njit(error_model="numpy")
def _attend(
    queries, heads, groups, key_width, blocks, entry, size, tables, table_width, lengths,
    value_start, value_width, scale, scores, mixed, out, out_stride, rows,
):  # fmt: skip
    """Softmax attention of every row over its blocks; a group's heads are filled up to whole QUERIES."""
    of_group = heads // groups
    filled, capacity = (of_group + QUERIES - 1) // QUERIES * QUERIES, table_width * size
    mixed_numbers, out_numbers = floats(mixed), floats(out)
    lengths = integers(lengths)
    for n in range(rows):
        table, length = integers(tables + 8 * n * table_width), lengths[n]
        following = integers(tables + 8 * min(n + 1, rows - 1) * table_width)[0]
        for group in range(groups):
            for first in range(0, of_group, QUERIES):
                query = queries + 4 * ((n * groups + group) * filled + first) * key_width
                keys, values = blocks + 4 * group * key_width, blocks + 4 * (value_start + group * value_width)
                _score_all(query, key_width, keys, entry, size, table, length, scores, capacity, following)
                _clear(mixed_numbers, QUERIES * value_width)
                count = min(QUERIES, of_group - first)
                for q in range(count):
                    _weigh(floats(scores + 4 * q * capacity), length, scale)
                _mix(scores, capacity, values, entry, size, table, length, mixed, value_width)
                for q in range(count):
                    feature = (group * of_group + first + q) * value_width
                    for v in range(value_width):
                        out_numbers[(feature + v) * out_stride + n] = mixed_numbers[q * value_width + v]


@kernel
def _attend_grouped(
    query, query_stride, key, key_stride, value, value_stride, cos, sin, half, is_interleaved, blocks, entry, size,
    slots, tables, table_width, lengths, scale, queries, scores, mixed, out, rows, heads, groups, width,
):  # fmt: skip
    of_group = heads // groups
    filled = (of_group + QUERIES - 1) // QUERIES * QUERIES
    slots, starts = integers(slots), np.empty(rows, dtype=np.int64)
    if filled > of_group:
        _clear(floats(queries), rows * groups * filled * width)
    cos, sin = floats(cos), floats(sin)
    kept = width - 2 * half
    for n in range(rows):
        starts[n] = slots[n] * entry
    for group in range(groups):
        x, offset = key + 4 * group * width * key_stride, group * width
        _copy(floats(x), key_stride, rows, kept, floats(blocks), starts, offset, True)
        x += 4 * kept * key_stride
        _turn(floats(x), key_stride, rows, cos, sin, half, is_interleaved, floats(blocks), starts, offset + kept, True)
    _copy(floats(value), value_stride, rows, groups * width, floats(blocks), starts, groups * width, True)
    for n in range(rows):
        starts[n] = n * groups * filled * width
    for head in range(heads):
        x, offset = query + 4 * head * width * query_stride, (head // of_group * filled + head % of_group) * width
        _copy(floats(x), query_stride, rows, kept, floats(queries), starts, offset, False)
        x += 4 * kept * query_stride
        _turn(
            floats(x), query_stride, rows, cos, sin, half, is_interleaved, floats(queries), starts, offset + kept, False
        )
    _attend(
        queries, heads, groups, width, blocks, entry, size, tables, table_width, lengths,
        groups * width, width, scale, scores, mixed, out, rows, rows,
    )  # fmt: skip


@kernel
def _attend_latent(
    query, query_stride, latent, latent_stride, norm, eps, up, cos, sin, half, is_interleaved, blocks, entry, size,
    slots, tables, table_width, lengths, scale, queries, scores, mixed, absorbed, out, rows, filled_rows,
    heads, own, rank, value_width,
):  # fmt: skip
    width, filled = rank + 2 * half, (heads + QUERIES - 1) // QUERIES * QUERIES
    slots, starts = integers(slots), np.empty(rows, dtype=np.int64)
    if filled > heads:
        _clear(floats(queries), rows * filled * width)
    cos, sin, norm, numbers = floats(cos), floats(sin), floats(norm), floats(latent)
    inverse = np.zeros(rows, dtype=np.float32)
    for r in range(rank):
        for n in range(rows):
            inverse[n] += numbers[r * latent_stride + n] * numbers[r * latent_stride + n]
    for n in range(rows):
        inverse[n] = ONE / np.sqrt(inverse[n] / np.float32(rank) + np.float32(eps))
        starts[n] = slots[n] * entry
    cache = floats(blocks)
    for r in range(rank):
        for n in range(rows):
            cache[starts[n] + r] = _kept(numbers[r * latent_stride + n] * inverse[n] * norm[r], True)
    x = floats(latent + 4 * rank * latent_stride)
    _turn(x, latent_stride, rows, cos, sin, half, is_interleaved, cache, starts, rank, True)
    for n in range(rows):
        starts[n] = n * filled * width
    for head in range(heads):
        x = query + 4 * head * (own + 2 * half) * query_stride
        up_head = up + 4 * head * (own + value_width) * rank
        product(x, query_stride, up_head, 1, rank, absorbed, filled_rows, filled_rows, rank, own)
        _copy(floats(absorbed), filled_rows, rows, rank, floats(queries), starts, head * width, False)
        x += 4 * own * query_stride
        place = head * width + rank
        _turn(floats(x), query_stride, rows, cos, sin, half, is_interleaved, floats(queries), starts, place, False)
    _attend(
        queries, heads, 1, width, blocks, entry, size, tables, table_width, lengths,
        0, rank, scale, scores, mixed, absorbed, filled_rows, rows,
    )  # fmt: skip
    for head in range(heads):
        up_head = up + 4 * (head * (own + value_width) + own) * rank
        x, place = absorbed + 4 * head * rank * filled_rows, out + 4 * head * value_width * filled_rows
        product(x, filled_rows, up_head, rank, 1, place, filled_rows, filled_rows, value_width, rank)


def attend_latent(
    query_NX: Tensor, latent_NW: Tensor, norm_R: Tensor, eps: float, up_XR: Tensor, rotation: Rotation,
    plan: Absorbed, layer: int, heads: int, scale: float,
) -> Tensor:  # fmt: skip
    """MLA's attention in its absorbed form, [N, H * V], from queries [N, H * (D + P)], what the latents and shared keys
    are before norm and rotation, and the up-projection [H * (D + V), R]; writes the cache first."""
    rows, rank, half = query_NX.shape[0], up_XR.shape[1], rotation.cos.shape[1]
    own = query_NX.shape[1] // heads - 2 * half
    value_width, filled = up_XR.shape[0] // heads - own, -(-heads // QUERIES) * QUERIES
    query_NX = by_feature(query_NX) if rows >= LEAST_ROWS else filled_up(query_NX)
    latent_NW, up_XR, filled_rows = by_feature(latent_NW), up_XR.contiguous(), query_NX.shape[0]
    queries, scores, mixed = _scratch(rows * filled, rank + 2 * half, rank, plan)
    absorbed, out = torch.zeros(heads * rank, filled_rows), torch.empty(heads * value_width, filled_rows)
    _attend_latent(
        query_NX.data_ptr(), query_NX.stride(1), latent_NW.data_ptr(), latent_NW.stride(1), norm_R.data_ptr(), eps,
        up_XR.data_ptr(), *_turning(rotation), *_cached(plan, layer), scale, queries.data_ptr(), scores.data_ptr(),
        mixed.data_ptr(), absorbed.data_ptr(), out.data_ptr(), rows, filled_rows, heads, own, rank, value_width,
    )  # fmt: skip
    return out.t()[:rows]


def attend_grouped(
    query_NX: Tensor, key_NX: Tensor, value_NX: Tensor, rotation: Rotation, plan: Absorbed, layer: int,
    layout: CacheLayout, scale: float,
) -> Tensor:  # fmt: skip
    """Grouped-query attention, [N, H * Q], from queries, keys and values before their rotation; writes the cache
    first."""
    rows, width, groups = query_NX.shape[0], layout.key_width, layout.groups
    heads = query_NX.shape[1] // width
    query_NX, key_NX, value_NX = by_feature(query_NX), by_feature(key_NX), by_feature(value_NX)
    filled = -(-heads // groups // QUERIES) * QUERIES
    queries, scores, mixed = _scratch(rows * groups * filled, width, width, plan)
    out_XN = torch.empty(heads * width, rows)
    _attend_grouped(
        query_NX.data_ptr(), query_NX.stride(1), key_NX.data_ptr(), key_NX.stride(1), value_NX.data_ptr(),
        value_NX.stride(1), *_turning(rotation), *_cached(plan, layer), scale, queries.data_ptr(), scores.data_ptr(),
        mixed.data_ptr(), out_XN.data_ptr(), rows, heads, groups, width,
    )  # fmt: skip
    return out_XN.t()


def _scratch(queries: int, key_width: int, value_width: int, plan: Absorbed) -> tuple[Tensor, Tensor, Tensor]:
    """Room for queries, for the scores and for the results of QUERIES of them."""
    capacity = plan.block_table_BM.shape[1] * plan.cache.shape[2]
    return torch.empty(queries, key_width), torch.empty(QUERIES, capacity), torch.empty(QUERIES, value_width)


def _turning(rotation: Rotation) -> tuple[int, int, int, bool]:
    return rotation.cos.data_ptr(), rotation.sin.data_ptr(), rotation.cos.shape[1], rotation.is_interleaved


def _cached(plan: Absorbed, layer: int) -> tuple[int, ...]:
    """The layer's blocks, their sizes, and each row's slot, blocks and length."""
    (_, _, size, entry), table_BM = plan.cache.shape, plan.block_table_BM
    blocks = plan.cache.data_ptr() + 4 * layer * plan.cache.stride(0)
    rows = (plan.slot_B.data_ptr(), table_BM.data_ptr(), table_BM.shape[1], plan.length_B.data_ptr())
    return blocks, entry, size, *rows


def _latent_half(arguments, state):
    a, s = integers(arguments), integers(state)
    norm, norm_eps, query_matrix, latent_matrix, out_matrix = a[0], floats(arguments + 8)[0], a[2], a[3], a[4]
    latent_norm, eps, up, blocks, scale = a[5], floats(arguments + 48)[0], a[7], a[8], floats(arguments + 72)[0]
    width, heads, own, half, rank, value_width = a[10], a[11], a[12], a[13], a[14], a[15]
    is_interleaved, entry, size = a[16] != 0, a[17], a[18]
    rows, x, room = s[ROWS], s[X], s[ROOM]
    filled, head_width, key_width = (heads + QUERIES - 1) // QUERIES * QUERIES, own + 2 * half, rank + 2 * half
    query = room + 4 * width * rows
    latent = query + 4 * heads * head_width * rows
    queries = latent + 4 * key_width * rows
    absorbed = queries + 4 * filled * key_width * rows
    attended = absorbed + 4 * heads * rank * rows
    mixed = attended + 4 * heads * value_width * rows
    scores = mixed + 4 * QUERIES * rank
    normalise_rows(x, rows, norm, room, rows, width, norm_eps)
    product(room, rows, query_matrix, width, 1, query, rows, rows, heads * head_width, width)
    product(room, rows, latent_matrix, width, 1, latent, rows, rows, key_width, width)
    _attend_latent(
        query, rows, latent, rows, latent_norm, eps, up, s[COS], s[SIN], half, is_interleaved, blocks, entry, size,
        s[SLOTS], s[TABLES], s[TABLE_WIDTH], s[LENGTHS], scale, queries, scores, mixed, absorbed, attended, rows, rows,
        heads, own, rank, value_width,
    )  # fmt: skip
    inner = heads * value_width
    product(attended, rows, out_matrix, inner, 1, room, rows, rows, width, inner)
    add_rows(room, rows, x, rows, width)


def latent_half(
    norm_C: Tensor, norm_eps: float, query_XC: Tensor, latent_WC: Tensor, out_CX: Tensor, latent_norm_R: Tensor,
    eps: float, up_XR: Tensor, cache: Tensor, layer: int, heads: int, half: int, is_interleaved: bool, scale: float,
) -> Operation:  # fmt: skip
    """X + MLA of RMSNorm(X), by the matrices of its projections; `half` is P/2."""
    width, rank, own = query_XC.shape[1], up_XR.shape[1], query_XC.shape[0] // heads - 2 * half
    value_width, filled = up_XR.shape[0] // heads - own, -(-heads // QUERIES) * QUERIES
    return Operation(
        kernel=operation(_latent_half),
        arguments=arguments_of(
            norm_C.data_ptr(), float(norm_eps), query_XC.data_ptr(), latent_WC.data_ptr(), out_CX.data_ptr(),
            latent_norm_R.data_ptr(), float(eps), up_XR.data_ptr(), cache[layer].data_ptr(), float(scale), width,
            heads, own, half, rank, value_width, is_interleaved, cache.shape[3], cache.shape[2],
        ),
        room_of_row=width + heads * (own + 2 * half + rank + value_width) + (filled + 1) * (rank + 2 * half) + rank,
        room_of_position=QUERIES,
        weights=(norm_C, query_XC, latent_WC, out_CX, latent_norm_R, up_XR, cache),
    )  # fmt: skip


def _grouped_half(arguments, state):
    a, s = integers(arguments), integers(state)
    norm, norm_eps, query_matrix, key_matrix, value_matrix = a[0], floats(arguments + 8)[0], a[2], a[3], a[4]
    out_matrix, blocks, scale, width, heads, groups = a[5], a[6], floats(arguments + 56)[0], a[8], a[9], a[10]
    head_width, half, is_interleaved, entry, size = a[11], a[12], a[13] != 0, a[14], a[15]
    rows, x, room = s[ROWS], s[X], s[ROOM]
    filled, inner = (heads // groups + QUERIES - 1) // QUERIES * QUERIES, groups * head_width
    query = room + 4 * width * rows
    key = query + 4 * heads * head_width * rows
    value = key + 4 * inner * rows
    queries = value + 4 * inner * rows
    attended = queries + 4 * groups * filled * head_width * rows
    mixed = attended + 4 * heads * head_width * rows
    scores = mixed + 4 * QUERIES * head_width
    normalise_rows(x, rows, norm, room, rows, width, norm_eps)
    product(room, rows, query_matrix, width, 1, query, rows, rows, heads * head_width, width)
    product(room, rows, key_matrix, width, 1, key, rows, rows, inner, width)
    product(room, rows, value_matrix, width, 1, value, rows, rows, inner, width)
    _attend_grouped(
        query, rows, key, rows, value, rows, s[COS], s[SIN], half, is_interleaved, blocks, entry, size, s[SLOTS],
        s[TABLES], s[TABLE_WIDTH], s[LENGTHS], scale, queries, scores, mixed, attended, rows, heads, groups, head_width,
    )  # fmt: skip
    inner = heads * head_width
    product(attended, rows, out_matrix, inner, 1, room, rows, rows, width, inner)
    add_rows(room, rows, x, rows, width)


def grouped_half(
    norm_C: Tensor, norm_eps: float, query_XC: Tensor, key_XC: Tensor, value_XC: Tensor, out_CX: Tensor, cache: Tensor,
    layer: int, layout: CacheLayout, half: int, is_interleaved: bool, scale: float,
) -> Operation:  # fmt: skip
    """X + grouped-query attention of RMSNorm(X), by the matrices of its projections; `half` is P/2."""
    width, head_width, groups = query_XC.shape[1], layout.key_width, layout.groups
    heads = query_XC.shape[0] // head_width
    filled = -(-heads // groups // QUERIES) * QUERIES
    return Operation(
        kernel=operation(_grouped_half),
        arguments=arguments_of(
            norm_C.data_ptr(), float(norm_eps), query_XC.data_ptr(), key_XC.data_ptr(), value_XC.data_ptr(),
            out_CX.data_ptr(), cache[layer].data_ptr(), float(scale), width, heads, groups, head_width, half,
            is_interleaved, cache.shape[3], cache.shape[2],
        ),
        room_of_row=width + (2 * heads + 2 * groups + groups * filled + 1) * head_width,
        room_of_position=QUERIES,
        weights=(norm_C, query_XC, key_XC, value_XC, out_CX, cache),
    )  # fmt: skip
