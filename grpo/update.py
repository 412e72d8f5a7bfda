"""The optimizer steps over a batch of graded completions: micro-batched loss and gradient, summed over ranks, one step.

Shapes: N packed tokens, X ratios between trainer and sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from grpo.auxiliary import Auxiliary, AuxiliaryStats
from grpo.batch import Minibatch
from grpo.config import Config
from grpo.distributed import Ranks
from grpo.entropy import entropy_threshold
from grpo.idle import fill_up
from grpo.importance import effective_sample_size
from grpo.loss import LossTerms, batch_loss
from grpo.memory import do_in_memory
from grpo.optimizer import Optimizer
from grpo.reference import Reference
from grpo.routing_replay import as_given, differing_tokens
from grpo.scoring import drawn_with, score
from grpo.support import is_truncated
from grpo.throughput import Phases
from grpo.trial import Trial
from grpo.types import Batch
from policy import Policy
from policy.logprobs import TokenLogprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateStats:
    """Means over the completion tokens of all ranks, in the last pass over the batch."""

    loss: float
    """Mean over the optimizer steps of the pass."""
    kl: float
    entropy: float
    """Nats per token."""
    entropy_kept: float
    """Nats per token that is uncertain enough to be learned from."""
    clipped_low: float
    """Share of tokens whose ratio was held because it is too small."""
    clipped_high: float
    """Share of tokens whose ratio was held because it is too large."""
    dropped: float
    """Share of tokens in rows that off-policy sequence masking dropped."""
    logp_difference_mean: float
    """Mean |sampler's - trainer's log-probability|, nats, before the first step."""
    logp_difference_max: float
    sampler_ratio_mean: float
    """pi_old / sampler, of tokens or of completions as `importance_sampling_correction` says."""
    sampler_ratio_min: float
    sampler_ratio_max: float
    effective_sample_size: float
    """Of these ratios, as a share of their number."""
    experts_differ: float | None = None
    """Share of the tokens that the sampler recorded experts of, prompts included, which the policy before its first
    step would have sent to others in some layer; None where nothing was recorded."""
    grad_norm: float
    """Before clipping; the largest of the pass."""
    num_skipped: int
    """Optimizer steps that were not taken because loss or gradient was not finite."""
    num_halvings: int
    """Times that this rank's micro-batches were halved for want of memory; the most of any optimizer step."""
    auxiliary: AuxiliaryStats
    """Of the MTP modules and the routers, in the last step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step with all that its loss depends on but the policy."""

    minibatch: Minibatch
    num_kept: int
    """Tokens of all ranks that are uncertain enough to be learned from."""
    entropy_coef: float
    """Weight of the entropy bonus."""
    num_halvings: int = 0
    """Times that this rank's micro-batches were halved for want of memory."""


