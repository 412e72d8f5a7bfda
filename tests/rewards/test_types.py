import dataclasses

import pytest

from rewards import Problem, RewardResult


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), -float("inf")])
def test_reward_is_finite(reward: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        RewardResult(reward=reward)


def test_reward_may_be_none() -> None:
    assert RewardResult(reward=None).reward is None


def test_values_cannot_be_changed() -> None:
    problem = Problem(id="1", prompt="?")
    with pytest.raises(dataclasses.FrozenInstanceError):
        problem.id = "2"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        RewardResult(reward=1.0).reward = 2.0  # type: ignore[misc]


def test_columns_are_not_shared() -> None:
    assert Problem(id="1", prompt="?").columns is not Problem(id="2", prompt="?").columns
