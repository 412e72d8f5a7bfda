"""Attention within short rows on a CPU in fp32: batched products around one softmax, nothing padded that need not be.

Scores of a row lie in two parts: over its own keys, all rows of a block in one layout, and over the prefix that it goes
on after, all rests of a prefix in one product. So a prefix's keys and values are copied for no rest, and the gradients
that its rests have for them add up within a product. What products give is laid out head by head, since torch would
else take them one by one. On one thread, where widths allow, it is all one kernel (policy/cpu_training_attention.py).

Shapes: U tokens, B rows of a block, R its longest row, H query heads, G key-value heads (head h reads h // (H/G)),
Q query and key width, V value width, M queries after one prefix, P tokens of the prefix.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from policy.linear import LANES, has_tiles
from policy.packing import PackedRows

SHORT_ROW = 256
"""Up to here, in tokens, plain batched products beat torch's fused kernel; where queries and keys are not as many, up
to so many scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rests:
    """Rows of a block that follow one another after one prefix."""

    queries: slice
    """Their tokens, M."""
    keys: slice
    """The prefix's tokens, P."""
    place: int
    """Where their scores over the prefix, [H, M, P], lie among the block's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Block:
    """Rows that follow one another, attended to at once."""

    tokens: slice
    rows: PackedRows
    rests: tuple[_Rests, ...]
    """Empty where nothing comes before the rows."""
    layout_B4: Tensor
    """For the softmax, of each row: its length, where the scores of its first query over the prefix lie for the first
    head, how far on those of the next head and of the next query; int64."""
    num_scores: int
    """Over prefixes, of all heads."""


def takes_short_rows(query_UHQ: Tensor, key_UGQ: Tensor, value_UGV: Tensor, rows: PackedRows) -> bool:
    """Whether `attend_short_rows` is for these."""
    if not all(x.device.type == "cpu" and x.dtype == torch.float32 for x in (query_UHQ, key_UGQ, value_UGV)):
        return False
    shared = rows.shared
    if shared is None:
        return rows.longest <= SHORT_ROW
    before = shared.prefix_rows.longest
    longest = max(block.rows.longest for block in shared.blocks)
    return before <= SHORT_ROW and longest * (before + longest) <= SHORT_ROW**2


def attend_short_rows(query_UHQ: Tensor, key_UGQ: Tensor, value_UGV: Tensor, rows: PackedRows, scale: float) -> Tensor:
    """Causal softmax attention [U, H, V] within each row, and over the prefix that it shares."""
    if has_tiles() and query_UHQ.shape[2] % LANES == value_UGV.shape[2] % LANES == 0:
        from policy import cpu_training_attention

        return cpu_training_attention.attend(query_UHQ, key_UGQ, value_UGV, find_segments(rows), scale)
    out_UHV: Tensor = _Attend.apply(query_UHQ, key_UGQ, value_UGV, _blocks(rows, query_UHQ.shape[1]), scale)
    return out_UHV


def find_segments(rows: PackedRows) -> Tensor:
    """The rows, each prefix before its rests, int64 [S, 3]: see `policy.cpu_training_attention.attend`."""
    shared = rows.shared
    if shared is None:
        return torch.tensor([[start, length, 0] for start, length in zip(rows.starts, rows.lengths, strict=True)])
    prefixes, rests = shared.prefix_rows, shared.rest_rows
    segments = [[[start, length, 0]] for start, length in zip(prefixes.starts, prefixes.lengths, strict=True)]
    for prefix, start, length in zip(shared.prefix_of_row, rests.starts, rests.lengths, strict=True):
        segments[prefix].append([shared.num_shared + start, length, 1])
    return torch.tensor([segment for of_prefix in segments for segment in of_prefix])


def _blocks(rows: PackedRows, heads: int) -> list[_Block]:
    shared = rows.shared
    if shared is None:
        return [_block(slice(0, sum(rows.lengths)), rows, heads)]
    starts, last, row = [0, *itertools.accumulate(shared.prefix_rows.lengths)], shared.num_shared, 0
    blocks = [_block(slice(0, last), shared.prefix_rows, heads)]
    for rests in shared.blocks:
        first, last = last, last + sum(rests.rows.lengths)
        of_row = shared.prefix_of_row[row : row + len(rests.rows.lengths)]
        prefixes = [slice(starts[prefix], starts[prefix + 1]) for prefix in of_row]
        blocks.append(_block(slice(first, last), rests.rows, heads, prefixes))
        row += len(of_row)
    return blocks


def _block(tokens: slice, rows: PackedRows, heads: int, prefixes: Sequence[slice] = ()) -> _Block:
    rests, layout, row, first, place = list[_Rests](), list[list[int]](), 0, tokens.start, 0
    for keys, same in itertools.groupby(prefixes):
        lengths = rows.lengths[row : row + sum(1 for _ in same)]
        of_rests = _Rests(queries=slice(first, first + sum(lengths)), keys=keys, place=place)
        before = keys.stop - keys.start
        for start in (0, *itertools.accumulate(lengths[:-1])):
            layout.append([place + start * before, sum(lengths) * before, before])
        rests.append(of_rests)
        row, first = row + len(lengths), first + sum(lengths)
        place += heads * sum(lengths) * before
    layout = layout or [[0, 0, 0]] * len(rows.lengths)
    table = torch.tensor([[length, *places] for length, places in zip(rows.lengths, layout, strict=True)])
    return _Block(tokens=tokens, rows=rows, rests=tuple(rests), layout_B4=table, num_scores=place)


class _Attend(Function):
    """Keeps the softmax's weights."""

    @staticmethod
    def forward(
        ctx: Any, query_UHQ: Tensor, key_UGQ: Tensor, value_UGV: Tensor, blocks: list[_Block], scale: float
    ) -> Tensor:
        from policy import cpu_kernels

        (tokens, heads, _), value_width = query_UHQ.shape, value_UGV.shape[-1]
        out_HUV = query_UHQ.new_empty(heads, tokens, value_width)
        weights = list[Tensor]()
        for block in blocks:
            both = _multiply(block, query_UHQ, key_UGQ)
            cpu_kernels.softmax_rows(*both, block.layout_B4, scale)
            _mix(block, *both, value_UGV, out_HUV)
            weights += both
        ctx.save_for_backward(query_UHQ, key_UGQ, value_UGV, *weights)
        ctx.blocks, ctx.scale = blocks, scale
        return out_HUV.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from policy import cpu_kernels

        query_UHQ, key_UGQ, value_UGV, *weights = ctx.saved_tensors
        [grad_UHV] = grads
        inputs = (query_UHQ, key_UGQ, value_UGV)
        query_grad, key_grad, value_grad = (torch.empty(x.shape[1], len(x), x.shape[2]) for x in inputs)
        for block, own, before in zip(ctx.blocks, weights[::2], weights[1::2], strict=True):
            back = _multiply(block, grad_UHV, value_UGV)
            cpu_kernels.softmax_rows_backward(own, before, *back, block.layout_B4, ctx.scale)
            _mix(block, *back, key_UGQ, query_grad)
            _gather(block, *back, query_UHQ, key_grad)
            _gather(block, own, before, grad_UHV, value_grad)
        return *(x.transpose(0, 1) for x in (query_grad, key_grad, value_grad)), None, None


