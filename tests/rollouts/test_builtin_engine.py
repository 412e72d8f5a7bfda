"""The engine against naive sampling, token for token."""

import numpy as np
import pytest
import torch

from policy import PackedRows, Policy
from policy.logprobs import token_logprobs
from rollouts import EngineConfig, SamplingError, SamplingParams, make_engine
from rollouts.builtin_engine import BuiltinEngine
from rollouts.sampler import mix, truncate, uniforms
from tests.policies import tiny_policy

PROMPTS = [[5, 9, 11, 3], list(range(3, 20)), [7] * 8, [40, 41], list(range(20, 52))]


def sample_naively(
    policy: Policy, prompt: list[int], seed: int, params: SamplingParams
) -> tuple[list[int], list[float]]:
    """One sequence, the whole row through the trunk for every token, no cache."""
    token_ids, logprobs = list(prompt), []
    with torch.no_grad():
        while len(token_ids) - len(prompt) < params.max_completion_length:
            logits = policy.logits(torch.tensor([token_ids]))[0, -1]
            if params.temperature == 0:
                token, logprob = int(logits.argmax()), 0.0
            else:
                log_all = truncate(logits[None] / params.temperature, params)[0].log_softmax(-1)
                uniform = uniforms(np.uint64(seed), np.array(len(logprobs)))
                cumulative = log_all.double().exp().cumsum(0)
                token = int((cumulative <= float(uniform) * cumulative[-1]).sum())
                logprob = float(log_all[token])
            token_ids.append(token)
            logprobs.append(logprob)
            if token in params.stop_token_ids:
                break
    return token_ids[len(prompt) :], logprobs


def check_against_naive(policy: Policy, engine: BuiltinEngine, params: SamplingParams, num_generations: int) -> None:
    groups = engine.generate(PROMPTS, num_generations, params)
    lengths = set()
    for place, (prompt, group) in enumerate(zip(PROMPTS, groups, strict=True)):
        assert len(group) == num_generations
        for g, completion in enumerate(group):
            seed = int(mix(int(mix(params.seed, place)), g))
            token_ids, logprobs = sample_naively(policy, prompt, seed, params)
            assert completion.token_ids == token_ids
            assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)
            assert completion.finish_reason == ("stop" if token_ids[-1] in params.stop_token_ids else "length")
            lengths.add(len(token_ids))
    assert len(lengths) > 1, "every completion is equally long: nothing left the batch early"


@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}],
    ids=["plain", "greedy", "top_k", "top_p", "min_p"],
)
def test_engine_equals_naive_sampling(changes: dict[str, float]) -> None:
    policy = tiny_policy()
    params = SamplingParams(
        **{"max_completion_length": 40, "stop_token_ids": tuple(range(2, 61, 5)), "seed": 3} | changes
    )
    if params.temperature == 0:
        params = SamplingParams(max_completion_length=12, temperature=0, stop_token_ids=tuple(range(0, 61, 2)), seed=3)
    check_against_naive(policy, make_engine(policy, EngineConfig()), params, num_generations=3)


def test_few_rows_and_small_blocks_change_nothing() -> None:
    policy = tiny_policy()
    params = SamplingParams(max_completion_length=30, stop_token_ids=(2, 9, 17), seed=4)
    config = EngineConfig(max_num_seqs=4, block_size=3, max_num_batched_tokens=20)
    check_against_naive(policy, make_engine(policy, config), params, num_generations=5)


def test_preemption_changes_nothing() -> None:
    policy = tiny_policy()
    shape = policy.config
    block_bytes = shape.num_hidden_layers * 4 * shape.cache_width * 4
    engine = BuiltinEngine(policy, EngineConfig(block_size=4, cache_gib=24 * block_bytes / 2**30))
    params = SamplingParams(max_completion_length=40, stop_token_ids=(2, 9), seed=5)
    check_against_naive(policy, engine, params, num_generations=4)
    assert engine.num_preemptions > 0


