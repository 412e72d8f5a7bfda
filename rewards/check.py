"""Looking into verdicts: one explained stage by stage, or a file of answers graded. What `grpo reward check` prints."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.math_ast import render
from rewards.math_normal import normal_form
from rewards.math_policy import MathPolicy
from rewards.math_polynomial import spell
from rewards.math_reward import DEFAULT_POLICY, Explanation, explain_math
from rewards.registry import resolve_reward, takes_one_completion
from rewards.types import Problem, RewardResult

_COMPLETION_KEYS = ("completion", "response", "prediction", "output", "answer")
_GOLD_KEYS = ("gold", "expected_answer", "solution", "target", "answer")
_EXPECTED_KEY = "expected"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRow:
    """One graded line of a file."""

    line: int
    """Its number in the file, from 1."""
    completion: str
    """What was graded."""
    gold: str
    """What it was graded against."""
    result: RewardResult
    """The verdict."""
    expected: float | None
    """The label of the row, if the file has a column `expected`."""

    @property
    def agrees(self) -> bool | None:
        """Whether the verdict is the label; None without a label."""
        return None if self.expected is None else self.result.reward == self.expected


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckReport:
    """A graded file."""

    rows: tuple[CheckedRow, ...]
    """In the order of the file."""
    statuses: Mapping[str, int]
    """How many rows ended with each status."""
    mean_reward: float
    """Over the rows that have a reward; 0.0 if none has."""
    disagreements: tuple[CheckedRow, ...]
    """The rows whose verdict is not their label."""


def explain_verdict(completion: str, gold: str, *, policy: MathPolicy = DEFAULT_POLICY) -> list[tuple[str, str]]:
    """(stage, what it made of the completion) for `verify_math`, in order, ending with the verdict."""
    explained = explain_math(completion, gold, policy=policy)
    stages = [("gold", f"{explained.gold.text!r} read as {render(explained.gold.node)}")]
    if explained.extraction is None or explained.answer is None:
        stages.append(("extract", "the completion states no answer"))
    else:
        stages.append(("extract", f"{explained.extraction.text!r} ({explained.extraction.source})"))
        stages.append(("parse", f"{type(explained.answer.node).__name__}: {render(explained.answer.node)}"))
        stages.extend(_normal_forms(explained))
    if explained.outcome is not None:
        stages.append(("decide", f"{explained.outcome.truth}: {explained.outcome.stage}"))
    stages.append(("verdict", f"reward {explained.reward}, status {explained.status}"))
    return stages


def check_file(path: str | Path, *, reward: str = "math") -> CheckReport:
    """Grades a JSONL file with a reward of the registry that takes `(problem, completion)`.

    A row names the completion (`completion`, `response`, `prediction`, `output`, or `answer` where the gold has a key
    of its
    own), the gold (`gold`, `expected_answer`, `solution`, `target` or `answer`), and may carry a label `expected`
    (1/0 or
    true/false). Raises ValueError naming the line that lacks one.
    """
    function = resolve_reward(reward)
    if not takes_one_completion(function):
        raise ValueError(f"reward {reward!r} grades batches; give one that takes (problem, completion)")
    rows = []
    for line, record in _records(Path(path)):
        completion = _field(record, _COMPLETION_KEYS, line, "completion", without=())
        gold = _field(record, _GOLD_KEYS, line, "gold", without=(completion[0],))
        problem = Problem(id=str(line), prompt=str(record.get("prompt", "")), answer=gold[1], columns=record)
        value = function(problem, completion[1])
        result = value if isinstance(value, RewardResult) else RewardResult(reward=value)
        label = record.get(_EXPECTED_KEY)
        expected = float(label) if isinstance(label, bool | int | float) else None
        rows.append(CheckedRow(line=line, completion=completion[1], gold=gold[1], result=result, expected=expected))
    rewards = [row.result.reward for row in rows if row.result.reward is not None]
    return CheckReport(
        rows=tuple(rows),
        statuses=dict(Counter(row.result.status for row in rows)),
        mean_reward=sum(rewards) / len(rewards) if rewards else 0.0,
        disagreements=tuple(row for row in rows if row.agrees is False),
    )


def _normal_forms(explained: Explanation) -> list[tuple[str, str]]:
    assert explained.answer is not None
    stages = []
    for name, reading in (("answer", explained.answer), ("gold", explained.gold)):
        form = normal_form(reading.node)
        if form is not None:
            denominator = spell(form.denominator)
            shown = spell(form.numerator) + (f" / ({denominator})" if denominator != "1" else "")
            stages.append((f"normal form of the {name}", shown[:300]))
    return stages


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}:{number} must be an object with a completion and a gold, got {type(record).__name__}"
                )
            yield number, record


def _field(
    record: Mapping[str, Any], keys: tuple[str, ...], line: int, what: str, *, without: tuple[str, ...]
) -> tuple[str, str]:
    for key in keys:
        if key in record and key not in without:
            return key, str(record[key])
    raise ValueError(f"line {line} has no {what}: one of {', '.join(keys)} is needed, the row has {', '.join(record)}")
