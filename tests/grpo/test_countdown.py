"""Countdown problems are solvable and in one split only; attempts are right in their arithmetic and unguided."""

import itertools
import random
import re
from collections import Counter
from fractions import Fraction

import pytest
from pydantic import ValidationError

from grpo.countdown import (
    AttemptsConfig,
    CountdownConfig,
    CountdownError,
    attempt_at_random,
    generate_problems,
    problem_text,
    vocabulary,
    write_attempts,
)
from rewards import Problem
from rewards.countdown import countdown_reward, evaluate, literals, parse
from rewards.format_reward import format_reward

EASY = CountdownConfig(num_numbers=3, high=9, operators="+-*/", max_value=60)
MANY = AttemptsConfig(go_on=0.8, stop_when_right=0.5, max_attempts=6)
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def problems(config: CountdownConfig, split: str, count: int, seed: int = 0) -> list[dict]:
    return list(itertools.islice(generate_problems(config, seed, split), count))


def key(row: dict) -> tuple[int, ...]:
    return (*sorted(row["nums"]), row["target"])


def can_be_reached(nums: list[int], target: int, config: CountdownConfig) -> bool:
    """By trying everything, over the values that an attempt may pass through."""
    if len(nums) == 1:
        return nums[0] == target
    for i, j in itertools.permutations(range(len(nums)), 2):
        a, b = nums[i], nums[j]
        rest = [n for place, n in enumerate(nums) if place not in (i, j)]
        values = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else -1}
        reached = (values[operator] for operator in config.operators)
        if any(can_be_reached([*rest, v], target, config) for v in reached if 0 <= v <= config.max_value):
            return True
    return False


def attempts_of(text: str) -> list[tuple[list[tuple[str, ...]], str]]:
    """Steps and verdict of each attempt in a completion."""
    inside = text.removeprefix("<think> ").partition(" </think>")[0]
    parts = re.findall(r"(.+?) (low|high|right)(?: |$)", inside)
    return [(STEP.findall(steps), verdict) for steps, verdict in parts]


@pytest.mark.parametrize("operators", ["+-", "+-*", "+-*/"])
def test_every_problem_is_solvable_and_within_its_range(operators: str) -> None:
    config = CountdownConfig(num_numbers=3, low=2, high=9, operators=operators, max_value=40)
    for row in problems(config, "train", 100) + problems(config, "held_out", 100):
        assert len(row["nums"]) == 3
        assert all(2 <= n <= 9 for n in row["nums"])
        assert 1 <= row["target"] <= 40
        assert can_be_reached(row["nums"], row["target"], config)


def test_training_and_held_out_problems_are_disjoint_whatever_the_seeds() -> None:
    train = {key(row) for seed in (0, 1) for row in problems(EASY, "train", 4000, seed)}
    held_out = {key(row) for seed in (0, 2) for row in problems(EASY, "held_out", 1000, seed)}
    assert len(train) > 1000
    assert len(held_out) > 150
    assert not train & held_out


def test_a_seed_gives_the_same_problems_and_another_seed_others() -> None:
    assert problems(EASY, "train", 50, 3) == problems(EASY, "train", 50, 3)
    assert problems(EASY, "train", 50, 3) != problems(EASY, "train", 50, 4)


def test_text_depends_only_on_its_seed() -> None:
    row = {"nums": [2, 3, 7], "target": 8}
    texts = [[write_attempts(row, EASY, MANY, random.Random(seed)) for seed in range(20)] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 10


def test_attempts_are_arithmetically_right_and_their_verdicts_true() -> None:
    rng, seen = random.Random(0), Counter()
    for row in problems(EASY, "train", 400):
        text = write_attempts(row, EASY, MANY, rng)
        attempts = attempts_of(text)
        assert 1 <= len(attempts) <= MANY.max_attempts
        for steps, verdict in attempts:
            assert len(steps) == len(row["nums"]) - 1
            values = Counter(row["nums"])
            for left, operator, right, result in steps:
                a, b, c = int(left), int(right), int(result)
                assert {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b or 1)}[operator] == c
                assert 0 <= c <= EASY.max_value
                values.subtract([a, b])
                assert min(values.values()) >= 0, "a number that is not there, or used twice"
                values[c] += 1
            assert +values == Counter([c])
            assert verdict == ("right" if c == row["target"] else "low" if c < row["target"] else "high")
            seen[verdict] += 1
    assert all(seen[verdict] > 50 for verdict in ("low", "high", "right"))


