"""What one batch of completions has to have worked out: which reward sees which of them, and what came back.

Knows nothing of processes. A **call** is one reward function on some completions of one problem, a **job** is the calls
that a worker gets in one message.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from fractions import Fraction
from itertools import groupby
from typing import Any, Final, Literal, Protocol, runtime_checkable

from rewards.types import STATUSES, Problem, RewardResult, Status

MAX_JOB: Final = 16
"""Most completions of a job of one-completion functions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One reward function on completions of one problem."""

    reward: str
    """Full name of the reward."""
    items: tuple[int, ...]
    """Positions of the completions in the batch; a one-completion function has one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Calls that travel together."""

    calls: tuple[Call, ...]
    """In the order in which they are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one reward function said of one completion."""

    score: float | None
    """Unweighted; None: does not apply."""
    status: Status
    """Of this part alone."""
    detail: str
    """One line for a person."""
    elapsed_s: float
    """Seconds spent on it."""
    failed: Literal["", "function", "worker"] = ""
    """Who failed, if anyone: the function (raised, or returned what is no score) or its worker (late, or dead)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardKind:
    """What has to be known of a reward function to plan its calls."""

    takes_one: bool
    """True for `f(problem, completion)`, False for TRL's kind."""
    takes_completion_ids: bool
    """False lets the token ids stay at home."""


