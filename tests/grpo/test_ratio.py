"""Ratios of tokens, of rows and geometric means, by hand.

Shapes: N packed tokens.
"""

import math

import pytest
import torch
from torch import Tensor

from grpo.ratio import geometric_log_ratios, row_means, sequence_log_ratios, token_log_ratios
from policy import PackedRows

ROWS = PackedRows.of([3, 4])
MASK = torch.tensor([False, True, True, False, True, True, True])
LOG_RATIO = torch.tensor([9.0, 0.1, 0.3, 9.0, -0.6, 0.0, 0.3])


def in_mask(x_N: Tensor) -> list[float]:
    return x_N[MASK].tolist()


def test_token_ratios_count_only_within_the_mask() -> None:
    found = token_log_ratios(
        torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, float("nan")]), torch.tensor([True, False])
    )
    assert found.tolist() == [0.5, 0.0]


def test_sequence_ratio_is_the_mean_over_the_row_at_each_of_its_tokens() -> None:
    assert in_mask(sequence_log_ratios(LOG_RATIO, MASK, ROWS)) == pytest.approx([0.2, 0.2, -0.1, -0.1, -0.1])


def test_a_row_without_a_token_has_mean_zero() -> None:
    assert row_means(torch.ones(7), torch.zeros(7, dtype=torch.bool), ROWS).tolist() == [0.0] * 7


def test_geometric_ratio_clips_where_the_advantage_moves_to() -> None:
    up, down = torch.ones(7), -torch.ones(7)
    # A > 0 holds what is above 0.2: (0.1 + 0.2) / 2 and (-0.6 + 0 + 0.2) / 3
    held = geometric_log_ratios(LOG_RATIO, up, MASK, ROWS, low=0.4, high=0.2)
    assert in_mask(held) == pytest.approx([0.15, 0.15, -0.4 / 3, -0.4 / 3, -0.4 / 3])
    # A < 0 holds what is below -0.4: (0.1 + 0.3) / 2 and (-0.4 + 0 + 0.3) / 3
    held = geometric_log_ratios(LOG_RATIO, down, MASK, ROWS, low=0.4, high=0.2)
    assert in_mask(held) == pytest.approx([0.2, 0.2, -0.1 / 3, -0.1 / 3, -0.1 / 3])


def test_gradient_of_a_row_reaches_all_of_its_tokens_alike_and_no_other() -> None:
    x_N = LOG_RATIO.clone().requires_grad_()
    sequence_log_ratios(x_N, MASK, ROWS).exp()[4].backward()
    expected = math.exp(-0.1) / 3
    assert x_N.grad is not None
    assert x_N.grad.tolist() == pytest.approx([0, 0, 0, 0, expected, expected, expected])
