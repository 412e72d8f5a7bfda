"""Worker processes and their deadlines: runs the jobs of a batch, and replaces a worker that is late or dead.

Workers are executed afresh (never forked from a process that has threads and a GPU), in a session of their own (Ctrl-C
in the terminal reaches only the parent), and speak JSON over a socket. A deadline covers one call, from the moment the
reply before it came; the worker that misses it is killed with everything it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rewards.grader_batch import Batch, Call, Job
from rewards.grader_process import WorkerProcess
from rewards.grader_worker import Executor
from rewards.types import Status

MAX_FAILED_STARTS: Final = 3
"""Replacements of workers that may die in a row before they were ready."""
_TICK_S: Final = 0.25
"""Longest wait between two looks at whether workers live, for those whose socket a child of theirs keeps open."""
_LAST_BREATH_S: Final = 0.5
"""Time between the last that was heard of a dying worker and its end, in which it is left to end by itself."""
_CLOSE_S: Final = 2.0
"""Time in which workers may end by themselves when the pool is closed."""


class GraderError(RuntimeError):
    """The grader cannot grade; the message says why and what to change."""


class GivenUpError(GraderError):
    """The batch was cancelled, or the grader closed, before all of it was graded."""


class JobQueue:
    """Jobs of one batch on their way to a pool; more may come while others are done, from another thread."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """`wake` ends the pool's wait for something to happen."""
        self._wake = wake
        self.waiting: deque[Job] = deque()
        self.is_closed = False
        """No more will come."""
        self.is_cancelled = False
        """What is there is not wanted any more."""
        self.busy_s = 0.0
        """Seconds in which jobs were waiting or being done."""

    def put(self, jobs: Iterable[Job]) -> None:
        """More to do. Raises GivenUpError where that is not wanted any more."""
        self.check_wanted()
        self.waiting.extend(jobs)
        self._wake()

    def check_wanted(self) -> None:
        """Raise GivenUpError once the queue is cancelled."""
        if self.is_cancelled:
            raise GivenUpError("the batch was given up before it was graded")

    def close(self) -> None:
        """Nothing more will come: the pool leaves when it is done."""
        self.is_closed = True
        self._wake()

    def cancel(self) -> None:
        """The pool leaves at once, with an error."""
        self.is_cancelled = True
        self._wake()


@dataclass(kw_only=True, slots=True)
class _Slot:
    """A place for a worker."""

    process: WorkerProcess | None = None
    """None: none is running, one is to be started before the next job."""
    is_loading: bool = False
    """True while it imports the rewards."""
    pending: deque[Call] = field(default_factory=deque)
    """Calls sent and not yet answered, in order."""
    deadline: float = 0.0
    """Of what it is doing, on the monotonic clock, seconds."""


