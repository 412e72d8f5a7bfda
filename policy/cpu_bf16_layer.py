"""A dense layer with grouped-query attention for a decoding step on the CPU in bf16, in one call.

Numbers lie as `policy/cpu_bf16_products.py` says, whose products these kernels are made of; the residual stream is
fp32, feature by feature. Attention is over a paged cache, which is written first. Tests compare the layer with torch's
operations.

Shapes: N rows (one token of each sequence), C model width, I inner width, H heads, G key-value heads, D head width, W
numbers of a cache entry, M blocks of the longest sequence.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from policy.cpu_bf16_products import (
    LANES,
    PAIRS,
    SUMS,
    WORDS,
    add_product,
    at,
    fetch,
    filled_up,
    gate_words,
    halves,
    joined,
    load,
    multiply_pairs,
    narrowed,
    normalise_words,
    product_numbers,
    product_rows,
    spread,
    widened,
    words,
)
from policy.cpu_compiler import ONE, ZERO, exp, floats, integers, kernel
from policy.decode_layout import by_feature

if TYPE_CHECKING:
    from policy.paged_attention import Absorbed, CacheLayout
    from policy.rope import Rotation

QUERIES, KEYS = 4, 4
"""Heads and positions whose scores are taken at a time."""
LARGEST = np.finfo(np.float32).max

(
    INPUT_NORM, QUERY, KEY, VALUE, OUTPUT, INNER_NORM, GATE, UP, DOWN, QUERY_BIAS, KEY_BIAS, VALUE_BIAS, QUERY_NORM,
    KEY_NORM,
) = range(14)  # fmt: skip
"""Places of a layer's weights in the list of their addresses."""

_HALF, _INT64, _WORD = ir.IntType(16), ir.IntType(64), ir.IntType(32)


# --- Tiles -------------------------------------------------------------------------------------------------------


