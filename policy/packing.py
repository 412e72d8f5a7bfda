"""Rows of different lengths laid end to end, without padding.

Shapes: B rows, N tokens of all rows together, S the longest row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """Where each row lies among N packed tokens."""

    lengths: tuple[int, ...]
    """Tokens of each row, [B]."""
    position_ids_N: Tensor
    """Position of each token within its row, int64."""
    slot_N: Tensor | None
    """Index of each token in a [B, S] padded layout, flattened; None where all rows are equally long."""
    bounds: Tensor
    """Where each row starts and, last, where the last one ends, int32 [B + 1]."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> PackedRows:
        """The layout of rows with these lengths (each at least 1)."""
        lengths = tuple(lengths)
        assert lengths
        assert min(lengths) > 0
        longest = max(lengths)
        grid = torch.arange(longest)
        inside = grid[None, :] < torch.tensor(lengths)[:, None]
        slots = inside.flatten().nonzero().squeeze(1)
        return cls(
            lengths=lengths,
            position_ids_N=(slots % longest).to(device),
            slot_N=None if min(lengths) == longest else slots.to(device),
            bounds=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device),
        )

    @property
    def longest(self) -> int:
        """S, tokens of the longest row."""
        return max(self.lengths)

    @property
    def starts(self) -> list[int]:
        """Index of each row's first token, [B]."""
        starts, position = [], 0
        for length in self.lengths:
            starts.append(position)
            position += length
        return starts

    @property
    def last_N(self) -> Tensor:
        """Index of each row's last token, [B]."""
        return torch.tensor(self.lengths).cumsum(0).sub(1).to(self.position_ids_N.device)

    def pad(self, x_N: Tensor) -> Tensor:
        """[N, ...] to [B, S, ...], zeros after each row's end."""
        shape = (len(self.lengths), self.longest, *x_N.shape[1:])
        if self.slot_N is None:
            return x_N.view(shape)
        flat = x_N.new_zeros(shape[0] * shape[1], *x_N.shape[1:])
        return flat.index_copy(0, self.slot_N, x_N).view(shape)

    def unpad(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...] to [N, ...]."""
        flat = x_BS.flatten(0, 1)
        return flat if self.slot_N is None else flat.index_select(0, self.slot_N)
