"""Which tokens are uncertain enough, and a bonus that follows a target."""

import math

import pytest
import torch

from grpo.algorithm import AlgorithmConfig
from grpo.distributed import Ranks
from grpo.entropy import EntropyState, adapted, applied_coefficient, entropy_threshold


@pytest.mark.parametrize("top", [0.0, 0.2, 0.35, 0.5, 1.0])
def test_threshold_is_the_quantile_of_all_tokens_together(top: float) -> None:
    values = torch.rand(101, generator=torch.Generator().manual_seed(0))
    found = entropy_threshold([values[:30], values[30:]], top, Ranks(cpu=True))
    assert found == pytest.approx(float(torch.quantile(values, 1 - top)), abs=1e-6)


def test_threshold_by_hand_and_of_nothing() -> None:
    # the top half of 1, 2, 3, 4 begins between 2 and 3
    assert entropy_threshold([torch.tensor([4.0, 1.0, 3.0, 2.0])], 0.5, Ranks(cpu=True)) == 2.5
    assert entropy_threshold([], 0.5, Ranks(cpu=True)) == 0.0


def test_a_fixed_coefficient_stays() -> None:
    algorithm = AlgorithmConfig(entropy_coef=0.01)
    state = EntropyState(coefficient=0.01)
    assert adapted(state, 0.0, algorithm) == state
    assert applied_coefficient(state, algorithm) == 0.01


def test_an_adaptive_coefficient_follows_the_target() -> None:
    algorithm = AlgorithmConfig(
        use_adaptive_entropy=True,
        entropy_target=0.5,
        entropy_coef=0.01,
        entropy_coef_delta=0.005,
        entropy_coef_max=0.015,
    )
    state = EntropyState(coefficient=0.01)
    assert applied_coefficient(state, algorithm) == 0.0  # not known yet
    found = []
    for entropy in (0.4, 0.5, 0.3, 0.6, 0.7, 0.7, 0.7, 0.4):
        state = adapted(state, entropy, algorithm)
        found.append((state.coefficient, applied_coefficient(state, algorithm)))
    expected = [(0.015, 0.015), (0.015, 0.015), (0.015, 0.015), (0.01, 0), (0.005, 0), (0, 0), (0, 0), (0.005, 0.005)]
    assert found == [pytest.approx(pair) for pair in expected]


def test_an_entropy_that_is_not_finite_moves_nothing() -> None:
    algorithm = AlgorithmConfig(use_adaptive_entropy=True)
    state = EntropyState(coefficient=0.01, entropy=0.1)
    assert adapted(state, math.nan, algorithm) == state
