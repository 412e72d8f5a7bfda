"""One optimizer step over a batch of graded completions: micro-batched loss and gradient, summed over ranks, one step.

Shapes: N packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.auxiliary import Auxiliary, AuxiliaryStats
from grpo.config import Config
from grpo.distributed import Ranks
from grpo.loss import clipped_loss
from grpo.optimizer import MasterAdamW
from grpo.types import Batch
from policy import Policy
from policy.logprobs import token_logprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateStats:
    """Means over the completion tokens of all ranks, of the last optimizer step on the batch."""

    loss: float
    kl: float
    entropy: float
    """Nats per token."""
    clipped: float
    """Share of tokens."""
    logp_difference_mean: float
    """Mean |sampler's - trainer's log-probability|, nats, before the first step."""
    logp_difference_max: float
    grad_norm: float
    """Before clipping."""
    is_skipped: bool
    """Whether the gradient was not finite and the step was not taken."""
    auxiliary: AuxiliaryStats
    """Of the MTP modules and the routers."""


def update(
    policy: Policy,
    optimizer: MasterAdamW,
    batches: Sequence[Batch],
    *,
    num_tokens: int,
    learning_rate: float,
    config: Config,
    ranks: Ranks,
    reference: Policy | None = None,
) -> UpdateStats:
    """`num_iterations` optimizer steps; `num_tokens` is the number of learned tokens of all ranks.

    The old policy of the ratio is the one at the start of the batch: with one iteration that is the current one,
    and with
    more its log-probabilities are computed once beforehand (the sampler's would be biased by truncated sampling).
    """
    olds: list[Tensor | None] = [None] * len(batches)
    if config.num_iterations > 1:
        olds = [_frozen_logprobs(policy, batch, config.temperature) for batch in batches]
    references = [None if reference is None else _frozen_logprobs(reference, b, config.temperature) for b in batches]
    first: _Sums | None = None
    for _ in range(config.num_iterations):
        sums = _Sums(policy)
        auxiliary = Auxiliary(policy, batches, num_tokens=num_tokens, config=config, ranks=ranks)
        for batch, old_N, ref_N in zip(batches, olds, references, strict=True):
            sums.add(_backward(policy, batch, old_N, ref_N, num_tokens, config, auxiliary))
            optimizer.gather_gradients()
        ranks.sum_(optimizer.gather_gradients())
        grad_norm = optimizer.step(learning_rate, config.max_grad_norm)
        auxiliary_stats = auxiliary.finish(is_skipped=not math.isfinite(grad_norm))
        first = first or sums
    assert first is not None
    sums.reduce(ranks)
    if first is not sums:
        first.reduce(ranks)
    count = max(1, num_tokens)
    return UpdateStats(
        loss=float(sums.loss) / count,
        kl=float(sums.kl) / count,
        entropy=float(sums.entropy) / count,
        clipped=float(sums.clipped) / count,
        logp_difference_mean=float(first.difference) / count,
        logp_difference_max=float(first.difference_max),
        grad_norm=grad_norm,
        is_skipped=not math.isfinite(grad_norm),
        auxiliary=auxiliary_stats,
    )


@dataclass(frozen=True, slots=True)
class _Step:
    loss: Tensor
    kl: Tensor
    entropy: Tensor
    clipped: Tensor
    difference_N: Tensor


def _backward(
    policy: Policy,
    batch: Batch,
    old_N: Tensor | None,
    ref_N: Tensor | None,
    num_tokens: int,
    config: Config,
    auxiliary: Auxiliary,
) -> _Step:
    """Add one micro-batch's share of the gradient."""
    mask_N, watch = batch.completion_mask_N, auxiliary.watch(batch)
    result = token_logprobs(policy, batch.token_ids_N, batch.rows, mask_N, temperature=config.temperature, watch=watch)
    current_N = result.logprobs_N
    terms = clipped_loss(
        current_N,
        current_N.detach() if old_N is None else old_N,
        batch.advantages_N,
        mask_N,
        epsilon=config.epsilon,
        epsilon_high=config.epsilon_high,
        ref_logprobs_N=ref_N,
        beta=config.beta,
    )
    loss = terms.loss_N.sum()
    (loss / num_tokens + auxiliary.loss(batch, result.output, watch)).backward()
    return _Step(
        loss=loss.detach(),
        kl=terms.kl_N.sum(),
        entropy=result.entropy_N.detach().sum(),
        clipped=terms.clipped_N.sum(),
        difference_N=torch.where(mask_N, current_N.detach() - batch.rollout_logprobs_N, 0.0).abs(),
    )


@torch.no_grad()
def _frozen_logprobs(policy: Policy, batch: Batch, temperature: float) -> Tensor:
    wanted_N = batch.completion_mask_N
    return token_logprobs(policy, batch.token_ids_N, batch.rows, wanted_N, temperature=temperature).logprobs_N


class _Sums:
    """Running sums over micro-batches, then over ranks."""

    def __init__(self, policy: Policy) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=policy.device)
        self.loss, self.kl, self.entropy, self.clipped, self.difference = (zero.clone() for _ in range(5))
        self.difference_max = zero.clone()

    def add(self, step: _Step) -> None:
        self.loss += step.loss
        self.kl += step.kl
        self.entropy += step.entropy
        self.clipped += step.clipped
        self.difference += step.difference_N.sum()
        self.difference_max = torch.maximum(self.difference_max, step.difference_N.max().double())

    def reduce(self, ranks: Ranks) -> None:
        ranks.sum_([self.loss, self.kl, self.entropy, self.clipped, self.difference])
        self.difference_max.fill_(ranks.max_number(float(self.difference_max)))
