"""The R1-Zero form: `<think>reasoning</think> <answer>answer</answer>` and nothing else.

The whole completion must have it: each of the four tags exactly once and in this order, only white space before,
between and behind the two blocks, an answer that is not empty. By counting and finding, in linear time: a regular
expression over text that a model chose may backtrack for minutes.
"""

from __future__ import annotations

from typing import Final

from rewards.types import Problem, RewardResult

TAGS: Final = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(problem: Problem, completion: str) -> RewardResult:
    """1.0 if the completion opens `<think>` itself and has the form, else 0.0 with the reason in `detail`."""
    return _judge(completion)


def format_open_reward(problem: Problem, completion: str) -> RewardResult:
    """As `format_reward`, for templates whose prompt ends with `<think>`: the completion must not open it again."""
    return _judge(f"<think>{completion}")


def _judge(text: str) -> RewardResult:
    fault = _find_fault(text)
    return RewardResult(reward=0.0 if fault else 1.0, detail=fault or "well formed")


def _find_fault(text: str) -> str | None:
    for tag in TAGS:
        if (count := text.count(tag)) != 1:
            return f"{tag} occurs {count} times"
    positions = [text.find(tag) for tag in TAGS]
    if positions != sorted(positions):
        return "the tags are out of order"
    open_think, close_think, open_answer, close_answer = positions
    if text[:open_think].strip():
        return "text before <think>"
    if text[close_think + len("</think>") : open_answer].strip():
        return "text between </think> and <answer>"
    if text[close_answer + len("</answer>") :].strip():
        return "text after </answer>"
    if not text[open_answer + len("<answer>") : close_answer].strip():
        return "the answer is empty"
    return None
