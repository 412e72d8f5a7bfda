"""Attention within short rows on a CPU in fp32: one kernel each way, on the thread that calls.

Rows are gone over one by one, head by head, in a core's cache: what is later than a query is left out by blocks, and
nothing is kept for the backward pass but two numbers of each softmax (FlashAttention, Dao et al., 2022, whose tiles
are whole rows here). Rows that go on after a prefix meet its keys where they lie; gradients of these add up over the
rows, in order.

Products are tiles of `policy/cpu_training_products.py`: those with a transpose read a copy in panels, the others rows.

Shapes: U tokens, S segments (prefixes, rests and rows that share nothing), H query heads, G key-value heads (head h
reads h // (H/G)), Q query and key width, V value width; in kernels, a segment of `length` queries and keys goes on
after a prefix of `before` keys, which may be none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from policy.cpu_compiler import ONE, ZERO, exp, floats, integers, kernel
from policy.cpu_kernels import highest
from policy.cpu_products import TILE
from policy.cpu_training_products import (
    NO,
    NONE,
    ROWS,
    SINGLE,
    WIDE,
    YES,
    copy,
    fill,
    pack_columns,
    packed,
    product_of_tiles,
    stay_apart,
)
from policy.linear import LANES

_OF_SUMS = {"reassoc", "contract"}


@njit(error_model="numpy")
def _up(count, step):
    return (count + step - 1) // step * step


@njit(error_model="numpy")
def _load_keys(key, key_row, value, value_row, place, room, length, width, value_width, with_values):
    """Keys and values of a segment, and panels of their transposes, at `place`, each with `room` rows of space."""
    stay_apart()
    values = place + 4 * room * width
    keys_across = values + 4 * room * value_width
    values_across = keys_across + 4 * room * width
    fill(key, key_row, place, width, length, _up(length, TILE), width)
    fill(value, value_row, values, value_width, length, _up(length, TILE), value_width)
    pack_columns(place, width, keys_across, width, length, _up(length, LANES))
    if with_values:
        pack_columns(values, value_width, values_across, value_width, length, _up(length, LANES))


@njit(error_model="numpy")
def _multiply_across(rows, width, place, before_place, out, length, before, room):
    """Products of a segment's rows with those whose transposes lie in panels: out[:, :before] with the prefix's, and
    from column `room` on, up to each tile's last row, with its own."""
    stay_apart()
    stride = 2 * room
    if before:
        columns = _up(before, LANES)
        product_of_tiles(rows, width, SINGLE, before_place, NONE, out, stride, _up(length, ROWS), columns, width, NO)
    for first in range(NONE, length, ROWS):
        of_tile, target = rows + 4 * first * width, out + 4 * (first * stride + room)
        seen = min(_up(first + ROWS, WIDE), _up(length, LANES))
        product_of_tiles(of_tile, width, SINGLE, place, NONE, target, stride, ROWS, seen, width, NO)


@njit(error_model="numpy")
def _multiply_along(weights, place, before_place, out, first, length, before, room, width):
    """Of TILE rows from `first` on the sums of the rows at both places with these weights, [TILE, width]."""
    stay_apart()
    seen, stride = min(first + TILE, _up(length, TILE)), 2 * room
    product_of_tiles(weights + 4 * room, stride, SINGLE, place, width, out, width, ROWS, width, seen, NO)
    if before:
        product_of_tiles(weights, stride, SINGLE, before_place, width, out, width, ROWS, width, before, YES)


@njit(error_model="numpy")
def _gather(weights, rows, out, before_out, length, before, room, width, adds):
    """Of each key the sum, over the queries that see it, of their rows with these weights; added for a prefix."""
    stay_apart()
    stride = 2 * room
    for first in range(NONE, length, ROWS):
        column = weights + 4 * (first * stride + room + first)
        place, target = rows + 4 * first * width, out + 4 * first * width
        product_of_tiles(column, SINGLE, stride, place, width, target, width, ROWS, width, length - first, adds)
    if before:
        product_of_tiles(weights, SINGLE, stride, rows, width, before_out, width, _up(before, TILE), width, length, YES)


@njit(error_model="numpy", fastmath=_OF_SUMS)
def _exponentials(x, start, count, end, peak, scale, share):
    """exp((x - peak) * scale) * share of so many scores, in place, then zeros to the end; their sum. Whole vectors, as
    numbers left over would be taken one by one."""
    total, whole = ZERO, _up(count, LANES)
    for j in range(start, start + whole):
        x[j] = exp((x[j] - peak) * scale) * share
    for j in range(start + count, start + max(whole, end)):
        x[j] = ZERO
    for j in range(start, start + whole):
        total += x[j]
    return total


