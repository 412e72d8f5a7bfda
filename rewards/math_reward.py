"""Verifies mathematical answers: extract, read, decide. The public door is `verify_math`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from rewards.extract import Extraction, after_thoughts, extract_answer, extract_statement
from rewards.math_answer import Reading, read_answer
from rewards.math_ast import Node, Text, render
from rewards.math_decide import Decider
from rewards.math_policy import MathPolicy
from rewards.math_scalar import Outcome
from rewards.math_sympy import worker_pool
from rewards.types import Problem, RewardResult, Status

DEFAULT_POLICY = MathPolicy()
_MAX_SHOWN = 120
_MAX_WORDS_CHARS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """What each stage made of one completion."""

    extraction: Extraction | None
    """Where the answer was found; None if the completion states none."""
    gold: Reading
    """The gold as it was read."""
    answer: Reading | None
    """The answer as it was read."""
    outcome: Outcome | None
    """The verdict and the stage that reached it."""
    status: Status
    """As in the RewardResult."""
    reward: float
    """1.0 or 0.0."""

    def detail(self) -> str:
        """One line: reason, answer and gold as read."""
        gold = f"gold {_show(self.gold)}"
        if self.extraction is None or self.answer is None:
            return f"no answer: the completion states none | {gold}"
        if self.outcome is None:
            return f"unread answer: {self.extraction.source} {self.answer.text[:_MAX_SHOWN]!r} | {gold}"
        verb = {"equal": "correct", "different": "wrong", "timeout": "timeout", "error": "error"}[self.outcome.truth]
        return f"{verb} ({self.outcome.stage}): {self.extraction.source} {_show(self.answer)} | {gold}"


def verify_math(completion: str, gold: str, *, policy: MathPolicy = DEFAULT_POLICY) -> RewardResult:
    """Whether the completion's answer is the gold: reward 1.0 or 0.0, with the reason in `detail`.

    `gold` is the answer itself, or a solution that states it (`\\boxed{}`, `####`). Safe from any thread and process; a
    verdict takes at most about `policy.deadline_s`. Status: `unparsed` (no answer, or none that can be read),
    `timeout` (the
    symbolic stage did not finish), `error` (its worker failed, or the gold is empty). Never raises for what a model
    writes.
    """
    start = time.perf_counter()
    explanation = explain_math(completion, gold, policy=policy)
    return RewardResult(
        reward=explanation.reward,
        breakdown={"math": explanation.reward},
        status=explanation.status,
        detail=explanation.detail(),
        elapsed_s=time.perf_counter() - start,
    )


def verify_math_many(
    completions: Sequence[str], golds: Sequence[str], *, policy: MathPolicy = DEFAULT_POLICY
) -> list[RewardResult]:
    """`verify_math` on pairs, in order. Raises ValueError if the lengths differ."""
    if len(completions) != len(golds):
        raise ValueError(f"{len(completions)} completions and {len(golds)} golds; give one gold for each completion")
    return [verify_math(c, g, policy=policy) for c, g in zip(completions, golds, strict=True)]


def math_reward(problem: Problem, completion: str) -> RewardResult:
    """The registry's `math` (and TRL's name, `accuracy`): `verify_math` against `problem.answer`; None without an
    answer."""
    if problem.answer is None:
        return RewardResult(reward=None, detail=f"problem {problem.id!r} has no answer to compare with")
    return verify_math(completion, problem.answer)


def explain_math(completion: str, gold: str, *, policy: MathPolicy = DEFAULT_POLICY) -> Explanation:
    """Each stage of a verdict, for people and tests."""
    gold_reading = read_gold(gold)
    if not gold_reading.text:
        return Explanation(
            extraction=None,
            gold=gold_reading,
            answer=None,
            outcome=Outcome("error", "the gold is empty"),
            status="error",
            reward=0.0,
        )
    extraction = extract_answer(completion)
    if extraction is None or not extraction.text.strip():
        return Explanation(extraction=None, gold=gold_reading, answer=None, outcome=None, status="unparsed", reward=0.0)
    if isinstance(gold_reading.node, Text) and extraction.source == "last expression":
        # Words are asked: a formula picked out of them is not what was said.
        whole = after_thoughts(completion).strip()
        extraction = Extraction(whole, "whole text") if len(whole) <= _MAX_WORDS_CHARS else extraction
    answer = read_answer(extraction.text)
    if (
        isinstance(answer.node, Text)
        and not isinstance(gold_reading.node, Text)
        and not _may_be_words(gold_reading, answer)
    ):
        return Explanation(
            extraction=extraction, gold=gold_reading, answer=answer, outcome=None, status="unparsed", reward=0.0
        )
    try:
        outcome = _decide(gold_reading, answer, policy)
    except _UndecidedError as undecided:
        outcome = undecided.outcome
    except RecursionError:
        outcome = Outcome("different", "nested too deep to compare")
    status: Status = (
        "ok" if outcome.truth in ("equal", "different") else "timeout" if outcome.truth == "timeout" else "error"
    )
    return Explanation(
        extraction=extraction,
        gold=gold_reading,
        answer=answer,
        outcome=outcome,
        status=status,
        reward=1.0 if outcome.is_equal else 0.0,
    )


@lru_cache(maxsize=4096)
def read_gold(gold: str) -> Reading:
    """A gold answer, or the answer that a gold solution states."""
    if len(gold) > 40 or "boxed" in gold or "####" in gold or "<answer>" in gold:
        statement = extract_statement(gold)
        if (
            statement is not None
            and statement.text.strip()
            and ("boxed" in gold or "####" in gold or "<answer>" in gold or len(gold) > 200)
        ):
            return read_answer(statement.text)
    return read_answer(gold)


def warm_up(policy: MathPolicy = DEFAULT_POLICY) -> None:
    """Starts a symbolic worker, so that the first verdict that needs one does not wait for it."""
    worker_pool().warm(policy.memory_mb)


class _UndecidedError(Exception):
    """Carries a verdict that must not be cached."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


@lru_cache(maxsize=16384)
def _decide(gold: Reading, answer: Reading, policy: MathPolicy) -> Outcome:
    """The verdict, remembered: a group of completions repeats its answers. A timeout is not remembered."""
    deadline = time.monotonic() + policy.deadline_s

    def prove(left: Node, right: Node) -> str:
        remaining = deadline - time.monotonic()
        if not policy.use_sympy:
            return "unproven"
        if remaining <= 0:
            return "timeout"
        return worker_pool().prove_equal(left, right, deadline_s=remaining, memory_mb=policy.memory_mb)

    outcome = Decider(policy, prove).decide(gold, answer)
    if outcome.truth in ("timeout", "error"):
        raise _UndecidedError(outcome)
    return outcome


def _may_be_words(gold: Reading, answer: Reading) -> bool:
    """Words may answer a gold that is a letter, a number or the empty set."""
    return isinstance(answer.node, Text) and answer.node.words.replace(" ", "").isalpha() and len(gold.text) < 200


def _show(reading: Reading) -> str:
    return f"{reading.text[:_MAX_SHOWN]!r} = {render(reading.node, _MAX_SHOWN)}"
