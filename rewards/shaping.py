"""Rewards for form and length, as users of TRL and open-r1 know them. None of them looks at whether the answer is
right,
except the cosine, which scales it.

Rewards of text take `(problem, completion)`; rewards of length are called as TRL calls them, since they count tokens.
Each
with parameters has a maker (`make_overlong_reward(...)`); the registry's name is the maker's default.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from rewards.extract import closed_boxes
from rewards.types import Message, Problem

LengthReward = Callable[..., list[float | None]]
"""`f(prompts, completions, completion_ids, **columns)`, one value a completion."""

_TAGS = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")


def tag_count_reward(problem: Problem, completion: str) -> float:
    """A quarter for each of `<think>`, `</think>`, `<answer>`, `</answer>` that stands exactly once on a line of its
    own.

    The tags with their line breaks are those of open-r1's `tag_count_reward`.
    """
    return sum(0.25 for tag in _TAGS if completion.count(tag) == 1)


def boxed_reward(problem: Problem, completion: str) -> float:
    r"""1.0 if the text after the thoughts holds a closed `\boxed{}` that is not empty, else 0.0."""
    return 1.0 if any(content.strip() for content in closed_boxes(completion)) else 0.0


def make_overlong_reward(*, max_completion_length: int = 16_384, soft_punish_cache: int = 4_096) -> LengthReward:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), lengths in tokens.

    0 up to `max_completion_length - soft_punish_cache`, falling to -1 at `max_completion_length`, -1 beyond.
    """
    if not 0 < soft_punish_cache <= max_completion_length:
        raise ValueError(
            f"soft_punish_cache must be from 1 to max_completion_length ({max_completion_length}), "
            f"got {soft_punish_cache}"
        )
    free = max_completion_length - soft_punish_cache

    def overlong_reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        return [max(-1.0, min(0.0, (free - len(ids)) / soft_punish_cache)) for ids in completion_ids]

    return overlong_reward


def make_cosine_length_reward(
    *,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
    max_len: int = 1_000,
) -> LengthReward:
    """Correctness scaled by length on a cosine (arXiv 2502.03373; open-r1's `cosine`), lengths in tokens.

    A right answer falls from `max_value_correct` at length 0 to `min_value_correct` at `max_len`; a wrong one rises
    from
    `min_value_wrong` to `max_value_wrong`: being wrong at length costs less than being wrong at once. Beyond
    `max_len` the
    value stays. Needs the column `answer` (or `solution`); None for a row without one, or whose verdict timed out.
    """
    if max_len < 1:
        raise ValueError(f"max_len must be at least 1 token, got {max_len}")

    def cosine_length_reward(
        prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
    ) -> list[float | None]:
        from rewards.math_reward import verify_math

        golds = columns.get("answer", columns.get("solution"))
        if golds is None:
            raise ValueError(
                "cosine_length needs a column 'answer' or 'solution' to tell right from wrong; the dataset has neither"
            )
        values: list[float | None] = []
        for completion, ids, gold in zip(completions, completion_ids, golds, strict=True):
            verdict = None if gold is None else verify_math(completion_text(completion), str(gold))
            if verdict is None or verdict.status in ("timeout", "error"):
                values.append(None)
                continue
            cosine = math.cos(math.pi * min(len(ids) / max_len, 1.0))
            start, end = (
                (max_value_correct, min_value_correct) if verdict.reward else (min_value_wrong, max_value_wrong)
            )
            values.append(end + 0.5 * (start - end) * (1.0 + cosine))
        return values

    return cosine_length_reward


def make_repetition_reward(*, ngram_size: int = 3, max_penalty: float = -1.0) -> Callable[[Problem, str], float]:
    """The share of repeated word n-grams times `max_penalty` (arXiv 2502.03373; open-r1's `repetition_penalty`)."""
    if ngram_size < 1:
        raise ValueError(f"ngram_size must be at least 1 word, got {ngram_size}")
    if max_penalty > 0:
        raise ValueError(f"max_penalty must be 0 or negative, got {max_penalty}")

    def repetition_reward(problem: Problem, completion: str) -> float:
        words = completion.lower().split()
        total = len(words) - ngram_size + 1
        if total < 1:
            return 0.0
        distinct = len({tuple(words[i : i + ngram_size]) for i in range(total)})
        return max_penalty * (1.0 - distinct / total)

    return repetition_reward


overlong_reward = make_overlong_reward()
cosine_length_reward = make_cosine_length_reward()
repetition_reward = make_repetition_reward()


def completion_text(completion: str | Sequence[Message]) -> str:
    """The text of a completion as TRL gives it: a string, or messages whose contents are joined."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
