"""Runs the policy over the cache: prompts in packed rows, then one token of every sequence at a time.

Shapes: B sequences, N packed prompt tokens, V vocabulary, L cached positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from policy import PackedRows, Policy
from policy.attention import Expanded
from policy.paged_attention import Absorbed


class ModelRunner:
    """Owns the cache, [layers, blocks, block_size, width]; knows nothing of sampling or scheduling."""

    def __init__(self, policy: Policy, num_blocks: int, block_size: int) -> None:
        self.policy, self.block_size = policy, block_size
        config = policy.config
        # Zeros, not empty memory: a masked position's weight is 0, and 0 times a stray NaN would still be NaN.
        self.cache = torch.zeros(
            config.num_hidden_layers,
            num_blocks,
            block_size,
            config.cache_width,
            dtype=policy.dtype,
            device=policy.device,
        )

    def prefill(self, rows: Sequence[Sequence[int]], blocks: Sequence[np.ndarray]) -> Tensor:
        """Write each row of tokens into its blocks; logits after each row's last token, [rows, V]."""
        packed = PackedRows.of([len(row) for row in rows], self.policy.device)
        token_ids_N = torch.tensor([token for row in rows for token in row], device=self.policy.device)
        slots = [self._slots(b, np.arange(len(row))) for row, b in zip(rows, blocks, strict=True)]
        slot_N = torch.from_numpy(np.concatenate(slots)).to(self.policy.device)
        plan = Expanded(rows=packed, cache=self.cache, slot_N=slot_N)
        output = self.policy(token_ids_N, packed.position_ids_N, plan)
        return self.policy.project(output.hidden_NC.index_select(0, packed.last_N))

    def decode(self, token_ids_B: np.ndarray, lengths_B: np.ndarray, block_table: np.ndarray) -> Tensor:
        """Feed one token per sequence, at position `lengths_B`, and give the logits after it, [B, V].

        `block_table` [B, blocks] int64 must reach that position; entries beyond a sequence's own are any valid ids.
        """
        device = self.policy.device
        reach = int(lengths_B.max()) // self.block_size + 1
        table_BM = torch.from_numpy(np.ascontiguousarray(block_table[:, :reach])).to(device)
        positions_B = torch.from_numpy(lengths_B).to(device)
        plan = Absorbed.at(self.cache, table_BM, positions_B)
        output = self.policy(torch.from_numpy(token_ids_B).to(device), positions_B, plan)
        return self.policy.project(output.hidden_NC)

    def copy_blocks(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy whole blocks, in every layer."""
        source = torch.from_numpy(sources).to(self.cache.device)
        self.cache[:, torch.from_numpy(targets).to(self.cache.device)] = self.cache[:, source]

    def _slots(self, blocks: np.ndarray, positions: np.ndarray) -> np.ndarray:
        slots: np.ndarray = blocks[positions // self.block_size] * self.block_size + positions % self.block_size
        return slots
