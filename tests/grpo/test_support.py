"""Ratios under truncated sampling are exact: the trainer renormalises over what the sampler could draw.

Shapes: N packed tokens, V vocabulary.
"""

from typing import Any

import pytest
import torch

from grpo.batch import make_batches
from grpo.support import supported_logprobs
from grpo.types import Batch
from policy import Policy
from policy.logprobs import token_logprobs
from rollouts import SamplingParams
from rollouts.sampler import truncate
from tests.grpo.rollouts import make_groups, rows_of
from tests.policies import tiny_policy

TRUNCATIONS = [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}]


def sampled(policy: Policy, **truncation: Any) -> tuple[Batch, SamplingParams]:
    params = {"temperature": 0.8} | truncation
    [batch] = make_batches(rows_of(make_groups(policy, **params)), 10**6)
    return batch, SamplingParams(max_completion_length=20, **params)


def moved(policy: Policy) -> Policy:
    """Another policy near this one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return policy


@pytest.mark.parametrize("truncation", TRUNCATIONS, ids=str)
@pytest.mark.parametrize("chunk_elements", [61, 10**6])
@torch.no_grad()
def test_log_probabilities_are_those_that_the_sampler_recorded(truncation: dict, chunk_elements: int) -> None:
    policy = tiny_policy()
    batch, params = sampled(policy, **truncation)
    mask_N = batch.completion_mask_N
    arguments = (policy, batch.token_ids_N, batch.rows, mask_N)
    values, support = supported_logprobs(*arguments, params, chunk_elements=chunk_elements)
    assert (values.logprobs_N - batch.rollout_logprobs_N)[mask_N].abs().max() < 1e-5
    over_all = token_logprobs(*arguments, temperature=0.8).logprobs_N
    assert (over_all - batch.rollout_logprobs_N)[mask_N].abs().max() > 0.1  # what a trainer without support computes
    assert 1 <= support.counts_W.min() <= support.counts_W.max() < 61


@torch.no_grad()
def test_the_drawn_token_is_always_supported() -> None:
    policy = tiny_policy()
    batch, _ = sampled(policy)  # of the whole vocabulary, so that most drawn tokens are not the likeliest one
    params = SamplingParams(max_completion_length=20, top_k=1)
    values, support = supported_logprobs(policy, batch.token_ids_N, batch.rows, batch.completion_mask_N, params)
    assert values.logprobs_N.isfinite().all()
    assert set(support.counts_W.tolist()) <= {1, 2}


def test_value_and_gradient_equal_the_definition_on_a_policy_that_moved() -> None:
    policy = tiny_policy()
    batch, params = sampled(policy, top_p=0.7)
    arguments = (batch.token_ids_N, batch.rows, batch.completion_mask_N, params)
    with torch.no_grad():
        _, support = supported_logprobs(policy, *arguments)
        kept = [
            truncate(policy.logits(row[None])[0, :-1] / 0.8, params) > float("-inf")
            for row in batch.token_ids_N.split(batch.rows.lengths)
        ]
    moved(policy)
    values, _ = supported_logprobs(policy, *arguments, support, chunk_elements=200)
    mean = (values.logprobs_N.sum() + 0.3 * values.entropy_N.sum()) / batch.completion_mask_N.sum()
    ours = torch.autograd.grad(mean, list(policy.parameters()))
    total = torch.zeros(())
    for row, mask, kept_SV in zip(
        batch.token_ids_N.split(batch.rows.lengths),
        batch.completion_mask_N.split(batch.rows.lengths),
        kept,
        strict=True,
    ):
        logits_SV = policy.logits(row[None])[0, :-1] / 0.8
        for n in mask.nonzero().flatten().tolist():
            inside = logits_SV[n - 1][kept_SV[n - 1]].log_softmax(-1)
            place = kept_SV[n - 1].nonzero().flatten().tolist().index(int(row[n]))
            total = total + inside[place] - 0.3 * (inside.exp() * inside).sum()
    total = total / batch.completion_mask_N.sum()
    assert mean.item() == pytest.approx(total.item(), rel=2e-6)
    theirs = torch.autograd.grad(total, list(policy.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, torch.zeros_like(a) if b is None else b, atol=2e-6, rtol=1e-5), (a - b).abs().max()


@torch.no_grad()
def test_the_mean_of_the_ratio_is_one() -> None:
    """Over all tokens that could be drawn, weighted by their probability: what makes a ratio a ratio."""
    policy = tiny_policy()
    batch, params = sampled(policy, top_k=4)
    _, support = supported_logprobs(policy, batch.token_ids_N, batch.rows, batch.completion_mask_N, params)
    first = int(batch.completion_mask_N.nonzero()[0])
    candidates = support.token_ids_K[: int(support.counts_W[0])].tolist()
    assert len(candidates) == 4
    both = []
    for policy_now in (policy, moved(tiny_policy())):
        logprobs = []
        for token in candidates:
            token_ids_N = batch.token_ids_N.clone()
            token_ids_N[first] = token
            values, _ = supported_logprobs(
                policy_now, token_ids_N, batch.rows, batch.completion_mask_N, params, support
            )
            logprobs.append(float(values.logprobs_N[first]))
        both.append(torch.tensor(logprobs))
    old, new = both
    assert (new - old).abs().max() > 0.01
    assert float((old.exp() * (new - old).exp()).sum()) == pytest.approx(1, abs=1e-5)
