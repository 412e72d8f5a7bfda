"""What is taken from the rewards before they become advantages: for length, and for leaving the reference.

Shapes: B rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo.batch import make_batches, make_rows
from grpo.config import Config
from grpo.distributed import Ranks
from grpo.idle import fill_up
from grpo.kl import ESTIMATORS
from grpo.ratio import row_sums
from grpo.reference import Reference
from grpo.scoring import drawn_with, score
from grpo.support import is_truncated
from grpo.types import Group, Origin
from policy import Policy
from rewards.shaping import make_overlong_reward


def penalised_rewards(
    groups: Sequence[Group], config: Config, *, policy: Policy, reference: Reference | None, ranks: Ranks
) -> list[list[float | None]]:
    """Rewards [P][G] less DAPO's soft overlong punishment and, with `kl_in: reward`, beta times the divergence from the
    reference; None stays None.
    """
    rewards: list[list[float | None]] = [[result.reward for result in group.results] for group in groups]
    if config.soft_punish_cache:
        for of_group, group in zip(rewards, groups, strict=True):
            for g, punishment in enumerate(punishments(group, config)):
                of_group[g] = _plus(of_group[g], punishment)
    if reference is not None and config.kl_in == "reward":
        for origin, kl in divergences(groups, config, policy=policy, reference=reference, ranks=ranks).items():
            of_group = rewards[origin.problem]
            of_group[origin.completion] = _plus(of_group[origin.completion], -config.beta * kl)
    return rewards


def punishments(group: Group, config: Config) -> list[float]:
    """From 0 down to -1 over the last `soft_punish_cache` tokens before the limit (DAPO, arXiv 2503.14476, eq. 13)."""
    punish = make_overlong_reward(
        max_completion_length=config.max_completion_length, soft_punish_cache=config.soft_punish_cache
    )
    found = punish([], [], [completion.token_ids for completion in group.completions])
    return [punishment or 0.0 for punishment in found]


@torch.no_grad()
def divergences(
    groups: Sequence[Group], config: Config, *, policy: Policy, reference: Reference, ranks: Ranks
) -> dict[Origin, float]:
    """Of each completion, summed over its tokens: the estimate of log sampler against log reference, nats.

    The sampler's recorded log-probabilities stand for the policy's; the reference is renormalised over the tokens that
    the sampler could draw. Keys number this rank's groups from 0.
    """
    rows = make_rows(groups, [[0.0] * len(group.completions) for group in groups], mask_truncated=False)
    params, found = drawn_with(config), dict[Origin, float]()
    batches = make_batches(rows, config.max_tokens_per_micro_batch, policy.device, share_prompts=config.share_prompts)
    for given in fill_up(batches, policy, ranks):
        batch = score(policy, given, params)[0] if is_truncated(params) else given
        values = reference.score(batch, params)
        if given.is_idle:
            continue
        kl_N = ESTIMATORS[config.kl_estimator](batch.rollout_logprobs_N, values.logprobs_N)
        kl_B = row_sums(kl_N, batch.completion_mask_N, batch.rows)
        found.update(zip(batch.origins, kl_B.tolist(), strict=True))
    return found


def _plus(reward: float | None, term: float) -> float | None:
    return None if reward is None else reward + term
