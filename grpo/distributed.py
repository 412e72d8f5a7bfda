"""How ranks share a step: who they are, sums over all, gathered values. The only file that imports accelerate.

Gradients are summed once per update, after all micro-batches, instead of through a wrapper's hooks: the loss is already
divided by the global number of tokens, and ranks may hold different numbers of micro-batches. Where the launcher's file
asks for weights in pieces, grpo/weights.py says what is different.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor

from grpo.config import ConfigError

Item = TypeVar("Item")

LOST = ("closed by peer", "reset by peer", "Broken pipe")
"""What gloo's error says when a peer is gone; it has no type of its own."""
LATE = "Timed out waiting"
"""What gloo's error says when a peer has not come."""
TIMEOUT_S = 1800.0
"""Seconds that ranks wait for each other where the recipe does not say (`ddp_timeout`)."""


Sharding = Literal["fsdp2", "zero2", "zero3"]
"""Ways of keeping weights in pieces."""


class RankLostError(RuntimeError):
    """Another rank ended in the middle of the run, or did not come; why stands in its own output, or its stacks."""


class PreemptedError(KeyboardInterrupt):
    """Asked to leave before the step in hand could be done; like an interrupt, it may come at any line."""


class Ranks:
    """The processes that `accelerate launch` (or nothing) started, and what they do together."""

    def __init__(self, *, cpu: bool, timeout_s: float = TIMEOUT_S) -> None:
        """A rank that waits for another for more than `timeout_s` seconds ends.

        Raises ConfigError where the launcher's file asks for something that is not done here.
        """
        self.sharding: Sharding | None = _sharding()
        """How weights are kept over ranks; None: whole on each."""
        self.deepspeed: Mapping[str, Any] = DeepSpeedPlugin().deepspeed_config if _uses_deepspeed() else {}
        """What the launcher's file tells DeepSpeed, where it does."""
        self.reshard_after_forward: bool = _is_set("FSDP_RESHARD_AFTER_FORWARD")
        """Whether FSDP2 takes a block apart between its forward and its backward pass."""
        self.timeout = timedelta(seconds=timeout_s)
        """For what makes groups of its own."""
        num_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.shares_gpu: bool = not cpu and share_gpus(torch.cuda.device_count(), num_here, self.sharding)
        """Whether gloo carries messages between GPUs, through the host; see `share_gpus`."""
        if int(os.environ.get("LOCAL_RANK", -1)) >= 0 and not dist.is_initialized():
            # Before accelerate would, whose own settings leave out a timeout of 600 s, and know NCCL alone for GPUs.
            dist.init_process_group("gloo" if cpu or self.shares_gpu else "nccl", timeout=self.timeout)
        self.device: torch.device = Accelerator(cpu=cpu).device
        self.rank: int = dist.get_rank() if dist.is_initialized() else 0
        self.size: int = dist.get_world_size() if dist.is_initialized() else 1
        self.may_give_up: bool = self.sharding is None
        """Whether this rank may be made to give the step up where it is (`PreemptedError`): always where weights are
        whole, else in `alone` only."""
        self._group: dist.ProcessGroup | None = None

    def apart(self) -> Ranks:
        """The same ranks over a group of their own, for `gather` in a thread beside this one: messages do not meet.

        All ranks call it together.
        """
        beside = copy(self)
        if self.size > 1:
            beside._group = dist.new_group(backend="gloo", timeout=self.timeout)
        return beside

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Around the part of a step that this rank does without the others, and may be made to give up.

        Where weights lie in pieces, all ranks give the step up if one does, here: none is amid a message, so
        that they can hand over together what a checkpoint takes.
        """
        if self.sharding is None or self._group is not None:  # a thread beside is not what is given up
            yield
            return
        given_up: PreemptedError | None = None
        try:
            try:
                self.may_give_up = True
                yield
            finally:
                self.may_give_up = False
        except PreemptedError as error:
            given_up = error
        if self.any(given_up is not None):
            raise given_up or PreemptedError("another rank gave the step up")

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the person."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> tuple[int, list[Item]]:
        """This rank's contiguous part of a list that all ranks hold, and the index of its first item."""
        start, end = (len(items) * r // self.size for r in (self.rank, self.rank + 1))
        return start, list(items[start:end])

    def deal(self, sizes: Sequence[int]) -> list[int]:
        """Places of this rank's items of a list that all ranks hold, in order; all get about the same size in sum: the
        largest item first, each to the rank that has least.
        """
        totals, dealt = [0] * self.size, list[list[int]]([] for _ in range(self.size))
        for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
            poorest = min(range(self.size), key=lambda rank: totals[rank])
            totals[poorest] += sizes[place]
            dealt[poorest].append(place)
        return sorted(dealt[self.rank])

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
        """The largest over all ranks, in double precision."""
        largest = torch.tensor(value, dtype=torch.float64, device=self.device)
        if self.size > 1:
            with self._peers():
                dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.sum_number(float(flag)) > 0

    def gather(self, items: list[Item]) -> list[Item]:
        """The lists of all ranks joined in order of rank, on every rank.

        Items are what JSON holds: numbers, texts, None, lists and dicts by text. With more ranks than one a tuple comes
        back as a list.
        """
        if self.size == 1:
            return items
        return [item for part in self.gather_bytes(json.dumps(items).encode()) for item in json.loads(part)]

    def gather_bytes(self, own: bytes) -> list[bytes]:
        """The bytes of all ranks, in order of rank, on every rank."""
        return [
            part.numpy().tobytes() for part in self.gather_rows(torch.frombuffer(bytearray(own), dtype=torch.uint8))
        ]

    def gather_rows(self, own_X: Tensor) -> list[Tensor]:
        """One tensor of each rank, in order of rank, on every rank and its host: one-dimensional, of one dtype, each of
        any length. They are never pickled, as `torch.distributed` does with objects.
        """
        if self.size == 1:
            return [own_X.cpu()]
        device = torch.device("cpu") if self._group is not None else self.device
        lengths = list(torch.zeros(self.size, dtype=torch.int64, device=device).split(1))
        with self._peers():
            dist.all_gather(lengths, torch.tensor([len(own_X)], device=device), group=self._group)
            counts = [int(length) for length in lengths]
            longest = max(counts)
            if not longest:
                return [own_X.cpu()] * self.size
            padded = own_X.new_zeros(longest, device=device)
            padded[: len(own_X)] = own_X
            parts = list(padded.new_empty(self.size * longest).split(longest))
            dist.all_gather(parts, padded, group=self._group)
        return [part[:count].cpu() for part, count in zip(parts, counts, strict=True)]

    def join(self, piece: Tensor, length: int) -> Tensor:
        """The whole, [length, ...], of the pieces that `cut` gave each rank; on every rank."""
        rows = -(-length // self.size)
        padded = piece.new_zeros(rows, *piece.shape[1:])
        padded[: len(piece)] = piece
        whole = piece.new_empty(rows * self.size, *piece.shape[1:])
        with self._peers():
            dist.all_gather(list(whole.split(rows)), padded)
        return whole[:length]

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's piece of a tensor that all ranks hold: as many rows of the first dimension as the others', fewer
        or none at the end.
        """
        rows = -(-len(whole) // self.size)
        return whole[rows * self.rank : rows * (self.rank + 1)]

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            with self._peers():
                dist.barrier(device_ids=None if self.device.type == "cpu" else [self.device.index])

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
            if LATE in str(error):
                raise RankLostError(
                    f"rank {self.rank} of {self.size} stops: another rank has kept it waiting for "
                    f"{self.timeout.total_seconds():g} s (ddp_timeout; the run's stacks_rank*.txt say what each was "
                    "doing); --resume goes on from the last checkpoint"
                ) from error
            raise

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def share_gpus(num_gpus: int, num_ranks: int, sharding: Sharding | None) -> bool:
    """Whether there are more ranks on a machine than GPUs: NCCL takes one a GPU, gloo more. Slow; to try out on one GPU
    what is meant for many.

    Raises ConfigError where DeepSpeed is asked for, which gives each rank the GPU of its number.
    """
    is_shared = num_gpus < num_ranks
    if is_shared and sharding in ("zero2", "zero3"):
        raise ConfigError(
            f"DeepSpeed wants a GPU for each process, and {num_ranks} processes have {num_gpus} here; start with "
            f"--num_processes {num_gpus}, or try recipes/accelerate/fsdp2.yaml, where processes may share a GPU"
        )
    return is_shared


def _sharding() -> Sharding | None:
    """What the launcher's file asks for, as it tells its processes. Raises ConfigError for what is not done here."""
    if _uses_deepspeed():
        return _zero_stage()
    if not _is_set("ACCELERATE_USE_FSDP"):
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise ConfigError("the launcher's file asks for FSDP 1; set fsdp_config.fsdp_version: 2 there")
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise ConfigError("fsdp_config.fsdp_offload_params is not done here; set it to false in the launcher's file")
    if _is_set("FSDP_ACTIVATION_CHECKPOINTING"):
        raise ConfigError(
            "set fsdp_config.fsdp_activation_checkpointing to false in the launcher's file: the recipe's "
            "activation_recomputation says what is made again"
        )
    return "fsdp2"


def _uses_deepspeed() -> bool:
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def _zero_stage() -> Sharding:
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "the launcher's file asks for DeepSpeed, which is not installed: pip install -e '.[deepspeed]'"
        )
    match DeepSpeedPlugin().zero_stage:
        case 2:
            return "zero2"
        case 3:
            return "zero3"
        case stage:
            raise ConfigError(f"zero_stage must be 2 or 3 in the launcher's file, got {stage}")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
