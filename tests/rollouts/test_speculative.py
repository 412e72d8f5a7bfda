"""Speculation changes how many passes it takes, and nothing else.

Shapes: N packed tokens, S positions of a row, V vocabulary.
"""

import itertools
from typing import cast

import numpy as np
import pytest
import torch

from policy import PackedRows, Policy
from policy.attention import Expanded
from policy.block import Block
from policy.mtp import MultiTokenPredictor
from rollouts import Completion, EngineConfig, EngineError, SamplingError, SamplingParams, make_engine
from rollouts.builtin_engine import BuiltinEngine
from rollouts.model_runner import ModelRunner
from rollouts.sampler import mix, sample
from rollouts.scheduler import RunningBatch
from rollouts.sequence import Chunk, Prefill, Sequence
from rollouts.speculative import PROBE, Speculator
from tests.policies import tiny_policy

# One shorter than any window, one that ends with a block of 4, one longer than a prefill of 20.
PROMPTS = [[5, 9, 11, 3], list(range(3, 20)), [7] * 8, [40], list(range(20, 52))]
# Alike for 21 tokens and for 13; one ends where the others go on.
ALIKE = [[*range(10, 31), 3, 4, 5], [*range(10, 31), 5, 6], [*range(10, 23), 7, 8], [*range(10, 31)], [40]]


def quieten(policy: Policy, share: float) -> Policy:
    """Scale what blocks add, and let each module begin with the next token's embedding: with a share of 0 the module
    says just what the trunk will say, with a small one often."""
    blocks = [cast(Block, layer) for layer in policy.layers]
    modules = [cast(MultiTokenPredictor, module) for module in policy.mtp]
    with torch.no_grad():
        for block in blocks + [module.block for module in modules]:
            for name, weight in block.named_parameters():
                if "o_proj" in name or "down_proj" in name:
                    weight.mul_(share)
        for module in modules:
            module.eh_proj.weight.zero_()
            module.eh_proj.weight[:, : policy.config.hidden_size].fill_diagonal_(1.0)
    return policy


def drafting_policy(num_modules: int = 1, share: float = 0.3, vocab_size: int = 61) -> Policy:
    return quieten(tiny_policy(num_nextn_predict_layers=num_modules, vocab_size=vocab_size), share)


def engine_of(
    policy: Policy, num_drafts: int, changes: dict[str, object] | None = None, *, max_batch: int = 1000
) -> BuiltinEngine:
    speculative = {"num_speculative_tokens": num_drafts, "max_batch": max_batch}
    return BuiltinEngine(policy, EngineConfig.model_validate({"speculative": speculative} | (changes or {})))


def cache_of(policy: Policy, num_blocks: int, block_size: int = 4) -> dict[str, object]:
    block_bytes = policy.config.num_cache_layers * block_size * policy.config.cache_width * 4
    return {"block_size": block_size, "cache_gib": num_blocks * block_bytes / 2**30}


def check_equal(got: list[list[Completion]], wanted: list[list[Completion]]) -> None:
    for ours, theirs in zip(itertools.chain(*got), itertools.chain(*wanted), strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.finish_reason == theirs.finish_reason
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


@pytest.mark.parametrize(("num_drafts", "num_modules"), [(1, 1), (3, 1), (2, 2), (1, 2), (4, 2)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8}, {"min_p": 0.1}],
    ids=["plain", "greedy", "top_k", "top_p", "min_p"],
)
def test_completions_are_those_of_plain_decoding(changes: dict[str, float], num_drafts: int, num_modules: int) -> None:
    policy = drafting_policy(num_modules)
    params = SamplingParams(**{"max_completion_length": 30, "stop_token_ids": (2, 9, 17), "seed": 3} | changes)  # type: ignore[arg-type]
    wanted = make_engine(policy, EngineConfig()).generate(PROMPTS, 3, params)
    engine = engine_of(policy, num_drafts)
    check_equal(engine.generate(PROMPTS, 3, params), wanted)
    assert 0 < engine.num_accepted < engine.num_drafted


@pytest.mark.parametrize("max_batch", [1000, 6])
@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_settings_that_must_not_matter_do_not(block_size: int, max_batch: int) -> None:
    """Few rows, small blocks, batches for which it drafts only once they have shrunk."""
    policy = drafting_policy(2)
    params = SamplingParams(max_completion_length=30, stop_token_ids=(2, 9), seed=4)
    wanted = make_engine(policy, EngineConfig()).generate(PROMPTS, 5, params)
    config: dict[str, object] = {"max_num_seqs": 11, "block_size": block_size, "max_num_batched_tokens": 20}
    engine = engine_of(policy, 3, config, max_batch=max_batch)
    check_equal(engine.generate(PROMPTS, 5, params), wanted)
    assert engine.num_accepted > 0


