"""Completions, results and answers as JSON for a checkpoint, exactly: a float reads back as the same float.

Seconds are left out: two runs that are the same in everything else differ in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from grpo.types import Answer, Group, Question
from rewards import RewardResult
from rollouts import Completion


def completion_to_json(completion: Completion) -> dict[str, Any]:
    """Every field of a completion."""
    return asdict(completion)


def read_completion(row: Mapping[str, Any]) -> Completion:
    """What `completion_to_json` gave."""
    return Completion(**row)


def result_to_json(result: RewardResult) -> dict[str, Any]:
    """Every field of a result but its seconds."""
    return {"breakdown": dict(result.breakdown)} | {
        name: getattr(result, name) for name in ("reward", "status", "detail")
    }


def read_result(row: Mapping[str, Any]) -> RewardResult:
    """What `result_to_json` gave."""
    return RewardResult(**row)


def answer_to_json(answer: Answer) -> dict[str, Any]:
    """An answer; of its problem only the place in the dataset."""
    group = answer.group
    return {
        "number": answer.question.number,
        "place": answer.question.place,
        "prompt_ids": list(group.prompt_ids),
        "completions": [completion_to_json(completion) for completion in group.completions],
        "texts": list(group.texts),
        "results": [result_to_json(result) for result in group.results],
    }


def read_answer(row: Mapping[str, Any], question: Callable[[int, int], Question]) -> Answer:
    """What `answer_to_json` gave; `question` makes one of a number and a place."""
    asked = question(row["number"], row["place"])
    group = Group(
        problem=asked.problem,
        prompt_ids=row["prompt_ids"],
        completions=[read_completion(completion) for completion in row["completions"]],
        texts=row["texts"],
        results=[read_result(result) for result in row["results"]],
    )
    return Answer(question=asked, group=group)
