"""The engine on a GPU: the tokens that it samples on the CPU, and their log-probabilities."""

import pytest
import torch

from policy import Policy
from rollouts import Completion, EngineConfig, SamplingParams, make_engine
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = [[5, 9, 11, 3], list(range(3, 20)), [7] * 8, [40, 41]]
POLICIES = {
    "deepseek_v3": tiny_policy,
    "llama": tiny_llama,
    "qwen3_moe": lambda: tiny_llama(**TINY_QWEN3_MOE),
}


def sample(policy: Policy, params: SamplingParams) -> list[Completion]:
    groups = make_engine(policy, EngineConfig(max_num_seqs=6)).generate(PROMPTS, 4, params)
    return [completion for group in groups for completion in group]


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("family", POLICIES)
def test_gpu_samples_the_tokens_of_the_cpu(family: str, temperature: float) -> None:
    params = SamplingParams(max_completion_length=20, temperature=temperature, seed=5, stop_token_ids=(2, 17))
    policy = POLICIES[family]()
    on_cpu, on_gpu = sample(policy, params), sample(policy.cuda(), params)
    for ours, wanted in zip(on_gpu, on_cpu, strict=True):
        assert ours.token_ids == wanted.token_ids
        assert ours.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)
        assert ours.finish_reason == wanted.finish_reason
