"""Advantages of completions from their rewards, without a critic. Pure functions.

An advantage is (reward - baseline) / scale; both are chosen by name. A completion without a reward (None) takes no part
and gets 0; a constant group gets 0 under every baseline of its own, and nothing becomes NaN.

Shapes: P problems, G completions of one problem, R rewards of one completion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from grpo.algorithm import AlgorithmConfig

Rewards = Sequence[float | None]
"""Of one group, [G]; None where nothing graded the completion."""

VARIANCE_TOLERANCE = 1e-6
"""Rewards that spread less than this carry no signal: their advantages are 0, so that rounding cannot make a spike."""


def centred(rewards_G: Tensor) -> Tensor:
    """r - mean over the group (Dr. GRPO, arXiv 2503.20783, section 3: no division by the spread)."""
    centred_G = rewards_G - rewards_G.mean()
    return centred_G if centred_G.abs().max() > VARIANCE_TOLERANCE else torch.zeros_like(rewards_G)


def left_out(rewards_G: Tensor) -> Tensor:
    """r - mean of the others of its group, which is G / (G - 1) times centred (RLOO, arXiv 2402.14740)."""
    count = len(rewards_G)
    return centred(rewards_G) * (count / (count - 1)) if count > 1 else torch.zeros_like(rewards_G)


def unchanged(rewards_G: Tensor) -> Tensor:
    """r itself: for `whiten`, which then takes the mean of the step from it (REINFORCE++, arXiv 2501.03262)."""
    return rewards_G


BASELINES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "group_mean": centred,
    "leave_one_out": left_out,
    "none": unchanged,
}
"""By the value of `baseline`."""


def step_advantages(
    rewards: Sequence[Rewards],
    algorithm: AlgorithmConfig,
    *,
    parts: Sequence[Sequence[Mapping[str, float]]] = (),
    weights: Mapping[str, float] | None = None,
) -> list[list[float]]:
    """Advantages [P][G] of all groups of one step, those of every rank together.

    `parts` holds each completion's rewards by name and `weights` their weights (1 where not named); only
    `normalize_then_sum` reads them.
    """
    if algorithm.multi_objective_aggregation == "normalize_then_sum":
        values = _decoupled(parts, weights or {}, algorithm.advantage_epsilon)
    else:
        values = [_of_group(_graded(group), algorithm) for group in rewards]
        if algorithm.scale_rewards == "batch":
            spread = _spread(torch.cat([_graded(group) for group in rewards])) if rewards else 0.0
            values = [_divide(values_G, spread, algorithm.advantage_epsilon) for values_G in values]
        elif algorithm.scale_rewards == "whiten":
            values = _whitened(values, algorithm.advantage_epsilon)
    return [_laid_out(values_G, group) for values_G, group in zip(values, rewards, strict=True)]


def _of_group(rewards_G: Tensor, algorithm: AlgorithmConfig) -> Tensor:
    """Baseline taken, and divided where the divisor is the group's own."""
    if not len(rewards_G):
        return rewards_G
    difference_G = BASELINES[algorithm.baseline](rewards_G)
    if algorithm.scale_rewards == "group":  # GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1.2
        return _divide(difference_G, _spread(rewards_G), algorithm.advantage_epsilon)
    if algorithm.scale_rewards == "mean":  # MaxRL: arXiv 2602.02710; rewards are taken to be at least 0
        return _divide(difference_G, float(rewards_G.mean()), 0.0)
    return difference_G


def _decoupled(
    parts: Sequence[Sequence[Mapping[str, float]]], weights: Mapping[str, float], epsilon: float
) -> list[Tensor]:
    """GDPO (arXiv 2601.05242): each reward standardised in its group, summed with weights, standardised in the step."""
    sums = []
    for group in parts:
        graded = [part for part in group if part]
        total_G = torch.zeros(len(graded), dtype=torch.float64)
        for name in dict.fromkeys(name for part in graded for name in part):
            has_it = torch.tensor([name in part for part in graded])
            scores = torch.tensor([part[name] for part in graded if name in part], dtype=torch.float64)
            total_G[has_it] += weights.get(name, 1.0) * _divide(centred(scores), _spread(scores), epsilon)
        sums.append(total_G)
    return _whitened(sums, epsilon)


def _whitened(values: Sequence[Tensor], epsilon: float) -> list[Tensor]:
    """Minus the mean of the step, divided by the standard deviation of the step (REINFORCE++, arXiv 2501.03262)."""
    if not values:
        return []
    together = torch.cat(list(values))
    mean = together.mean() if len(together) else torch.zeros(())
    if mean.abs() <= VARIANCE_TOLERANCE:  # centred groups: a constant one stays at exactly 0
        mean = torch.zeros_like(mean)
    return [_divide(values_G - mean, _spread(together), epsilon) for values_G in values]


def _spread(values: Tensor) -> float:
    """Sample standard deviation; 0 of fewer than two."""
    return float(values.std()) if len(values) > 1 else 0.0


def _divide(values: Tensor, divisor: float, epsilon: float) -> Tensor:
    """Zeros where the divisor is so small that only rounding would be divided by it."""
    return values / (divisor + epsilon) if divisor > VARIANCE_TOLERANCE else torch.zeros_like(values)


def _graded(group: Rewards) -> Tensor:
    return torch.tensor([reward for reward in group if reward is not None], dtype=torch.float64)


def _laid_out(values_G: Tensor, group: Rewards) -> list[float]:
    """Back in the places of the group, 0 where there was no reward."""
    values = iter(values_G.tolist())
    return [0.0 if reward is None else next(values) for reward in group]
