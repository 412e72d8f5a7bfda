"""How ranks share a step: who they are, sums over all, gathered objects. The only file that imports accelerate.

Gradients are summed once per update, after all micro-batches, instead of through a wrapper's hooks: the loss is already
divided by the global number of tokens, and ranks may hold different numbers of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

Item = TypeVar("Item")

LOST = ("closed by peer", "reset by peer", "Broken pipe")
"""What gloo's error says when a peer is gone; it has no type of its own."""


class RankLostError(RuntimeError):
    """Another rank ended in the middle of the run; why stands in its own output."""


class Ranks:
    """The processes that `accelerate launch` (or nothing) started, and what they do together."""

    def __init__(self, *, cpu: bool) -> None:
        self._accelerator = Accelerator(cpu=cpu)
        self.device: torch.device = self._accelerator.device
        self.rank: int = dist.get_rank() if dist.is_initialized() else 0
        self.size: int = dist.get_world_size() if dist.is_initialized() else 1
        self._group: dist.ProcessGroup | None = None

    def apart(self) -> Ranks:
        """The same ranks over a group of their own, for `gather` in a thread beside this one: messages do not meet.

        All ranks call it together.
        """
        beside = copy(self)
        if self.size > 1:
            beside._group = dist.new_group(backend="gloo")
        return beside

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the person."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> tuple[int, list[Item]]:
        """This rank's contiguous part of a list that all ranks hold, and the index of its first item."""
        start, end = (len(items) * r // self.size for r in (self.rank, self.rank + 1))
        return start, list(items[start:end])

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Add tensors up over all ranks, in place, in one message per dtype."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for group in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            with self._peers():
                dist.all_reduce(flat)
            pieces = flat.split([tensor.numel() for tensor in group])
            for tensor, piece in zip(group, pieces, strict=True):
                tensor.copy_(piece.view_as(tensor))

    def sum_number(self, value: float) -> float:
        """One number added up over all ranks, in double precision."""
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        self.sum_([total])
        return float(total)

    def max_number(self, value: float) -> float:
        """The largest over all ranks."""
        return max(self.gather([value]))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum_number(float(flag)) > 0

    def gather(self, items: list[Item]) -> list[Item]:
        """The lists of all ranks joined in order of rank, on every rank."""
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        with self._peers():
            dist.all_gather_object(parts, items, group=self._group)
        return [item for part in parts for item in part]

    def wait(self) -> None:
        """Until every rank is here."""
        with self._peers():
            self._accelerator.wait_for_everyone()

    @contextmanager
    def _peers(self) -> Iterator[None]:
        """Around what needs all ranks: one that is gone is said in one line, under which its own error can be seen."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistBackendError) or any(sign in str(error) for sign in LOST):
                raise RankLostError(
                    f"rank {self.rank} of {self.size} stops: another rank ended (see its own output); "
                    "--resume goes on from the last checkpoint"
                ) from error
            raise

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()
