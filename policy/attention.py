"""What both attentions share: how to attend in one pass (the plan), attention within packed rows, the cache's writing.

Shapes: N packed tokens, B sequences, H query heads, G key-value heads (G divides H; head h reads h // (H/G)),
Q query and key width, V value width, W numbers of a cache entry, L cached positions, S longest row (of what is shared:
P longest prefix, R longest rest), U tokens with shared prefixes counted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.continued_attention import Continued
from policy.cpu_attention import SHORT_ROW, attend_short_rows, takes_short_rows
from policy.gpu_attention import attend_on_gpu, takes_unpadded
from policy.packing import PackedRows, SharedPrefixes
from policy.paged_attention import Absorbed
from policy.recompute import remade


@dataclass(frozen=True, kw_only=True, slots=True)
class Expanded:
    """Attend within each packed row; where a cache is given, also write what decoding will need.

    Where `rows.shared` is given, the tokens are those U, in its order, and there is no cache.
    """

    rows: PackedRows
    cache: Tensor | None = None
    """[layers, blocks, block_size, W], or None while training."""
    slot_N: Tensor | None = None
    """Flat position of each token in the cache, block * block_size + offset."""


AttentionPlan = Expanded | Continued | Absorbed


def attend_in_rows(query_NHQ: Tensor, key_NGQ: Tensor, value_NGV: Tensor, rows: PackedRows, scale: float) -> Tensor:
    """Causal softmax attention [N, H, V] within each packed row; of the U tokens of `rows.shared` where it is given."""
    if takes_unpadded(query_NHQ, value_NGV):
        return attend_on_gpu(query_NHQ, key_NGQ, value_NGV, rows, scale)
    if takes_short_rows(query_NHQ, key_NGQ, value_NGV, rows):
        return attend_short_rows(query_NHQ, key_NGQ, value_NGV, rows, scale)
    if rows.shared is not None:
        return _attend_after_prefixes(query_NHQ, key_NGQ, value_NGV, rows.shared, scale)
    # Causal attention never looks right, so zeros padded after a row's end change nothing inside it.
    query, key, value = (rows.pad(x).transpose(1, 2) for x in (query_NHQ, key_NGQ, value_NGV))
    return rows.unpad(attend_causally(query, key, value, scale).transpose(1, 2))


def attend_causally(query_BHSQ: Tensor, key_BGSQ: Tensor, value_BGSV: Tensor, scale: float) -> Tensor:
    """Causal softmax attention [B, H, S, V]; the softmax is in fp32 either way."""
    (_, heads, length, _), groups = query_BHSQ.shape, key_BGSQ.shape[1]
    if query_BHSQ.device.type != "cpu" or length > SHORT_ROW:
        return F.scaled_dot_product_attention(
            query_BHSQ, key_BGSQ, value_BGSV, is_causal=True, scale=scale, enable_gqa=groups < heads
        )
    bias_SS = torch.full((length, length), float("-inf"), dtype=query_BHSQ.dtype).triu(1)
    return _attend_plainly(query_BHSQ, key_BGSQ, value_BGSV, bias_SS.repeat(heads // groups, 1), scale)


def _attend_after_prefixes(
    query_UHQ: Tensor, key_UGQ: Tensor, value_UGV: Tensor, shared: SharedPrefixes, scale: float
) -> Tensor:
    """Attention [U, H, V] of prefixes within themselves, and of each rest over its prefix and itself."""
    prefix_rows = shared.prefix_rows
    counts = [shared.num_shared, *(sum(block.rows.lengths) for block in shared.blocks)]
    queries, keys, values = (x.split(counts) for x in (query_UHQ, key_UGQ, value_UGV))
    outs = [attend_in_rows(queries[0], keys[0], values[0], prefix_rows, scale)]
    for block, query, key, value in zip(shared.blocks, queries[1:], keys[1:], values[1:], strict=True):
        join = partial(block.join, prefix_rows=prefix_rows)
        key_BGSQ, value_BGSV = remade(join, keys[0], key), remade(join, values[0], value)
        query_BHRQ = block.rows.pad(query).transpose(1, 2)
        out_BHRV = _attend_seeing(query_BHRQ, key_BGSQ, value_BGSV, block.hides(prefix_rows), scale)
        outs.append(block.rows.unpad(out_BHRV.transpose(1, 2)))
    return torch.cat(outs)


def _attend_seeing(
    query_BHRQ: Tensor, key_BGSQ: Tensor, value_BGSV: Tensor, hidden_BRS: Tensor, scale: float
) -> Tensor:
    """Softmax attention [B, H, R, V] of queries over all keys that are not hidden from them; the last keys are the
    queries' own, and those after a query's are."""
    (_, heads, own, _), groups, before = query_BHRQ.shape, key_BGSQ.shape[1], key_BGSQ.shape[2] - query_BHRQ.shape[2]
    nothing = torch.zeros((), dtype=query_BHRQ.dtype, device=query_BHRQ.device)
    bias_BRS = nothing.masked_fill(hidden_BRS, float("-inf"))
    if query_BHRQ.device.type == "cpu" and own * (before + own) <= SHORT_ROW**2:
        bias_BRS = bias_BRS.repeat(1, heads // groups, 1)
        if len(bias_BRS) > 1:
            bias_BRS = bias_BRS.repeat_interleave(groups, dim=0)
        return _attend_plainly(query_BHRQ, key_BGSQ, value_BGSV, bias_BRS, scale)
    outs = list[Tensor]()
    # Some queries at a time: what lies to the right of all of them costs nothing.
    for first in range(0, own, SHORT_ROW):
        last = min(own, first + SHORT_ROW)
        seen = slice(before + last)
        outs.append(
            F.scaled_dot_product_attention(
                query_BHRQ[:, :, first:last],
                key_BGSQ[:, :, seen],
                value_BGSV[:, :, seen],
                attn_mask=bias_BRS[:, None, first:last, seen],
                scale=scale,
                enable_gqa=groups < heads,
            )
        )
    return torch.cat(outs, dim=2)


def _attend_plainly(query_BHRQ: Tensor, key_BGSQ: Tensor, value_BGSV: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Softmax attention [B, H, R, V] in two batched products; `bias` is added to the scores, [..., H/G * R, S]."""
    heads, length, groups = query_BHRQ.shape[1], query_BHRQ.shape[2], key_BGSQ.shape[1]
    # Heads that share a key are one taller matrix.
    query = query_BHRQ.unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1)
    key, value = key_BGSQ.flatten(0, 1), value_BGSV.flatten(0, 1)
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scale)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(weights, value).view(-1, heads, length, value.shape[-1])


def write_cache(blocks: Tensor, slot_N: Tensor, first_NX: Tensor, second_NY: Tensor) -> None:
    """Put what decoding will read at flat positions `slot_N` of one layer's blocks [blocks, block_size, W], in place:
    the two parts of each entry side by side.

    What is not a number is written as 0. It still spoils the sequence it comes from, through that sequence's own hidden
    states; in the cache it would spoil the block's next holder too, since weight 0 times NaN is NaN.
    """
    if blocks.is_cuda:
        from policy import step_kernels

        step_kernels.write(blocks, slot_N, first_NX, second_NY)
        return
    entries_NW = torch.cat((first_NX, second_NY), dim=-1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    blocks.flatten(0, 1).index_copy_(0, slot_N, entries_NW.to(blocks.dtype))
