"""Attention of packed rows whose beginnings lie in the cache: a long prompt computed in parts, or one that begins as
another did.

Shapes: B rows, N new tokens of all rows together, L tokens of all rows with what lies before them, S new tokens of one
row, T its tokens with what lies before them, H query heads, G key-value heads, Q query and key width, V value width,
W numbers of a cache entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.gpu_attention import attend_unpadded, takes_unpadded
from policy.packing import PackedRows

QUERIES = 1024
"""Of a row at once, where the mask is written out: it grows with their number times the row's length."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Continued:
    """Attend from each packed row over what of it is cached, itself included, which is written first.

    All rows are written before any is read: one may begin with blocks that another fills in the same pass.
    """

    rows: PackedRows
    """The new tokens; their positions count from the row's first new token."""
    cache: Tensor
    """[layers, blocks, block_size, W]."""
    slot_N: Tensor
    """Flat position of each new token in the cache, block * block_size + offset."""
    lengths: tuple[int, ...]
    """Tokens of each row with those before it, [B]."""
    slot_L: Tensor
    """Flat positions in the cache of all these tokens, row after row."""
    bounds: Tensor
    """Where each row starts among them and, last, where the last one ends, int32 [B + 1]."""

    @classmethod
    def of(cls, rows: PackedRows, cache: Tensor, slot_N: Tensor, lengths: Sequence[int], slot_L: Tensor) -> Continued:
        """The plan of these rows; tensors on the cache's device."""
        return cls(
            rows=rows,
            cache=cache,
            slot_N=slot_N,
            lengths=tuple(lengths),
            slot_L=slot_L,
            bounds=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(cache.device),
        )

    def read(self, layer: int) -> Tensor:
        """Entries of all rows' tokens, [L, W]."""
        return self.cache[layer].flatten(0, 1).index_select(0, self.slot_L)


def attend_to_context(query_NHQ: Tensor, key_LGQ: Tensor, value_LGV: Tensor, plan: Continued, scale: float) -> Tensor:
    """Softmax attention [N, H, V] of each new token over itself and all before it in its row."""
    if takes_unpadded(query_NHQ, value_LGV):
        return attend_unpadded(
            query_NHQ, key_LGQ, value_LGV, plan.rows.bounds, plan.bounds, plan.rows.longest, max(plan.lengths), scale
        )
    rows = zip(
        query_NHQ.split(list(plan.rows.lengths)),
        key_LGQ.split(list(plan.lengths)),
        value_LGV.split(list(plan.lengths)),
        strict=True,
    )
    return torch.cat([_attend_row(query, key, value, scale) for query, key, value in rows])


def _attend_row(query_SHQ: Tensor, key_TGQ: Tensor, value_TGV: Tensor, scale: float) -> Tensor:
    before, is_grouped = len(key_TGQ) - len(query_SHQ), query_SHQ.shape[1] > key_TGQ.shape[1]
    key, value = key_TGQ.transpose(0, 1)[None], value_TGV.transpose(0, 1)[None]
    parts = []
    for query in query_SHQ.split(QUERIES):
        seen = before + len(query)
        is_seen = torch.ones(len(query), seen, dtype=torch.bool, device=query.device).tril(before)
        attended = F.scaled_dot_product_attention(
            query.transpose(0, 1)[None],
            key[:, :, :seen],
            value[:, :, :seen],
            attn_mask=is_seen,
            scale=scale,
            enable_gqa=is_grouped,
        )
        parts.append(attended[0].transpose(0, 1))
        before = seen
    return torch.cat(parts)
