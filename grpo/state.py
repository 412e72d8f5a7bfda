"""Completions, results and answers as JSON for a checkpoint, exactly: a float reads back as the same float.

Seconds are left out: two runs that are the same in everything else differ in them. Recorded experts are written as
base64, those of a group's prompt once.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from grpo.types import Answer, Group, Question
from rewards import RewardResult
from rollouts import Completion


def completion_to_json(completion: Completion) -> dict[str, Any]:
    """Every field of a completion."""
    values = {field.name: getattr(completion, field.name) for field in fields(completion)}
    values |= {"token_ids": list(completion.token_ids), "logprobs": list(completion.logprobs)}
    return {key: _array_to_json(value) if isinstance(value, np.ndarray) else value for key, value in values.items()}


def read_completion(row: Mapping[str, Any]) -> Completion:
    """What `completion_to_json` gave."""
    values: dict[str, Any] = {key: _read_array(v) if isinstance(v, dict) else v for key, v in row.items()}
    return Completion(**values)


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
    prompt_MSK = next((c.prompt_experts_MSK for c in group.completions if c.prompt_experts_MSK is not None), None)
    return {
        "number": answer.question.number,
        "place": answer.question.place,
        "prompt_ids": list(group.prompt_ids),
        "prompt_experts": None if prompt_MSK is None else _array_to_json(prompt_MSK),
        "completions": [
            # An old success has been through another pass over the prompt.
            completion_to_json(replace(c, prompt_experts_MSK=None) if c.prompt_experts_MSK is prompt_MSK else c)
            for c in group.completions
        ],
        "texts": list(group.texts),
        "results": [result_to_json(result) for result in group.results],
    }


def read_answer(row: Mapping[str, Any], question: Callable[[int, int], Question]) -> Answer:
    """What `answer_to_json` gave; `question` makes one of a number and a place."""
    asked = question(row["number"], row["place"])
    prompt_MSK = _read_array(row["prompt_experts"]) if row.get("prompt_experts") else None
    completions = [read_completion(completion) for completion in row["completions"]]
    group = Group(
        problem=asked.problem,
        prompt_ids=row["prompt_ids"],
        completions=[
            replace(c, prompt_experts_MSK=prompt_MSK)
            if c.prompt_experts_MSK is None and c.experts_MTK is not None
            else c
            for c in completions
        ],
        texts=row["texts"],
        results=[read_result(result) for result in row["results"]],
    )
    return Answer(question=asked, group=group)


def _array_to_json(array: np.ndarray) -> dict[str, Any]:
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "base64": base64.b64encode(array.tobytes()).decode("ascii"),
    }


def _read_array(row: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(base64.b64decode(row["base64"]), dtype=row["dtype"]).reshape(row["shape"])
