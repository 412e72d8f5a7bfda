"""One batch that is graded while its completions are still coming.

    with grader.start(problems) as grading:
        grading.add(8, texts)                   # completions 8, 9, ... are there; workers begin with them
        ...
        results = grading.finish()              # of all completions, in order

All problems are known from the start, so what is graded together does not depend on what comes when: the results are
those of `Grader.grade` on the whole batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from types import TracebackType

from rewards.background import run_apart
from rewards.grader_batch import Batch
from rewards.grader_pool import InProcess, JobQueue, WorkerPool
from rewards.types import RewardResult


class Grading:
    """A batch in hand; made by `Grader.start`, to be finished or cancelled by the thread that started it.

    Worker processes are fed by a thread of the grading's own, which begins when the first completions come and ends
    with the grading. Where all come at once, and without worker processes, there is none: `finish` does the work.
    """

    def __init__(
        self,
        batch: Batch,
        pool: WorkerPool | InProcess,
        *,
        conclude: Callable[[Batch], list[RewardResult]],
        release: Callable[[], None],
    ) -> None:
        """`conclude` makes the results of a batch that is done, `release` lets the next batch have the pool."""
        self._batch, self._pool = batch, pool
        self._conclude, self._release = conclude, release
        self._jobs = JobQueue(pool.wake)
        self._thread: Future[None] | None = None
        self._is_in_caller = self._is_over = False
        self._ending = threading.Lock()

    @property
    def busy_s(self) -> float:
        """Seconds so far in which a completion was being graded, or waited for a worker."""
        return self._jobs.busy_s

    def add(
        self, start: int, completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Completions `start`, `start + 1`, ... of the batch have come; two flat lists of equal length.

        A function that takes lists is called once all completions of its group have come. Raises ValueError or
        TypeError for what is no text, was there before, or does not fit the batch; and what has ended the grading.
        """
        self._jobs.check_wanted()
        self._batch.add(start, completions, completion_ids)
        if self._pool.is_apart:
            self._jobs.put(self._batch.plan(self._pool.num_workers))
            if self._thread is not None and self._thread.done():
                self._thread.result()
            elif self._thread is None and not self._batch.is_whole:
                self._thread = run_apart(lambda: self._pool.run(self._jobs, self._batch), "grading")

    def finish(self) -> list[RewardResult]:
        """Wait for what is not graded yet; one result for each completion, in order of the batch.

        Raises ValueError if completions are missing, and what `Grader.grade` raises.
        """
        try:
            self._jobs.check_wanted()
            self._batch.check_whole()
            self._jobs.put(self._batch.plan(self._pool.num_workers))
            self._jobs.close()
            if self._thread is None:
                self._is_in_caller = True
                self._pool.run(self._jobs, self._batch)
            else:
                self._thread.result()
            return self._conclude(self._batch)
        finally:
            self._is_in_caller = False
            self.cancel()

    def cancel(self) -> None:
        """Drop what is not graded yet, with the workers that are at it; nothing where the grading is over."""
        self._jobs.cancel()
        if self._thread is not None:
            wait([self._thread])
        with self._ending:
            # Where another thread closes the grader while ours does the work, ours lets go as soon as it notices.
            if not (self._is_over or self._is_in_caller):
                self._is_over = True
                self._release()

    def __enter__(self) -> Grading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cancel()