def test_same_completion_whatever_shares_the_batch() -> None:
    policy = tiny_policy()
    engine = make_engine(policy, EngineConfig())
    params = SamplingParams(max_completion_length=30, stop_token_ids=(2,))
    together = engine.generate(PROMPTS, 2, params, prompt_seeds=[10, 11, 12, 13, 14])
    turned = engine.generate(PROMPTS[::-1], 2, params, prompt_seeds=[14, 13, 12, 11, 10])[::-1]
    alone = [engine.generate([p], 2, params, prompt_seeds=[10 + i])[0] for i, p in enumerate(PROMPTS)]
    for group, turned_group, alone_group in zip(together, turned, alone, strict=True):
        for a, b, c in zip(group, turned_group, alone_group, strict=True):
            assert a.token_ids == b.token_ids == c.token_ids


def test_recorded_logprobs_equal_the_trainers() -> None:
    policy = tiny_policy()
    params = SamplingParams(max_completion_length=40, temperature=0.8, stop_token_ids=(2,))
    groups = make_engine(policy, EngineConfig()).generate(PROMPTS, 3, params)
    rows = [(p, c) for p, group in zip(PROMPTS, groups, strict=True) for c in group]
    packed = PackedRows.of([len(p) + len(c.token_ids) for p, c in rows])
    token_ids_N = torch.tensor([t for p, c in rows for t in (*p, *c.token_ids)])
    wanted_N = torch.tensor([x for p, c in rows for x in [False] * len(p) + [True] * len(c.token_ids)])
    with torch.no_grad():
        trained = token_logprobs(policy, token_ids_N, packed, wanted_N, temperature=0.8).logprobs_N[wanted_N]
    sampled = torch.tensor([x for _, c in rows for x in c.logprobs])
    assert (trained - sampled).abs().max() < 1e-5


def test_versions_are_recorded() -> None:
    policy = tiny_policy()
    engine = make_engine(policy, EngineConfig())
    engine.load_weights(policy, version=7)
    assert engine.generate([[3]], 1, SamplingParams(max_completion_length=2))[0][0].policy_version == 7


def test_another_policy_is_refused() -> None:
    engine = make_engine(tiny_policy(), EngineConfig())
    with pytest.raises(SamplingError, match="make another engine"):
        engine.load_weights(tiny_policy(), version=1)


def test_nan_aborts_only_the_sequences_it_meets() -> None:
    policy = tiny_policy()
    with torch.no_grad():
        policy.embed_tokens.weight[60] = float("nan")
    params = SamplingParams(max_completion_length=5)
    bad, good = make_engine(policy, EngineConfig()).generate([[60, 4], [5, 4]], 2, params)
    assert [c.finish_reason for c in bad] == ["abort", "abort"]
    assert all(c.finish_reason in ("length", "abort") for c in good)
    assert any(c.finish_reason == "length" for c in good)


@pytest.mark.parametrize(
    ("prompts", "length", "message"),
    [([[1, 2], []], 4, "prompt 1 is empty"), ([[1] * 120], 20, "exceeds the model's context of 128")],
)
def test_bad_prompts_are_named(prompts: list[list[int]], length: int, message: str) -> None:
    engine = make_engine(tiny_policy(), EngineConfig())
    with pytest.raises(SamplingError, match=message):
        engine.generate(prompts, 1, SamplingParams(max_completion_length=length))


def test_cache_too_small_for_one_sequence_says_how_much_is_needed() -> None:
    engine = make_engine(tiny_policy(), EngineConfig(cache_gib=1e-6))
    with pytest.raises(SamplingError, match=r"needs .* GiB of cache, but engine.cache_gib is 1e-06"):
        engine.generate([[1, 2]], 1, SamplingParams(max_completion_length=100))


@pytest.mark.parametrize(
    ("key", "value"), [("max_completion_length", 0), ("temperature", -1), ("top_k", -1), ("top_p", 0), ("min_p", 1)]
)
def test_bad_sampling_parameters_are_named(key: str, value: float) -> None:
    with pytest.raises(SamplingError, match=key):
        SamplingParams(**{"max_completion_length": 1, key: value})
