"""Copies of a policy that are there to be sampled from: what they share, and where they lie."""

from typing import Any

import pytest
import torch

from grpo.weights import copy_policy, sampler_device
from tests.grpo.rollouts import tiny_config
from tests.policies import tiny_llama, tiny_policy

GPU = torch.device("cuda", 1)


def test_a_copy_is_of_its_own_but_for_what_is_shared() -> None:
    policy = tiny_policy()
    frozen = policy.embed_tokens.weight
    copied = copy_policy(policy, policy.device, shared=[frozen])
    ours, theirs = policy.state_dict(), copied.state_dict()
    assert ours.keys() == theirs.keys()
    assert any("bias" in name for name, _ in policy.named_buffers())
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor)
        assert (theirs[name].data_ptr() == tensor.data_ptr()) == (name == "embed_tokens.weight")
    assert copied.embed_tokens.weight is frozen
    assert not any(weight.requires_grad for weight in copied.parameters() if weight is not frozen)
    assert all(weight.requires_grad for weight in policy.parameters())


def test_a_copy_may_lie_elsewhere_and_keeps_what_is_tied() -> None:
    policy = tiny_llama(tie_word_embeddings=True)
    copied = copy_policy(policy, torch.device("meta"))
    assert copied.lm_head.weight is copied.embed_tokens.weight
    assert {tensor.device.type for tensor in copied.state_dict().values()} == {"meta"}
    assert {tensor.device.type for tensor in policy.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize(
    ("engine", "where"),
    [
        ({}, GPU),
        ({"kind": "vllm_colocate"}, GPU),
        ({"kind": "vllm_server"}, torch.device("cpu")),
        ({"kind": "vllm_server", "vllm_server": {"weight_transfer": "nccl"}}, GPU),
    ],
)
def test_a_copy_that_servers_read_from_files_takes_no_memory_of_the_device(
    engine: dict[str, Any], where: torch.device
) -> None:
    assert sampler_device(tiny_config(engine=engine), GPU) == where
