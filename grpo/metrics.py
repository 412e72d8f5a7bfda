"""The numbers of a step, under TRL's names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

from grpo.routers import RouterStats
from grpo.types import Group
from grpo.update import UpdateStats
from rollouts import EngineStats


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """What metrics need of one group; small, so that ranks can exchange it."""

    rewards: list[float]
    breakdowns: list[dict[str, float]]
    statuses: list[str]
    lengths: list[int]
    """Tokens of each completion."""
    finish_reasons: list[str]


def graded(group: Group) -> Graded:
    """The part of a group that metrics are made of."""
    return Graded(
        rewards=[result.reward for result in group.results if result.reward is not None],
        breakdowns=[dict(result.breakdown) for result in group.results],
        statuses=[result.status for result in group.results],
        lengths=[len(completion.token_ids) for completion in group.completions],
        finish_reasons=[completion.finish_reason for completion in group.completions],
    )


def rollout_metrics(groups: Sequence[Graded]) -> dict[str, Any]:
    """Rewards, lengths and how completions ended, over all ranks' groups."""
    rewards = [reward for group in groups for reward in group.rewards]
    spreads = [pstdev(group.rewards) for group in groups if group.rewards]
    breakdowns = [breakdown for group in groups for breakdown in group.breakdowns]
    lengths = [length for group in groups for length in group.lengths]
    reasons = [reason for group in groups for reason in group.finish_reasons]
    statuses = [status for group in groups for status in group.statuses]
    metrics: dict[str, Any] = {
        "reward": fmean(rewards) if rewards else 0.0,
        "reward_std": fmean(spreads) if spreads else 0.0,
        "frac_reward_zero_std": fmean(spread == 0 for spread in spreads) if spreads else 1.0,
    }
    for name in dict.fromkeys(name for breakdown in breakdowns for name in breakdown):
        scores = [breakdown[name] for breakdown in breakdowns if name in breakdown]
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = fmean(scores), pstdev(scores)
    metrics |= {
        "completions/mean_length": fmean(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": fmean(reason == "length" for reason in reasons),
        "completions/aborted": reasons.count("abort"),
        "grading/unparsed": statuses.count("unparsed"),
        "grading/timeout": statuses.count("timeout"),
        "grading/error": statuses.count("error"),
    }
    return metrics


def policy_lag(groups: Sequence[Group], version: int) -> float:
    """Mean over the completions that a step trains on: optimizer steps between the weights that sampled each and those,
    of this `version`, that learn from it.
    """
    versions = [completion.policy_version for group in groups for completion in group.completions]
    return version - fmean(versions) if versions else 0.0


def engine_metrics(stats: Sequence[EngineStats]) -> dict[str, Any]:
    """What the samplers of all ranks did in a step; nothing of what did not happen."""
    drafted = sum(of_rank.num_drafted for of_rank in stats)
    counts: dict[str, Any] = {
        "sampling/drafted": drafted,
        "sampling/cached_prompt_tokens": sum(of_rank.num_cached_tokens for of_rank in stats),
        "sampling/preemptions": sum(of_rank.num_preemptions for of_rank in stats),
    }
    metrics = {name: count for name, count in counts.items() if count}
    if drafted:
        metrics["sampling/acceptance_rate"] = sum(of_rank.num_accepted for of_rank in stats) / drafted
    return metrics


def update_metrics(stats: UpdateStats) -> dict[str, Any]:
    """Loss, divergences, gradient and the experts' load."""
    metrics: dict[str, Any] = {
        "loss": stats.loss,
        "kl": stats.kl,
        "entropy": stats.entropy,
        "clip_ratio/low_mean": stats.clipped_low,
        "clip_ratio/high_mean": stats.clipped_high,
        "clip_ratio/region_mean": stats.clipped_low + stats.clipped_high,
        "sampling/logp_difference_mean": stats.logp_difference_mean,
        "sampling/logp_difference_max": stats.logp_difference_max,
        "sampling/importance_sampling_ratio/mean": stats.sampler_ratio_mean,
        "sampling/importance_sampling_ratio/min": stats.sampler_ratio_min,
        "sampling/importance_sampling_ratio/max": stats.sampler_ratio_max,
        "sampling/effective_sample_size": stats.effective_sample_size,
        "sampling/off_policy_masked": stats.dropped,
        "grad_norm": stats.grad_norm,
        "update/skipped": stats.num_skipped,
        "update/halvings": stats.num_halvings,
    }
    if stats.experts_differ is not None:
        metrics["sampling/experts_differ"] = stats.experts_differ
    if stats.auxiliary.mtp_loss is not None:
        metrics["mtp/loss"] = stats.auxiliary.mtp_loss
    return metrics | router_metrics(stats.auxiliary.routers)


def router_metrics(stats: RouterStats | None) -> dict[str, Any]:
    """How evenly the experts are used, layer by layer and overall; nothing for a policy without experts.

    A load is relative to the mean: 1 for every expert of a layer where it is even.
    """
    if stats is None:
        return {}
    max_load_M = [max(layer) * len(layer) for layer in stats.load_ME]
    dead_M = [sum(share == 0 for share in layer) for layer in stats.load_ME]
    metrics: dict[str, Any] = {
        "moe/load": [[round(share, 5) for share in layer] for layer in stats.load_ME],
        "moe/max_load": max(max_load_M),
        "moe/dead_experts": sum(dead_M),
        "moe/entropy": fmean(stats.entropy_M),
        "moe/layers/max_load": [round(load, 4) for load in max_load_M],
        "moe/layers/dead_experts": dead_M,
        "moe/layers/entropy": [round(entropy, 4) for entropy in stats.entropy_M],
    }
    if stats.balance_M is not None and stats.z_M is not None:
        metrics |= {"moe/balance_loss": fmean(stats.balance_M), "moe/z_loss": fmean(stats.z_M)}
    return metrics
