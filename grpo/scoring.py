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
    batch with the support that this was found to be. Tokens go to the experts that the batch names.
    """
    tokens = (policy, batch.token_ids_N, batch.rows, batch.learned)
    given_MNK = None if batch.experts_NMK is None else batch.experts_NMK.transpose(0, 1)
    if not is_truncated(params):
        values = token_logprobs(*tokens, temperature=params.temperature, given_experts_MNK=given_MNK, watch=watch)
        return batch, values
    values, support = supported_logprobs(*tokens, params, batch.support, given_experts_MNK=given_MNK, watch=watch)
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
