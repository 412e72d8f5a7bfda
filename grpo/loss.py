"""The clipped policy-gradient loss and its KL penalty. Pure functions of per-token tensors.

Shapes: N packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """Per-token terms, zero outside the mask."""

    loss_N: Tensor
    """What is summed and divided by the number of completion tokens of the whole step."""
    clipped_N: Tensor
    """True where clipping took the gradient away."""
    kl_N: Tensor
    """k3 estimate of the divergence from the reference, nats; zeros without one."""


def clipped_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    mask_N: Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    ref_logprobs_N: Tensor | None = None,
    beta: float = 0.0,
) -> LossTerms:
    """-min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) + beta * k3 at each token.

    PPO, equation 7, per token as in DeepSeekMath, equation 3; `epsilon_high` (default: epsilon) is DAPO's clip-higher,
    equation 10.
    """
    high = epsilon if epsilon_high is None else epsilon_high
    ratio_N = torch.where(mask_N, logprobs_N - old_logprobs_N, 0.0).exp()
    clipped_ratio_N = ratio_N.clamp(1 - epsilon, 1 + high)
    gain_N = torch.minimum(ratio_N * advantages_N, clipped_ratio_N * advantages_N)
    kl_N = torch.zeros_like(logprobs_N)
    if ref_logprobs_N is not None:
        kl_N = torch.where(mask_N, k3(logprobs_N, ref_logprobs_N), 0.0)
    below = (ratio_N < 1 - epsilon) & (advantages_N < 0)
    above = (ratio_N > 1 + high) & (advantages_N > 0)
    return LossTerms(
        loss_N=torch.where(mask_N, -gain_N, 0.0) + beta * kl_N,
        clipped_N=(below | above) & mask_N,
        kl_N=kl_N.detach(),
    )


def k3(logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log ref - log policy: unbiased and never negative (Schulman, "Approximating KL",
    2020)."""
    difference_N = ref_logprobs_N - logprobs_N
    return difference_N.exp() - difference_N - 1
