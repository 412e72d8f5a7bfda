"""The countdown task: problems, and text of unguided attempts at them for a base model to learn from.

A problem gives some numbers and a target; an answer is an expression that uses each number once and equals the target.
Problems come in the columns of Jiayi-Pan/Countdown-Tasks-3to4 (`nums`, `target`), made with a seed, and are solvable by
construction.

The text of attempts demonstrates no search: each attempt combines the numbers at random, is worked out, and is compared
with the target. How many there are is random too, and so is whether the text stops once the target is met. Format and
arithmetic are there to learn; persistence, stopping at the right place and better choices are left for RL to find.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Split = Literal["train", "held_out"]
HELD_OUT_SHARE = 6
"""One problem in so many is held out, by a hash of the problem itself, so that no seed can mix the two."""

WORDS = ("User", ":", "Assistant", "Using", "the", "numbers", ",", "make", ".", "low", "high", "right")
MAX_MISSES = 20_000
"""Draws in a row without a problem that is wanted, after which there is taken to be none."""
MARKS = ("<think>", "</think>", "<answer>", "</answer>", "+", "-", "*", "/", "=", "(", ")")


class CountdownConfig(BaseModel):
    """Which countdown problems: the `dataset.countdown` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_numbers: int = Field(default=3, ge=2, le=6, description="numbers of a problem")
    low: int = Field(default=1, ge=1, description="smallest number")
    high: int = Field(default=12, ge=1, description="largest number")
    operators: str = Field(default="+-*", pattern=r"^[-+*/]+$", description="operators that may be used, of + - * /")
    max_value: int = Field(default=99, ge=1, description="largest value of any step; targets are within 1 and this")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.low <= self.high <= self.max_value:
            raise ValueError(
                f"dataset.countdown needs low <= high <= max_value, "
                f"got low={self.low}, high={self.high}, max_value={self.max_value}"
            )
        return self


class AttemptsConfig(BaseModel):
    """How the base model's text is made: the `base.attempts` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    go_on: float = Field(default=0.75, ge=0, lt=1, description="chance that another attempt follows a failed one")
    stop_when_right: float = Field(
        default=0.5, ge=0, le=1, description="chance that the text stops at an attempt that is right"
    )
    max_attempts: int = Field(default=14, ge=1, description="attempts of one text at most")


class CountdownError(ValueError):
    """A `dataset.countdown` section that has no such problems, or too few; the message says which keys to change."""


def problem_text(nums: list[int], target: int) -> str:
    """The question in words that `vocabulary` holds."""
    return f"Using the numbers {' '.join(map(str, nums))} , make {target} ."


def vocabulary(config: CountdownConfig) -> list[str]:
    """Every word of problems and attempts; each number is one word."""
    return [*WORDS, *MARKS, *map(str, range(config.max_value + 1))]


def generate_problems(config: CountdownConfig, seed: int, split: Split) -> Iterator[dict[str, Any]]:
    """An endless stream of rows `{"nums", "target"}`, solvable by construction, all of one split.

    Raises CountdownError where there seem to be none, as with sums that all exceed `max_value`.
    """
    rng = random.Random(f"countdown {seed} {split}")
    misses = 0
    while misses < MAX_MISSES:
        misses += 1
        nums = [rng.randint(config.low, config.high) for _ in range(config.num_numbers)]
        attempt = attempt_at_random(nums, config, rng)
        if attempt is None or attempt.value < 1:
            continue
        if _is_held_out(nums, attempt.value) == (split == "held_out"):
            misses = 0
            yield {"nums": nums, "target": attempt.value}
    raise CountdownError(
        f"dataset.countdown gives no {split} problems: {MAX_MISSES} draws of {config.num_numbers} numbers from "
        f"{config.low} to {config.high} with {config.operators} found none; raise max_value, or widen low to high"
    )


class Attempt:
    """One way of combining all the numbers."""

    __slots__ = ("expression", "steps", "value")

    def __init__(self, steps: list[str], expression: str, value: int) -> None:
        self.steps, self.expression, self.value = steps, expression, value


def attempt_at_random(nums: list[int], config: CountdownConfig, rng: random.Random) -> Attempt | None:
    """Combine two random values by a random operator until one is left.

    None where a step has no value within 0 and `max_value`: a difference or quotient takes the larger value first, and
    a quotient must be whole.
    """
    values = [(n, str(n)) for n in nums]
    steps = []
    while len(values) > 1:
        (a, left), (b, right) = (values.pop(rng.randrange(len(values))) for _ in range(2))
        operator = rng.choice(config.operators)
        if operator in "-/" and a < b:
            (a, left), (b, right) = (b, right), (a, left)
        if operator == "/" and (b == 0 or a % b):
            return None
        value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b else 0}[operator]
        if value > config.max_value:
            return None
        steps.append(f"{a} {operator} {b} = {value}")
        values.append((value, f"( {left} {operator} {right} )"))
    value, expression = values[0]
    return Attempt(steps, expression[2:-2], value)


def write_attempts(row: dict[str, Any], config: CountdownConfig, attempts: AttemptsConfig, rng: random.Random) -> str:
    """A completion in the R1-Zero form: attempts at random, then the last one as the answer."""
    words = ["<think>"]
    for index in range(attempts.max_attempts):
        attempt = _attempt(row["nums"], config, rng)
        right = attempt.value == row["target"]
        verdict = "right" if right else "low" if attempt.value < row["target"] else "high"
        words += [" , ".join(attempt.steps), verdict]
        goes_on = rng.random() >= attempts.stop_when_right if right else rng.random() < attempts.go_on
        if not goes_on or index + 1 == attempts.max_attempts:
            break
    words += ["</think>", "<answer>", attempt.expression, "</answer>"]
    return " ".join(words)


def _attempt(nums: list[int], config: CountdownConfig, rng: random.Random) -> Attempt:
    """The first attempt that has a value; ends because the problem is solvable."""
    while (attempt := attempt_at_random(nums, config, rng)) is None:
        pass
    return attempt


def _is_held_out(nums: list[int], target: int) -> bool:
    digest = hashlib.sha256(f"{sorted(nums)} {target}".encode()).digest()
    return digest[0] % HELD_OUT_SHARE == 0