def update(
    policy: Policy,
    optimizer: Optimizer,
    minibatches: Sequence[Minibatch],
    *,
    learning_rate: float,
    config: Config,
    ranks: Ranks,
    reference: Reference | None = None,
    entropy_coef: float = 0.0,
    on_fault: Callable[[Step], None] | None = None,
    phases: Phases | None = None,
    trial: Trial | None = None,
) -> UpdateStats:
    """`num_iterations` passes over the minibatches, an optimizer step each.

    The old policy of the ratio is the one at the start: with one step that is the current one, with more its
    log-probabilities are computed once beforehand (the sampler's would mix in how sampler and trainer differ).
    A step whose loss or gradient is not finite on any rank is not taken on any; `on_fault` sees it, the weights as they
    were. A step for which memory runs out is done again in smaller micro-batches, which also the passes after it keep.
    Where weights lie in pieces, `trial` finds out beforehand what fits, and ranks with fewer micro-batches than others
    do idle ones. `phases` learns where the time goes.
    """
    phases, num_halvings = phases or Phases(policy.device), 0
    with phases.phase("logprobs"):
        if trial is not None:
            minibatches, num_halvings = trial.fit(minibatches, partial(_trial_loss, config=config, ranks=ranks), ranks)
        minibatches = [replace(part, batches=fill_up(part.batches, policy, ranks)) for part in minibatches]
        steps = prepare(policy, minibatches, config, ranks, reference, entropy_coef)
        steps = [replace(step, num_halvings=step.num_halvings + num_halvings) for step in steps]
    grad_norm, num_skipped = 0.0, 0
    for _ in range(config.num_iterations):
        sums, norms = _Sums(policy), list[float]()
        for index, given in enumerate(steps):
            busy, num_tokens = _busy(given.minibatch.batches), given.minibatch.counts.tokens
            auxiliary = Auxiliary(policy, busy, num_tokens=num_tokens, config=config, ranks=ranks)
            with phases.phase("forward_backward"):
                loss, sums, step = _accumulate(policy, optimizer, given, config, sums, auxiliary, ranks)
            steps[index] = step
            with phases.phase("sync"):
                optimizer.reduce(loss, ranks)
            with phases.phase("optimizer"):
                if loss.isfinite():
                    norms.append(optimizer.step(learning_rate, config.max_grad_norm))
                else:
                    optimizer.restart()
                    norms.append(math.nan)
            auxiliary_stats = auxiliary.finish(is_skipped=not math.isfinite(norms[-1]))
            if not math.isfinite(norms[-1]):
                num_skipped += 1
                if on_fault is not None:
                    on_fault(replace(step, minibatch=replace(step.minibatch, batches=_busy(step.minibatch.batches))))
        grad_norm = next((norm for norm in norms if not math.isfinite(norm)), max(norms))
    return sums.mean(steps, ranks, grad_norm=grad_norm, num_skipped=num_skipped, auxiliary=auxiliary_stats)


def _accumulate(
    policy: Policy,
    optimizer: Optimizer,
    step: Step,
    config: Config,
    before: _Sums,
    auxiliary: Auxiliary,
    ranks: Ranks,
) -> tuple[Tensor, _Sums, Step]:
    """The gradient of one optimizer step on the masters; its loss, the sums with it, and the step as it fitted."""

    def attempt(batches: Sequence[Batch]) -> tuple[Tensor, _Sums]:
        loss, sums = torch.zeros((), dtype=torch.float64, device=policy.device), before.copy()
        optimizer.restart()
        auxiliary.restart()
        for number, batch in enumerate(batches, start=1):
            differentiate = partial(optimizer.backward, is_last=number == len(batches))
            if batch.is_idle:
                differentiate(_idle_loss(policy, batch, config, auxiliary))
            else:
                loss += backward(policy, batch, step, config, sums, auxiliary, differentiate).loss.detach()
        return loss, sums

    (loss, sums), batches, num_halvings = do_in_memory(attempt, step.minibatch.batches, ranks)
    if num_halvings:
        step = replace(
            step,
            minibatch=replace(step.minibatch, batches=batches),
            num_halvings=step.num_halvings + num_halvings,
        )
    return loss, sums, step


