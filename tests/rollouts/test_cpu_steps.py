"""Decoding steps in one call against the same steps module by module."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from policy import Policy
from rollouts import Completion, EngineConfig, SamplingParams, make_engine
from rollouts.cpu_steps import is_made_of_operations
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy

PROMPTS = [[5, 9, 11, 3], list(range(3, 20)), [7] * 8, [12, 4]]
MAKERS: dict[str, Callable[[], Policy]] = {
    "latent": tiny_policy,
    "no_shared_experts": lambda: tiny_policy(n_shared_experts=0),
    "grouped": tiny_llama,
}


def sampled(policy: Policy, params: SamplingParams, **settings: int) -> list[Completion]:
    groups = make_engine(policy, EngineConfig(block_size=4, **settings)).generate(PROMPTS, 5, params)
    return [each for group in groups for each in group]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("maker", MAKERS)
def test_steps_in_one_call_are_steps_by_modules(maker: str, temperature: float) -> None:
    params = SamplingParams(
        max_completion_length=20, stop_token_ids=(2, 9, 31), temperature=temperature, record_experts=True
    )
    watched = MAKERS[maker]()
    watched.norm.register_forward_hook(lambda *_: None)
    expected = sampled(watched, params)
    assert {each.finish_reason for each in expected} == {"stop", "length"}
    for settings in ({}, {"run_ahead": 1}, {"run_ahead": 32}, {"max_num_seqs": 3}):
        for mine, theirs in zip(sampled(MAKERS[maker](), params, **settings), expected, strict=True):
            assert (mine.token_ids, mine.finish_reason) == (theirs.token_ids, theirs.finish_reason)
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
            if theirs.experts_MTK is not None:
                np.testing.assert_array_equal(mine.experts_MTK, theirs.experts_MTK)


def test_what_is_truncated_is_drawn_outside_the_steps() -> None:
    params, watched = SamplingParams(max_completion_length=9, top_k=5, top_p=0.9), tiny_policy()
    watched.norm.register_forward_hook(lambda *_: None)
    for mine, theirs in zip(sampled(tiny_policy(), params), sampled(watched, params), strict=True):
        assert mine.token_ids == theirs.token_ids
        assert mine.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_a_fault_ends_its_own_sequence_within_the_steps() -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.embed_tokens.weight[40:44] = float("nan")
    completions = sampled(policy, SamplingParams(max_completion_length=20))
    reasons = {each.finish_reason for each in completions}
    assert reasons == {"abort", "length"}
    for each in completions:
        *before, last = (token in range(40, 44) for token in each.token_ids)
        assert not any(before), "a sequence went on after a token behind which nothing can be computed"
        assert last or each.finish_reason == "length"


def test_which_policies_are_decoded_so() -> None:
    def is_taken(policy: Policy, block_size: int = 4) -> bool:
        config = policy.config
        cache = torch.zeros(config.num_hidden_layers, 3, block_size, config.cache_width)
        return is_made_of_operations(policy, cache)

    assert is_taken(tiny_policy())
    assert is_taken(tiny_llama())
    assert not is_taken(tiny_policy(), block_size=3)
    assert not is_taken(tiny_policy(q_lora_rank=12))
    for changes in ({"model_type": "qwen2"}, {"model_type": "qwen3"}, TINY_QWEN3_MOE):
        assert not is_taken(tiny_llama(**changes)), changes
    assert not is_taken(tiny_llama().double())


def test_weights_that_move_are_followed() -> None:
    params, policy, other = SamplingParams(max_completion_length=6), tiny_llama(), tiny_llama(seed=1)
    engine = make_engine(policy, EngineConfig(block_size=4))
    before = engine.generate(PROMPTS, 2, params)
    policy.load_state_dict(other.state_dict(), assign=True)
    engine.load_weights(policy, version=1)
    after = engine.generate(PROMPTS, 2, params)
    expected = make_engine(other, EngineConfig(block_size=4)).generate(PROMPTS, 2, params)
    assert [c.token_ids for g in after for c in g] == [c.token_ids for g in expected for c in g]
    assert [c.token_ids for g in after for c in g] != [c.token_ids for g in before for c in g]
