"""Whether a run is alive, for who looks from outside: a heartbeat file, and the stacks of a step that takes too long.

The stacks are written by `faulthandler`'s own thread in C, which needs neither the main thread nor the interpreter's
lock: a step that hangs inside a library shows where. All durations are of the monotonic clock.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
from collections import deque
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import monotonic
from typing import IO

FACTOR = 10.0
"""A step may take so many times the median of those before it."""
LEAST_S = 30.0
"""Seconds that any step may take: short ones vary by more than their length."""
STEPS = 50
"""The median is of so many steps, the last ones; of fewer than three nothing is concluded."""


class Watchdog:
    """Watches one rank's steps; close it at the end. A process has one timer: a second watchdog would take it over."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        note: Callable[[str], None],
        *,
        factor: float = FACTOR,
        least_s: float = LEAST_S,
        most_s: float | None = None,
    ) -> None:
        """`folder` is the run's; a disk that refuses the files is said once, and the run goes on unwatched.

        Stacks of a step are written after `most_s` seconds at the latest, where that is given.
        """
        self._heartbeat = folder / f"heartbeat_rank{rank}.json"
        self._stacks = folder / f"stacks_rank{rank}.txt"
        self._note, self._factor, self._least_s, self._most_s = note, factor, least_s, most_s
        self._durations: deque[float] = deque(maxlen=STEPS)
        self._file: IO[str] | None = None
        self._started, self._number = monotonic(), 0
        self._has_failed = False

    @property
    def limit_s(self) -> float | None:
        """Seconds after which stacks are written; None while there is nothing to compare with, and no bound."""
        if len(self._durations) < 3:
            return self._most_s
        limit_s = max(self._least_s, self._factor * median(self._durations))
        return limit_s if self._most_s is None else min(limit_s, self._most_s)

    def begin(self, number: int) -> None:
        """Step `number` (from 1) begins: beat, and set the timer anew."""
        self._started, self._number = monotonic(), number
        limit_s, partial = self.limit_s, self._heartbeat.with_suffix(".partial")
        try:
            beat = {"step": number, "pid": os.getpid(), "host": socket.gethostname(), "limit_s": limit_s}
            partial.write_text(json.dumps(beat) + "\n")
            partial.replace(self._heartbeat)
            if limit_s is not None:
                self._file = self._file or self._stacks.open("a")
                faulthandler.dump_traceback_later(limit_s, file=self._file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            if not self._has_failed:
                self._note(f"heartbeat could not be written ({error.strerror}); the run goes on without it")
            self._has_failed = True

    def end(self) -> None:
        """The step is done; where it was late, say so and where to look."""
        faulthandler.cancel_dump_traceback_later()
        elapsed, limit_s = monotonic() - self._started, self.limit_s
        if limit_s is not None and elapsed > limit_s:
            usual = f" where {median(self._durations):.1f} s is usual" if len(self._durations) >= 3 else ""
            self._note(
                f"step {self._number} took {elapsed:.1f} s{usual}; {self._stacks} says what it was doing after "
                f"{limit_s:.1f} s"
            )
        self._durations.append(elapsed)

    def close(self) -> None:
        """Stop watching; a file without stacks goes."""
        faulthandler.cancel_dump_traceback_later()
        if self._file is not None:
            is_empty = not os.fstat(self._file.fileno()).st_size
            self._file.close()
            self._file = None
            if is_empty:
                self._stacks.unlink(missing_ok=True)