def prepare(
    policy: Policy,
    minibatches: Sequence[Minibatch],
    config: Config,
    ranks: Ranks,
    reference: Reference | None = None,
    entropy_coef: float = 0.0,
) -> list[Step]:
    """Passes without a gradient: what the loss needs of the policy before its first step, and of the reference."""
    params = drawn_with(config)
    is_masked = config.top_entropy_quantile < 1
    needs_a_pass = config.takes_several_steps or is_masked or (reference is not None and is_truncated(params))

    def look(given: Sequence[Batch]) -> tuple[list[Batch], list[Tensor]]:
        batches, entropies = list[Batch](), list[Tensor]()
        for batch in given:
            if needs_a_pass:
                with torch.no_grad():
                    batch, values = score(policy, batch, params)
                entropies.append(values.entropy_N)
                if config.takes_several_steps:
                    batch = replace(batch, old_logprobs_N=values.logprobs_N, differs_N=_differing(batch, values))
                    if config.routing_replay == "old_policy" and values.output.experts_MNK is not None:
                        batch = replace(batch, experts_NMK=as_given(values.output.experts_MNK), differs_N=None)
            if reference is not None:
                batch = replace(batch, ref_logprobs_N=reference.score(batch, params).logprobs_N)
            batches.append(batch)
        return batches, entropies

    steps = []
    for minibatch in minibatches:
        (batches, entropies), _, num_halvings = do_in_memory(look, minibatch.batches, ranks)
        num_kept = minibatch.counts.tokens
        if is_masked:
            passes = zip(entropies, batches, strict=True)
            learned = [e.index_select(0, batch.learned.token_W) for e, batch in passes if not batch.is_idle]
            threshold = entropy_threshold(learned, config.top_entropy_quantile, ranks)
            batches = [replace(batch, certain_N=e < threshold) for e, batch in zip(entropies, batches, strict=True)]
            num_kept = int(ranks.sum_number(sum(int((e >= threshold).sum()) for e in learned)))
        steps.append(
            Step(
                minibatch=Minibatch(batches=batches, counts=minibatch.counts),
                num_kept=num_kept,
                entropy_coef=entropy_coef,
                num_halvings=num_halvings,
            )
        )
    return steps


def _differing(batch: Batch, values: TokenLogprobs) -> Tensor | None:
    """`Batch.differs_N`, from a pass that was given the sampler's experts; None from another."""
    if batch.experts_NMK is None or values.output.preferred_MNK is None:
        return None
    return differing_tokens(batch.experts_NMK, values.output.preferred_MNK)


def backward(
    policy: Policy,
    batch: Batch,
    step: Step,
    config: Config,
    sums: _Sums | None = None,
    auxiliary: Auxiliary | None = None,
    differentiate: Callable[[Tensor], None] = Tensor.backward,
) -> LossTerms:
    """Add one micro-batch's share of the gradient, and its numbers to `sums` and `auxiliary`."""
    watch = None if auxiliary is None else auxiliary.watch(batch)
    batch, values = score(policy, batch, drawn_with(config), watch)
    terms = batch_loss(
        values.logprobs_N,
        values.entropy_N,
        batch,
        config,
        step.minibatch.counts,
        max_completion_length=config.max_completion_length,
        entropy_coef=step.entropy_coef,
        num_kept=step.num_kept,
    )
    loss = terms.loss
    if auxiliary is not None and watch is not None:
        loss = loss + auxiliary.loss(batch, values.output, watch)
    differentiate(loss)
    if sums is not None:
        if batch.differs_N is None and config.routing_replay != "old_policy":
            batch = replace(batch, differs_N=_differing(batch, values))
        sums.add(terms, values, batch)
    return terms


def _busy(batches: Sequence[Batch]) -> list[Batch]:
    return [batch for batch in batches if not batch.is_idle]


def _idle_loss(policy: Policy, batch: Batch, config: Config, auxiliary: Auxiliary) -> Tensor:
    """0, by the way on which all weights take part as they do in other ranks' losses."""
    watch = auxiliary.watch(batch)
    batch, values = score(policy, batch, drawn_with(config), watch)
    return 0.0 * (values.logprobs_N.sum() + auxiliary.loss(batch, values.output, watch))