class Batch:
    """Completions to grade, which may come in pieces, and what has been found out about each."""

    def __init__(
        self,
        *,
        problems: Sequence[Problem],
        rewards: Sequence[Sequence[str]],
        kinds: Mapping[str, RewardKind],
    ) -> None:
        """A problem for each completion to come; `rewards[i]` are the names of the functions that grade completion i,
        `kinds` what they take.
        """
        self._problems = _encode_problems(problems)
        self._groups = [tuple(items) for _, items in groupby(range(len(problems)), key=self._problems.__getitem__)]
        self._group_of = [index for index, items in enumerate(self._groups) for _ in items]
        self._missing = [len(items) for items in self._groups]
        self._completions: list[str | None] = [None] * len(problems)
        self._completion_ids: list[Sequence[int] | None] = [None] * len(problems)
        self._rewards = rewards
        self._kinds = kinds
        self._unplanned: list[int] = []
        self.parts: list[dict[str, Part]] = [{} for _ in problems]
        """What came back, by completion and name of the reward."""

    @property
    def longest_group(self) -> int:
        """Completions of the largest group."""
        return max(map(len, self._groups), default=0)

    @property
    def is_whole(self) -> bool:
        """Whether all completions have come."""
        return not any(self._missing)

    def check_whole(self) -> None:
        """Raise ValueError where completions are missing."""
        if num_missing := sum(self._missing):
            raise ValueError(f"{num_missing} of the {len(self._problems)} completions have not been added")

    def add(self, start: int, completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None) -> None:
        """Completions `start`, `start + 1`, ... have come.

        Raises TypeError for what is no text, ValueError for lists that do not fit, before anything is kept.
        """
        places = range(start, start + len(completions))
        if completion_ids is not None and len(completion_ids) != len(completions):
            raise ValueError(f"{len(completions)} completions were added with {len(completion_ids)} completion_ids")
        if start < 0 or places.stop > len(self._problems):
            raise ValueError(f"completions {start} to {places.stop - 1} were added to a batch of {len(self._problems)}")
        if (odd := next((c for c in completions if not isinstance(c, str)), None)) is not None:
            raise TypeError(f"a completion is text, got {type(odd).__name__}: {odd!r:.80}")
        if (twice := next((i for i in places if self._completions[i] is not None), None)) is not None:
            raise ValueError(f"completion {twice} was added twice")
        self._completions[start : places.stop] = completions
        if completion_ids is not None:
            self._completion_ids[start : places.stop] = completion_ids
        self._unplanned += places
        for item in places:
            self._missing[self._group_of[item]] -= 1

    def plan(self, num_workers: int) -> list[Job]:
        """Jobs that make every call on what has come since the last plan once: a batch function gets all of a group, as
        soon as it is there, one-completion functions are spread.
        """
        fresh, self._unplanned = sorted(self._unplanned), []
        jobs = [
            Job(calls=(Call(reward=name, items=self._groups[group]),))
            for group in dict.fromkeys(self._group_of[item] for item in fresh)
            if not self._missing[group]
            for name in self._rewards[self._groups[group][0]]
            if not self._kinds[name].takes_one
        ]
        size = max(1, min(MAX_JOB, len(self._problems) // (4 * max(num_workers, 1))))
        for start in range(0, len(fresh), size):
            calls = [
                Call(reward=name, items=(item,))
                for item in fresh[start : start + size]
                for name in self._rewards[item]
                if self._kinds[name].takes_one
            ]
            if calls:
                jobs.append(Job(calls=tuple(calls)))
        return jobs

    def encode(self, job: Job) -> str:
        """The job as JSON text in the form that `rewards.grader_worker` reads."""
        items = sorted({item for call in job.calls for item in call.items})
        position = {item: index for index, item in enumerate(items)}
        texts = {text: index for index, text in enumerate(dict.fromkeys(self._problems[item] for item in items))}
        takes_ids = any(self._kinds[call.reward].takes_completion_ids for call in job.calls)
        ids = [self._completion_ids[item] for item in items] if takes_ids else None
        rest = json.dumps(
            {
                "completions": [self._completions[item] for item in items],
                "completion_ids": ids if ids is not None and all(each is not None for each in ids) else None,
                "calls": [
                    [call.reward, texts[self._problems[call.items[0]]], [position[item] for item in call.items]]
                    for call in job.calls
                ],
            },
            default=_to_json,
        )
        return f'{{"problems": [{", ".join(texts)}], {rest[1:]}'

    def record(self, call: Call, reply: Mapping[str, Any]) -> list[Job]:
        """Keeps a worker's reply to a call; returns what has to be done again."""
        if "raised" in reply:
            return self.fail(call, status="error", detail=reply["raised"], failed="function")
        elapsed_s = reply["elapsed_s"] / len(call.items)
        for item, (score, status, detail, is_fault) in zip(call.items, reply["scores"], strict=True):
            self.parts[item][call.reward] = Part(
                score=score,
                status=status,
                detail=detail,
                elapsed_s=elapsed_s,
                failed="function" if is_fault else "",
            )
        return []

    def fail(
        self, call: Call, *, status: Status, detail: str, failed: Literal["function", "worker"], elapsed_s: float = 0.0
    ) -> list[Job]:
        """Marks the completion of a failed call; of several, none is to blame yet, so each is done again alone."""
        if len(call.items) > 1:
            return [Job(calls=(Call(reward=call.reward, items=(item,)),)) for item in call.items]
        self.parts[call.items[0]][call.reward] = Part(
            score=0.0, status=status, detail=detail, elapsed_s=elapsed_s, failed=failed
        )
        return []

    def merge(self, weights: Sequence[float], labels: Mapping[str, str]) -> list[RewardResult]:
        """One result for each completion; `labels` are the names in the breakdown."""
        return [
            _merge([(labels[name], weight, parts[name]) for name, weight in zip(names, weights, strict=True)])
            for names, parts in zip(self._rewards, self.parts, strict=True)
        ]


def _merge(parts: Sequence[tuple[str, float, Part]]) -> RewardResult:
    scores = {label: part.score for label, _, part in parts if part.score is not None}
    total = sum(weight * part.score for _, weight, part in parts if part.score is not None)
    status = max((part.status for _, _, part in parts), key=STATUSES.index)
    details = [f"{label}: {part.detail}" if len(parts) > 1 else part.detail for label, _, part in parts if part.detail]
    if not math.isfinite(total):
        total, status = 0.0, "error"
        details.append("the weighted sum of the scores is not a finite number")
    return RewardResult(
        reward=total if scores else None,
        breakdown=scores,
        status=status,
        detail="; ".join(details),
        elapsed_s=sum(part.elapsed_s for _, _, part in parts),
    )


@runtime_checkable
class _Array(Protocol):
    """Arrays and scalars of numpy and torch."""

    def tolist(self) -> Any: ...


def _encode_problems(problems: Sequence[Problem]) -> list[str]:
    """Each problem as JSON text; a group that repeats one object is encoded once."""
    texts: list[str] = []
    previous = None
    for problem in problems:
        texts.append(texts[-1] if problem is previous else _encode_problem(problem))
        previous = problem
    return texts


def _encode_problem(problem: Problem) -> str:
    fields = {
        "id": problem.id,
        "prompt": problem.prompt,
        "reward": problem.reward,
        "answer": problem.answer,
        "tests": problem.tests,
        "source": problem.source,
        "columns": problem.columns,
    }
    try:
        return json.dumps(fields, default=_to_json)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{problem.source or problem.id}: {_find_culprit(fields | dict(problem.columns))}") from error


def _find_culprit(fields: Mapping[str, Any]) -> str:
    for name, value in fields.items():
        if name == "columns":
            continue
        try:
            json.dumps(value, default=_to_json)
        except (TypeError, ValueError) as error:
            return (
                f"{name!r} cannot be sent to a grading worker: {error}; "
                "turn it into text, numbers, lists or dicts, or drop the column from the dataset"
            )
    return "a column's name cannot be sent to a grading worker; column names are text"


def _to_json(value: Any) -> Any:
    """What the datasets library yields besides plain values, as the plain values that they stand for."""
    match value:
        case Mapping():
            return dict(value)
        case date() | time():
            return value.isoformat()
        case Decimal() | Fraction():
            return str(value)
        case set() | frozenset():
            return sorted(value, key=repr)
        case _Array():
            return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__!r}")
