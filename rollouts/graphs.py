"""CUDA graphs of one step each, captured as they come up: a step of few rows waits for its kernels to be started, not
for their work, and a graph starts them all at once.

A graph reads and writes at fixed addresses. What a step is made of (policy, cache, kernels) says nothing of graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar

import torch

CAPTURED_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Batch sizes that graphs are captured for, as they come up; between them a batch is filled up with idle rows."""

T = TypeVar("T")


def rows_for(size: int, captured: tuple[int, ...] = CAPTURED_ROWS) -> int:
    """The next captured size; a batch beyond them all has its own."""
    return next((rows for rows in captured if rows >= size), size)


class Step(Protocol):
    """What has been captured."""

    graph: torch.cuda.CUDAGraph


S = TypeVar("S", bound=Step)


class Graphs(Generic[S]):
    """Steps by what they were captured for; they share memory, so what one gives is valid until another runs."""

    def __init__(self) -> None:
        self._steps: dict[Hashable, S] = {}

    def get(self, key: Hashable, make: Callable[[Any], S]) -> S:
        """The step of this key; `make` captures it, with the others' pool of memory, where there is none yet."""
        if key not in self._steps:
            pool = next(iter(self._steps.values())).graph.pool() if self._steps else None
            self._steps[key] = make(pool)
        return self._steps[key]

    def captured(self, key: Hashable) -> torch.cuda.CUDAGraph:
        """The graph of a step that there is."""
        return self._steps[key].graph

    def clear(self) -> None:
        """Forget them all."""
        self._steps.clear()


def capture(run: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what `run` starts, and what it gives: tensors that every replay writes anew."""
    # Once outside, so that kernels are compiled and handles made before anything is captured.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        given = run()
    return graph, given
