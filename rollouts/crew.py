"""Threads that share out the rows of a decoding step on a CPU.

A product of a step is too small for several threads to share. So each takes some of the rows through the whole step
instead: its kernels run outside of the interpreter's lock (policy/cpu_products.py), and nobody waits for another before
the step's end. Torch's own number of threads stays as it is: what a step leaves to torch is too small for more than one
thread, and changing the number at every step makes the update that follows a third slower.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

LEAST_ROWS = 16
"""Rows that a thread is worth waking for."""

T = TypeVar("T")


class Crew:
    """As many threads as torch has for one operation."""

    def __init__(self) -> None:
        self._others: ThreadPoolExecutor | None = None
        self._size = 1

    def run(self, work: Callable[[slice], T], rows: int) -> list[T]:
        """`work` of parts of so many rows, in order, each on a thread of its own."""
        parts = max(1, min(torch.get_num_threads(), rows // LEAST_ROWS))
        if parts == 1:
            return [work(slice(rows))]
        if self._others is None or self._size < parts:
            self.close()
            self._others, self._size = ThreadPoolExecutor(parts - 1, thread_name_prefix="decode"), parts
        bounds = [rows * part // parts for part in range(parts + 1)]
        slices = [slice(begin, end) for begin, end in pairwise(bounds)]
        is_inference = torch.is_inference_mode_enabled()

        def alone(part: slice) -> T:
            with torch.inference_mode(is_inference), torch.no_grad():
                return work(part)

        waiting = [self._others.submit(alone, part) for part in slices[1:]]
        return [work(slices[0]), *(future.result() for future in waiting)]

    def close(self) -> None:
        """Let the threads go."""
        if self._others is not None:
            self._others.shutdown()