def count_naively(
    policy: Policy, prompt: list[int], token_ids: list[int], seed: int, num_drafts: int, first: int = 1
) -> list[int]:
    """[drafted, accepted] of a completion that has `first` tokens when speculation begins: every draft comes from the
    modules over the whole true row."""
    row_S = torch.tensor(prompt + token_ids)
    rows = PackedRows.of([len(row_S)])
    with torch.no_grad():
        hidden_SC = policy(row_S, rows.position_ids_N, Expanded(rows=rows)).hidden_NC
        ahead = [policy.project(each.hidden_NC) for each in policy.predict_ahead(hidden_SC, row_S.roll(-1), rows)]
    drafted, accepted, cached = 0, 0, len(prompt) + first - 1
    params = SamplingParams(max_completion_length=1)
    while cached + 1 < len(row_S):
        drafted += num_drafts
        agreed = 0
        while agreed < num_drafts and cached + 1 + agreed < len(row_S):
            counter = torch.tensor([cached + 1 + agreed - len(prompt)])
            seeds = torch.from_numpy(np.array([seed], dtype=np.uint64).view(np.int64))
            draft = sample(ahead[agreed][cached - 1][None], seeds, counter, params).token_ids_B
            if int(draft) != int(row_S[cached + 1 + agreed]):
                break
            agreed += 1
        accepted += agreed
        cached += agreed + 1
    return [drafted, accepted]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("config", ["plain", "small_blocks", "preemption", "late", "parts", "alike", "alike_parts"])
def test_drafts_are_those_of_the_modules_over_whole_rows(config: str, depth: int) -> None:
    """So no row of the modules' cache is missing, stale, or another sequence's, whatever happened on the way."""
    policy = drafting_policy(depth)
    params = SamplingParams(max_completion_length=40, stop_token_ids=(2,), seed=5)
    changes: dict[str, dict[str, object]] = {
        "plain": {},
        "small_blocks": {"block_size": 1},
        "preemption": cache_of(policy, 24),
        "late": {"max_num_seqs": 8, "block_size": 4},
        "parts": {"max_num_batched_tokens": 5, "block_size": 4},
        "alike": {"block_size": 4},
        "alike_parts": {"max_num_batched_tokens": 5, "block_size": 2},
    }
    engine = engine_of(policy, depth, changes[config])
    prompts = ALIKE if "alike" in config else PROMPTS
    if prompts is ALIKE:  # what the first call left is found by the second
        engine.generate(prompts, 1, SamplingParams(max_completion_length=3))
        assert engine.num_cached_tokens > 0
        engine.num_drafted = engine.num_accepted = 0
    groups = engine.generate(prompts, 4, params)
    counts = [
        count_naively(policy, prompt, list(completion.token_ids), int(mix(int(mix(params.seed, p)), g)), depth)
        for p, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        for g, completion in enumerate(group)
    ]
    drafted, accepted = np.sum(counts, axis=0).tolist()
    assert 0 < accepted < drafted
    assert engine.num_drafted == drafted or config == "preemption"  # stepping back begins a round elsewhere
    assert abs(engine.num_accepted - accepted) <= (0.1 * accepted if config == "preemption" else 0)
    assert (engine.num_preemptions > 0) == (config == "preemption")
    check_equal(groups, make_engine(policy, EngineConfig()).generate(prompts, 4, params))


@pytest.mark.parametrize("most", [5, 8192])
def test_a_beginning_that_the_modules_never_saw_is_read_again_before_it_is_drafted_for(most: int) -> None:
    """A batch too large to draft for leaves its prompts in the cache without the modules' rows."""
    policy, prompt, seeds = drafting_policy(2), ALIKE[0], [11, 12, 13]
    params = SamplingParams(max_completion_length=20)
    engine = engine_of(policy, 2, {"block_size": 4, "max_num_batched_tokens": most}, max_batch=1)
    engine.generate([prompt], 2, params)  # both end at once
    assert engine.num_drafted == 0
    completions = [engine.generate([prompt], 1, params, prompt_seeds=[seed])[0][0] for seed in seeds]
    assert engine.num_cached_tokens == 3 * 20
    counts = [
        count_naively(policy, prompt, list(completion.token_ids), int(mix(seed, 0)), 2)
        for seed, completion in zip(seeds, completions, strict=True)
    ]
    assert [engine.num_drafted, engine.num_accepted] == np.sum(counts, axis=0).tolist()
    assert engine.num_accepted > 0