def _score_tile() -> Any:
    """out[q, k] = sum_d query[q, d] key[k, d] of QUERIES queries and KEYS keys; strides in numbers."""

    @intrinsic
    def tile(_: Any, query: Any, key: Any, key_stride: Any, out: Any, stride: Any, width: Any):
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            query, key, key_stride, out, stride, width = arguments
            nothing = ir.Constant(SUMS, [0.0] * LANES)
            totals = [cgutils.alloca_once_value(builder, nothing) for _ in range(QUERIES * KEYS)]

            def rows(address: Any, stride: Any, first: Any, count: int) -> list[Any]:
                places = [builder.add(first, builder.mul(stride, _INT64(row))) for row in range(count)]
                return [load(builder, at(builder, address, place, PAIRS, _HALF)) for place in places]

            with cgutils.for_range(builder, builder.udiv(width, _INT64(2 * LANES))) as loop:
                first = builder.mul(loop.index, _INT64(2 * LANES))
                queries, keys = rows(query, width, first, QUERIES), rows(key, key_stride, first, KEYS)
                pairs = [(q, k) for q in queries for k in keys]
                for (q, k), total in zip(pairs, totals, strict=True):
                    builder.store(multiply_pairs(builder, builder.load(total), q, k), total)
            # Vectors are folded in pairs: each time half as many hold twice as many sums in half as many parts.
            sums, width = [builder.load(total) for total in totals], LANES
            while width > 1:
                half = width // 2
                low = [first + i for first in range(0, LANES, width) for i in range(half)]
                places = [[*of, *(LANES + place for place in of)] for of in (low, [i + half for i in low])]
                masks = [ir.Constant(WORDS, of) for of in places]
                sums = [
                    builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks))
                    for a, b in zip(sums[::2], sums[1::2], strict=True)
                ]
                width = half
            for q in range(QUERIES):
                of_q = ir.Constant(ir.VectorType(_WORD, KEYS), list(range(q * KEYS, q * KEYS + KEYS)))
                scores = builder.shuffle_vector(sums[0], sums[0], of_q)
                builder.store(scores, at(builder, out, builder.mul(stride, _INT64(q)), scores.type), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return tile


def _mixing_tile() -> Any:
    """out[q, v] += sum_l weight[q, l] value[l, v] of QUERIES queries and 2 * LANES columns v, over pairs of positions.

    `weight` is bf16 [QUERIES, capacity], `out` fp32 [QUERIES, out_stride].
    """
    columns, positions = 2 * LANES, ir.VectorType(_HALF, 2 * LANES)
    # The first half of two positions' columns, each column of one beside that of the other; and the second half.
    masks = [
        ir.Constant(
            ir.VectorType(_WORD, columns), [place for v in range(LANES) for place in (begin + v, columns + begin + v)]
        )
        for begin in (0, LANES)
    ]

    @intrinsic
    def tile(_: Any, value: Any, entry: Any, weight: Any, capacity: Any, out: Any, out_stride: Any, pairs: Any):
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value, entry, weight, capacity, out, out_stride, pairs = arguments
            places = [
                [
                    at(builder, out, builder.add(builder.mul(out_stride, _INT64(q)), _INT64(LANES * part)), SUMS)
                    for part in range(2)
                ]
                for q in range(QUERIES)
            ]
            totals = [
                [cgutils.alloca_once_value(builder, builder.load(place, align=4)) for place in of] for of in places
            ]
            with cgutils.for_range(builder, pairs) as loop:
                begin = builder.mul(builder.mul(loop.index, _INT64(2)), entry)
                rows = [
                    load(builder, at(builder, value, start, positions, _HALF))
                    for start in (begin, builder.add(begin, entry))
                ]
                parts = [builder.shuffle_vector(*rows, mask) for mask in masks]
                for q, of_q in enumerate(totals):
                    place = builder.add(builder.mul(capacity, _INT64(q)), builder.mul(loop.index, _INT64(2)))
                    both = spread(builder, load(builder, at(builder, weight, place, _WORD, _HALF)))
                    for part, total in zip(parts, of_q, strict=True):
                        builder.store(multiply_pairs(builder, builder.load(total), both, part), total)
            for of_places, of_totals in zip(places, totals, strict=True):
                for place, total in zip(of_places, of_totals, strict=True):
                    builder.store(builder.load(total), place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return tile


_score, _mix = _score_tile(), _mixing_tile()


# --- Attention ---------------------------------------------------------------------------------------------------


@njit(error_model="numpy")
def _cleaned(number):
    """What is no number is 0 in the cache: see `policy.attention.write_cache`."""
    return number if abs(number) <= LARGEST else ZERO


@njit(error_model="numpy", fastmath={"contract", "reassoc"})
def _finish_head(x, width, bias, norm, eps):
    """A head of a projection, in place: with its bias, if any, then normalised, if it is to be."""
    if bias:
        offsets = halves(bias)
        for d in range(width):
            x[d] += widened(offsets[d])
    if norm:
        weights, total = halves(norm), ZERO
        for d in range(width):
            total += x[d] * x[d]
        inverse = ONE / np.sqrt(total / np.float32(width) + np.float32(eps))
        for d in range(width):
            x[d] = x[d] * inverse * widened(weights[d])


@njit(error_model="numpy", fastmath={"contract"})
def _turn(x, width, cos, sin, out, cleans):
    """A head's pairs (i, i + width / 2) turned."""
    half = width // 2
    for i in range(half):
        a, b = x[i], x[i + half]
        first, second = a * cos[i] - b * sin[i], a * sin[i] + b * cos[i]
        if cleans:
            first, second = _cleaned(first), _cleaned(second)
        out[i], out[half + i] = narrowed(first), narrowed(second)


@njit(error_model="numpy", fastmath={"contract", "reassoc"})
def _weigh(scores, length, scale, weights):
    """Softmax of scale * score, as bf16; 0 for positions up to whole KEYS."""
    highest, total = scores[0], ZERO
    for place in range(1, length):
        highest = max(highest, scores[place])
    for place in range(length):
        scores[place] = exp((scores[place] - highest) * np.float32(scale))
        total += scores[place]
    share = ONE / total
    for place in range(length):
        weights[place] = narrowed(scores[place] * share)
    for place in range(length, (length + KEYS - 1) // KEYS * KEYS):
        weights[place] = np.uint16(0)


@njit(error_model="numpy")
def _fetch(columns, width, entry, size, block):
    """Some columns of a block's entries."""
    for position in range(size * block, size * block + size):
        for v in range(0, width, 2 * LANES):
            fetch(columns + 2 * (entry * position + v))


@njit(error_model="numpy")
def _attend(
    query, width, keys, values, entry, size, table, next_table, length, next_length, scale, scores, weights, capacity,
    mixed, count,
):  # fmt: skip
    """Attention of the first `count` of QUERIES queries of one row, over its blocks of `size` positions.

    The next row's blocks are fetched meanwhile, which lie anywhere.
    """
    next_blocks = (next_length + size - 1) // size
    for block in range(next_blocks - (length + size - 1) // size):
        _fetch(keys, width, entry, size, next_table[next_blocks - 1 - block])
        _fetch(values, width, entry, size, next_table[next_blocks - 1 - block])
    for block in range((length + size - 1) // size):
        begin = block * size
        if block < next_blocks:
            _fetch(keys, width, entry, size, next_table[block])
        for first in range(0, min(size, length - begin), KEYS):
            place = keys + 2 * entry * (size * table[block] + first)
            _score(query, place, entry, scores + 4 * (begin + first), capacity, width)
    for q in range(count):
        _weigh(floats(scores + 4 * q * capacity), length, scale, halves(weights + 2 * q * capacity))
    numbers = floats(mixed)
    for i in range(QUERIES * width):
        numbers[i] = ZERO
    for block in range((length + size - 1) // size):
        begin = block * size
        if block < next_blocks:
            _fetch(values, width, entry, size, next_table[block])
        pairs = (min(size, length - begin) + 1) // 2
        place = values + 2 * entry * size * table[block]
        for v in range(0, width, 2 * LANES):
            _mix(place + 2 * v, entry, weights + 2 * begin, capacity, mixed + 4 * v, width, pairs)


@njit(error_model="numpy")
def _write_entry(key, value, width, groups, weights_of, eps, cos, sin, entry):
    """A row's keys, turned, and values, from their projections, to its place in the cache."""
    cache = halves(entry)
    for group in range(groups):
        x, bias = floats(key + 4 * group * width), weights_of[KEY_BIAS]
        _finish_head(x, width, bias + 2 * group * width if bias else 0, weights_of[KEY_NORM], eps)
        _turn(x, width, cos, sin, halves(entry + 2 * group * width), True)
        x, bias = floats(value + 4 * group * width), weights_of[VALUE_BIAS]
        _finish_head(x, width, bias + 2 * group * width if bias else 0, 0, eps)
        for d in range(width):
            cache[(groups + group) * width + d] = narrowed(_cleaned(x[d]))


@njit(error_model="numpy")
def _attend_grouped(
    projected, weights_of, eps, cos, sin, blocks, entry, size, slots, tables, table_width, lengths, scale, room, out,
    stride, rows, heads, groups, width,
):  # fmt: skip
    """Words of what heads attend to, [H * D / 2, stride], from projections in fp32, [rows, (H + 2 * G) * D]."""
    of_group, capacity, features = heads // groups, table_width * size, (heads + 2 * groups) * width
    filled = (of_group + QUERIES - 1) // QUERIES * QUERIES
    scores = room + 2 * groups * filled * width
    weights = scores + 4 * QUERIES * capacity
    mixed = weights + 2 * QUERIES * capacity
    slots, lengths, out_words = integers(slots), integers(lengths), words(out)
    attended, queries = floats(mixed), words(room)
    for i in range(groups * filled * width // 2):
        queries[i] = np.uint32(0)
    for n in range(rows):
        key, angle = projected + 4 * (n * features + heads * width), 2 * n * width
        value, place = key + 4 * groups * width, blocks + 2 * slots[n] * entry
        _write_entry(key, value, width, groups, weights_of, eps, floats(cos + angle), floats(sin + angle), place)
    for n in range(rows):
        for head in range(heads):
            x, bias = floats(projected + 4 * (n * features + head * width)), weights_of[QUERY_BIAS]
            _finish_head(x, width, bias + 2 * head * width if bias else 0, weights_of[QUERY_NORM], eps)
            query = halves(room + 2 * (head // of_group * filled + head % of_group) * width)
            _turn(x, width, floats(cos + 2 * n * width), floats(sin + 2 * n * width), query, False)
        table, length = integers(tables + 8 * n * table_width), lengths[n]
        following = min(n + 1, rows - 1)
        next_table, next_length = integers(tables + 8 * following * table_width), lengths[following]
        for group in range(groups):
            keys, values = blocks + 2 * group * width, blocks + 2 * (groups + group) * width
            for first in range(0, of_group, QUERIES):
                query, count = room + 2 * (group * filled + first) * width, min(QUERIES, of_group - first)
                _attend(
                    query, width, keys, values, entry, size, table, next_table, length,
                    next_length if first == 0 else 0, scale, scores, weights, capacity, mixed, count,
                )  # fmt: skip
                place = (group * of_group + first) * width // 2
                for i in range(count * width // 2):
                    out_words[(place + i) * stride + n] = joined(attended[2 * i], attended[2 * i + 1])


# --- The layer ---------------------------------------------------------------------------------------------------


@kernel
def _decode(
    x, stride, weights, eps, cos, sin, blocks, entry, size, slots, tables, table_width, lengths, scale,
    room, out, rows, filled_rows, width, inner, heads, groups, head_width,
):  # fmt: skip
    weights_of = integers(weights)
    stream, source = floats(out), floats(x)
    for c in range(width):
        for n in range(rows):
            stream[c * filled_rows + n] = source[c * stride + n]
        for n in range(rows, filled_rows):
            stream[c * filled_rows + n] = ZERO
    inner_width, group_width = heads * head_width, groups * head_width
    features = inner_width + 2 * group_width
    inverse = room
    normed = room + 4 * filled_rows
    # The attention's numbers, and after them the feed-forward's.
    projected = gate = normed + 2 * width * filled_rows
    attended = projected + 4 * features * filled_rows
    rest = attended + 2 * inner_width * filled_rows
    attended_words = words(attended)
    for i in range(inner_width // 2 * filled_rows):
        attended_words[i] = np.uint32(0)
    normalise_words(out, weights_of[INPUT_NORM], eps, inverse, normed, filled_rows, width)
    product_rows(normed, weights_of[QUERY], projected, features, filled_rows, inner_width, width, weights_of[KEY])
    key = projected + 4 * inner_width
    product_rows(normed, weights_of[KEY], key, features, filled_rows, group_width, width, weights_of[VALUE])
    value = key + 4 * group_width
    product_rows(normed, weights_of[VALUE], value, features, filled_rows, group_width, width, weights_of[OUTPUT])
    _attend_grouped(
        projected, weights_of, eps, cos, sin, blocks, entry, size, slots, tables, table_width, lengths, scale, rest,
        attended, filled_rows, rows, heads, groups, head_width,
    )  # fmt: skip
    add_product(attended, weights_of[OUTPUT], out, filled_rows, width, inner_width, weights_of[GATE])
    up = gate + 4 * inner * filled_rows
    normalise_words(out, weights_of[INNER_NORM], eps, inverse, normed, filled_rows, width)
    product_numbers(normed, weights_of[GATE], gate, filled_rows, inner, width, weights_of[UP])
    product_numbers(normed, weights_of[UP], up, filled_rows, inner, width, weights_of[DOWN])
    gate_words(gate, up, filled_rows, inner)
    add_product(gate, weights_of[DOWN], out, filled_rows, width, inner, weights_of[DOWN])


def decode(
    x_NC: Tensor, weights: np.ndarray, eps: float, inner: int, rotation: Rotation, plan: Absorbed, layer: int,
    layout: CacheLayout, heads: int, scale: float,
) -> Tensor:  # fmt: skip
    """The layer's output [N, C] from its input, both fp32; writes the cache first.

    `weights` are the addresses of the layer's weights, int64, in the order of this file's names; 0 for what is not
    there.
    """
    x_NC = by_feature(x_NC)
    (rows, width), head_width, groups = x_NC.shape, layout.key_width, layout.groups
    filled, (_, _, size, entry), table_BM = filled_up(rows), plan.cache.shape, plan.block_table_BM
    capacity, of_group = table_BM.shape[1] * size, -(-heads // groups // QUERIES) * QUERIES
    of_attention = (6 * heads + 8 * groups) * head_width * filled
    of_attention += 2 * groups * of_group * head_width + QUERIES * (6 * capacity + 4 * head_width)
    num_bytes = (4 + 2 * width) * filled + max(of_attention, 8 * inner * filled)
    room, out_CN = torch.empty(num_bytes, dtype=torch.uint8), torch.empty(width, filled)
    _decode(
        x_NC.data_ptr(), x_NC.stride(1), weights.ctypes.data, eps, rotation.cos.data_ptr(),
        rotation.sin.data_ptr(), plan.cache[layer].data_ptr(), entry, size, plan.slot_B.data_ptr(), table_BM.data_ptr(),
        table_BM.shape[1], plan.length_B.data_ptr(), scale, room.data_ptr(), out_CN.data_ptr(), rows, filled, width,
        inner, heads, groups, head_width,
    )  # fmt: skip
    return out_CN.t()[:rows]
