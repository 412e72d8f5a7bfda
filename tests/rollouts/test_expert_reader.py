"""The experts that the engine records are those of a pass over whole rows, however the rows were sampled.

Shapes: N packed tokens, M layers with routed experts, T tokens of a completion but the last, K experts per token.
"""

from typing import Any

import numpy as np
import pytest
import torch

from policy import PackedRows, Policy
from policy.attention import Expanded
from rollouts import Completion, EngineConfig, SamplingError, SamplingParams, make_engine
from rollouts.builtin_engine import BuiltinEngine
from rollouts.vllm_requests import check_request
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy

PROMPTS = [[5, 9, 11, 3], list(range(3, 20)), [7] * 8, [40, 41]]
SPECULATION: dict[str, Any] = {"speculative": {"num_speculative_tokens": 2}}


def sample(policy: Policy, length: int = 24, **settings: Any) -> tuple[BuiltinEngine, list[list[Completion]]]:
    engine = BuiltinEngine(policy, EngineConfig.model_validate(settings))
    params = SamplingParams(max_completion_length=length, stop_token_ids=(2, 9, 17), record_experts=True)
    return engine, engine.generate(PROMPTS, 3, params)


def chosen_by(policy: Policy, token_ids: list[int]) -> torch.Tensor:
    """Experts [M, N, K] of one row, sorted: in which order equal ones are named means nothing."""
    rows = PackedRows.of([len(token_ids)])
    with torch.no_grad():
        experts_MNK = policy(torch.tensor(token_ids), rows.position_ids_N, Expanded(rows=rows)).experts_MNK
    assert experts_MNK is not None
    return experts_MNK.sort().values


def check_records(policy: Policy, groups: list[list[Completion]]) -> None:
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            assert completion.experts_MTK is not None
            assert completion.prompt_experts_MSK is group[0].prompt_experts_MSK, "a copy of its own"
            assert completion.experts_MTK.dtype == np.uint8
            fed = [*prompt, *completion.token_ids[:-1]]
            recorded = np.concatenate((completion.prompt_experts_MSK, completion.experts_MTK), axis=1)  # type: ignore[arg-type]
            assert torch.equal(torch.from_numpy(recorded).long().sort().values, chosen_by(policy, fed))


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({}, {}),
        ({"max_num_seqs": 2, "block_size": 4}, {}),
        ({"max_num_batched_tokens": 5, "block_size": 3}, {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
        (SPECULATION, {"num_nextn_predict_layers": 1}),
    ],
    ids=["plain", "two at once", "small prefills", "speculation"],
)
def test_what_is_recorded_is_what_the_trainer_chooses(settings: dict[str, Any], changes: dict[str, Any]) -> None:
    policy = tiny_policy(**changes)
    engine, groups = sample(policy, **settings)
    check_records(policy, groups)
    assert (engine.num_accepted > 0) == ("speculative" in settings)


def test_a_sequence_that_stepped_back_has_the_same_record() -> None:
    policy = tiny_policy()
    block_bytes = 3 * 4 * policy.config.cache_width * 4
    engine, groups = sample(policy, cache_gib=24 * block_bytes / 2**30, block_size=4)
    assert engine.num_preemptions > 0
    check_records(policy, groups)


def test_experts_in_every_second_layer() -> None:
    policy = tiny_llama(**TINY_QWEN3_MOE)
    check_records(policy, sample(policy)[1])


def test_a_completion_of_one_token_has_fed_none() -> None:
    policy = tiny_policy()
    _, groups = sample(policy, length=1)
    check_records(policy, groups)
    assert all(completion.experts_MTK.shape == (2, 0, 2) for group in groups for completion in group)  # type: ignore[union-attr]


def test_many_experts_take_two_bytes() -> None:
    _, [[first, *_], *_] = sample(tiny_policy(n_routed_experts=300), length=3)
    assert first.experts_MTK is not None
    assert first.experts_MTK.dtype == np.int16


@pytest.mark.parametrize(("policy", "asked"), [(tiny_policy(), False), (tiny_llama(), True)], ids=["unasked", "dense"])
def test_nothing_is_recorded_where_nothing_is_asked_or_chosen(policy: Policy, asked: bool) -> None:
    params = SamplingParams(max_completion_length=3, record_experts=asked)
    [[completion]] = make_engine(policy, EngineConfig()).generate([[5, 6]], 1, params)
    assert completion.experts_MTK is None
    assert completion.prompt_experts_MSK is None


def test_vllm_is_not_asked_for_what_it_does_not_say() -> None:
    with pytest.raises(SamplingError, match=r"vLLM does not say which experts .*engine\.kind: builtin"):
        check_request([[5]], SamplingParams(max_completion_length=3, record_experts=True), 100)
