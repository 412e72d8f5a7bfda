"""Where the time and memory of a step go, phase by phase, and how much of the device's rate the update uses.

Phases, in the order of a step: sample, grade, logprobs (passes without a gradient: old policy, reference),
forward_backward, optimizer, sync (gradients over ranks, weights to the engine).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch

from policy.flops import Flops

ASKING = "ask"
"""The phase of sampling and grading together, whose seconds are told apart elsewhere."""


class Phases:
    """Seconds and memory of the named parts of a step.

    A GPU works on while the host goes ahead, so there a phase lies between two events in its stream; nobody waits for
    them before `take`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._is_gpu = device, device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._peaks: dict[str, int] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a part of the step; one name may come several times, and adds up."""
        if not self._is_gpu:
            started = perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + perf_counter() - started
            return
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.reset_peak_memory_stats(self._device)
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))
        self._peaks[name] = max(self._peaks.get(name, 0), torch.cuda.max_memory_allocated(self._device))

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call; waits for the GPU to be done with the last one."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, first, last in self._events:
            self._seconds[name] = self._seconds.get(name, 0.0) + first.elapsed_time(last) / 1000
        taken, self._seconds, self._events = self._seconds, {}, []
        return taken

    def take_peaks(self) -> dict[str, int]:
        """Most bytes allocated on a GPU in each phase since the last call."""
        taken, self._peaks = self._peaks, {}
        return taken


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large product in `dtype`: what utilisation is measured against.

    Measured and not looked up, since a card's power and clock make what its data sheet says a rumour. On a GPU this
    takes some 30 ms and 384 MiB, once; on a CPU, where it is rough, some milliseconds.
    """
    is_gpu = device.type == "cuda"
    size, rounds = (8192, 10) if is_gpu else (512, 5)
    generator = torch.Generator(device).manual_seed(0)  # not zeros: a GPU that multiplies zeros runs faster
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.empty(size, size, device=device, dtype=dtype)
    for _ in range(3):
        torch.mm(a, b, out=product)
    times = []
    for _ in range(1 if is_gpu else rounds):
        phases = Phases(device)
        with phases.phase("products"):
            for _ in range(rounds if is_gpu else 1):
                torch.mm(a, b, out=product)
        times.append(phases.take()["products"] / (rounds if is_gpu else 1))
    return 2 * size**3 / min(times)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spent:
    """What one update took and did."""

    seconds: float
    """From the first row packed to the last step done."""
    lengths: Sequence[int]
    """Tokens of each row that this rank learned from, once for every pass over it."""
    num_tokens: float
    """Of all ranks' rows together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """What turns a step's seconds into rates."""

    flops: Flops
    matmul_rate: float
    """Operations a second of a large product on this rank's device."""

    def metrics(self, spent: Spent, phases: Phases, *, num_sampled: int, sample_s: float) -> dict[str, float]:
        """Seconds of each phase of the update, tokens a second, this rank's model FLOP utilisation in the update, and
        on a GPU the most memory of either half of the step.

        `num_sampled` counts all ranks' completion tokens, `sample_s` seconds of sampling. `phases` starts anew.
        """
        seconds, peaks = phases.take(), phases.take_peaks()
        metrics = {"time/update": spent.seconds}
        metrics |= {f"time/{name}": value for name, value in seconds.items() if name != ASKING}
        metrics["update/tokens_per_second"] = spent.num_tokens / spent.seconds
        metrics["update/mfu"] = self.flops.training(spent.lengths) / (spent.seconds * self.matmul_rate)
        if sample_s > 0:
            metrics["sample/tokens_per_second"] = num_sampled / sample_s
        if peaks:
            metrics["memory/sample_peak_gib"] = peaks.pop(ASKING, 0) / 2**30
            metrics["memory/update_peak_gib"] = max(peaks.values(), default=0) / 2**30
        return metrics
