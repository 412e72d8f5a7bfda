"""Reward functions written for verl and OpenRLHF, called as ours.

Usually reached by name: `verl:module:function`, `openrlhf:path/to/file.py:function`. Either may be `async def`.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any

from rewards.registry import RewardFunction, RewardSignatureError
from rewards.types import Message, Problem


def adapt_verl(compute_score: RewardFunction) -> RewardFunction:
    """`compute_score(data_source, solution_str, ground_truth, extra_info) -> float | {"score": float, ...}` as ours.

    A row in verl's layout gives `data_source`, `reward_model["ground_truth"]` and `extra_info`; for any other row these
    are the problem's source, its answer and an empty dict.
    """
    accepts = _check_arguments(compute_score, ("solution_str", "ground_truth"), "verl's compute_score")

    def score(problem: Problem, completion: str) -> Any:
        reward_model = problem.columns.get("reward_model")
        nested = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
        arguments = {
            "data_source": problem.columns.get("data_source", problem.source),
            "solution_str": completion,
            "ground_truth": problem.answer if nested is None else nested,
            "extra_info": problem.columns.get("extra_info") or {},
        }
        return _pick(compute_score(**_keep(arguments, accepts)), "score")

    return score


def adapt_openrlhf(reward_func: RewardFunction) -> RewardFunction:
    """`reward_func(queries, prompts, labels) -> tensor | {"rewards": tensor, ...}` as TRL calls it.

    Queries are prompt and completion joined; labels are the problems' answers, "" where there is none. Messages become
    text by joining their contents with line ends: no chat template is known here.
    """
    accepts = _check_arguments(reward_func, ("queries",), "OpenRLHF's reward_func")

    def score(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        prompt_texts = [_to_text(prompt) for prompt in prompts]
        texts = [_to_text(completion) for completion in completions]
        arguments = columns | {
            "queries": [prompt + text for prompt, text in zip(prompt_texts, texts, strict=True)],
            "prompts": prompt_texts,
            "labels": columns.get("answer", [""] * len(texts)),
        }
        return _pick(reward_func(**_keep(arguments, accepts)), "rewards")

    return score


def _check_arguments(function: RewardFunction, required: Sequence[str], kind: str) -> frozenset[str] | None:
    """The names of the arguments that `function` accepts, None if any; raises RewardSignatureError."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    if missing := [name for name in required if name not in parameters]:
        raise RewardSignatureError(f"not {kind}: no argument {missing[0]!r} among ({', '.join(parameters)})")
    return frozenset(parameters)


def _keep(arguments: Mapping[str, Any], accepts: frozenset[str] | None) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if accepts is None or name in accepts}


def _pick(returned: Any, key: str) -> Any:
    """`returned`, or its entry `key` if it is a mapping; now, or once awaited."""
    if inspect.isawaitable(returned):
        return _pick_awaited(returned, key)
    if isinstance(returned, Mapping):
        if key not in returned:
            raise ValueError(f"returned a dict without {key!r}: its keys are {', '.join(map(repr, returned))}")
        return returned[key]
    return returned


async def _pick_awaited(returned: Awaitable[Any], key: str) -> Any:
    return _pick(await returned, key)


def _to_text(content: str | Sequence[Message]) -> str:
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)
