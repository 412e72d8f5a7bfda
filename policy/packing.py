"""Rows of different lengths laid end to end, without padding; and what several begin with, laid down once.

Shapes: B rows, N tokens of all rows together, S the longest row, F prefixes, U tokens with each prefix counted once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
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
    shared: SharedPrefixes | None = None
    """How a pass goes once over what rows begin with; None where each row is gone over by itself."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        prefixes: Sequence[tuple[int, int]] = (),
    ) -> PackedRows:
        """The layout of rows with these lengths (each at least 1).

        `prefixes` says how many rows, one after another, begin with the same tokens, and with how many: pairs that
        cover all rows in order, none of which may end with its prefix. Empty: nothing is shared.
        """
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
            shared=SharedPrefixes.of(lengths, prefixes, device) if prefixes else None,
        )

    @property
    def alone(self) -> PackedRows:
        """The same rows, each gone over by itself."""
        return replace(self, shared=None)

    def take(self, first: int, last: int) -> PackedRows:
        """Rows `first` to `last`, the last not included, sharing among them what they share here."""
        prefixes = list[tuple[int, int]]()
        if self.shared is not None:
            start = 0
            for count, length in self.shared.prefixes:
                inside = min(last, start + count) - max(first, start)
                if inside > 0:
                    prefixes.append((inside, length))
                start += count
        return PackedRows.of(self.lengths[first:last], self.position_ids_N.device, prefixes=prefixes)

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


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrefixes:
    """What rows begin with, once: U tokens, first those of the F prefixes, then what each of the B rows goes on with.

    A token's keys, values and hidden state depend on nothing after it, so that rows with equal beginnings have them in
    common.
    """

    prefixes: tuple[tuple[int, int], ...]
    """How many rows share each prefix and how many tokens it has, [F]."""
    prefix_rows: PackedRows
    """The prefixes as rows of their own, [F]."""
    rest_rows: PackedRows
    """What comes after the prefix in each row, [B]."""
    prefix_B: Tensor
    """Which prefix each row begins with, int64."""
    token_U: Tensor
    """Place of each token among N, of a prefix in the first row that has it; int64."""
    place_N: Tensor
    """Place of each of the N tokens among U, int64."""
    position_ids_U: Tensor
    """Position of each token within its row, int64."""
    bounds: Tensor
    """Where each prefix and then each rest starts among U, and where the last ends, int32 [F + B + 1]."""
    rest_bounds: Tensor
    """Where the first rest of each prefix starts among the rests' tokens, and where the last ends, int32 [F + 1]."""
    longest_together: int
    """Most tokens of all rests of one prefix."""

    @classmethod
    def of(
        cls, lengths: Sequence[int], prefixes: Sequence[tuple[int, int]], device: torch.device | str = "cpu"
    ) -> SharedPrefixes:
        """See `PackedRows.of`."""
        prefix_of_row = [f for f, (count, _) in enumerate(prefixes) for _ in range(count)]
        assert len(prefix_of_row) == len(lengths)
        rests = [length - prefixes[f][1] for length, f in zip(lengths, prefix_of_row, strict=True)]
        assert min(rests) > 0
        prefix_B, lengths_B = torch.tensor(prefix_of_row), torch.tensor(lengths)
        starts, rest_rows = PackedRows.of([length for _, length in prefixes]), PackedRows.of(rests)
        row_N = torch.arange(len(lengths)).repeat_interleave(lengths_B)
        position_N = torch.arange(len(row_N)) - (lengths_B.cumsum(0) - lengths_B)[row_N]
        own_B = torch.tensor([length for _, length in prefixes])[prefix_B]
        is_shared_N = position_N < own_B[row_N]
        num_shared = sum(starts.lengths)
        place_N = torch.where(
            is_shared_N,
            starts.bounds[:-1].long()[prefix_B][row_N] + position_N,
            num_shared + torch.arange(len(row_N)) - own_B.cumsum(0)[row_N],
        )
        is_first_B = prefix_B.diff(prepend=torch.tensor([-1])) > 0
        token_U = torch.cat(((is_shared_N & is_first_B[row_N]).nonzero(), (~is_shared_N).nonzero())).squeeze(1)
        ends = [0, *itertools.accumulate(count for count, _ in prefixes)]
        rest_bounds = rest_rows.bounds[ends]
        return cls(
            prefixes=tuple(prefixes),
            prefix_rows=PackedRows.of(starts.lengths, device),
            rest_rows=PackedRows.of(rests, device),
            prefix_B=prefix_B.to(device),
            token_U=token_U.to(device),
            place_N=place_N.to(device),
            position_ids_U=position_N[token_U].to(device),
            bounds=torch.cat((starts.bounds, num_shared + rest_rows.bounds[1:])).to(device),
            rest_bounds=rest_bounds.to(device),
            longest_together=int(rest_bounds.diff().max()),
        )

    @property
    def num_shared(self) -> int:
        """Tokens of all prefixes; the rests' come after them."""
        return sum(self.prefix_rows.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest prefix or rest."""
        return max(self.prefix_rows.longest, self.rest_rows.longest)

    def join(self, start_F: Tensor, rest_B: Tensor) -> Tensor:
        """[num_shared, G, ...] and [U - num_shared, G, ...] to rows [B, G, P + R, ...]: each row's prefix, padded with
        zeros to the longest (P), then its rest, padded to the longest (R)."""
        start = self.prefix_rows.pad(start_F).transpose(1, 2).index_select(0, self.prefix_B)
        return torch.cat((start, self.rest_rows.pad(rest_B).transpose(1, 2)), dim=2)

    def hides(self) -> Tensor:
        """True where a rest must not look: [B, R, P + R], or [1, R, P + R] where all prefixes are equally long."""
        before, own = self.prefix_rows.longest, self.rest_rows.longest
        device = self.prefix_B.device
        later_RR = torch.ones(own, own, dtype=torch.bool, device=device).triu(1)[None]
        if self.prefix_rows.slot_N is None:
            return F.pad(later_RR, (before, 0))
        length_B = self.prefix_rows.bounds.diff().index_select(0, self.prefix_B)
        beyond_BP = torch.arange(before, device=device) >= length_B[:, None]
        size = (len(length_B), own)
        return torch.cat((beyond_BP[:, None].expand(*size, -1), later_RR.expand(*size, -1)), dim=2)
