"""Entropy: which tokens are uncertain enough to learn from, and a bonus whose weight may follow a target.

Shapes: N packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.algorithm import AlgorithmConfig
from grpo.distributed import Ranks


def entropy_threshold(entropies: Sequence[Tensor], top_quantile: float, ranks: Ranks) -> float:
    """The entropy, nats, that the top share of all tokens of all ranks reaches, between tokens interpolated linearly.

    "Beyond the 80/20 Rule" (arXiv 2506.01939): only these tokens keep their policy gradient. `entropies` are
    those of this rank's learned tokens.
    """
    own = torch.cat([e.detach().cpu() for e in entropies]) if entropies else torch.zeros(0)
    ordered = torch.cat(ranks.gather_rows(own)).sort().values  # torch.quantile takes no more than 2^24 numbers
    if not len(ordered):
        return 0.0
    place = (1 - top_quantile) * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 1)
    above = min(below + 1, len(ordered) - 1)
    return float(torch.lerp(ordered[below], ordered[above], place - below))


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyState:
    """Where the adaptive bonus stands; part of a checkpoint."""

    coefficient: float
    """Weight that the next step may use."""
    entropy: float | None = None
    """Nats a token in the last step; None before the first."""


def applied_coefficient(state: EntropyState, algorithm: AlgorithmConfig) -> float:
    """Weight of the bonus in the next step; if adaptive, 0 until the last step's entropy is known to be low."""
    if not algorithm.use_adaptive_entropy:
        return algorithm.entropy_coef
    return state.coefficient if state.entropy is not None and state.entropy <= algorithm.entropy_target else 0.0


def adapted(state: EntropyState, entropy: float, algorithm: AlgorithmConfig) -> EntropyState:
    """One `entropy_coef_delta` up where the step's entropy is at or below its target, else one down, within its bounds
    (Skywork-OR1, arXiv 2505.22312).
    """
    if not algorithm.use_adaptive_entropy or not math.isfinite(entropy):
        return state
    is_low = entropy <= algorithm.entropy_target
    moved = state.coefficient + (algorithm.entropy_coef_delta if is_low else -algorithm.entropy_coef_delta)
    bounded = min(max(moved, algorithm.entropy_coef_min), algorithm.entropy_coef_max)
    return EntropyState(coefficient=bounded, entropy=entropy)
