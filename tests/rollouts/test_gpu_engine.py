"""The built-in engine on a GPU: graphs that run ahead, against the same engine on the CPU and against the trainer.

Shapes: B sequences.
"""

import copy

import numpy as np
import pytest
import torch

from policy import Policy, cast_weights
from rollouts import Completion, EngineConfig, SamplingParams
from rollouts.builtin_engine import BuiltinEngine
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy
from tests.rollouts.agreement import recorded_and_trained
from tests.rollouts.test_expert_reader import chosen_by

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [[5, 9, 11, 3], list(range(3, 20)), [7] * 8, [40, 41], list(range(20, 52))]


def make_policy(family: str) -> Policy:
    if family == "deepseek_v3":
        return tiny_policy()
    return tiny_llama(**TINY_QWEN3_MOE if family == "qwen3_moe" else {})


def generate(policy: Policy, params: SamplingParams, count: int = 3, **changes: object) -> list[list[Completion]]:
    engine = BuiltinEngine(policy, EngineConfig.model_validate({"block_size": 4, "cache_gib": 0.1} | changes))
    return engine.generate(PROMPTS, count, params)


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, {"top_p": 0.8, "top_k": 20}], ids=str)
@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen3_moe"])
def test_gpu_samples_what_the_cpu_samples(family: str, changes: dict[str, float]) -> None:
    """In fp32; rounding may move a boundary past a draw, so nearly all completions must agree, not all."""
    policy = make_policy(family)
    params = SamplingParams(max_completion_length=21, stop_token_ids=(2, 9), **changes)  # type: ignore[arg-type]
    wanted = generate(policy, params)
    got = generate(copy.deepcopy(policy).to("cuda"), params)
    same = [
        ours.token_ids == theirs.token_ids and ours.finish_reason == theirs.finish_reason
        for a, b in zip(got, wanted, strict=True)
        for ours, theirs in zip(a, b, strict=True)
    ]
    assert sum(same) >= len(same) - 1


@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen3_moe"])
def test_settings_that_must_not_matter_do_not(family: str) -> None:
    """How far it runs ahead, how many sequences at once, and whether blocks run out."""
    policy = make_policy(family).to("cuda")
    params = SamplingParams(max_completion_length=30, stop_token_ids=(2, 9))
    wanted = [[c.token_ids for c in group] for group in generate(policy, params)]
    entry = policy.config.num_cache_layers * policy.config.cache_width * 4 * 4
    for changes in ({"run_ahead": 1}, {"run_ahead": 5}, {"max_num_seqs": 2}, {"cache_gib": 26 * entry / 2**30}):
        got = [[c.token_ids for c in group] for group in generate(policy, params, **changes)]
        same = [a == b for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y, strict=True)]
        assert sum(same) >= len(same) - 1, changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen3_moe"])
def test_recorded_logprobs_equal_the_trainers_and_follow_the_weights(family: str, dtype: torch.dtype) -> None:
    policy = cast_weights(make_policy(family), dtype).to("cuda")
    engine = BuiltinEngine(policy, EngineConfig(block_size=4, cache_gib=0.1))
    params = SamplingParams(max_completion_length=20)
    for version in range(2):
        groups = engine.generate(PROMPTS, 4, params)
        ours, theirs = recorded_and_trained(policy, PROMPTS, groups)
        difference = (ours - theirs).abs()
        assert difference.max() < 1e-4 if dtype == torch.float32 else difference.mean() < 5e-2
        with torch.no_grad():  # in place, as the optimizer does: the captured graphs must see it
            for weight in policy.parameters():
                weight.mul_(0.9)
        engine.load_weights(policy, version + 1)


def test_weights_that_moved_are_captured_anew() -> None:
    policy = tiny_policy().to("cuda")
    engine = BuiltinEngine(policy, EngineConfig(block_size=4, cache_gib=0.1))
    params = SamplingParams(max_completion_length=12, temperature=0.0)
    before = engine.generate(PROMPTS, 1, params)
    other = tiny_policy(seed=1).to("cuda")
    for weight, new in zip(policy.parameters(), other.parameters(), strict=True):
        weight.data = new.data.clone()
    after = engine.generate(PROMPTS, 1, params)
    fresh = BuiltinEngine(other, EngineConfig(block_size=4, cache_gib=0.1)).generate(PROMPTS, 1, params)
    assert [g[0].token_ids for g in after] == [g[0].token_ids for g in fresh]
    assert [g[0].token_ids for g in after] != [g[0].token_ids for g in before]


def test_a_sequence_of_nan_aborts_alone() -> None:
    policy = tiny_policy().to("cuda")
    with torch.no_grad():
        policy.embed_tokens.weight[11] = float("nan")
    groups = generate(policy, SamplingParams(max_completion_length=8), count=2)
    assert {c.finish_reason for c in groups[0]} == {"abort"}
    assert all(c.finish_reason != "abort" for c in groups[3] if 11 not in c.token_ids)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_graphs_record_the_experts_of_every_token(family: str) -> None:
    """In fp32 they are those of the CPU's pass over the same tokens, but for a tie that rounding breaks."""
    policy = make_policy(family)
    params = SamplingParams(max_completion_length=21, stop_token_ids=(2, 9), record_experts=True)
    same = []
    for prompt, group in zip(PROMPTS, generate(copy.deepcopy(policy).to("cuda"), params), strict=True):
        for completion in group:
            of_prompt, own = completion.prompt_experts_MSK, completion.experts_MTK
            assert of_prompt is not None
            assert own is not None
            recorded = torch.from_numpy(np.concatenate((of_prompt, own), axis=1)).long().sort().values
            wanted = chosen_by(policy, [*prompt, *completion.token_ids[:-1]])
            assert recorded.shape == wanted.shape
            same.append((recorded == wanted).double().mean())
    assert torch.stack(same).mean() > 0.99
