"""Corrections for tokens that another policy drew, by hand.

Shapes: N packed tokens.
"""

import math
from typing import Any

import pytest
import torch

from grpo.importance import SamplerWeights, effective_sample_size, keep_near_policy, weigh_sampler
from policy import PackedRows
from policy.packing import Wanted

ROWS = PackedRows.of([3, 2])
MASK = torch.tensor([False, True, True, False, True])
RATIOS = torch.tensor([1.0, 4.0, 0.5, 1.0, 0.1])


def weigh(correction: str, **bounds: Any) -> SamplerWeights:
    rollout = torch.full((5,), -2.0)
    return weigh_sampler(
        rollout + RATIOS.log(),
        rollout,
        MASK,
        ROWS,
        Wanted.of(MASK, ROWS),
        correction=correction,
        **({"clip_min": None, "clip_max": None} | bounds),
    )


@pytest.mark.parametrize(
    ("correction", "bounds", "expected"),
    [
        ("off", {}, [1.0, 1.0, 1.0]),
        ("token_truncate", {"clip_max": 3.0}, [3.0, 0.5, 0.1]),
        ("token_truncate", {"clip_max": 3.0, "clip_min": 0.2}, [3.0, 0.5, 0.2]),
        ("token_mask", {"clip_max": 3.0}, [0.0, 0.5, 0.1]),
        ("token_mask", {"clip_max": 5.0, "clip_min": 0.5}, [4.0, 0.5, 0.0]),  # IcePop's bounds
        ("sequence_truncate", {"clip_max": 1.5}, [1.5, 1.5, 0.1]),  # 4 * 0.5 = 2
        ("sequence_mask", {"clip_max": 1.5}, [0.0, 0.0, 0.1]),
        ("sequence_mask", {"clip_min": 0.5}, [2.0, 2.0, 0.0]),
    ],
)
def test_weights_by_hand(correction: str, bounds: dict[str, float], expected: list[float]) -> None:
    assert weigh(correction, **bounds).weight_N[MASK].tolist() == pytest.approx(expected, rel=1e-5)


def test_ratios_are_told_before_they_are_bounded() -> None:
    assert weigh("token_mask", clip_max=3.0).ratio_X.tolist() == pytest.approx([4.0, 0.5, 0.1], rel=1e-5)
    assert weigh("sequence_mask", clip_max=1.5).ratio_X.tolist() == pytest.approx([2.0, 0.1], rel=1e-5)


def test_what_the_sampler_does_not_know_is_not_corrected() -> None:
    rollout = torch.tensor([-1.0, float("nan"), -2.0, -1.0, -1.0])
    given = (torch.full((5,), -1.0), rollout, MASK, ROWS, Wanted.of(MASK, ROWS))
    found = weigh_sampler(*given, correction="token_truncate", clip_min=None, clip_max=9.0)
    assert found.weight_N[MASK].tolist() == pytest.approx([1.0, math.e, 1.0], rel=1e-5)


def test_off_policy_rows_with_a_negative_advantage_are_dropped() -> None:
    # Row one: mean of log sampler - log policy is (0.2 + 1.0) / 2 = 0.6; row two: 0.4.
    rollout = torch.zeros(5)
    logprobs = -torch.tensor([9.0, 0.2, 1.0, 9.0, 0.4])
    for advantages, expected in (
        ([-1.0, -1.0], [False, False, True]),
        ([1.0, -1.0], [True, True, True]),
        ([0.0, 1.0], [True, True, True]),
    ):
        advantages_N = torch.tensor(advantages).repeat_interleave(torch.tensor([3, 2]))
        kept = keep_near_policy(logprobs, rollout, advantages_N, MASK, ROWS, 0.5)
        assert kept[MASK].tolist() == expected


def test_effective_sample_size_by_hand() -> None:
    assert effective_sample_size(4.0, 4.0, 4) == 1.0  # four of weight 1
    assert effective_sample_size(2.0, 4.0, 4) == 0.25  # one of weight 2, three of 0
    assert effective_sample_size(0.0, 0.0, 0) == 1.0
