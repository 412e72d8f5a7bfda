"""Attention from one new token of each sequence over its cached positions.

A cache entry is W numbers a token: for latent attention one key of W numbers, whose first R are also the value; for
grouped-query attention the keys of all groups, then their values. Both are one formula over different columns.

Shapes: B sequences, H query heads, G key-value heads, Q key width, V value width, W numbers of a cache entry, L cached
positions, M blocks of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_BLOCK = 4
"""Positions of the smallest cache block that the kernels for the CPU take: they score so many at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheLayout:
    """Which columns of a cache entry are keys and which are values; group g's begin g times their width later."""

    groups: int
    """G."""
    key_width: int
    """Q; keys begin at column 0."""
    value_start: int
    """Column of the first value."""
    value_width: int
    """V."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Absorbed:
    """Attend from one new token per sequence over its cached positions, the new one included.

    The name is MLA's, which absorbs its up-projections here; grouped-query attention has nothing to absorb.
    """

    cache: Tensor
    """[layers, blocks, block_size, W]."""
    block_table_BM: Tensor
    """Block ids in order, reaching every sequence's new token; entries beyond a sequence's own are any valid ids.

    On a GPU, where there are more new tokens than rows of it, the rows serve again from the first on."""
    slot_B: Tensor
    """Flat cache position where each sequence's new token goes, block * block_size + offset."""
    length_B: Tensor
    """Cached positions of each sequence, the new one included."""
    bias_B1L: Tensor | None
    """[B, 1, L] fp32, 0 at a sequence's positions and -inf beyond; None for kernels, which read `length_B`."""

    @classmethod
    def at(cls, cache: Tensor, block_table_BM: Tensor, position_B: Tensor) -> Absorbed:
        """The plan in which each sequence's new token stands at `position_B` (int64, 0 for the first)."""
        size = cache.shape[2]
        if cache.is_cuda:
            from policy import step_kernels

            _, slot_B, length_B = step_kernels.place(block_table_BM, position_B, size)
            return cls(cache=cache, block_table_BM=block_table_BM, slot_B=slot_B, length_B=length_B, bias_B1L=None)
        own_B = block_table_BM.gather(1, (position_B // size)[:, None]).squeeze(1)
        bias_B1L = None
        if cache.dtype != torch.float32 or size < LEAST_BLOCK or torch.is_grad_enabled():
            beyond_BL = torch.arange(block_table_BM.shape[1] * size)[None] > position_B[:, None]
            bias_B1L = torch.zeros(beyond_BL.shape).masked_fill_(beyond_BL, float("-inf"))[:, None]
        return cls(
            cache=cache,
            block_table_BM=block_table_BM.contiguous(),  # kernels take it by its address
            slot_B=own_B * size + position_B % size,
            length_B=position_B + 1,
            bias_B1L=bias_B1L,
        )

    @classmethod
    def at_several(
        cls, cache: Tensor, block_table_BM: Tensor, length_B: Tensor, first: int, count: int, idle_block: int
    ) -> tuple[Tensor, Absorbed]:
        """The plan for `count` new tokens of every sequence, from position length + first on, and these positions: the
        first token of all sequences, then the second. Tokens before position 0 go to a block that is nobody's."""
        if cache.is_cuda:
            from policy import step_kernels

            position_N, slot_N, until_N = step_kernels.place(
                block_table_BM, length_B, cache.shape[2], first, count, idle_block
            )
            plan = cls(cache=cache, block_table_BM=block_table_BM, slot_B=slot_N, length_B=until_N, bias_B1L=None)
            return position_N, plan
        ahead_X1 = torch.arange(first, first + count, device=length_B.device)[:, None]
        position_N = (length_B + ahead_X1).flatten()
        table_NM = block_table_BM.repeat(count, 1).masked_fill_(position_N[:, None] < 0, idle_block)
        position_N = position_N.clamp(min=0)
        return position_N, cls.at(cache, table_NM, position_N)

    @property
    def is_by_feature(self) -> bool:
        """Whether the kernels for the CPU attend, in the layout of `policy.decode_layout`."""
        return self.bias_B1L is None and self.cache.device.type == "cpu"


def attend_over_cache(
    query_BHQ: Tensor, layer: int, plan: Absorbed, layout: CacheLayout, scale: float, *, in_two: bool = False
) -> Tensor:
    """Softmax attention [B, H, V]; scores and softmax are in fp32.

    With `in_two`, for latent attention in half precision, [2, B, H, V]: the result rounded, and what that left.
    """
    blocks = plan.cache[layer]
    if plan.bias_B1L is None:
        from policy import decode_kernels

        return decode_kernels.attend(
            query_BHQ, blocks, plan.block_table_BM, plan.length_B, layout, scale, in_two=in_two
        )
    cached_BLW = blocks.index_select(0, plan.block_table_BM.flatten()).view(len(query_BHQ), -1, blocks.shape[-1])
    values_end = layout.value_start + layout.groups * layout.value_width
    if layout.groups == 1:
        keys_BQL = cached_BLW[..., : layout.key_width].transpose(1, 2)
        values_BLV = cached_BLW[..., layout.value_start : values_end]
        if query_BHQ.dtype == torch.float32:
            scores_BHL = torch.baddbmm(plan.bias_B1L, query_BHQ, keys_BQL, alpha=scale)
        else:
            scores_BHL = torch.bmm(query_BHQ, keys_BQL).float() * scale + plan.bias_B1L
        weights_BHL = scores_BHL.softmax(dim=-1).to(cached_BLW.dtype)
        if in_two:
            mixed_BHV = torch.bmm(weights_BHL.float(), values_BLV.float())
            rounded_BHV = mixed_BHV.to(values_BLV.dtype)
            return torch.stack((rounded_BHV, (mixed_BHV - rounded_BHV).to(values_BLV.dtype)))
        return torch.bmm(weights_BHL, values_BLV)
    keys = cached_BLW[..., : layout.groups * layout.key_width].split(layout.key_width, dim=-1)
    values = cached_BLW[..., layout.value_start : values_end].split(layout.value_width, dim=-1)
    out = []
    # Group by group the columns are read where they lie; one product of all groups would copy them in their order.
    for query_BKQ, keys_BLQ, values_BLV in zip(query_BHQ.chunk(layout.groups, dim=1), keys, values, strict=True):
        scores_BKL = torch.bmm(query_BKQ, keys_BLQ.transpose(1, 2)).float() * scale + plan.bias_B1L
        out.append(torch.bmm(scores_BKL.softmax(dim=-1).to(cached_BLW.dtype), values_BLV))
    return torch.cat(out, dim=1)