def _trial_loss(policy: Policy, batch: Batch, *, config: Config, ranks: Ranks) -> Tensor:
    """Of a pass on this rank alone: the routers' losses, which ask the others, take next to no memory."""
    config = config.model_copy(update={"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0})
    auxiliary = Auxiliary(policy, [batch], num_tokens=1, config=config, ranks=ranks)
    return _idle_loss(policy, batch, config, auxiliary)


SUMMED = (
    *("loss", "kl", "entropy", "entropy_kept", "difference", "ratio", "ratio_squared"),
    *("kept", "low", "high", "dropped", "differing", "recorded"),
)
"""What is added up over micro-batches and ranks; the last two where experts were recorded."""


class _Sums:
    """Running sums over micro-batches, then over ranks; on the device, as a number asked for would be waited for."""

    def __init__(self, policy: Policy) -> None:
        self._totals = torch.zeros(len(SUMMED), dtype=torch.float64, device=policy.device)
        self._extremes = torch.full((3,), -math.inf, dtype=torch.float64, device=policy.device)
        """Largest |sampler's - trainer's log-probability|, largest ratio, and the smallest one negated."""
        self._num_ratios = 0

    def copy(self) -> _Sums:
        """The same sums, to go on from; tensors are replaced, never changed in place."""
        return copy(self)

    def add(self, terms: LossTerms, values: TokenLogprobs, batch: Batch) -> None:
        mask_N, entropy_N, ratio_X = batch.completion_mask_N, values.entropy_N.detach(), terms.sampler_ratio_X
        old_N = values.logprobs_N.detach() if batch.old_logprobs_N is None else batch.old_logprobs_N
        difference_N = torch.where(mask_N, old_N - batch.rollout_logprobs_N, 0.0).abs()
        kept_entropy_N = torch.where(terms.kept_N, entropy_N, 0.0)
        sums = [terms.loss.detach(), *(x.sum() for x in (terms.kl_N, entropy_N, kept_entropy_N, difference_N))]
        of_ratios = (ratio_X.sum(), ratio_X.square().sum())
        flags = [terms.kept_N, terms.low_N, terms.high_N, terms.is_dropped_N]
        if batch.experts_NMK is not None and batch.differs_N is not None:
            flags += [batch.differs_N, batch.experts_NMK[:, 0, 0] >= 0]
        counts = torch.stack(flags).sum(dim=1)
        given = torch.cat([torch.stack(part).double() for part in (sums, of_ratios)] + [counts.double()])
        self._totals = self._totals + F.pad(given, (0, len(SUMMED) - len(given)))
        extremes = [difference_N.max()]
        if len(ratio_X):
            extremes += [ratio_X.max(), -ratio_X.min()]
        largest = torch.stack([extreme.double() for extreme in extremes])
        # What is no number is left out, as a row that was given up must not hide the others.
        self._extremes = torch.fmax(self._extremes, F.pad(largest, (0, 3 - len(largest)), value=-math.inf))
        self._num_ratios += len(ratio_X)

    def mean(
        self,
        steps: Sequence[Step],
        ranks: Ranks,
        *,
        grad_norm: float,
        num_skipped: int,
        auxiliary: AuxiliaryStats,
    ) -> UpdateStats:
        """The means over all ranks."""
        ranks.sum_([self._totals])
        total = dict(zip(SUMMED, self._totals.tolist(), strict=True))
        num_ratios = int(ranks.sum_number(self._num_ratios))
        count = max(1, sum(step.minibatch.counts.tokens for step in steps))
        difference_max, ratio_max, ratio_min_negated = map(ranks.max_number, self._extremes.tolist())
        return UpdateStats(
            loss=total["loss"] / max(1, len(steps)),
            kl=total["kl"] / count,
            entropy=total["entropy"] / count,
            entropy_kept=total["entropy_kept"] / max(1.0, total["kept"]),
            clipped_low=total["low"] / count,
            clipped_high=total["high"] / count,
            dropped=total["dropped"] / count,
            logp_difference_mean=total["difference"] / count,
            logp_difference_max=max(0.0, difference_max),
            sampler_ratio_mean=total["ratio"] / num_ratios if num_ratios else 1.0,
            sampler_ratio_min=-ratio_min_negated if num_ratios else 1.0,
            sampler_ratio_max=ratio_max if num_ratios else 1.0,
            effective_sample_size=effective_sample_size(total["ratio"], total["ratio_squared"], num_ratios),
            experts_differ=total["differing"] / total["recorded"] if total["recorded"] else None,
            grad_norm=grad_norm,
            num_skipped=num_skipped,
            num_halvings=max((step.num_halvings for step in steps), default=0),
            auxiliary=auxiliary,
        )
