"""Corrections where the tokens were not drawn from the policy that learns from them. Pure functions, without gradient.

Two gaps add up: the sampler's log-probabilities differ from the trainer's for the same weights (another program,
another precision), and the trainer's policy moves on while it learns. The first is weighed here, the second by the
ratio of the loss; off-policy sequence masking looks at both together.

Shapes: N packed tokens, B rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.ratio import row_means, row_sums, spread_over_rows
from policy import PackedRows
from policy.packing import Wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerWeights:
    """What to multiply the policy-gradient term by, and the ratios that it was made of."""

    weight_N: Tensor
    """fp32, at every token of a row the same where the correction is of sequences."""
    ratio_X: Tensor
    """fp64, pi_old / sampler, one for each learned token, or for each row with one: before truncation or masking."""


def weigh_sampler(
    old_logprobs_N: Tensor,
    rollout_logprobs_N: Tensor,
    mask_N: Tensor,
    rows: PackedRows,
    learned: Wanted,
    *,
    correction: str,
    clip_min: float | None,
    clip_max: float | None,
) -> SamplerWeights:
    """pi_old / sampler of a token or of a whole row, then bounded or, out of bounds, set to 0.

    `learned` are the places of the mask.

    `*_truncate` clamps (truncated importance sampling, TIS: "Your Efficient RL Framework Secretly Brings You Off-Policy
    RL Training", 2025); `*_mask` drops (masked importance sampling; `token_mask` with two bounds is IcePop, Ling
    Team, 2025); `off` leaves every weight at 1. A log-probability that the sampler does not know (nan) counts as equal.
    """
    log_ratio_N = torch.where(mask_N, (old_logprobs_N - rollout_logprobs_N).nan_to_num(nan=0.0), 0.0)
    if correction.startswith("sequence"):
        log_ratio_B = row_sums(log_ratio_N, mask_N, rows)
        log_weight_N = spread_over_rows(log_ratio_B, rows)
        ratio_X = log_ratio_B.index_select(0, learned.row_L).double().exp()
    else:
        log_weight_N = log_ratio_N
        ratio_X = log_ratio_N.index_select(0, learned.token_W).double().exp()
    weight_N = log_weight_N.exp()
    if correction == "off":
        weight_N = torch.ones_like(weight_N)
    elif correction.endswith("truncate"):
        weight_N = weight_N.clamp(clip_min, clip_max)
    else:
        is_out_N = torch.zeros_like(mask_N)
        if clip_min is not None:
            is_out_N = is_out_N | (weight_N < clip_min)
        if clip_max is not None:
            is_out_N = is_out_N | (weight_N > clip_max)
        weight_N = weight_N.masked_fill(is_out_N, 0.0)
    return SamplerWeights(weight_N=weight_N, ratio_X=ratio_X)


def keep_near_policy(
    logprobs_N: Tensor,
    rollout_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    rows: PackedRows,
    threshold: float,
) -> Tensor:
    """True at the tokens of rows that are kept: those with an advantage of at least 0, or whose mean of log sampler -
    log pi is at most `threshold` nats (off-policy sequence masking: DeepSeek-V3.2, arXiv 2512.02556, equation 9).
    """
    difference_N = (rollout_logprobs_N - logprobs_N.detach()).nan_to_num(nan=0.0)
    return (advantages_N >= 0) | (row_means(difference_N, mask_N, rows) <= threshold)


def effective_sample_size(total: float, total_of_squares: float, count: int) -> float:
    """(sum w)^2 / (n sum w^2), from 1/n to 1: the share of samples that the weights leave to count (Kish, 1965)."""
    return total * total / (count * total_of_squares) if count and total_of_squares else 1.0