def test_the_answer_is_the_last_attempt() -> None:
    rng, rewards = random.Random(1), Counter()
    for row in problems(EASY, "train", 300):
        text = write_attempts(row, EASY, MANY, rng)
        steps, verdict = attempts_of(text)[-1]
        expression = parse(text.partition("<answer>")[2].partition("</answer>")[0])
        assert sorted(literals(expression)) == sorted(row["nums"])
        assert evaluate(expression) == int(steps[-1][-1])
        problem = Problem(id="1", prompt="?", columns=row)
        reward = countdown_reward(problem, text).reward
        assert reward == (1.0 if verdict == "right" else 0.0)
        assert format_reward(problem, text).reward == 1.0
        rewards[reward] += 1
    assert min(rewards[0.0], rewards[1.0]) > 30


def test_the_first_attempt_is_the_same_whatever_the_target() -> None:
    """The draw never looks at the target: an equality, seed by seed."""
    for seed in range(100):
        rows = [{"nums": [3, 5, 8], "target": target} for target in (1, 6, 16, 40)]
        firsts = [attempts_of(write_attempts(row, EASY, MANY, random.Random(seed)))[0][0] for row in rows]
        assert firsts == [firsts[0]] * 4


def test_later_attempts_are_no_better_than_the_first() -> None:
    """An attempt after a failed one is right as often as an attempt drawn at random: nothing was learned from it."""
    row, rng = {"nums": [3, 5, 8], "target": 16}, random.Random(2)
    drawn = [attempt_at_random(row["nums"], EASY, rng) for _ in range(20_000)]
    values = Counter(attempt.value for attempt in drawn if attempt is not None)
    chance = values[16] / values.total()
    assert 0.02 < chance < 0.3
    right, count = Counter(), Counter()
    for _ in range(6000):
        previous = ""
        for place, (_, verdict) in enumerate(attempts_of(write_attempts(row, EASY, MANY, rng))):
            if previous != "right":
                count[place] += 1
                right[place] += verdict == "right"
            previous = verdict
    for place in range(4):
        error = (chance * (1 - chance) / count[place]) ** 0.5
        assert count[place] > 1000
        assert abs(right[place] / count[place] - chance) < 4.5 * error


def test_how_long_a_text_goes_on_follows_its_settings() -> None:
    row = {"nums": [3, 5, 8], "target": 60}  # out of reach of + and -
    config = CountdownConfig(operators="+-", max_value=60)
    settings = AttemptsConfig(go_on=0.7, stop_when_right=1, max_attempts=40)
    rng = random.Random(3)
    lengths = [len(attempts_of(write_attempts(row, config, settings, rng))) for _ in range(3000)]
    assert sum(lengths) / 3000 == pytest.approx(1 / 0.3, rel=0.08)
    for stop, expected in ((1.0, {1}), (0.0, {5})):
        settings = AttemptsConfig(go_on=0.0, stop_when_right=stop, max_attempts=5)
        only = {"nums": [2, 2], "target": 4}
        sums = CountdownConfig(num_numbers=2, operators="+")
        assert {len(attempts_of(write_attempts(only, sums, settings, rng))) for _ in range(20)} == expected


def test_the_vocabulary_holds_every_word() -> None:
    words, rng = set(vocabulary(EASY)), random.Random(4)
    assert len(words) == len(vocabulary(EASY))
    for row in problems(EASY, "train", 200):
        text = f"User : {problem_text(row['nums'], row['target'])} Assistant : {write_attempts(row, EASY, MANY, rng)}"
        assert set(text.split()) <= words


def test_no_value_leaves_the_range() -> None:
    assert attempt_at_random([7, 8], CountdownConfig(operators="*", max_value=55), random.Random(0)) is None
    assert attempt_at_random([2, 7], CountdownConfig(operators="/"), random.Random(0)) is None
    quotient = attempt_at_random([2, 8], CountdownConfig(operators="/"), random.Random(0))
    assert quotient is not None
    assert (quotient.value, quotient.expression, quotient.steps) == (4, "8 / 2", ["8 / 2 = 4"])


def test_settings_without_problems_are_refused_instead_of_searched_for_ever() -> None:
    config = CountdownConfig(num_numbers=3, low=20, high=30, operators="+", max_value=40)
    with pytest.raises(CountdownError, match="gives no train problems: .* raise max_value, or widen low to high"):
        next(generate_problems(config, 0, "train"))


@pytest.mark.parametrize(
    "changes", [{"low": 8, "high": 3}, {"high": 100, "max_value": 99}, {"operators": "+^"}, {"num_numbers": 1}]
)
def test_settings_that_contradict_themselves_are_refused(changes: dict) -> None:
    with pytest.raises(ValidationError):
        CountdownConfig(**changes)
