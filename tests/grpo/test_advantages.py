"""Advantages against numbers worked by hand."""

import math
from typing import Any, get_args

import pytest

from grpo.advantages import BASELINES, step_advantages
from grpo.algorithm import AlgorithmConfig, Baseline, Scale

SCALES = get_args(Scale)
CHOICES = [(baseline, scale) for baseline in ("group_mean", "leave_one_out") for scale in SCALES]


def of_groups(*rewards: list[float | None], **choices: Any) -> list[list[float]]:
    return step_advantages(rewards, AlgorithmConfig(**choices))


def of_group(rewards: list[float | None], **choices: Any) -> list[float]:
    return of_groups(rewards, **choices)[0]


def test_every_named_baseline_is_there() -> None:
    assert BASELINES.keys() == set(get_args(Baseline))


def test_group_standardised_by_hand() -> None:
    # mean 0.5; sample variance of (1, 0, 0, 1) is 4 * 0.25 / 3
    expected = 0.5 / math.sqrt(1 / 3)
    assert of_group([1, 0, 0, 1]) == pytest.approx([expected, -expected, -expected, expected])


def test_epsilon_is_added_to_the_standard_deviation() -> None:
    expected = 0.5 / (math.sqrt(1 / 3) + 0.1)
    assert of_group([1, 0, 0, 1], advantage_epsilon=0.1)[0] == pytest.approx(expected)


def test_centred_by_hand() -> None:
    assert of_group([1, 0, 0, 0], scale_rewards="none") == pytest.approx([0.75, -0.25, -0.25, -0.25])


def test_leave_one_out_by_hand() -> None:
    found = of_group([1, 0, 0.5], baseline="leave_one_out", scale_rewards="none")
    assert found == pytest.approx([1 - 0.25, 0 - 0.75, 0.5 - 0.5])


def test_mean_normalised_by_hand() -> None:
    # one right of four: mean 0.25, so the right one weighs (1 - 0.25) / 0.25
    assert of_group([1, 0, 0, 0], scale_rewards="mean") == pytest.approx([3, -1, -1, -1])
    assert of_group([0, 0, 0, 0], scale_rewards="mean") == [0, 0, 0, 0]


def test_divided_by_the_spread_of_all_rewards_by_hand() -> None:
    # rewards 1, 0, 3, 1: mean 1.25, sum of squares 4.75, sample variance 4.75 / 3
    found = of_groups([1, 0], [3, 1], scale_rewards="batch")
    spread = math.sqrt(4.75 / 3)
    assert found == [pytest.approx([0.5 / spread, -0.5 / spread]), pytest.approx([1 / spread, -1 / spread])]


def test_standardised_over_the_step_by_hand() -> None:
    # differences 0.5, -0.5, 1, -1: mean 0, sample variance 2.5 / 3
    found = of_groups([1, 0], [3, 1], scale_rewards="whiten")
    spread = math.sqrt(2.5 / 3)
    assert found == [pytest.approx([0.5 / spread, -0.5 / spread]), pytest.approx([1 / spread, -1 / spread])]


def test_standardised_over_the_step_without_a_baseline_of_the_group() -> None:
    # rewards 1, 0, 3, 0: mean 1, sample variance (0 + 1 + 4 + 1) / 3 = 2
    found = of_groups([1, 0], [3, 0], baseline="none", scale_rewards="whiten")
    assert found == [pytest.approx([0, -1 / math.sqrt(2)]), pytest.approx([math.sqrt(2), -1 / math.sqrt(2)])]


def test_rewards_normalised_then_summed_by_hand() -> None:
    # In its group each reward is +-1/sqrt(2); right weighs 1, short weighs 3.
    parts = [[{"right": 1.0, "short": 0.2}, {"right": 0.0, "short": 0.4}], [{"right": 1.0}, {"right": 0.0}]]
    found = step_advantages(
        [[1.6, 1.2], [1.0, 0.0]],
        AlgorithmConfig(multi_objective_aggregation="normalize_then_sum"),
        parts=parts,
        weights={"short": 3.0},
    )
    # sums: (1 - 3)/sqrt 2, (3 - 1)/sqrt 2, 1/sqrt 2, -1/sqrt 2; sample variance (2 + 2 + .5 + .5) / 3
    spread = math.sqrt(5 / 3)
    first, second = math.sqrt(2) / spread, math.sqrt(0.5) / spread
    assert found == [pytest.approx([-first, first]), pytest.approx([second, -second])]


def test_normalised_then_summed_a_constant_reward_adds_nothing_and_none_takes_no_part() -> None:
    algorithm = AlgorithmConfig(multi_objective_aggregation="normalize_then_sum")
    parts = [[{"a": 1.0, "b": 0.3}, {"a": 0.0, "b": 0.3}, {}], [{"b": 0.1}] * 3]
    found = step_advantages([[1.3, 0.3, None], [0.1] * 3], algorithm, parts=parts)
    # +-1/sqrt 2 and three zeros: sample variance 1 / 4
    assert found == [pytest.approx([math.sqrt(2), -math.sqrt(2), 0]), [0.0] * 3]


@pytest.mark.parametrize(("baseline", "scale"), CHOICES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e9, 1 / 3])
def test_a_constant_group_carries_no_signal(baseline: str, scale: str, reward: float) -> None:
    found = of_groups([reward] * 7, [1.0, 0.0], baseline=baseline, scale_rewards=scale)
    assert found[0] == [0.0] * 7
    assert all(math.isfinite(advantage) for advantage in found[1])


@pytest.mark.parametrize(("baseline", "scale"), CHOICES)
def test_rounding_noise_is_no_signal(baseline: str, scale: str) -> None:
    assert of_group([0.3, 0.1 + 0.2, 0.3], baseline=baseline, scale_rewards=scale) == [0.0] * 3


@pytest.mark.parametrize(("baseline", "scale"), CHOICES)
@pytest.mark.parametrize("rewards", [[], [None], [None, None], [1.0], [None, 1.0]])
def test_nothing_to_compare_with_is_no_signal(baseline: str, scale: str, rewards: list[float | None]) -> None:
    assert of_group(rewards, baseline=baseline, scale_rewards=scale) == [0.0] * len(rewards)


@pytest.mark.parametrize("scale", SCALES)
def test_a_step_without_groups_has_no_advantages(scale: str) -> None:
    assert of_groups(scale_rewards=scale) == []


@pytest.mark.parametrize(("baseline", "scale"), CHOICES)
def test_completions_without_a_reward_take_no_part(baseline: str, scale: str) -> None:
    with_gap = of_group([1.0, None, 0.0, 0.0], baseline=baseline, scale_rewards=scale)
    assert with_gap[1] == 0.0
    assert [with_gap[i] for i in (0, 2, 3)] == of_group([1.0, 0.0, 0.0], baseline=baseline, scale_rewards=scale)


@pytest.mark.parametrize(("baseline", "scale"), CHOICES)
def test_advantages_of_a_group_sum_to_zero(baseline: str, scale: str) -> None:
    found = of_groups([0.1, 0.7, 1.1, 0.0, 0.4], [2.0, 0.5], baseline=baseline, scale_rewards=scale)
    assert [sum(group) for group in found] == pytest.approx([0, 0], abs=1e-12)
    assert found[0][2] == max(found[0])
