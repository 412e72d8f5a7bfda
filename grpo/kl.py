"""Estimates of the divergence from a reference at each sampled token. Pure functions.

With d = log pi - log ref of a token that was drawn from pi, each estimate has KL(pi || ref) as its mean (k2 nearly);
Schulman, "Approximating KL Divergence", 2020.

Shapes: N packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def k1(logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
    """d: unbiased, of either sign."""
    return logprobs_N - ref_logprobs_N


def k2(logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
    """d^2 / 2: biased as a number, but its gradient has the divergence's gradient as its mean."""
    return (logprobs_N - ref_logprobs_N).square() / 2


def k3(logprobs_N: Tensor, ref_logprobs_N: Tensor) -> Tensor:
    """e^-d + d - 1: unbiased and never negative (DeepSeekMath, arXiv 2402.03300, equation 4)."""
    difference_N = ref_logprobs_N - logprobs_N
    return difference_N.exp() - difference_N - 1


ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""By the value of `kl_estimator`."""


def penalise(
    logprobs_N: Tensor,
    ref_logprobs_N: Tensor,
    log_ratio_N: Tensor,
    mask_N: Tensor,
    *,
    estimator: str,
    is_corrected: bool,
) -> Tensor:
    """The estimate at each token, differentiable, 0 outside the mask.

    Corrected, it is times the token's ratio to the old policy, which the tokens were drawn from: the mean of its
    gradient is then the gradient of KL(pi || ref), also where the policy has moved on (DeepSeek-V3.2, arXiv 2512.02556,
    equation 7). For k2, whose gradient is right without it, the ratio is a plain weight.
    """
    kl_N = torch.where(mask_N, ESTIMATORS[estimator](logprobs_N, ref_logprobs_N), 0.0)
    if not is_corrected:
        return kl_N
    ratio_N = log_ratio_N.exp()
    return kl_N * (ratio_N.detach() if estimator == "k2" else ratio_N)
