"""The engine in bf16 on a CPU: the same completions on any number of threads, and a reason where torch decodes."""

import logging

import pytest
import torch

from policy import Policy, cast_weights
from policy.decode_layout import has_bf16_products
from rollouts import Completion, EngineConfig, SamplingParams, make_engine
from tests.policies import tiny_llama


def policy_in_bf16() -> Policy:
    policy = tiny_llama(hidden_size=64, intermediate_size=96, head_dim=32, vocab_size=4200, initializer_range=0.1)
    return cast_weights(policy, torch.bfloat16)


def completions(policy: Policy, threads: int, block_size: int = 16) -> list[Completion]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        engine = make_engine(policy, EngineConfig(block_size=block_size))
        groups = engine.generate([[1, 2, 3], [4, 5]], 20, SamplingParams(max_completion_length=6))
    finally:
        torch.set_num_threads(before)
    return [completion for group in groups for completion in group]


@pytest.mark.skipif(not has_bf16_products(), reason="this processor has no avx512_bf16")
def test_completions_do_not_depend_on_the_number_of_threads() -> None:
    policy = policy_in_bf16()
    one, two = completions(policy, 1), completions(policy, 2)
    assert len({tuple(completion.token_ids) for completion in one}) > 30
    assert one == two


def test_the_engine_says_why_torch_decodes(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        completions(policy_in_bf16(), 1, block_size=6)
    assert "decoding in bf16 is left to torch" in caplog.text
