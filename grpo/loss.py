"""The loss of one micro-batch, put together from the algorithm's choices. A pure function of per-token tensors.

    sum over tokens of  weight * (-gain * keep * correction + beta * kl)  -  entropy_coef * mean entropy

The weight comes from `grpo/aggregation.py`, the gain from `grpo/ratio.py` and `grpo/clipping.py`, keep and correction
from `grpo/importance.py` and `grpo/entropy.py`, kl from `grpo/kl.py`. Sums over micro-batches and ranks are the loss of
the step.

Shapes: N packed tokens, X ratios between trainer and sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.aggregation import Counts, token_weights
from grpo.algorithm import AlgorithmConfig
from grpo.clipping import CLIPPINGS, Gain, Tokens, keep_ratio
from grpo.importance import keep_near_policy, weigh_sampler
from grpo.kl import penalise
from grpo.ratio import geometric_log_ratios, sequence_log_ratios, token_log_ratios
from grpo.types import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerms:
    """The loss, and what it was made of: without gradient, zero outside the mask."""

    loss: Tensor
    """What to differentiate: this micro-batch's part of the loss of the step."""
    per_token_N: Tensor
    """Each token's part of it, entropy bonus aside."""
    kl_N: Tensor
    """Estimate of the divergence from the reference, nats; zeros without one."""
    low_N: Tensor
    """True where clipping held a ratio that is too small."""
    high_N: Tensor
    """True where it held one that is too large."""
    kept_N: Tensor
    """True at the tokens that the policy-gradient term and the entropy bonus run over."""
    is_dropped_N: Tensor
    """True at the tokens of rows that off-policy sequence masking dropped."""
    sampler_ratio_X: Tensor
    """pi_old / sampler of each token, or of each row where the correction is of sequences, fp64."""


def batch_loss(
    logprobs_N: Tensor,
    entropy_N: Tensor,
    batch: Batch,
    algorithm: AlgorithmConfig,
    counts: Counts,
    *,
    max_completion_length: int,
    entropy_coef: float = 0.0,
    num_kept: int | None = None,
) -> LossTerms:
    """The loss of one micro-batch under the policy's log-probabilities and entropies, both differentiable.

    `num_kept` is the number of tokens of all ranks that `batch.certain_N` leaves, the denominator of the bonus;
    default: all of `counts`.
    """
    mask_N, rows = batch.completion_mask_N, batch.rows
    old_N = logprobs_N.detach() if batch.old_logprobs_N is None else batch.old_logprobs_N
    if batch.stale_N is not None:
        old_N = torch.where(batch.stale_N, batch.rollout_logprobs_N, old_N)
    log_ratio_N = token_log_ratios(logprobs_N, old_N, mask_N)
    gain = _gain(logprobs_N, old_N, log_ratio_N, batch, algorithm)
    policy_N = -gain.gain_N

    is_dropped_N = torch.zeros_like(mask_N)
    if algorithm.off_policy_mask_threshold is not None:
        is_dropped_N = mask_N & ~keep_near_policy(
            logprobs_N, batch.rollout_logprobs_N, batch.advantages_N, mask_N, rows, algorithm.off_policy_mask_threshold
        )
    kept_N = mask_N if batch.certain_N is None else mask_N & ~batch.certain_N
    sampler = weigh_sampler(
        old_N.detach(),
        batch.rollout_logprobs_N,
        mask_N,
        rows,
        batch.learned,
        correction=algorithm.importance_sampling_correction,
        clip_min=algorithm.importance_sampling_clip_min,
        clip_max=algorithm.importance_sampling_clip_max,
    )
    if algorithm.importance_sampling_correction != "off":
        policy_N = policy_N * sampler.weight_N
    loss_N = torch.where(kept_N & ~is_dropped_N, policy_N, 0.0)

    kl_N = torch.zeros_like(logprobs_N)
    if batch.ref_logprobs_N is not None:
        kl_N = penalise(
            logprobs_N,
            batch.ref_logprobs_N,
            log_ratio_N,
            mask_N,
            estimator=algorithm.kl_estimator,
            is_corrected=algorithm.use_bias_correction_kl,
        )
        loss_N = loss_N + algorithm.beta * kl_N

    weighted_N = loss_N * token_weights(batch, counts, algorithm.loss_aggregation, max_completion_length)
    loss = weighted_N.sum()
    if entropy_coef:
        bonus = torch.where(kept_N, entropy_N, 0.0).sum() / max(1, counts.tokens if num_kept is None else num_kept)
        loss = loss - entropy_coef * bonus
    return LossTerms(
        loss=loss,
        per_token_N=weighted_N.detach(),
        kl_N=kl_N.detach(),
        low_N=gain.low_N & mask_N,
        high_N=gain.high_N & mask_N,
        kept_N=kept_N,
        is_dropped_N=is_dropped_N,
        sampler_ratio_X=sampler.ratio_X,
    )


def _gain(logprobs_N: Tensor, old_N: Tensor, log_ratio_N: Tensor, batch: Batch, algorithm: AlgorithmConfig) -> Gain:
    mask_N, rows, advantages_N = batch.completion_mask_N, batch.rows, batch.advantages_N
    low, high = algorithm.bounds
    level = algorithm.importance_sampling_level
    if level == "sequence":
        ratio_N = sequence_log_ratios(log_ratio_N, mask_N, rows).exp()
    elif level == "geometric_mean":
        ratio_N = geometric_log_ratios(log_ratio_N, advantages_N, mask_N, rows, low=low, high=high).exp()
    else:
        ratio_N = log_ratio_N.exp()
    tokens = Tokens(ratio_N=ratio_N, logprobs_N=logprobs_N, old_logprobs_N=old_N, advantages_N=advantages_N)
    if level != "geometric_mean":
        return CLIPPINGS[algorithm.clipping](tokens, algorithm)
    return Gain(
        gain_N=keep_ratio(tokens, algorithm).gain_N,
        low_N=(log_ratio_N < -low) & (advantages_N < 0),
        high_N=(log_ratio_N > high) & (advantages_N > 0),
    )
