"""The engine against naive sampling, token for token.

Shapes: N packed tokens, B live rows, C model width, V vocabulary.
"""

import numpy as np
import pytest
import torch

from policy import PackedRows, Policy
from policy.attention import Expanded
from rollouts import EngineConfig, SamplingError, SamplingParams, make_engine
from rollouts.builtin_engine import BuiltinEngine
from rollouts.sampler import mix, truncate, uniforms
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy
from tests.rollouts.agreement import recorded_and_trained
from tests.small_memory import room_for

PROMPTS = [[5, 9, 11, 3], list(range(3, 20)), [7] * 8, [40, 41], list(range(20, 52))]


def sample_naively(
    policy: Policy, prompts: list[list[int]], seeds: list[int], params: SamplingParams
) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities after each prompt: no cache, every row whole through the trunk for every token."""
    rows, logprobs = [list(prompt) for prompt in prompts], [[] for _ in prompts]
    live = list(range(len(rows)))
    for step in range(params.max_completion_length):
        packed = PackedRows.of([len(rows[i]) for i in live])
        token_ids_N = torch.tensor([token for i in live for token in rows[i]])
        with torch.no_grad():
            hidden_NC = policy(token_ids_N, packed.position_ids_N, Expanded(rows=packed)).hidden_NC
            logits_BV = policy.project(hidden_NC[packed.last_N])
        for i, logits_V in zip(list(live), logits_BV, strict=True):
            if params.temperature == 0:
                token, logprob = int(logits_V.argmax()), 0.0
            else:
                log_all = truncate(logits_V[None] / params.temperature, params)[0].log_softmax(-1)
                uniform = float(uniforms(np.uint64(seeds[i]), np.array(step)))
                cumulative = log_all.double().exp().cumsum(0)
                token = int((cumulative <= uniform * cumulative[-1]).sum())
                logprob = float(log_all[token])
            rows[i].append(token)
            logprobs[i].append(logprob)
            if token in params.stop_token_ids:
                live.remove(i)
        if not live:
            break
    return [(row[len(prompt) :], each) for row, prompt, each in zip(rows, prompts, logprobs, strict=True)]


def check_against_naive(
    policy: Policy,
    engine: BuiltinEngine,
    params: SamplingParams,
    num_generations: int,
    asked: list[list[int]] = PROMPTS,
) -> None:
    groups = engine.generate(asked, num_generations, params)
    assert [len(group) for group in groups] == [num_generations] * len(asked)
    prompts = [prompt for prompt in asked for _ in range(num_generations)]
    seeds = [int(mix(int(mix(params.seed, p)), g)) for p in range(len(asked)) for g in range(num_generations)]
    completions = [completion for group in groups for completion in group]
    for completion, (token_ids, logprobs) in zip(
        completions, sample_naively(policy, prompts, seeds, params), strict=True
    ):
        assert completion.token_ids == token_ids
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-5)
        assert completion.finish_reason == ("stop" if token_ids[-1] in params.stop_token_ids else "length")
    lengths = {len(completion.token_ids) for completion in completions}
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


@pytest.mark.parametrize("changes", [{}, TINY_QWEN3_MOE], ids=["llama", "qwen3_moe"])
def test_other_families_are_sampled_through_the_same_engine(changes: dict[str, object]) -> None:
    policy = tiny_llama(**changes)
    params = SamplingParams(max_completion_length=30, stop_token_ids=(2, 9, 17), seed=4)
    for config in (EngineConfig(), EngineConfig(max_num_seqs=4, block_size=3, max_num_batched_tokens=20)):
        check_against_naive(policy, make_engine(policy, config), params, num_generations=2)


def test_few_rows_and_small_blocks_change_nothing() -> None:
    policy = tiny_policy()
    params = SamplingParams(max_completion_length=30, stop_token_ids=(2, 9, 17), seed=4)
    config = EngineConfig(max_num_seqs=4, block_size=3, max_num_batched_tokens=20)
    check_against_naive(policy, make_engine(policy, config), params, num_generations=5)


def test_preemption_changes_nothing() -> None:
    policy = tiny_policy()
    engine = BuiltinEngine(policy, EngineConfig(block_size=4, cache_gib=cache_of(policy, 24)))
    params = SamplingParams(max_completion_length=40, stop_token_ids=(2, 9), seed=5)
    check_against_naive(policy, engine, params, num_generations=4)
    assert engine.num_preemptions > 0


FAMILIES = {"deepseek_v3": {}, "llama": {"model_type": "llama"}, "qwen3_moe": TINY_QWEN3_MOE}
SYSTEM = list(range(10, 37))
ALIKE = [[*SYSTEM, 3, 4], [*SYSTEM, 5], [*SYSTEM[:9], 7, 8], [50, *SYSTEM], [*SYSTEM, 3, 4, 5, 6, 7, 8, 9]]
"""Of 27 tokens alike at the beginning, of 9, of none, and one prompt that begins another."""


def policy_of(family: str) -> Policy:
    return tiny_llama(**FAMILIES[family]) if FAMILIES[family] else tiny_policy()


def cache_of(policy: Policy, num_blocks: int, block_size: int = 4) -> float:
    """GiB of a cache of so many blocks."""
    shape = policy.config
    return num_blocks * shape.num_hidden_layers * block_size * shape.cache_width * 4 / 2**30


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block_size", "most"), [(3, 5), (4, 8), (16, 20), (1, 1)])
def test_prompts_computed_in_parts_change_nothing(family: str, block_size: int, most: int) -> None:
    policy = policy_of(family)
    params = SamplingParams(max_completion_length=10, stop_token_ids=(2, 9, 17), seed=6)
    config = EngineConfig(block_size=block_size, max_num_batched_tokens=most)
    check_against_naive(policy, make_engine(policy, config), params, num_generations=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("most", [9, 8192])
def test_prompts_that_begin_alike_are_computed_once_and_nothing_changes(family: str, most: int) -> None:
    policy = policy_of(family)
    params = SamplingParams(max_completion_length=10, stop_token_ids=(2, 9, 17), seed=6)
    engine = BuiltinEngine(policy, EngineConfig(block_size=4, max_num_batched_tokens=most))
    for _ in range(2):
        check_against_naive(policy, engine, params, num_generations=2, asked=ALIKE)
    # In the first call 6 blocks of 4 in the second prompt, 2 in the third, 7 in the fifth. In the second call all but
    # what holds a prompt's last token.
    first, second = 4 * (6 + 2 + 7), 4 * (7 + 6 + 2 + 6 + 8)
    assert engine.stats.num_cached_tokens == first + second


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_preemption_among_prompts_in_parts_that_begin_alike_changes_nothing(family: str) -> None:
    policy = policy_of(family)
    params = SamplingParams(max_completion_length=40, stop_token_ids=(2, 9), seed=5)
    config = EngineConfig(block_size=4, max_num_batched_tokens=7, cache_gib=cache_of(policy, 26))
    engine = BuiltinEngine(policy, config)
    for _ in range(2):
        check_against_naive(policy, engine, params, num_generations=3, asked=ALIKE)
    assert engine.num_preemptions > 0
    assert engine.num_cached_tokens > 0


def test_a_long_prompt_is_computed_in_parts_of_the_budget() -> None:
    """Of 8,000 tokens, which a pass over all of it must agree with."""
    policy = tiny_llama(
        max_position_embeddings=8192, hidden_size=16, num_hidden_layers=2, initializer_range=0.5,
        num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    prompt = torch.randint(3, 61, (8000,), generator=torch.Generator().manual_seed(0)).tolist()
    params = SamplingParams(max_completion_length=3, temperature=0.0)
    passes: list[int] = []
    hook = policy.norm.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    engine = make_engine(policy, EngineConfig(max_num_batched_tokens=2048))
    [[completion]] = engine.generate([prompt], 1, params)
    hook.remove()
    assert passes == [2048, 2048, 2048, 8000 - 3 * 2048, 1, 1]
    with torch.no_grad():
        logits_SV = policy.logits(torch.tensor([[*prompt, *completion.token_ids]]))[0]
    assert completion.token_ids == logits_SV[len(prompt) - 1 : -1].argmax(dim=-1).tolist()


def test_what_old_weights_left_in_the_cache_is_not_used() -> None:
    policy = tiny_policy()
    engine = BuiltinEngine(policy, EngineConfig(block_size=4))
    params = SamplingParams(max_completion_length=10, stop_token_ids=(2, 9, 17), seed=6)
    check_against_naive(policy, engine, params, num_generations=2, asked=ALIKE)
    within = engine.num_cached_tokens
    for version, told in ((1, True), (1, False)):
        with torch.no_grad():
            for weight in policy.parameters():
                weight.mul_(0.9)
        if told:
            engine.load_weights(policy, version)
        engine.num_cached_tokens = 0
        check_against_naive(policy, engine, params, num_generations=2, asked=ALIKE)
        assert engine.num_cached_tokens == within
    engine.load_weights(policy, 1)
    check_against_naive(policy, engine, params, num_generations=2, asked=ALIKE)
    assert engine.num_cached_tokens > 2 * within
    engine.reset_prefix_cache()
    engine.num_cached_tokens = 0
    check_against_naive(policy, engine, params, num_generations=2, asked=ALIKE)
    assert engine.num_cached_tokens == within


def test_an_interrupted_call_leaves_nothing_in_the_cache() -> None:
    policy = tiny_policy()
    engine = BuiltinEngine(policy, EngineConfig(block_size=4, max_num_seqs=2))
    params = SamplingParams(max_completion_length=10, stop_token_ids=(2, 9, 17), seed=6)
    check_against_naive(policy, engine, params, num_generations=2, asked=ALIKE)
    passes = 0

    def interrupt(module: object, inputs: object, output: object) -> None:
        nonlocal passes
        passes += 1
        if passes == 5:
            raise KeyboardInterrupt

    hook = policy.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(ALIKE, 2, params)
    hook.remove()
    for _ in range(2):
        check_against_naive(policy, engine, params, num_generations=2, asked=ALIKE)


def test_same_completion_whatever_shares_the_batch() -> None:
    policy = tiny_policy()
    engine = make_engine(policy, EngineConfig())
    params = SamplingParams(max_completion_length=30, stop_token_ids=(2,))
    seeds = [10, 2**63 + 11, 2**64 - 1, 13, 2**53 + 1]  # as `mix` gives them: 64 bits that no float holds
    together = engine.generate(PROMPTS, 2, params, prompt_seeds=seeds)
    turned = engine.generate(PROMPTS[::-1], 2, params, prompt_seeds=seeds[::-1])[::-1]
    alone = [engine.generate([p], 2, params, prompt_seeds=[s])[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    for group, turned_group, alone_group in zip(together, turned, alone, strict=True):
        for a, b, c in zip(group, turned_group, alone_group, strict=True):
            assert a.token_ids == b.token_ids == c.token_ids


def test_recorded_logprobs_equal_the_trainers() -> None:
    policy = tiny_policy()
    params = SamplingParams(max_completion_length=40, temperature=0.8, stop_token_ids=(2,))
    groups = make_engine(policy, EngineConfig()).generate(PROMPTS, 3, params)
    sampled, trained = recorded_and_trained(policy, PROMPTS, groups, temperature=0.8)
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


def test_nan_aborts_the_sequences_it_meets_and_spoils_no_other() -> None:
    """Neither those beside it nor those that later get its cache blocks."""
    good, bad = [[5, 4], [7, 8, 9]], [60, 4, 5, 6, 7, 8]
    params = SamplingParams(max_completion_length=20, stop_token_ids=(60,), seed=1)  # 60 is sampled but never fed back
    policy = tiny_policy()
    wanted = make_engine(policy, EngineConfig()).generate(good, 3, params, prompt_seeds=[1, 2])
    with torch.no_grad():
        policy.embed_tokens.weight[60] = float("nan")
    engine = make_engine(policy, EngineConfig(block_size=4))
    for _ in range(2):
        *others, aborted = engine.generate([*good, bad], 3, params, prompt_seeds=[1, 2, 3])
        assert [(c.token_ids, c.finish_reason) for c in aborted] == [([], "abort")] * 3
        for group, wanted_group in zip(others, wanted, strict=True):
            assert [c.token_ids for c in group] == [c.token_ids for c in wanted_group]
            assert [c.finish_reason for c in group] == [c.finish_reason for c in wanted_group]


@pytest.mark.parametrize("most", [5, 100])
def test_nan_in_a_shared_beginning_aborts_all_that_hold_it_and_is_not_kept(most: int) -> None:
    """In the cache it is zeros, so that whoever read on from there would pass for sound."""
    begin = [4, 5, 6, 7, 8, 9]
    good = [[*begin, 10, 11, 12], [*begin, 13, 14, 15, 16]]
    bad = [[*begin, 60, 11, 12, 13, 14, 15], [*begin, 60, 11, 12, 13, 20, 21, 22, 23], [*begin[:5], 60]]
    params = SamplingParams(max_completion_length=12, stop_token_ids=(60,), seed=1)
    policy = tiny_policy()
    wanted = make_engine(policy, EngineConfig()).generate(good, 2, params, prompt_seeds=[1, 2])
    with torch.no_grad():
        policy.embed_tokens.weight[60] = float("nan")
    engine = BuiltinEngine(policy, EngineConfig(block_size=2, max_num_batched_tokens=most))
    for _ in range(2):
        groups = engine.generate([*bad, *good], 2, params, prompt_seeds=[3, 4, 5, 1, 2])
        assert [(c.token_ids, c.finish_reason) for group in groups[:3] for c in group] == [([], "abort")] * 6
        assert [[c.token_ids for c in g] for g in groups[3:]] == [[c.token_ids for c in g] for g in wanted]
    assert engine.num_cached_tokens > 0


@pytest.mark.parametrize("layer", ["layers.1.mlp", "layers.2.self_attn", "norm", "lm_head"])
def test_the_layer_where_numbers_end_is_named(layer: str, caplog: pytest.LogCaptureFixture) -> None:
    policy = tiny_policy()
    with torch.no_grad():
        for weight in policy.get_submodule(layer).parameters():
            weight[-1] = float("nan")
    make_engine(policy, EngineConfig()).generate([[5, 9, 11]], 2, SamplingParams(max_completion_length=4))
    assert [record.message for record in caplog.records] == [
        "2 of 2 completions were given up at policy version 0, since their logits were not all numbers; the first is "
        "completion 0 of prompt 0, at its token 0. The first layer with such an output: "
        f"{layer}, from token {2 if layer == 'lm_head' else 0} of the row on (id {11 if layer == 'lm_head' else 5})"
    ]


def test_a_token_that_spoils_a_completion_is_named(caplog: pytest.LogCaptureFixture) -> None:
    policy, prompt = tiny_policy(), [5, 9, 11]
    params = SamplingParams(max_completion_length=12)
    token_ids = make_engine(policy, EngineConfig()).generate([prompt], 1, params)[0][0].token_ids
    bad = next(token for token in token_ids if token not in prompt)
    with torch.no_grad():
        policy.embed_tokens.weight[bad] = float("inf")
    [[completion]] = make_engine(policy, EngineConfig()).generate([prompt], 1, params)
    length = token_ids.index(bad) + 1
    assert (completion.token_ids, completion.finish_reason) == (token_ids[:length], "abort")
    where = f"embed_tokens, from token {len(prompt) + length - 1} of the row on (id {bad})"
    assert f"at its token {length}. The first layer with such an output: {where}" in caplog.text


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


@pytest.mark.parametrize("room", [30, 9])
def test_where_memory_runs_out_fewer_are_sampled_at_once_and_nothing_else_changes(room: int) -> None:
    """Less room than a decoding step of all 40 takes, and less than a prefill of all five."""
    policy, params = tiny_policy(), SamplingParams(max_completion_length=12, seed=3)
    config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=64)
    prompts = [prompt[:5] for prompt in PROMPTS]
    expected = BuiltinEngine(policy, config).generate(prompts, 8, params)
    engine = BuiltinEngine(policy, config)
    with room_for(policy, room) as refused:
        for _ in range(2):
            found = engine.generate(prompts, 8, params)
            assert [[c.token_ids for c in group] for group in found] == [[c.token_ids for c in g] for g in expected]
    assert 0 < len(refused) <= 4
    assert engine.max_num_seqs <= max(room, 20)


def test_one_sequence_that_does_not_fit_is_an_error() -> None:
    policy = tiny_policy()
    with room_for(policy, 2), pytest.raises(SamplingError, match=r"out of memory with one sequence \(CUDA out of"):
        make_engine(policy, EngineConfig()).generate([[5, 9, 11]], 2, SamplingParams(max_completion_length=4))