@njit(error_model="numpy", fastmath=_OF_SUMS)
def _softmax(scores, length, before, room, scale, stats, is_known):
    """Scores of a segment to weights, in place, and each softmax's highest score and share; or as these say.

    What a query must not see of its tile becomes 0.
    """
    stay_apart()
    x, stats = floats(scores), floats(stats)
    for row in range(length):
        prefix, seen, end = 2 * room * row, row + 1, _up(row + 1, ROWS)
        own = prefix + room
        if is_known:
            peak, share = stats[2 * row], stats[2 * row + 1]
        else:
            peak, share = highest(highest(x[own], x, own, seen), x, prefix, before), ONE
        total = _exponentials(x, prefix, before, before, peak, scale, share)
        total += _exponentials(x, own, seen, end, peak, scale, share)
        if not is_known:
            share = ONE / total
            for j in range(prefix, prefix + _up(before, LANES)):
                x[j] *= share
            for j in range(own, own + _up(seen, LANES)):
                x[j] *= share
            stats[2 * row], stats[2 * row + 1] = peak, share


@njit(error_model="numpy", fastmath=_OF_SUMS)
def _dot(w, g, start, count):
    total = ZERO
    for j in range(start, start + _up(count, LANES)):
        total += w[j] * g[j]
    return total


@njit(error_model="numpy", fastmath=_OF_SUMS)
def _softmax_back(weights, grads, length, before, room, scale):
    """With weights w and their gradients g of a segment: w * (g - sum of w g) * scale, in the place of the latter."""
    stay_apart()
    w, g = floats(weights), floats(grads)
    for row in range(length):
        prefix, seen, end = 2 * room * row, row + 1, _up(row + 1, ROWS)
        own = prefix + room
        total = _dot(w, g, prefix, before) + _dot(w, g, own, seen)
        for j in range(prefix, prefix + _up(before, LANES)):
            g[j] = w[j] * (g[j] - total) * scale
        for j in range(own, own + _up(seen, LANES)):
            g[j] = w[j] * (g[j] - total) * scale
        for j in range(own + seen, own + end):
            g[j] = ZERO


@kernel
def _attend(
    query, query_row, query_head, key, key_row, key_head, value, value_row, value_head, out, stats, segments, count,
    tokens, heads, groups, width, value_width, scale, scratch, room,
):  # fmt: skip
    segments, scale, share = integers(segments), np.float32(scale), heads // groups
    of_keys = 8 * room * (width + value_width)
    rest_keys = scratch + of_keys
    queries = rest_keys + of_keys
    mixed = queries + 4 * room * width
    scores = mixed + 4 * TILE * value_width
    for group in range(groups):
        before = NONE
        for s in range(count):
            start, length, is_rest = segments[3 * s], segments[3 * s + 1], segments[3 * s + 2]
            before, place = (before, rest_keys) if is_rest else (NONE, scratch)
            keys, values = (
                key + 4 * (start * key_row + group * key_head),
                value + 4 * (start * value_row + group * value_head),
            )
            _load_keys(keys, key_row, values, value_row, place, room, length, width, value_width, NO)
            across = 4 * room * (width + value_width)
            for head in range(group * share, group * share + share):
                rows = query + 4 * (start * query_row + head * query_head)
                fill(rows, query_row, queries, width, length, _up(length, ROWS), width)
                _multiply_across(queries, width, place + across, scratch + across, scores, length, before, room)
                _softmax(scores, length, before, room, scale, stats + 8 * (head * tokens + start), NO)
                own, prefix = place + 4 * room * width, scratch + 4 * room * width
                for first in range(NONE, length, ROWS):
                    weights = scores + 8 * room * first
                    _multiply_along(weights, own, prefix, mixed, first, length, before, room, value_width)
                    target = out + 4 * ((start + first) * heads + head) * value_width
                    copy(mixed, value_width, target, heads * value_width, min(ROWS, length - first), value_width)
            if not is_rest:
                before = length