class WorkerPool:
    """A fixed number of workers that all have loaded the same rewards."""

    is_apart: Final = True
    """Grades beside whatever the process does."""

    def __init__(
        self,
        *,
        num_workers: int,
        timeout_s: float,
        startup_timeout_s: float,
        memory_mb: int | None,
        pass_env: Collection[str] = (),
    ) -> None:
        self._timeout_s = timeout_s
        self._startup_timeout_s = startup_timeout_s
        self._memory_mb = memory_mb
        self._pass_env = tuple(pass_env)
        self._cwd = os.getcwd()
        self._names: list[str] = []
        self._slots = [_Slot() for _ in range(num_workers)]
        self._selector = selectors.PollSelector()
        self._alarm, self._bell = socket.socketpair()
        for end in (self._alarm, self._bell):
            end.setblocking(False)
        self._selector.register(self._alarm, selectors.EVENT_READ)
        self._failed_starts = 0
        self._reply: Mapping[str, Any] = {}
        self.restarts = 0
        """Workers that were replaced."""

    @property
    def num_workers(self) -> int:
        """Processes that grade at once."""
        return len(self._slots)

    def load(self, names: Sequence[str]) -> Mapping[str, Any]:
        """Imports rewards in every worker, those started later included; returns what `Executor.load` replies.

        Raises GraderError if a worker dies of it, or does not answer within the startup timeout.
        """
        before, self._names, self._reply = self._names, list(names), {}
        try:
            with self._abandon_on_error():
                for slot in self._slots:
                    self._start(slot)
                while any(slot.is_loading for slot in self._slots):
                    self._wait()
                    for slot in self._slots:
                        self._advance(slot, None)
        finally:
            if "loaded" not in self._reply:
                self._names = before
        return self._reply

    def run(self, jobs: JobQueue, batch: Batch) -> None:
        """Makes every call of the jobs, until the queue is closed, and lets the batch record the replies; a failed call
        fails alone. Raises GivenUpError, busy workers ended, once the queue is cancelled.
        """
        with self._abandon_on_error():
            while not jobs.is_closed or jobs.waiting or self._is_busy:
                jobs.check_wanted()
                started, has_work = time.perf_counter(), bool(jobs.waiting) or self._is_busy
                for slot in self._slots:
                    if jobs.waiting and not slot.pending and not slot.is_loading:
                        self._assign(slot, jobs.waiting, batch)
                self._wait(may_idle=not jobs.is_closed)
                for slot in self._slots:
                    jobs.waiting.extend(self._advance(slot, batch))
                jobs.busy_s += time.perf_counter() - started if has_work else 0.0

    def wake(self) -> None:
        """Have `run` look at its jobs now; from any thread."""
        with contextlib.suppress(OSError):  # closed, or full of calls that it has not heard yet
            self._bell.send(b"!")

    @property
    def _is_busy(self) -> bool:
        return any(slot.pending for slot in self._slots)

    def close(self) -> None:
        """Ends all workers: idle ones by themselves, busy ones by force."""
        running = [slot.process for slot in self._slots if slot.process is not None]
        for process in running:
            process.hang_up()
        deadline = time.monotonic() + _CLOSE_S
        for slot in self._slots:
            is_busy = bool(slot.pending) or slot.is_loading
            self._end(slot, within_s=0.0 if is_busy else max(0.0, deadline - time.monotonic()))
        self._selector.close()
        self._alarm.close()
        self._bell.close()

    @contextlib.contextmanager
    def _abandon_on_error(self) -> Iterator[None]:
        """Ends busy workers if the caller is interrupted: their replies must not be taken for the next batch's."""
        has_finished = False
        try:
            yield
            has_finished = True
        finally:
            for slot in [] if has_finished else self._slots:
                if slot.pending or slot.is_loading:
                    self._end(slot)

    def _start(self, slot: _Slot) -> None:
        """Starts a worker in the slot if none is alive there, and has it load the rewards."""
        if slot.process is not None and slot.process.has_ended:
            self._end(slot)
            self.restarts += 1
        if slot.process is None:
            slot.process = WorkerProcess(self._cwd, self._pass_env)
            for descriptor in slot.process.descriptors:
                self._selector.register(descriptor, selectors.EVENT_READ)
        message = {"load": self._names, "path": [str(entry) for entry in sys.path], "memory_mb": self._memory_mb}
        slot.is_loading = True
        slot.deadline = time.monotonic() + self._startup_timeout_s
        slot.process.send(json.dumps(message), self._startup_timeout_s)  # if it died, the next look at it tells

    def _end(self, slot: _Slot, within_s: float = 0.0) -> str:
        if slot.process is None:
            return ""
        for descriptor in slot.process.descriptors:
            self._selector.unregister(descriptor)
        how = slot.process.end(within_s)
        slot.process = None
        slot.is_loading = False
        slot.pending.clear()
        return how

    def _replace(self, slot: _Slot, within_s: float = 0.0) -> str:
        how = self._end(slot, within_s)
        self.restarts += 1
        self._start(slot)
        return how

    def _assign(self, slot: _Slot, jobs: deque[Job], batch: Batch) -> None:
        if slot.process is None:
            self._start(slot)
            return
        job = jobs.popleft()
        if slot.process.send(batch.encode(job), self._timeout_s):
            slot.pending.extend(job.calls)
            slot.deadline = time.monotonic() + self._timeout_s
        else:  # it died while it was idle, which is no fault of this job
            jobs.appendleft(job)
            self._replace(slot)

    def _wait(self, *, may_idle: bool = False) -> None:
        """Until something happens, or a deadline; with nothing under way only if it `may_idle`."""
        deadlines = [slot.deadline for slot in self._slots if slot.pending or slot.is_loading]
        if deadlines:
            self._selector.select(max(0.0, min(_TICK_S, min(deadlines) - time.monotonic())))
        elif may_idle:
            self._selector.select()
        with contextlib.suppress(BlockingIOError):
            self._alarm.recv(1 << 12)

    def _advance(self, slot: _Slot, batch: Batch | None) -> list[Job]:
        """Takes what a worker has answered and notices if it is late or dead; returns jobs to do again."""
        if slot.process is None:
            return []
        now = time.monotonic()
        again: list[Job] = []
        for reply in slot.process.receive():
            if slot.is_loading:
                slot.is_loading = False
                self._failed_starts = 0
                if "refused" not in self._reply:
                    self._reply = reply
                if "refused" in reply and batch is not None:
                    raise GraderError(f"a worker could not be replaced: {reply['refused']}")
            elif slot.pending and batch is not None:
                again += batch.record(slot.pending.popleft(), reply)
                if reply.get("retire"):
                    again += _collect_rest(slot.pending)
                    self._replace(slot)
                    return again
            slot.deadline = now + self._timeout_s
        if slot.process.is_silent:
            again += self._mourn(slot, batch)
        elif now > slot.deadline and slot.is_loading:
            raise GraderError(
                f"a grading worker took more than {self._startup_timeout_s:g} s to import "
                f"{', '.join(self._names)}; raise startup_timeout_s, or import less"
            )
        elif now > slot.deadline and slot.pending and batch is not None:
            detail = f"no answer within {self._timeout_s:g} s (timeout_s)"
            again += self._lose(slot, batch, "timeout", detail)
        return again

    def _mourn(self, slot: _Slot, batch: Batch | None) -> list[Job]:
        """Replaces a worker that died."""
        if slot.is_loading:
            self._failed_starts += 1
            how = self._end(slot, _LAST_BREATH_S)
            if batch is None or self._failed_starts >= MAX_FAILED_STARTS:
                raise GraderError(f"a grading worker died while it imported {', '.join(self._names)}: {how}")
            self.restarts += 1
            self._start(slot)
            return []
        if batch is None or not slot.pending:
            self._replace(slot)
            return []
        return self._lose(slot, batch, "error", "")

    def _lose(self, slot: _Slot, batch: Batch, status: Status, detail: str) -> list[Job]:
        """Blames the call that was under way, and puts those behind it back."""
        culprit, *rest = slot.pending
        how = self._replace(slot, 0.0 if status == "timeout" else _LAST_BREATH_S)
        elapsed_s = self._timeout_s if status == "timeout" else 0.0
        again = batch.fail(culprit, status=status, detail=detail or how, failed="worker", elapsed_s=elapsed_s)
        return again + _collect_rest(deque(rest))


def _collect_rest(pending: deque[Call]) -> list[Job]:
    return [Job(calls=tuple(pending))] if pending else []


class InProcess:
    """Stands in for a pool where there are no workers: same messages, no deadline, no limit, no protection."""

    is_apart: Final = False
    num_workers: Final = 0

    def __init__(self) -> None:
        self._executor = Executor()
        self.restarts = 0
        """Always 0."""

    def load(self, names: Sequence[str]) -> Mapping[str, Any]:
        """Imports rewards here."""
        return self._executor.load(names)

    def run(self, jobs: JobQueue, batch: Batch) -> None:
        """Makes every call of the jobs here, one after the other."""
        started = time.perf_counter()
        while jobs.waiting:
            jobs.check_wanted()
            job = jobs.waiting.popleft()
            for call, reply in zip(job.calls, self._executor.run(json.loads(batch.encode(job))), strict=True):
                jobs.put(batch.record(call, reply))
        jobs.busy_s = time.perf_counter() - started

    def wake(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """Ends the event loop of the `async def` rewards."""
        self._executor.close()
