"""The reference stays, or follows slowly."""

import pytest
import torch

from grpo.batch import make_batches
from grpo.reference import Reference
from grpo.scoring import drawn_with, score
from policy.lora import LoraConfig, adapters, add_adapters
from tests.grpo.rollouts import make_groups, rows_of, tiny_config
from tests.policies import tiny_policy


def shift(policy: torch.nn.Module, by: float) -> None:
    with torch.no_grad():
        for weight in policy.parameters():
            weight += by


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_it_is_a_copy_that_stays(is_offloaded: bool) -> None:
    policy = tiny_policy()
    [batch] = make_batches(rows_of(make_groups(policy)), 10**6)
    params = drawn_with(tiny_config())
    before = score(policy, batch, params)[1].logprobs_N.detach()
    reference = Reference(policy, is_offloaded=is_offloaded)
    shift(policy, 0.1)
    found = reference.score(batch, params).logprobs_N
    assert torch.equal(found, before)
    assert not found.requires_grad


def test_it_follows_by_the_share_asked_for() -> None:
    policy = tiny_policy()
    start = {name: weight.clone() for name, weight in policy.named_parameters()}
    reference = Reference(policy)
    shift(policy, 1.0)
    reference.follow(policy, 0.25)
    for name, weight in reference.policy.named_parameters():
        assert torch.allclose(weight, start[name] + 0.25, atol=1e-6)
    reference.follow(policy, 1.0)
    for ours, theirs in zip(reference.policy.parameters(), policy.parameters(), strict=True):
        assert torch.allclose(ours, theirs)


def test_adapters_off_the_policy_is_its_own_reference() -> None:
    policy = tiny_policy()
    [batch] = make_batches(rows_of(make_groups(policy)), 10**6)
    params = drawn_with(tiny_config())
    before = score(policy, batch, params)[1].logprobs_N.detach()
    add_adapters(policy, LoraConfig(r=2), seed=0)
    reference = Reference(policy)
    assert reference.policy is policy
    with torch.no_grad():
        for layer in adapters(policy).values():
            layer.lora_B += 0.3
    adapted = score(policy, batch, params)[1].logprobs_N
    assert torch.equal(reference.score(batch, params).logprobs_N, before)
    assert (adapted - before).abs().max() > 0.01
    assert torch.equal(score(policy, batch, params)[1].logprobs_N, adapted)