def _multiply(block: _Block, a_UHX: Tensor, b_UGX: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token's a the products with b of its own row, [H, B, R, R], and of its prefix, as `_Rests.place` says."""
    a_BRHX, b_BRGX = (block.rows.pad(x_UHX[block.tokens]) for x_UHX in (a_UHX, b_UGX))
    (count, longest, heads, _), share = a_BRHX.shape, a_UHX.shape[1] // b_UGX.shape[1]
    own, before = a_UHX.new_empty(heads, count, longest, longest), a_UHX.new_empty(block.num_scores)
    for head in range(heads):
        torch.bmm(a_BRHX[:, :, head], b_BRGX[:, :, head // share].transpose(1, 2), out=own[head])
    for rests, scores_HMP in _by_prefix(block, before, heads):
        a_HMX, b_GXP = a_UHX[rests.queries].transpose(0, 1), b_UGX[rests.keys].permute(1, 2, 0)
        for first in range(share):
            torch.bmm(a_HMX[first::share], b_GXP, out=scores_HMP[first::share])
    return own, before


def _mix(block: _Block, own_HBRR: Tensor, before: Tensor, b_UGX: Tensor, out_HUX: Tensor) -> None:
    """Write what these weights make of b, [H, X] for each token of the block."""
    b_BRGX, heads, share = block.rows.pad(b_UGX[block.tokens]), len(out_HUX), len(out_HUX) // b_UGX.shape[1]
    for head in range(heads):
        with _rows_of(block, out_HUX[head]) as out_BRX:
            torch.bmm(own_HBRR[head], b_BRGX[:, :, head // share], out=out_BRX)
    for rests, weights_HMP in _by_prefix(block, before, heads):
        b_GPX, out_HMX = b_UGX[rests.keys].transpose(0, 1), out_HUX[:, rests.queries]
        for first in range(share):
            out_HMX[first::share].baddbmm_(weights_HMP[first::share], b_GPX)


def _gather(block: _Block, own_HBRR: Tensor, before: Tensor, a_UHX: Tensor, out_GUX: Tensor) -> None:
    """Write what each token of the block is given of a by those that see it, [G, X]; add it for those of prefixes."""
    a_BRHX, heads, share = block.rows.pad(a_UHX[block.tokens]), a_UHX.shape[1], a_UHX.shape[1] // len(out_GUX)
    for group in range(len(out_GUX)):
        with _rows_of(block, out_GUX[group]) as out_BRX:
            for head in range(share * group, share * (group + 1)):
                kept = 0 if head == share * group else 1
                out_BRX.baddbmm_(own_HBRR[head].transpose(1, 2), a_BRHX[:, :, head], beta=kept)
    for rests, weights_HMP in _by_prefix(block, before, heads):
        a_HMX, out_GPX = a_UHX[rests.queries].transpose(0, 1), out_GUX[:, rests.keys]
        for first in range(share):
            out_GPX.baddbmm_(weights_HMP[first::share].transpose(1, 2), a_HMX[first::share])


@contextmanager
def _rows_of(block: _Block, out_UX: Tensor) -> Iterator[Tensor]:
    """The block's part of a head's output as rows [B, R, X] to write to."""
    out_NX, shape = out_UX[block.tokens], (len(block.rows.lengths), block.rows.longest, out_UX.shape[1])
    if block.rows.slot_N is None:
        yield out_NX.view(shape)
    else:
        out_BRX = out_UX.new_empty(shape)
        yield out_BRX
        torch.index_select(out_BRX.flatten(0, 1), 0, block.rows.slot_N, out=out_NX)


def _by_prefix(block: _Block, before: Tensor, heads: int) -> Iterator[tuple[_Rests, Tensor]]:
    """Rests with their scores over their prefix, [H, M, P]."""
    for rests in block.rests:
        shape = (heads, rests.queries.stop - rests.queries.start, rests.keys.stop - rests.keys.start)
        yield rests, before[rests.place : rests.place + math.prod(shape)].view(shape)