@kernel
def _attend_back(
    query, query_row, query_head, key, key_row, key_head, value, value_row, value_head, grad, grad_row, grad_head,
    query_grad, key_grad, value_grad, stats, segments, count, tokens, heads, groups, width, value_width, scale,
    scratch, room,
):  # fmt: skip
    segments, scale, share, both = integers(segments), np.float32(scale), heads // groups, width + value_width
    of_keys = 12 * room * both
    rest_keys = scratch + of_keys
    queries = rest_keys + of_keys
    grads = queries + 4 * room * width
    query_grads = grads + 4 * room * value_width
    weights = query_grads + 4 * TILE * width
    weight_grads = weights + 8 * room * room
    across, back = 4 * room * both, 8 * room * both
    of_values = 4 * room * width
    for group in range(groups):
        before, prefix_start = NONE, NONE
        for s in range(count + 1):
            start, length, is_rest = (
                (segments[3 * s], segments[3 * s + 1], segments[3 * s + 2]) if s < count else (NONE, NONE, NONE)
            )
            if before and not is_rest:  # nothing more comes after this prefix
                place = prefix_start * groups + group
                copy(scratch + back, width, key_grad + 4 * place * width, groups * width, before, width)
                place, own = value_grad + 4 * place * value_width, scratch + back + of_values
                copy(own, value_width, place, groups * value_width, before, value_width)
            before, place = (before, rest_keys) if is_rest else (NONE, scratch)
            keys, values = (
                key + 4 * (start * key_row + group * key_head),
                value + 4 * (start * value_row + group * value_head),
            )
            if s < count:
                _load_keys(keys, key_row, values, value_row, place, room, length, width, value_width, YES)
            for head in range(group * share, group * share + share if s < count else 0):
                rows = query + 4 * (start * query_row + head * query_head)
                fill(rows, query_row, queries, width, length, _up(length, TILE), width)
                rows = grad + 4 * (start * grad_row + head * grad_head)
                fill(rows, grad_row, grads, value_width, length, _up(length, TILE), value_width)
                _multiply_across(queries, width, place + across, scratch + across, weights, length, before, room)
                _softmax(weights, length, before, room, scale, stats + 8 * (head * tokens + start), YES)
                rows, own = scratch + across + of_values, place + across + of_values
                _multiply_across(grads, value_width, own, rows, weight_grads, length, before, room)
                _softmax_back(weights, weight_grads, length, before, room, scale)
                for first in range(NONE, length, ROWS):
                    w = weight_grads + 8 * room * first
                    _multiply_along(w, place, scratch, query_grads, first, length, before, room, width)
                    target = query_grad + 4 * ((start + first) * heads + head) * width
                    copy(query_grads, width, target, heads * width, min(TILE, length - first), width)
                adds, place_back, prefix_back = head > group * share, place + back, scratch + back
                _gather(weight_grads, queries, place_back, prefix_back, length, before, room, width, adds)
                place_back, prefix_back = place_back + of_values, prefix_back + of_values
                _gather(weights, grads, place_back, prefix_back, length, before, room, value_width, adds)
            if is_rest:
                own = start * groups + group
                copy(rest_keys + back, width, key_grad + 4 * own * width, groups * width, length, width)
                own, rows = value_grad + 4 * own * value_width, rest_keys + back + of_values
                copy(rows, value_width, own, groups * value_width, length, value_width)
            else:
                before, prefix_start = length, start


def attend(query_UHQ: Tensor, key_UGQ: Tensor, value_UGV: Tensor, segments_S3: Tensor, scale: float) -> Tensor:
    """Causal softmax attention [U, H, V] within each segment and over the prefix that it goes on after.

    Of each segment: its first token, its tokens, and 1 where it goes on after the last one before it that has 0 here;
    int64.
    """
    out_UHV: Tensor = _Attend.apply(query_UHQ, key_UGQ, value_UGV, segments_S3, scale)
    return out_UHV


class _Attend(Function):
    """Keeps its inputs, and the highest score and the share of each softmax."""

    @staticmethod
    def forward(
        ctx: Any, query_UHQ: Tensor, key_UGQ: Tensor, value_UGV: Tensor, segments_S3: Tensor, scale: float
    ) -> Tensor:
        query_UHQ, key_UGQ, value_UGV = (packed(x) for x in (query_UHQ, key_UGQ, value_UGV))
        (tokens, heads, width), (_, groups, values) = query_UHQ.shape, value_UGV.shape
        room = _room(segments_S3)
        out_UHV, stats_HU2 = torch.empty(tokens, heads, values), torch.empty(heads, tokens, 2)
        scratch = torch.empty(room * (4 * (width + values) + width + 2 * room) + TILE * values)
        _attend(
            *_addresses(query_UHQ, key_UGQ, value_UGV), out_UHV.data_ptr(), stats_HU2.data_ptr(),
            segments_S3.data_ptr(), len(segments_S3), tokens, heads, groups, width, values, scale, scratch.data_ptr(),
            room,
        )  # fmt: skip
        ctx.save_for_backward(query_UHQ, key_UGQ, value_UGV, segments_S3, stats_HU2)
        ctx.scale = scale
        return out_UHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_UHQ, key_UGQ, value_UGV, segments_S3, stats_HU2 = ctx.saved_tensors
        (tokens, heads, width), (_, groups, values) = query_UHQ.shape, value_UGV.shape
        room, grad_UHV = _room(segments_S3), packed(grads[0])
        into = [torch.empty(x.shape) for x in (query_UHQ, key_UGQ, value_UGV)]
        scratch = torch.empty(room * (7 * (width + values) + 4 * room) + TILE * width)
        _attend_back(
            *_addresses(query_UHQ, key_UGQ, value_UGV, grad_UHV), *(x.data_ptr() for x in into), stats_HU2.data_ptr(),
            segments_S3.data_ptr(), len(segments_S3), tokens, heads, groups, width, values, ctx.scale,
            scratch.data_ptr(), room,
        )  # fmt: skip
        return *into, None, None


def _room(segments_S3: Tensor) -> int:
    """Rows of space for the longest segment, in whole panels."""
    return int(_up(int(segments_S3[:, 1].max()), WIDE))


def _addresses(*tensors: Tensor) -> list[int]:
    return [number for x in tensors for number in (x.data_ptr(), x.stride(0), x.stride(1))]
