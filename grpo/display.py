"""What a person watches while a run goes on: the stage, how far it is, how long it will take, and four figures.

Nothing is recorded here; `metrics.jsonl` is the record.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from grpo.curves import format_number
from grpo.report import find_accuracy, format_duration
from grpo.run_files import as_number

MAX_NOTE = 2000
"""Characters of a note that are printed."""
SECONDS_BETWEEN_DRAWINGS = 0.1
"""On a terminal: a drawing takes about a millisecond, which fast steps should not pay each time."""


class _Console(Console):
    """Rich would end the process where nobody reads what it prints."""

    def on_broken_pipe(self) -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())


class Display:
    """A live area at the bottom of a terminal; one plain line at a time where the output is not one.

    An output that cannot be written to (a full disk, a pipe that nobody reads) costs the line, not the run.

    Use it as a context manager: on the way out, exceptions included, the terminal is as it was. It draws when it is
    told something and has no thread of its own, so that worker processes can be forked while it is open.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        console: Console | None = None,
        seconds_between_lines: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Show nothing unless `rank` is 0. Without a terminal, print a line every `seconds_between_lines` at most,
        and the last of each stage; `console` is by default stderr, or stdout if only that is a terminal.
        """
        self._console = console or _Console(stderr=sys.stderr.isatty() or not sys.stdout.isatty(), highlight=False)
        self._is_silent = rank != 0
        self._seconds_between_lines = seconds_between_lines
        self._clock = clock
        self._live: Live | None = None
        self._title = ""
        self._done = self._total = 0
        self._start = self._last_advance = self._last_line = clock()
        self._durations: deque[float] = deque(maxlen=20)
        self._figures = ""

    def __enter__(self) -> Self:
        if not self._is_silent and self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._close_stage()
        finally:
            if self._live is not None:
                with contextlib.suppress(OSError):
                    self._live.stop()
                self._live = None

    def stage(self, title: str, total: int, done: int = 0) -> None:
        """Begin a part of the run, of `total` steps, `done` of them before now (a resumed run)."""
        self._close_stage()
        self._title, self._total, self._done = _clean(title), total, done
        self._start = self._last_advance = self._clock()
        self._last_line = self._start - self._seconds_between_lines
        self._durations.clear()
        self._figures = ""
        self._refresh()

    def advance(self, metrics: Mapping[str, object] | None = None, steps: int = 1) -> None:
        """Record that `steps` more are done, and what they measured, under the names of `metrics.jsonl`."""
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        now = self._clock()
        self._durations.append((now - self._last_advance) / steps)
        self._last_advance = now
        self._done += steps
        if metrics is not None:
            self._figures = describe_metrics(metrics)
        if self._live is not None:
            if now - self._last_line >= SECONDS_BETWEEN_DRAWINGS or self._done >= self._total:
                self._last_line = now
                self._refresh()
        elif now - self._last_line >= self._seconds_between_lines and self._done < self._total:
            self._last_line = now
            self._print(self._describe_progress())

    def note(self, text: str) -> None:
        """Print a line that stays, above the live area."""
        self._print(_clean(text))

    def estimate_seconds_left(self) -> float | None:
        """Steps left times the mean duration of the last 20, the shortest and longest tenth left out; None before any.

        A step that also wrote a checkpoint moves it little, a growing completion length moves it soon.
        """
        if not self._durations:
            return None
        ordered = sorted(self._durations)
        trim = max(len(ordered) // 10, int(len(ordered) > 2))
        kept = ordered[trim : len(ordered) - trim]
        return max(self._total - self._done, 0) * sum(kept) / len(kept)

    def _close_stage(self) -> None:
        if self._title and self._durations:  # a stage that had nothing left to do says nothing
            took = format_duration(self._clock() - self._start)
            self._print(f"{self._title}: {self._done}/{self._total} in {took}  {self._figures}".rstrip())
        self._title = ""
        self._refresh()

    def _describe_progress(self) -> str:
        left = self.estimate_seconds_left()
        parts = [f"{self._title} {self._done}/{self._total}", self._figures]
        parts.append("" if left is None else f"{format_duration(left)} left")
        return "  ".join(part for part in parts if part)

    def _refresh(self) -> None:
        if self._live is None:
            return
        if not self._title:
            self._draw(Text())
            return
        left = self.estimate_seconds_left()
        bar = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, None, 1, None):
            bar.add_column(ratio=ratio, no_wrap=True, overflow="ellipsis")
        bar.add_row(
            Text(self._title, style="bold"),
            f"{self._done}/{self._total}",
            ProgressBar(total=max(self._total, 1), completed=self._done),
            "" if left is None else f"{format_duration(left)} left",
        )
        figures = Text(self._figures, style="dim", no_wrap=True, overflow="ellipsis")
        self._draw(Group(bar, figures))

    def _draw(self, content: RenderableType) -> None:
        assert self._live is not None
        with contextlib.suppress(OSError):  # a terminal may be closed before the run is done
            self._live.update(content, refresh=True)

    def _print(self, text: str) -> None:
        if not self._is_silent:
            with contextlib.suppress(OSError):
                # On a terminal rich folds at its width; elsewhere a line stays a line, for grep.
                self._console.print(Text(text), soft_wrap=self._live is None)


def describe_metrics(metrics: Mapping[str, object]) -> str:
    """Reward, accuracy, mean length and throughput on one line; what is missing or not finite is left out."""
    accuracy = find_accuracy(metrics)
    shown = [
        ("reward", metrics.get("reward"), ""),
        ("accuracy", metrics.get(accuracy) if accuracy else None, "%"),
        ("length", metrics.get("completions/mean_length"), ""),
        ("tokens/s", metrics.get("tokens_per_second"), ""),
    ]
    numbers = [(label, as_number(value), unit) for label, value, unit in shown]
    return "  ".join(f"{label} {format_number(value, unit)}" for label, value, unit in numbers if value is not None)


def _clean(text: str) -> str:
    """Without control characters, which could move the cursor, and not longer than a screen."""
    plain = "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")
    return plain if len(plain) <= MAX_NOTE else plain[:MAX_NOTE] + "…"
