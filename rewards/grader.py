"""Grades completions with the reward functions of a run, in worker processes that may hang, crash or run out of memory.

    with Grader(["countdown", "format"], weights=[1.0, 0.2], num_workers=2) as grader:
        results = grader.grade(problems, completions)

Here are the rules of scoring; `grading` is a batch whose completions are still coming, `grader_batch` plans and
merges, `grader_pool` keeps the deadlines, `grader_process` is one worker seen from outside, `grader_worker` the same
from inside.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Final

from rewards.grader_batch import Batch, Part, RewardKind
from rewards.grader_pool import GraderError, InProcess, WorkerPool
from rewards.grader_worker import ENVIRONMENT_MARK
from rewards.grading import Grading
from rewards.registry import RewardNotFoundError, RewardSignatureError, reward_name
from rewards.types import Problem, RewardResult

__all__ = ["Grader", "GraderError", "RewardError"]

_ERRORS: Final = {error.__name__: error for error in (RewardNotFoundError, RewardSignatureError, GraderError)}
_LOGGER: Final = logging.getLogger(__name__)
_CLOSE_S: Final = 5.0
"""Time that another thread has to let go of the workers before they are ended under its hands."""


class RewardError(GraderError):
    """A reward function failed on every completion of the first batch that it saw: a bug, not a score."""


class Grader:
    """Reward functions by name, each call under a deadline; results in the order of the completions.

    A function that hangs, crashes, runs out of memory, raises or returns what is no finite number costs the completion
    in hand its score from that function, 0.0 with status `timeout` or `error`, and no other; the worker is replaced
    where that is needed. `timeouts`, `errors` and `restarts` count what happened since the grader was made.
    """

    def __init__(
        self,
        rewards: Sequence[str],
        *,
        weights: Sequence[float] | None = None,
        num_workers: int = 1,
        timeout_s: float = 10.0,
        memory_mb: int | None = 2048,
        startup_timeout_s: float = 120.0,
        pass_env: Sequence[str] = (),
        strict: bool = True,
    ) -> None:
        """Starts the workers and imports the rewards in each.

        rewards: built-in names, `module:function`, `path/to/file.py:function`, `verl:...`, `openrlhf:...`.
        weights: one finite number for each reward, None: 1.0 each.
        num_workers: processes; 0 grades in this process, with no deadline and no protection, for debugging and tests.
        timeout_s: seconds for one call: one completion, or the whole group for a function that takes lists. A group
            that is late, or whose function raises or dies, is done again one completion at a time, so that only the
            one to blame loses its score.
        memory_mb: MiB that a worker may map beyond what its imports took, None: no limit.
        startup_timeout_s: seconds for a worker to start and import the rewards.
        pass_env: names of environment variables that the workers get although they look like secrets.
        strict: whether `grade` raises RewardError for a function that raised, or returned no score, on every completion
            of the first batch that it saw.

        Raises RewardNotFoundError, RewardSignatureError or GraderError if a reward cannot be had, ValueError or
        TypeError for arguments out of range.
        """
        if isinstance(rewards, str) or not rewards:
            raise ValueError(f"rewards is a list of one name or more, got {rewards!r}")
        if len(set(rewards)) != len(rewards):
            raise ValueError(f"a reward is listed twice in rewards: {', '.join(rewards)}")
        weights = [1.0] * len(rewards) if weights is None else list(weights)
        if len(weights) != len(rewards) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(f"weights is one finite number for each of {len(rewards)} rewards, got {weights}")
        positive = [timeout_s, startup_timeout_s, *([] if memory_mb is None else [memory_mb])]
        if num_workers < 0 or not all(number > 0 for number in positive):
            raise ValueError(
                "num_workers is at least 0, timeout_s, startup_timeout_s and memory_mb are above 0, got "
                f"num_workers={num_workers}, timeout_s={timeout_s}, startup_timeout_s={startup_timeout_s}, "
                f"memory_mb={memory_mb}"
            )
        if num_workers and ENVIRONMENT_MARK in os.environ:
            raise GraderError(
                "a grading worker that imports a reward's file is asked to make a Grader of its own; "
                'put what that file runs under `if __name__ == "__main__":`'
            )
        self._rewards = tuple(rewards)
        self._weights = weights
        self._strict = strict
        self._kinds: dict[str, RewardKind] = {}
        self._labels: dict[str, str] = {}
        self._judged: set[str] = set()
        self._is_closed = False
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._open: Grading | None = None
        self.timeouts = 0
        """Scores that a deadline cost, by reward and completion."""
        self.errors = 0
        """Scores that a failure of the function or its worker cost, by reward and completion."""
        self._pool: WorkerPool | InProcess
        if num_workers:
            self._pool = WorkerPool(
                num_workers=num_workers,
                timeout_s=timeout_s,
                startup_timeout_s=startup_timeout_s,
                memory_mb=memory_mb,
                pass_env=pass_env,
            )
        else:
            self._pool = InProcess()
        is_ready = False
        try:
            self.load(self._rewards)
            is_ready = True
        finally:
            if not is_ready:
                self.close()

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each of the run's rewards by its name in the breakdown."""
        return {self._labels[name]: weight for name, weight in zip(self._rewards, self._weights, strict=True)}

    @property
    def restarts(self) -> int:
        """Workers that were killed or died, and were replaced."""
        return self._pool.restarts

    def load(self, rewards: Iterable[str]) -> None:
        """Imports more rewards, those that problems name for themselves; `grade` does it where it was not done.

        Raises as the constructor does.
        """
        self._claim()
        try:
            self._load(rewards)
        finally:
            self._release()

    def grade(
        self,
        problems: Sequence[Problem],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
    ) -> list[RewardResult]:
        """One result for each completion, in order; three flat lists of equal length.

        Consecutive completions of equal problems are one group: a function that takes lists gets them in one call.
        The reward is the sum of weight times score over the functions that gave one, None if none did; the breakdown
        has the scores by short name, unweighted. A problem with a `reward` of its own has it in the place, and with the
        weight, of the run's first.

        Raises ValueError if the lengths differ or a problem cannot be sent to a worker, RewardError if `strict`, what
        `load` raises for a problem's own reward, and GraderError if a worker cannot be replaced.
        """
        if len(problems) != len(completions) or (completion_ids is not None and len(completion_ids) != len(problems)):
            raise ValueError(
                f"grade takes lists of equal length, got {len(problems)} problems, {len(completions)} completions"
                + ("" if completion_ids is None else f", {len(completion_ids)} completion_ids")
            )
        with self.start(problems) as grading:
            grading.add(0, completions, completion_ids)
            return grading.finish()

    def start(self, problems: Sequence[Problem]) -> Grading:
        """Begins a batch whose completions come bit by bit, one for each problem of a flat list; see `Grading`.

        Until it is finished or cancelled other threads wait with theirs. Raises GraderError if this thread has one in
        hand already; else what `grade` raises for its problems.
        """
        self._claim()
        try:
            if self._is_closed:
                raise GraderError("the grader is closed")
            self._load_own(problems)
            batch = Batch(
                problems=problems,
                rewards=[self._rewards_for(problem) for problem in problems],
                kinds=self._kinds,
            )
            self._open = Grading(batch, self._pool, conclude=self._conclude, release=self._release)
            return self._open
        finally:
            if self._open is None:
                self._release()

    def cancel(self) -> None:
        """Drops the batch in hand, whichever thread it is in; that thread gets GivenUpError."""
        if (grading := self._open) is not None:
            grading.cancel()

    def close(self) -> None:
        """Ends the workers, and a batch in hand with them; the grader cannot be used any more."""
        self.cancel()
        has_turn = self._lock.acquire(timeout=_CLOSE_S)
        try:
            if not self._is_closed:
                self._is_closed = True
                self._pool.close()
        finally:
            if has_turn:
                self._lock.release()

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _claim(self) -> None:
        """Wait for the batches of other threads, and keep them waiting."""
        if self._owner == threading.get_ident():
            raise GraderError("this thread has a batch in hand; finish or cancel it before the next")
        self._lock.acquire()
        self._owner = threading.get_ident()

    def _release(self) -> None:
        self._open = self._owner = None
        self._lock.release()

    def _conclude(self, batch: Batch) -> list[RewardResult]:
        self._judge(batch.parts, are_alone=batch.longest_group < 2)
        return batch.merge(self._weights, self._labels)

    def _load(self, rewards: Iterable[str]) -> None:
        new = [name for name in dict.fromkeys(rewards) if name not in self._kinds]
        if not new:
            return
        reply = self._pool.load([*self._kinds, *new])
        if "refused" in reply:
            raise _ERRORS[reply["kind"]](reply["refused"])
        self._kinds = {name: RewardKind(**kind) for name, kind in reply["loaded"].items()}
        self._label(new)

    def _load_own(self, problems: Sequence[Problem]) -> None:
        for problem in problems:
            if problem.reward is not None and problem.reward not in self._kinds:
                try:
                    self._load([problem.reward])
                except tuple(_ERRORS.values()) as error:
                    raise type(error)(f"{problem.source or problem.id}: {error}") from error

    def _rewards_for(self, problem: Problem) -> tuple[str, ...]:
        return self._rewards if problem.reward is None else (problem.reward, *self._rewards[1:])

    def _judge(self, parts: Sequence[Mapping[str, Part]], *, are_alone: bool) -> None:
        """Counts failures, and raises or warns if a function that was not seen before did nothing but fail.

        One that takes lists is not known yet as long as its groups had one completion each (`are_alone`): there it may
        return one number for any group and pass for right.
        """
        by_reward: dict[str, list[Part]] = {}
        for row in parts:
            for name, part in row.items():
                by_reward.setdefault(name, []).append(part)
        failed = [part for found in by_reward.values() for part in found if part.failed]
        self.timeouts += sum(part.status == "timeout" for part in failed)
        self.errors += sum(part.status == "error" for part in failed)
        for name, found in by_reward.items():
            if name in self._judged:
                continue
            if all(part.failed for part in found):
                message = (
                    f"reward {name!r} failed on each of the {len(found)} completions of its first batch: "
                    f"{found[0].detail}; correct the function, or take it out of `rewards`"
                )
                if self._strict and any(part.failed == "function" for part in found):
                    raise RewardError(message)
                _LOGGER.warning("%s", message)
            if self._kinds[name].takes_one or not are_alone:
                self._judged.add(name)

    def _label(self, rewards: Sequence[str]) -> None:
        """Gives rewards their names in the breakdown, for good: short ones, where these tell them from the others."""
        count = Counter([*self._labels.values(), *map(reward_name, rewards)])
        for name in rewards:
            short = reward_name(name)
            self._labels[name] = short if count[short] == 1 else name
