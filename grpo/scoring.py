"""A policy's log-probabilities of a batch, under the distribution that its completions were drawn from.

Shapes: N packed tokens.
"""

from __future__ import annotations

from dataclasses import replace

from grpo.config import Config
from grpo.support import is_truncated, supported_logprobs
from grpo.types import Batch
from policy import Policy
from policy.balance import RouterWatch
from policy.logprobs import TokenLogprobs, token_logprobs
from rollouts import SamplingParams


def score(
    policy: Policy, batch: Batch, params: SamplingParams, watch: RouterWatch | None = None
) -> tuple[Batch, TokenLogprobs]:
    """The policy's log-probabilities and entropies of a batch, of the distribution that the sampler drew from; and the
    batch with the support that this was found to be.
    """
    tokens = (policy, batch.token_ids_N, batch.rows, batch.completion_mask_N)
    if not is_truncated(params):
        return batch, token_logprobs(*tokens, temperature=params.temperature, watch=watch)
    values, support = supported_logprobs(*tokens, params, batch.support, watch=watch)
    return replace(batch, support=support), values


def drawn_with(config: Config) -> SamplingParams:
    """Temperature and truncation of a recipe."""
    return SamplingParams(
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
    )
