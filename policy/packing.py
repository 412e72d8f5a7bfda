"""Rows of different lengths laid end to end, without padding; and what several begin with, laid down once.

Shapes: B rows, N tokens of all rows together, S the longest row, F prefixes, U tokens with each prefix counted once,
W wanted tokens, L rows with one.
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
        prefixes: Sequence[int] = (),
        prefix_of_row: Sequence[int] = (),
    ) -> PackedRows:
        """The layout of rows with these lengths (each at least 1).

        Rows may begin with the same tokens: `prefixes` are how many, [F], and `prefix_of_row` says which of them each
        row begins with and goes on after, [B]; each is some row's. Empty: nothing is shared.
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
            shared=SharedPrefixes.of(lengths, prefixes, prefix_of_row, device) if prefixes else None,
        )

    @property
    def alone(self) -> PackedRows:
        """The same rows, each gone over by itself."""
        return replace(self, shared=None)

    def take(self, first: int, last: int) -> PackedRows:
        """Rows `first` to `last`, the last not included, sharing among them what they share here."""
        if self.shared is None:
            return PackedRows.of(self.lengths[first:last], self.position_ids_N.device)
        of_row = self.shared.prefix_of_row[first:last]
        kept = {prefix: new for new, prefix in enumerate(dict.fromkeys(of_row))}
        return PackedRows.of(
            self.lengths[first:last],
            self.position_ids_N.device,
            prefixes=[self.shared.prefix_rows.lengths[prefix] for prefix in kept],
            prefix_of_row=[kept[prefix] for prefix in of_row],
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """Some tokens of packed rows by their places, which the host knows when it packs them and a GPU's mask would have
    to be asked for."""

    token_W: Tensor
    """Their places among the N tokens, in order, int64."""
    row_L: Tensor
    """The rows that have any, int64."""
    first_position: int
    """Least position of one in its row; at least 1, as a row's first token has nothing before it."""

    @classmethod
    def of(cls, mask_N: Tensor, rows: PackedRows) -> Wanted:
        """The tokens at which a mask is true, on the device of `rows`. Waits for a GPU that the mask lies on."""
        device, token_W = rows.position_ids_N.device, mask_N.cpu().nonzero().squeeze(1)
        ends_B = torch.tensor(rows.lengths).cumsum(0)
        row_W = torch.searchsorted(ends_B, token_W, right=True)
        position_W = token_W - (ends_B - torch.tensor(rows.lengths))[row_W]
        first_position = int(position_W.min()) if len(token_W) else 1
        assert first_position, "a row's first token has nothing before it"
        return cls(token_W=token_W.to(device), row_L=row_W.unique().to(device), first_position=first_position)


BLOCK_GROWTH, BLOCK_LEAST = 1.5, 16
"""Rests up to so many times as long as the shortest of them are padded together, and those of so many tokens."""

LEAST_KEYS = 4096
"""Tokens of prefixes, copies counted, over which a GPU's backward pass has work for all of its processors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedPrefixes:
    """What rows begin with, once: U tokens, first those of the F prefixes, then what each of the B rows goes on with.

    A token's keys, values and hidden state depend on nothing after it, so that rows with equal beginnings have them in
    common.
    """

    prefix_of_row: tuple[int, ...]
    """Which prefix each row begins with, [B]."""
    prefix_rows: PackedRows
    """The prefixes as rows of their own, [F]."""
    rest_rows: PackedRows
    """What comes after the prefix in each row, [B]."""
    token_U: Tensor
    """Place of each token among N, of a prefix in the first row that has it; int64."""
    place_N: Tensor
    """Place of each of the N tokens among U, int64."""
    position_ids_U: Tensor
    """Position of each token within its row, int64."""
    bounds: Tensor
    """Where each prefix and then each rest starts among U, and where the last ends, int32 [F + B + 1]."""
    runs: RestRuns | None
    """The rests by prefix; None where the rows of a prefix do not follow one another in the order of the prefixes."""
    blocks: tuple[RestBlock, ...]
    """The rests in order, some at a time on a CPU, whose attention pads them; few where short ones come first."""

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        prefixes: Sequence[int],
        prefix_of_row: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> SharedPrefixes:
        """See `PackedRows.of`."""
        assert len(prefix_of_row) == len(lengths)
        assert set(prefix_of_row) == set(range(len(prefixes)))
        rests = [length - prefixes[prefix] for length, prefix in zip(lengths, prefix_of_row, strict=True)]
        prefix_rows, rest_rows = PackedRows.of(prefixes), PackedRows.of(rests)
        lengths_B, prefix_B = torch.tensor(lengths), torch.tensor(prefix_of_row)
        own_B, num_shared = torch.tensor(prefixes)[prefix_B], sum(prefixes)
        row_N = torch.arange(len(lengths)).repeat_interleave(lengths_B)
        position_N = torch.arange(len(row_N)) - (lengths_B.cumsum(0) - lengths_B)[row_N]
        is_shared_N = position_N < own_B[row_N]
        place_N = torch.where(
            is_shared_N,
            prefix_rows.bounds[:-1].long()[prefix_B][row_N] + position_N,
            num_shared + torch.arange(len(row_N)) - own_B.cumsum(0)[row_N],
        )
        last_U = torch.full((num_shared + sum(rests),), len(row_N))
        token_U = last_U.scatter_reduce(0, place_N, torch.arange(len(row_N)), "amin")
        is_by_prefix = list(prefix_of_row) == sorted(prefix_of_row)
        return cls(
            prefix_of_row=tuple(prefix_of_row),
            prefix_rows=PackedRows.of(prefixes, device),
            rest_rows=PackedRows.of(rests, device),
            token_U=token_U.to(device),
            place_N=place_N.to(device),
            position_ids_U=position_N[token_U].to(device),
            bounds=torch.cat((prefix_rows.bounds, num_shared + rest_rows.bounds[1:])).to(device),
            runs=RestRuns.of(prefixes, prefix_of_row, rests, device) if is_by_prefix else None,
            blocks=tuple(
                RestBlock(rows=PackedRows.of(rests[rows], device), prefix_B=prefix_B[rows].to(device))
                for rows in (_blocks(rests) if torch.device(device).type == "cpu" else [slice(0, len(rests))])
            ),
        )

    @property
    def num_shared(self) -> int:
        """Tokens of all prefixes; the rests' come after them."""
        return sum(self.prefix_rows.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest prefix or rest."""
        return max(self.prefix_rows.longest, self.rest_rows.longest)


@dataclass(frozen=True, kw_only=True, slots=True)
class RestRuns:
    """Rests that follow one another after one prefix, each run with a copy of the prefix's keys and values.

    Copies give a GPU enough to do at once: of `LEAST_KEYS` tokens together, or of a prefix for each of its rests.
    """

    bounds: Tensor
    """Where each run starts among the rests' tokens and, last, where the last one ends, int32."""
    key_bounds: Tensor
    """The same among the copies' tokens, int32."""
    token_K: Tensor
    """Place of each of the copies' tokens among the prefixes' tokens, int64."""
    longest: int
    """Most tokens of a run."""

    @classmethod
    def of(
        cls, prefixes: Sequence[int], prefix_of_row: Sequence[int], rests: Sequence[int], device: torch.device | str
    ) -> RestRuns:
        """Of rests in the order of their prefixes."""
        copies = -(-LEAST_KEYS // sum(prefixes))
        runs, of_run, places = list[int](), list[int](), list[Tensor]()
        starts = [0, *itertools.accumulate(prefixes)]
        for prefix, rows in itertools.groupby(range(len(rests)), key=lambda row: prefix_of_row[row]):
            tokens = [rests[row] for row in rows]
            at_once = -(-len(tokens) // copies)
            for first in range(0, len(tokens), at_once):
                runs.append(sum(tokens[first : first + at_once]))
                of_run.append(prefixes[prefix])
                places.append(torch.arange(starts[prefix], starts[prefix + 1]))
        bounds, key_bounds = (
            torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)
            for lengths in (runs, of_run)
        )
        return cls(bounds=bounds, key_bounds=key_bounds, token_K=torch.cat(places).to(device), longest=max(runs))


@dataclass(frozen=True, kw_only=True, slots=True)
class RestBlock:
    """Some rests that follow one another, about equally long."""

    rows: PackedRows
    """The rests, [B]."""
    prefix_B: Tensor
    """Which prefix each follows, int64."""

    def join(self, prefix_F: Tensor, rest_N: Tensor, *, prefix_rows: PackedRows) -> Tensor:
        """The prefixes' and these rests' [..., G, Q] as rows [B, G, P + R, Q]: the prefix, padded with zeros to the
        longest of all (P), then the rest, padded to the longest here (R)."""
        prefix = prefix_rows.pad(prefix_F).transpose(1, 2).index_select(0, self.prefix_B)
        return torch.cat((prefix, self.rows.pad(rest_N).transpose(1, 2)), dim=2)

    def hides(self, prefix_rows: PackedRows) -> Tensor:
        """True where a rest must not look: [B, R, P + R], or [1, R, P + R] where all prefixes are equally long."""
        before, own, device = prefix_rows.longest, self.rows.longest, self.prefix_B.device
        later_RR = torch.ones(own, own, dtype=torch.bool, device=device).triu(1)[None]
        if prefix_rows.slot_N is None:
            return F.pad(later_RR, (before, 0))
        length_B = prefix_rows.bounds.diff().index_select(0, self.prefix_B)
        beyond_BP = torch.arange(before, device=device) >= length_B[:, None]
        size = (len(length_B), own)
        return torch.cat((beyond_BP[:, None].expand(*size, -1), later_RR.expand(*size, -1)), dim=2)


def _blocks(lengths: Sequence[int]) -> list[slice]:
    """Rows one after another that are worth padding together."""
    blocks, first, shortest, longest = list[slice](), 0, lengths[0], lengths[0]
    for row, length in enumerate(lengths):
        shortest, longest = min(shortest, length), max(longest, length)
        if longest > BLOCK_GROWTH * max(shortest, BLOCK_LEAST):
            blocks.append(slice(first, row))
            first, shortest, longest = row, length, length
    return [*blocks, slice(first, len(lengths))]
