"""Advantages against numbers worked by hand."""

import math

import pytest

from grpo.advantages import SCALINGS, group_advantages


def test_group_standardised_by_hand() -> None:
    # mean 0.5; sample variance of (1, 0, 0, 1) is 4 * 0.25 / 3
    expected = 0.5 / math.sqrt(1 / 3)
    assert group_advantages([1, 0, 0, 1], "group") == pytest.approx([expected, -expected, -expected, expected])


def test_centred_by_hand() -> None:
    assert group_advantages([1, 0, 0, 0], "none") == pytest.approx([0.75, -0.25, -0.25, -0.25])


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1e9, 1 / 3])
def test_a_constant_group_carries_no_signal(scaling: str, reward: float) -> None:
    assert group_advantages([reward] * 7, scaling) == [0.0] * 7


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rounding_noise_is_no_signal(scaling: str) -> None:
    assert group_advantages([0.3, 0.1 + 0.2, 0.3], scaling) == [0.0] * 3


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("rewards", [[], [None], [None, None], [1.0], [None, 1.0]])
def test_nothing_to_compare_with_is_no_signal(scaling: str, rewards: list[float | None]) -> None:
    assert group_advantages(rewards, scaling) == [0.0] * len(rewards)


def test_completions_without_a_reward_take_no_part() -> None:
    with_gap = group_advantages([1.0, None, 0.0, 0.0], "group")
    assert with_gap[1] == 0.0
    assert [with_gap[i] for i in (0, 2, 3)] == group_advantages([1.0, 0.0, 0.0], "group")


@pytest.mark.parametrize("scaling", SCALINGS)
def test_advantages_sum_to_zero(scaling: str) -> None:
    assert sum(group_advantages([0.1, 0.7, 1.1, 0.0, 0.4], scaling)) == pytest.approx(0, abs=1e-12)
