"""What holds the policy near the old one: the gain of each token as a function of its ratio. Pure functions.

The gain is what the loss is minus of, and its gradient is what is taken away: by PPO and DPPO where a token has moved
far enough, by SAPO little by little; by CISPO never.

Shapes: N packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.algorithm import AlgorithmConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """What a gain is made of; outside the mask, numbers that do not count."""

    ratio_N: Tensor
    """pi / pi_old at the chosen level, differentiable."""
    logprobs_N: Tensor
    """log pi of the token, nats, differentiable."""
    old_logprobs_N: Tensor
    """log pi_old of the token, nats."""
    advantages_N: Tensor
    """Of the token's row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What each token adds to the objective."""

    gain_N: Tensor
    """To be maximised, differentiable."""
    low_N: Tensor
    """True where the gradient was taken away or its weight bounded because the ratio is too small."""
    high_N: Tensor
    """True where that happened because the ratio is too large."""


def clip_ratio(tokens: Tokens, algorithm: AlgorithmConfig) -> Gain:
    """min(ratio * A, clip(ratio, 1 - epsilon, 1 + epsilon_high) * A) (PPO, arXiv 1707.06347, equation 7).

    `epsilon_high` above `epsilon` is DAPO's clip-higher (arXiv 2503.14476, equation 10). `delta` bounds the first ratio
    too: the loss of a token with a negative advantage stays finite (dual clip, arXiv 1912.09729; two-sided
    clipping, INTELLECT-2, arXiv 2505.07291).
    """
    low, high = algorithm.bounds
    ratio_N, advantages_N = tokens.ratio_N, tokens.advantages_N
    clipped_N = ratio_N.clamp(1 - low, 1 + high)
    bounded_N = ratio_N if algorithm.delta is None else ratio_N.clamp(max=algorithm.delta)
    is_high_N = (ratio_N > 1 + high) & (advantages_N > 0)
    if algorithm.delta is not None:
        is_high_N |= (ratio_N > algorithm.delta) & (advantages_N < 0)
    return Gain(
        gain_N=torch.minimum(bounded_N * advantages_N, clipped_N * advantages_N),
        low_N=(ratio_N < 1 - low) & (advantages_N < 0),
        high_N=is_high_N,
    )


def clip_weight(tokens: Tokens, algorithm: AlgorithmConfig) -> Gain:
    """sg(min(ratio, epsilon_high)) * A * log pi: every token keeps a gradient (CISPO: MiniMax-M1, arXiv 2506.13585,
    equation 4; the bound itself is `epsilon_high`, as in ScaleRL, arXiv 2510.13786, and TRL).
    """
    _, high = algorithm.bounds
    weight_N = tokens.ratio_N.clamp(max=high).detach()
    is_high_N = tokens.ratio_N > high
    return Gain(
        gain_N=weight_N * tokens.advantages_N * tokens.logprobs_N,
        low_N=torch.zeros_like(is_high_N),
        high_N=is_high_N,
    )


def gate_ratio(tokens: Tokens, algorithm: AlgorithmConfig) -> Gain:
    """4 / tau * sigmoid(tau * (ratio - 1)) * A, tau by the sign of A (SAPO, arXiv 2511.20347).

    At ratio 1 the slope is 1; it fades to both sides.
    """
    tau_N = torch.where(tokens.advantages_N > 0, algorithm.sapo_temperature_pos, algorithm.sapo_temperature_neg)
    gate_N = torch.sigmoid(tau_N * (tokens.ratio_N - 1)) * 4 / tau_N
    nowhere_N = torch.zeros_like(gate_N, dtype=torch.bool)
    return Gain(gain_N=gate_N * tokens.advantages_N, low_N=nowhere_N, high_N=nowhere_N)


def total_variation(logprobs_N: Tensor, old_logprobs_N: Tensor) -> Tensor:
    """|pi - pi_old| of the token against all others: the binary total variation."""
    return (logprobs_N.exp() - old_logprobs_N.exp()).abs()


def binary_divergence(logprobs_N: Tensor, old_logprobs_N: Tensor) -> Tensor:
    """KL(old || new), nats, of the token against all others."""
    old_N = old_logprobs_N.exp()
    # Of one less the probability; the smallest float keeps a token that is all but certain finite.
    rest_N, old_rest_N = (torch.expm1(l_N).neg().clamp(min=1e-8) for l_N in (logprobs_N, old_logprobs_N))
    return old_N * (old_logprobs_N - logprobs_N) + (1 - old_N) * (old_rest_N.log() - rest_N.log())


def mask_moved(tokens: Tokens, algorithm: AlgorithmConfig, divergence: Callable[[Tensor, Tensor], Tensor]) -> Gain:
    """sg(ratio) * A * log pi where the token has not moved too far in the direction of its advantage, 0 elsewhere.

    DPPO (arXiv 2602.04879): "too far" is measured on probabilities, above `epsilon` down and `epsilon_high` up, so that
    rare tokens are free to move and frequent ones are not. `delta` bounds the weight (20 in the paper).
    """
    low, high = algorithm.bounds
    old_N, logprobs_N = tokens.old_logprobs_N, tokens.logprobs_N.detach()
    moved_N = divergence(logprobs_N, old_N)
    is_high_N = (moved_N > high) & (logprobs_N > old_N) & (tokens.advantages_N > 0)
    is_low_N = (moved_N > low) & (logprobs_N < old_N) & (tokens.advantages_N <= 0)
    weight_N = tokens.ratio_N.detach().clamp(max=algorithm.delta or float("inf"))
    kept_N = torch.where(is_low_N | is_high_N, 0.0, weight_N)
    return Gain(gain_N=kept_N * tokens.advantages_N * tokens.logprobs_N, low_N=is_low_N, high_N=is_high_N)


def keep_ratio(tokens: Tokens, algorithm: AlgorithmConfig) -> Gain:
    """ratio * A, whatever the ratio."""
    nowhere_N = torch.zeros_like(tokens.ratio_N, dtype=torch.bool)
    return Gain(gain_N=tokens.ratio_N * tokens.advantages_N, low_N=nowhere_N, high_N=nowhere_N)


CLIPPINGS: Mapping[str, Callable[[Tokens, AlgorithmConfig], Gain]] = {
    "ppo": clip_ratio,
    "cispo": clip_weight,
    "sapo": gate_ratio,
    "dppo_tv": lambda tokens, algorithm: mask_moved(tokens, algorithm, total_variation),
    "dppo_kl": lambda tokens, algorithm: mask_moved(tokens, algorithm, binary_divergence),
    "none": keep_ratio,
}
"""By the value of `clipping`."""