@pytest.mark.parametrize("most", [5, 8192])
@pytest.mark.parametrize("depth", [1, 2])
def test_what_was_decoded_plainly_is_read_again_before_it_is_drafted_for(depth: int, most: int) -> None:
    policy = drafting_policy(depth)
    prompt, seed = PROMPTS[2], 11
    params = SamplingParams(max_completion_length=60, stop_token_ids=(2, 9, 17))
    engine = engine_of(policy, depth, {"block_size": 4, "max_num_batched_tokens": most}, max_batch=1)
    group = engine.generate([prompt], 2, params, prompt_seeds=[seed])[0]
    lengths = [len(completion.token_ids) for completion in group]
    last, both = int(np.argmax(lengths)), min(lengths)  # they go together until one of them ends
    assert 3 < both < max(lengths) - 10
    wanted = count_naively(policy, prompt, list(group[last].token_ids), int(mix(seed, last)), depth, first=both)
    assert [engine.num_drafted, engine.num_accepted] == wanted
    assert engine.num_accepted > 0


@pytest.mark.parametrize(("num_drafts", "num_modules"), [(1, 1), (3, 1), (3, 3)])
def test_a_module_that_says_what_the_trunk_says_is_always_accepted(num_drafts: int, num_modules: int) -> None:
    policy = drafting_policy(num_modules, share=0.0)
    engine = engine_of(policy, num_drafts)
    params = SamplingParams(max_completion_length=1 + 8 * (num_drafts + 1))
    engine.generate(PROMPTS, 3, params)
    assert engine.num_drafted == 15 * 8 * num_drafts  # 8 rounds after the first token of each
    assert engine.num_accepted == engine.num_drafted


def test_tokens_are_distributed_as_the_trunk_says() -> None:
    """All triples over a small vocabulary: chi-square against the product of the trunk's own probabilities."""
    policy = drafting_policy(vocab_size=5)
    count, vocabulary = 4000, policy.config.vocab_size
    engine = engine_of(policy, 1, {"max_num_seqs": count}, max_batch=count)
    groups = engine.generate([[1, 3]], count, SamplingParams(max_completion_length=3, seed=11))
    triples = list(itertools.product(range(vocabulary), repeat=3))
    with torch.no_grad():
        log_all = policy.logits(torch.tensor([[1, 3, *triple] for triple in triples])).log_softmax(-1)
    expected = [count * float(log_all[n, [1, 2, 3], list(triple)].sum().exp()) for n, triple in enumerate(triples)]
    assert sum(expected) == pytest.approx(count, rel=1e-4)
    assert 0.1 < engine.num_accepted / engine.num_drafted < 0.9
    seen = dict.fromkeys(triples, 0)
    for completion in groups[0]:
        seen[tuple(completion.token_ids)] += 1
    # Triples that are seldom expected are taken together, as the approximation wants.
    bins: list[list[float]] = [[0.0, 0.0]]
    for wanted, triple in sorted(zip(expected, triples, strict=True)):
        if bins[-1][1] >= 8:
            bins.append([0.0, 0.0])
        bins[-1][0] += seen[triple]
        bins[-1][1] += wanted
    statistic = sum((got - wanted) ** 2 / wanted for got, wanted in bins)
    freedom = len(bins) - 1
    assert freedom > 30
    assert statistic < freedom + 3 * (2 * freedom) ** 0.5  # about one in 500 draws lies above


def test_drafting_that_does_not_pay_is_given_up() -> None:
    policy = tiny_policy(num_nextn_predict_layers=1)
    with torch.no_grad():
        cast(MultiTokenPredictor, policy.mtp[0]).eh_proj.weight.zero_()  # it says the same whatever it sees
    params = SamplingParams(max_completion_length=60, seed=2)
    engine = engine_of(policy, 2)
    check_equal(engine.generate(PROMPTS, 10, params), make_engine(policy, EngineConfig()).generate(PROMPTS, 10, params))
    assert PROBE <= engine.num_drafted / 2 < PROBE + 50
    paying = engine_of(drafting_policy(share=0.0), 2)
    paying.generate(PROMPTS, 10, params)
    assert paying.num_drafted == 50 * 20 * 2


def test_larger_batches_are_not_drafted_for() -> None:
    engine = engine_of(drafting_policy(), 1, max_batch=4)
    engine.generate(PROMPTS, 1, SamplingParams(max_completion_length=9))
    assert engine.num_drafted == 0
    engine.generate(PROMPTS[:4], 1, SamplingParams(max_completion_length=9))
    assert engine.num_drafted > 0


