"""AdamW whose fp32 masters and moments stay in the host's memory, passing through the device bucket by bucket.

While one bucket is stepped, the next one comes and the last one goes, each on a stream of its own. The numbers are
those of `MasterAdamW`, to the bit, and so are its checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from grpo.layout import Whole
from grpo.optimizer import MasterAdamW
from policy import Policy

BUCKET = 1 << 23
"""Weights stepped at once."""
STAGING_BYTES = 2 * 3 * 4 * BUCKET
"""What is on the device of them: two buckets with master, mean and square of each weight."""


class Piece(NamedTuple):
    """A part of one weight, which lies in one bucket."""

    name: str
    within: slice
    """Of the weight, flattened."""
    place: slice
    """Of all weights, laid end to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Pieces that lie end to end and decay alike."""

    pieces: tuple[Piece, ...]
    decays: bool

    @property
    def place(self) -> slice:
        """Of all weights, laid end to end."""
        return slice(self.pieces[0].place.start, self.pieces[-1].place.stop)


class OffloadedMasterAdamW(MasterAdamW):
    """`MasterAdamW` with its state on the host, pinned where the policy is on a GPU.

    An fp32 policy has masters of its own here too; its weights are their copies.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        bucket: int = BUCKET,
    ) -> None:
        assert bucket % 64 == 0, "a CPU rounds what is left over from its vectors otherwise"
        self._betas, self._eps, self._weight_decay = betas, eps, weight_decay
        self._weights = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        self._device, self._layout = policy.device, Whole()
        self._buckets = list(_cut(self._weights, bucket))
        count = sum(weight.numel() for weight in self._weights.values())
        is_gpu = policy.device.type == "cuda"
        # One allocation for each kind, [all weights]: pinning is slow, and a copy of a bucket is one.
        self._master, self._mean, self._square = (torch.zeros(count, pin_memory=is_gpu) for _ in range(3))
        self._steps = 0
        self._gradient: Tensor | None = None
        """Summed up, fp32, on the device; [all weights], while there is one."""
        self._places = self._find_places()
        self.masters = {name: self._of(self._master, name) for name in self._weights}
        for name, weight in self._weights.items():
            self.masters[name].copy_(weight.detach())

    def gather_gradients(self) -> list[Tensor]:
        """See `MasterAdamW.gather_gradients`; they are one tensor here."""
        if self._gradient is None:
            self._gradient = torch.zeros(len(self._master), device=self._device)
        for name, weight in self._weights.items():
            if weight.grad is not None:
                self._of(self._gradient, name).add_(weight.grad)
                weight.grad = None
        return [self._gradient]

    def restart(self) -> None:
        """See `MasterAdamW.restart`."""
        for weight in self._weights.values():
            weight.grad = None
        self._gradient = None

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """See `MasterAdamW.step`."""
        gradient = self._gradient
        assert gradient is not None, "gather_gradients comes first"
        parts = [self._of(gradient, name) for name in self._weights]
        total_norm = torch.nn.utils.get_total_norm(parts, foreach=True)
        norm = float(total_norm)
        if math.isfinite(norm):
            gradient.mul_((max_grad_norm / (total_norm + 1e-6)).clamp(max=1.0))
            self._step_buckets(gradient, learning_rate)
            self._steps += 1
        self._gradient = None
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """See `MasterAdamW.state_tensors`: the same names and shapes."""
        self._wait()
        state: dict[str, Tensor] = {}
        for name in self._weights:
            state[f"master.{name}"] = self.masters[name]
            if self._steps:
                state[f"step.{name}"] = torch.tensor(float(self._steps))
                state[f"exp_avg.{name}"] = self._of(self._mean, name)
                state[f"exp_avg_sq.{name}"] = self._of(self._square, name)
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """See `MasterAdamW.load_state_tensors`."""
        self._check_state(state, is_8bit=False)
        self._wait()
        with torch.no_grad():
            for name, weight in self._weights.items():
                self.masters[name].copy_(state[f"master.{name}"])
                weight.copy_(self.masters[name])
                if f"step.{name}" in state:
                    self._steps = int(state[f"step.{name}"])
                    self._of(self._mean, name).copy_(state[f"exp_avg.{name}"])
                    self._of(self._square, name).copy_(state[f"exp_avg_sq.{name}"])

    @torch.no_grad()
    def _step_buckets(self, gradient: Tensor, learning_rate: float) -> None:
        streams = _Streams(self._device)
        staged = [torch.empty(3, max(_length(b.place) for b in self._buckets), device=self._device) for _ in range(2)]
        streams.begin()
        for turn, bucket in enumerate(self._buckets):
            slot, length = turn % 2, _length(bucket.place)
            on_host = [flat[bucket.place] for flat in (self._master, self._mean, self._square)]
            on_device = staged[slot][:, :length]
            with streams.coming(slot):
                for row, source in zip(on_device, on_host, strict=True):
                    row.copy_(source, non_blocking=True)
            self._step_one(bucket, on_device, gradient, learning_rate)
            with streams.going(slot):
                for row, target in zip(on_device, on_host, strict=True):
                    target.copy_(row, non_blocking=True)
        streams.end()

    def _step_one(self, bucket: Bucket, staged: Tensor, gradient: Tensor, learning_rate: float) -> None:
        # Piece by piece, as torch steps tensor by tensor, so that the same numbers are rounded alike.
        start = bucket.place.start
        masters, means, squares = (
            [row[piece.place.start - start : piece.place.stop - start] for piece in bucket.pieces] for row in staged
        )
        adamw(
            masters,
            [gradient[piece.place] for piece in bucket.pieces],
            means,
            squares,
            [],
            [torch.tensor(float(self._steps), device=self._device) for _ in bucket.pieces],
            fused=True,
            amsgrad=False,
            beta1=self._betas[0],
            beta2=self._betas[1],
            lr=learning_rate,
            weight_decay=self._weight_decay if bucket.decays else 0.0,
            eps=self._eps,
            maximize=False,
        )
        for piece, master in zip(bucket.pieces, masters, strict=True):
            self._weights[piece.name].view(-1)[piece.within].copy_(master)

    def _find_places(self) -> dict[str, slice]:
        places: dict[str, slice] = {}
        for bucket in self._buckets:
            for piece in bucket.pieces:
                first = places.get(piece.name, piece.place).start
                places[piece.name] = slice(first, piece.place.stop)
        return places

    def _of(self, flat: Tensor, name: str) -> Tensor:
        """A weight's part of a tensor over all weights, in the weight's shape."""
        return flat[self._places[name]].view(self._weights[name].shape)

    def _wait(self) -> None:
        """Until what goes to the host has arrived."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Streams:
    """Copies to and from a GPU beside its work; on a CPU everything is in order anyway."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        if self._is_gpu:
            self._work = torch.cuda.current_stream(device)
            self._in, self._out = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._gone = [torch.cuda.Event(), torch.cuda.Event()]
            self._came = [torch.cuda.Event(), torch.cuda.Event()]

    def begin(self) -> None:
        """What comes waits for all work so far, and so for the last step's copies."""
        if self._is_gpu:
            self._in.wait_stream(self._work)

    @contextmanager
    def coming(self, slot: int) -> Iterator[None]:
        """Copies to the device, once the slot is free; work that follows waits for them."""
        if not self._is_gpu:
            yield
            return
        self._in.wait_event(self._gone[slot])
        with torch.cuda.stream(self._in):
            yield
            self._came[slot].record()
        self._work.wait_event(self._came[slot])

    @contextmanager
    def going(self, slot: int) -> Iterator[None]:
        """Copies to the host, once the work so far is done."""
        if not self._is_gpu:
            yield
            return
        self._out.wait_stream(self._work)
        with torch.cuda.stream(self._out):
            yield
            self._gone[slot].record()

    def end(self) -> None:
        """Work that follows, and whoever gets the staging memory next, waits for the copies."""
        if self._is_gpu:
            self._work.wait_stream(self._out)


def _cut(weights: Mapping[str, Tensor], most: int) -> Iterator[Bucket]:
    """Buckets of at most so many weights: those that decay, then the others."""
    position = 0
    for decays in (True, False):
        pieces, room = list[Piece](), most
        for name, weight in weights.items():
            if (weight.ndim > 1) is not decays:
                continue
            for start in range(0, weight.numel(), most):
                length = min(most, weight.numel() - start)
                if length > room:
                    yield Bucket(pieces=tuple(pieces), decays=decays)
                    pieces, room = [], most
                within = slice(start, start + length)
                pieces.append(Piece(name=name, within=within, place=slice(position, position + length)))
                position, room = position + length, room - length
        if pieces:
            yield Bucket(pieces=tuple(pieces), decays=decays)


def _length(place: slice) -> int:
    return int(place.stop - place.start)
