"""The built-in engine on a GPU: graphs that run ahead, against the same engine on the CPU and against the trainer.

Shapes: B sequences.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from policy import PackedRows, Policy, cast_weights
from policy.attention import Expanded
from policy.tokenizer import REPLACEMENT
from rollouts import Completion, EngineConfig, SamplingParams
from rollouts.builtin_engine import BuiltinEngine
from rollouts.stop_strings import StopStrings
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy
from tests.rollouts.agreement import recorded_and_trained
from tests.rollouts.test_expert_reader import chosen_by
from tests.rollouts.test_speculative import drafting_policy
from tests.tokenizer_kinds import byte_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SYSTEM = list(range(10, 37))
ALIKE = [[*SYSTEM, 3, 4], [*SYSTEM, 5], [*SYSTEM[:9], 7, 8], [50, *SYSTEM], [*SYSTEM, 3, 4, 5, 6, 7, 8, 9]]
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


@pytest.mark.parametrize("changes", [{"max_num_batched_tokens": 9}, {}], ids=["in_parts", "whole"])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama", "qwen3_moe"])
def test_parts_and_shared_beginnings_change_nothing(family: str, changes: dict[str, int]) -> None:
    """In fp32, where attention over what is cached has another kernel than in bf16."""
    policy = make_policy(family)
    params = SamplingParams(max_completion_length=16, stop_token_ids=(2, 9))
    wanted = BuiltinEngine(policy, EngineConfig(block_size=64)).generate(ALIKE, 3, params)
    config = EngineConfig.model_validate({"block_size": 4, "cache_gib": 0.1} | changes)
    engine = BuiltinEngine(policy.to("cuda"), config)
    for _ in range(2):
        found = engine.num_cached_tokens
        got = engine.generate(ALIKE, 3, params)
        same = [a.token_ids == b.token_ids for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y, strict=True)]
        assert sum(same) >= len(same) - 1
        assert engine.num_cached_tokens > found


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_in_bf16_parts_and_shared_beginnings_record_the_trainers_logprobs(family: str) -> None:
    """Widths that the fused kernel takes: what it makes of a row's second part is what the whole row gives."""
    wide = {"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16, "initializer_range": 0.1}
    policy = tiny_policy(**wide) if family == "deepseek_v3" else tiny_llama(initializer_range=0.1)
    policy = cast_weights(policy, torch.bfloat16).to("cuda")
    params = SamplingParams(max_completion_length=16)
    differences = []
    for most in (8192, 9):
        config = EngineConfig(block_size=4, cache_gib=0.1, max_num_batched_tokens=most)
        groups = BuiltinEngine(policy, config).generate(ALIKE, 4, params)
        ours, theirs = recorded_and_trained(policy, ALIKE, groups)
        differences.append(float((ours - theirs).abs().mean()))
    assert max(differences) < 5e-2
    assert differences[1] < 3 * differences[0] + 1e-3


@pytest.mark.parametrize("run_ahead", [1, 8])
def test_stop_strings_end_completions_however_far_it_runs_ahead(run_ahead: int) -> None:
    tokenizer = byte_tokenizer()
    policy = tiny_policy(vocab_size=len(tokenizer)).to("cuda")
    config = EngineConfig(block_size=4, cache_gib=0.1, run_ahead=run_ahead)
    engine = BuiltinEngine(policy, config, tokenizer)
    params = SamplingParams(max_completion_length=24, seed=3)
    unbounded = [c for group in engine.generate(PROMPTS, 4, params) for c in group]
    texts = [tokenizer.decode(c.token_ids) for c in unbounded]
    middles = sorted({text[at : at + 4] for text in texts for at in range(3, len(text) - 4)})
    strings = tuple([middle for middle in middles if REPLACEMENT not in middle][::9])
    stops = StopStrings(tokenizer, strings)
    groups = engine.generate(PROMPTS, 4, replace(params, stop_strings=strings))
    same = stopped = 0
    for ours, whole in zip((c for group in groups for c in group), unbounded, strict=True):
        end = stops.first_end(np.array(whole.token_ids))
        stopped += end is not None
        same += ours.token_ids == whole.token_ids[:end] and ours.finish_reason == ("stop" if end else "length")
    assert stopped > 0
    assert same >= len(unbounded) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
def test_a_context_of_32k(family: str, dtype: torch.dtype) -> None:
    """30,000 tokens of prompt and 64 more are the likeliest ones of the whole row through the trunk."""
    shape: dict[str, object] = dict(  # noqa: C408
        max_position_embeddings=32768, vocab_size=1024, hidden_size=256, initializer_range=0.06
    )
    wide = {"qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "kv_lora_rank": 64}
    policy = tiny_policy(**shape, **wide) if family == "deepseek_v3" else tiny_llama(**shape, num_key_value_heads=4)
    policy = cast_weights(policy, dtype).to("cuda")
    prompt = torch.randint(3, 1024, (30_000,), generator=torch.Generator().manual_seed(0)).tolist()
    engine = BuiltinEngine(policy, EngineConfig(cache_gib=1.0))
    [[completion]] = engine.generate([prompt], 1, SamplingParams(max_completion_length=64, temperature=0.0))
    assert len(completion.token_ids) == 64
    with torch.no_grad():
        row = torch.tensor([*prompt, *completion.token_ids], device="cuda")
        rows = PackedRows.of([len(row)], "cuda")
        hidden_NC = policy(row, rows.position_ids_N, Expanded(rows=rows)).hidden_NC
        logits = policy.project(hidden_NC[len(prompt) - 1 : -1])
    said = torch.tensor(completion.token_ids, device="cuda")
    # By how much a token lost, in deviations of the logits: rounding decides between neighbours, no more.
    lost = (logits.max(dim=-1).values - logits.gather(1, said[:, None]).squeeze(1)) / logits.std(dim=-1)
    assert lost.max() < (1e-3 if dtype == torch.float32 else 0.2)


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


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, {"top_p": 0.8}], ids=str)
@pytest.mark.parametrize(("num_drafts", "num_modules"), [(1, 1), (3, 1), (2, 2)])
def test_speculation_gives_the_completions_of_plain_decoding(
    num_drafts: int, num_modules: int, changes: dict[str, float]
) -> None:
    """In fp32; rounds replayed as graphs, one after another or a look of the host between them."""
    policy = drafting_policy(num_modules).to("cuda")
    params = SamplingParams(max_completion_length=30, stop_token_ids=(2, 9), **changes)  # type: ignore[arg-type]
    wanted = [[c.token_ids for c in group] for group in generate(policy, params)]
    speculative = {"num_speculative_tokens": num_drafts, "max_batch": 1000}
    for settings in ({}, {"run_ahead": 1}, {"run_ahead": 16}, {"max_num_seqs": 3}):
        config = {"block_size": 4, "cache_gib": 0.1, "speculative": speculative} | settings
        engine = BuiltinEngine(policy, EngineConfig.model_validate(config))
        for _ in range(2):  # the second call finds its graphs
            got = [[c.token_ids for c in group] for group in engine.generate(PROMPTS, 3, params)]
            same = [a == b for x, y in zip(got, wanted, strict=True) for a, b in zip(x, y, strict=True)]
            assert sum(same) >= len(same) - 1, settings
        # Nearly as many drafts are right as on the CPU, so that the modules were fed what they should be.
        on_cpu = BuiltinEngine(copy.deepcopy(policy).to("cpu"), EngineConfig.model_validate(config))
        on_cpu.generate(PROMPTS, 3, params)
        assert engine.num_accepted / 2 == pytest.approx(on_cpu.num_accepted, rel=0.1)


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