def test_nan_aborts_the_sequences_it_meets_and_spoils_no_other() -> None:
    good, bad = [[5, 4], [7, 8, 9]], [60, 4, 5, 6, 7, 8]
    params = SamplingParams(max_completion_length=20, stop_token_ids=(60,), seed=1)
    policy = drafting_policy()
    wanted = make_engine(policy, EngineConfig()).generate(good, 3, params, prompt_seeds=[1, 2])
    with torch.no_grad():
        policy.embed_tokens.weight[60] = float("nan")
    engine = engine_of(policy, 2, {"block_size": 4})
    for _ in range(2):
        *others, aborted = engine.generate([*good, bad], 3, params, prompt_seeds=[1, 2, 3])
        assert [(c.token_ids, c.finish_reason) for c in aborted] == [([], "abort")] * 3
        check_equal(others, wanted)


def test_a_policy_without_modules_is_refused() -> None:
    with pytest.raises(EngineError, match="num_speculative_tokens is 2, but the policy has no MTP modules"):
        engine_of(tiny_policy(), 2)


def test_a_cache_that_holds_the_least_is_enough_and_one_block_less_is_refused() -> None:
    policy = drafting_policy()
    params = SamplingParams(max_completion_length=7)
    prompt = list(range(3, 8))  # 12 tokens in 3 blocks; the window of 2 reaches into 2 of them
    wanted = make_engine(policy, EngineConfig()).generate([prompt], 3, params)
    check_equal(engine_of(policy, 1, cache_of(policy, 5)).generate([prompt], 3, params), wanted)
    with pytest.raises(SamplingError, match=r"one sequence of 12 tokens needs"):
        engine_of(policy, 1, cache_of(policy, 4)).generate([prompt], 3, params)


def test_rounds_that_run_ahead_are_rounds_with_looks_between() -> None:
    policy, prompts = drafting_policy(share=0.05), PROMPTS[:3]
    params, rows = SamplingParams(max_completion_length=60, temperature=0.3), np.arange(len(prompts))

    def decode(looks: list[int]) -> tuple[RunningBatch, list[int]]:
        """And how many tokens were drafted and accepted."""
        runner = ModelRunner(policy, 60, 4, 20, policy.config.num_cache_layers)
        speculator = Speculator(runner, 2, 100, len(prompts), 8192)
        running = RunningBatch(len(prompts), 20, params.max_completion_length)
        blocks = [np.arange(20) + 20 * row for row in rows]
        prefills = [Prefill(token_ids=prompts[row], sequences=[], blocks=blocks[row]) for row in rows]
        chunks = [Chunk(prefill=prefill, begin=0, end=len(prefill.token_ids)) for prefill in prefills]
        read, tails = speculator.read(chunks)
        for row, prefill in enumerate(prefills):
            prefill.tail_WC = tails[row]
            sequence = Sequence(place=row, prompt=prefill.token_ids, seed=row)
            running.add(sequence, len(prefill.token_ids), blocks[row])
            speculator.begin(running, [(row, prefill)])
        first_1B = runner.logits_after(read).argmax(dim=-1).numpy()[None]
        zero_1B = np.zeros((1, len(prompts)), dtype=np.float32)
        running.push_tokens(rows, first_1B, zero_1B, (), 60)
        counts = []
        for num_rounds in looks:
            drafted = speculator.decode(running, params, num_rounds)
            kept_B = running.push_tokens(rows, drafted.token_ids_TB, drafted.logprobs_TB, (), 60, drafted.valid_B)
            running.length += kept_B
            counts.append(speculator.count(drafted.accepted_IB, kept_B))
        return running, np.sum(counts, axis=0).tolist()

    with torch.inference_mode():
        (ahead, drafts_ahead), (looked, drafts_looked) = decode([5, 3]), decode([1] * 8)
    assert ahead.token_ids.tolist() == looked.token_ids.tolist()
    assert ahead.count.tolist() == looked.count.tolist()
    assert drafts_ahead == drafts_looked
    assert drafts_ahead[0] == 8 * 2 * len(prompts)
    assert drafts_ahead[1] > 0


def test_no_more_rounds_run_ahead_than_what_is_left_may_take() -> None:
    policy = drafting_policy()
    speculator = Speculator(ModelRunner(policy, 4, 4, 2, policy.config.num_cache_layers), 3, 100, 2, 8192)
    assert speculator.rounds_for(7) == 7
    speculator.count(np.array([[3, 0], [2, 0]]), np.array([7, 1]))  # 3 rounds gave 8 tokens
    assert [speculator.rounds_for(left) for left in (1, 2, 3, 8, 9)] == [1, 1, 2, 3, 4]
