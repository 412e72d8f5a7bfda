"""Triton kernels for decoding: attention over a paged cache in one pass over it. Imported only where a GPU is used.

The plain twin is in `policy/paged_attention.py`, which defines what is computed; tests compare the two on the CPU
(TRITON_INTERPRET=1) and on the GPU. A sequence's positions are cut into parts whose length depends on how many
sequences there are (and where the table is wide, on its width), so that the order of additions, and with it every bit
of a result, does not depend on which others share the batch.

Shapes: B sequences, H query heads, G key-value heads, K = H/G query heads of one key-value head, Q key width, V value
width, W numbers of a cache entry, M blocks of the longest sequence, S parts of the longest sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from policy.paged_attention import CacheLayout

PART = 1024
"""Positions that one program walks through; longer sequences are shared among several and then merged."""
FEW_PROGRAMS = 64
"""Where there would be at most so many programs, sequences are cut into parts as short as two of its loops: a program
waits for each of its loads in turn, and a GPU has twice as many processors."""
MERGED_BYTES = 32 << 20
"""Of what the parts of all sequences give; longer parts where it would be more."""


@triton.jit(do_not_specialize=["tables"])
def _attend_kernel(
    query, cache, table, lengths, out, peaks, totals,
    scale, query_stride, head_stride, table_stride, tables, heads_per_group, groups, parts, value_start,
    WIDTH: tl.constexpr, SIZE: tl.constexpr, KEY: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    VALUE: tl.constexpr, VALUES: tl.constexpr, IS_SHARED: tl.constexpr, HEADS: tl.constexpr, STEP: tl.constexpr,
    LONGEST: tl.constexpr, IS_WHOLE: tl.constexpr, IN_TWO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence, up to HEADS query heads of one group, one part of its positions.

    Keys are read as MAIN columns (a power of two) and REST more; the first serve as values too where IS_SHARED.
    """
    row = tl.program_id(0)
    tiles = tl.cdiv(heads_per_group, HEADS)
    group = tl.program_id(1) // tiles
    tile = tl.program_id(1) % tiles
    part = tl.program_id(2)
    length = tl.load(lengths + row)
    first = part * LONGEST
    if first < length:
        within = tile * HEADS + tl.arange(0, HEADS)
        is_head = within < heads_per_group
        head = group * heads_per_group + within
        main = tl.arange(0, MAIN)
        is_main = main < KEY
        start = query + row.to(tl.int64) * query_stride + head[:, None] * head_stride
        q_main = tl.load(start + main[None, :], mask=is_head[:, None] & is_main[None, :], other=0.0)
        if REST > 0:
            rest = MAIN + tl.arange(0, REST)
            is_rest = rest < KEY
            q_rest = tl.load(start + rest[None, :], mask=is_head[:, None] & is_rest[None, :], other=0.0)
        value = tl.arange(0, VALUES)
        is_value = value < VALUE
        peak = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.zeros([HEADS], tl.float32)
        mixed = tl.zeros([HEADS, VALUES], tl.float32)
        last = tl.minimum(first + LONGEST, length)
        for begin in range(first, last, STEP):
            position = begin + tl.arange(0, STEP)
            is_here = position < last
            block = tl.load(table + row % tables * table_stride + position // SIZE, mask=is_here, other=0).to(tl.int64)
            entry = cache + (block * SIZE + position % SIZE) * WIDTH
            key = entry[:, None] + group * KEY
            k_main = tl.load(key + main[None, :], mask=is_here[:, None] & is_main[None, :], other=0.0)
            scores = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
            if REST > 0:
                k_rest = tl.load(key + rest[None, :], mask=is_here[:, None] & is_rest[None, :], other=0.0)
                scores += tl.dot(q_rest, tl.trans(k_rest), input_precision=PRECISION)
            scores = tl.where(is_here[None, :], scores * scale, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            old = tl.exp(peak - higher)
            weight = tl.exp(scores - higher[:, None])
            if IS_SHARED:
                v = k_main
            else:
                at_value = entry[:, None] + value_start + group * VALUE + value[None, :]
                v = tl.load(at_value, mask=is_here[:, None] & is_value[None, :], other=0.0)
            mixed = mixed * old[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
            total = total * old + tl.sum(weight, axis=1)
            peak = higher
        target = (row.to(tl.int64) * (groups * heads_per_group) + head) * parts + part
        inside = is_head[:, None] & is_value[None, :]
        if IS_WHOLE:
            place = out + target[:, None] * VALUE + value[None, :]
            result = mixed / total[:, None]
            tl.store(place, result, mask=inside)
            if IN_TWO:
                left = result - result.to(out.dtype.element_ty).to(tl.float32)
                second = tl.num_programs(0).to(tl.int64) * (groups * heads_per_group) * VALUE
                tl.store(place + second, left, mask=inside)
        else:
            tl.store(out + target[:, None] * VALUE + value[None, :], mixed, mask=inside)
            tl.store(peaks + target, peak, mask=is_head)
            tl.store(totals + target, total, mask=is_head)


@triton.jit
def _merge_kernel(
    mixed, peaks, totals, lengths, out, heads, parts,
    VALUE: tl.constexpr, VALUES: tl.constexpr, LONGEST: tl.constexpr, IN_TWO: tl.constexpr,
):  # fmt: skip
    """One head of one sequence: its parts, each with its own peak, into one."""
    row = tl.program_id(0)
    at = row.to(tl.int64) * heads + tl.program_id(1)
    value = tl.arange(0, VALUES)
    is_value = value < VALUE
    count = tl.cdiv(tl.load(lengths + row), LONGEST)
    peak = float("-inf")
    total = 0.0
    result = tl.zeros([VALUES], tl.float32)
    for part in range(0, count):
        of_part = tl.load(peaks + at * parts + part)
        higher = tl.maximum(peak, of_part)
        old = tl.exp(peak - higher)
        new = tl.exp(of_part - higher)
        piece = tl.load(mixed + (at * parts + part) * VALUE + value, mask=is_value, other=0.0)
        result = result * old + piece * new
        total = total * old + tl.load(totals + at * parts + part) * new
        peak = higher
    result = result / total
    tl.store(out + at * VALUE + value, result, mask=is_value)
    if IN_TWO:
        left = result - result.to(out.dtype.element_ty).to(tl.float32)
        second = tl.num_programs(0).to(tl.int64) * heads * VALUE
        tl.store(out + second + at * VALUE + value, left, mask=is_value)


def attend(
    query_BHQ: Tensor,
    blocks: Tensor,
    block_table_BM: Tensor,
    length_B: Tensor,
    layout: CacheLayout,
    scale: float,
    *,
    in_two: bool = False,
    part: int | None = None,
) -> Tensor:
    """See `policy.paged_attention.attend_over_cache`, `in_two` too; `blocks` [blocks, block_size, W] are one layer's.

    One program walks through at most `part` positions; None chooses by the number of sequences. A table of fewer rows
    than there are queries serves again from its first row on.
    """
    (rows, heads, key_width), (_, size, width) = query_BHQ.shape, blocks.shape
    assert query_BHQ.stride(-1) == 1
    assert block_table_BM.stride(-1) == 1
    assert key_width == layout.key_width
    main, rest = _split_width(key_width)
    values = max(16, triton.next_power_of_2(layout.value_width))
    is_shared = layout.groups == 1 and layout.value_start == 0 and layout.value_width == main
    per_group = heads // layout.groups
    tile = 16 if per_group <= 16 or main > 128 else 32
    wide = main > 128
    step = 32 if wide else 64
    reach, programs = block_table_BM.shape[1] * size, rows * layout.groups * triton.cdiv(per_group, tile)
    if part is None:
        part = part_for(programs, reach, 4 * rows * heads * layout.value_width, 2 * step)
    parts = triton.cdiv(reach, part)
    # A third load on its way pays where there are many programs, and fits where numbers have two bytes.
    stages = 3 if wide and parts == 1 and blocks.element_size() == 2 else 2
    halves = (2,) if in_two else ()
    out = torch.empty(*halves, rows, heads, layout.value_width, dtype=blocks.dtype, device=blocks.device)
    mixed, peaks, totals = out, out, out
    if parts > 1:
        mixed = torch.empty(rows, heads, parts, layout.value_width, dtype=torch.float32, device=blocks.device)
        peaks = torch.empty(rows, heads, parts, dtype=torch.float32, device=blocks.device)
        totals = torch.empty_like(peaks)
    _attend_kernel[(rows, layout.groups * triton.cdiv(per_group, tile), parts)](
        query_BHQ, blocks, block_table_BM, length_B, mixed, peaks, totals,
        scale, query_BHQ.stride(0), query_BHQ.stride(1), block_table_BM.stride(0), len(block_table_BM),
        per_group, layout.groups, parts, layout.value_start,
        WIDTH=width, SIZE=size, KEY=key_width, MAIN=main, REST=rest, VALUE=layout.value_width, VALUES=values,
        IS_SHARED=is_shared, HEADS=tile, STEP=step, LONGEST=part, IS_WHOLE=parts == 1,
        IN_TWO=in_two, PRECISION="ieee" if blocks.dtype == torch.float32 else "tf32", num_warps=4, num_stages=stages,
    )  # fmt: skip
    if parts > 1:
        _merge_kernel[(rows, heads)](
            mixed, peaks, totals, length_B, out, heads, parts,
            VALUE=layout.value_width, VALUES=values, LONGEST=part, IN_TWO=in_two,
        )  # fmt: skip
    return out


def part_for(programs: int, reach: int, bytes_of_part: int, least: int) -> int:
    """Positions of a part: of sequences of up to `reach` for which there would be so many programs without parts."""
    if programs > FEW_PROGRAMS:
        return PART
    part = least
    while part < PART and triton.cdiv(reach, part) * bytes_of_part > MERGED_BYTES:
        part *= 2
    return part


def _split_width(width: int) -> tuple[int, int]:
    """A key's width as a power of two and the power of two that holds what is left, each 0 or at least 16.

    576 is 512 and 64: one tile of 1,024 would be half empty, and would not hold the values alone.
    """
    main = triton.next_power_of_2(width)
    if main == width or width < 32:
        return max(16, main), 0
    main //= 2
    return main, max(16, triton.next_power_of_2(width - main))
