"""Draws against the distribution they claim to come from.

Shapes: B sequences, V vocabulary.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rollouts.sampler import WIDE, Sampled, mix, truncate, uniforms
from rollouts.sampler import sample as sample_tensors
from rollouts.types import SamplingParams

MASK = 2**64 - 1


def sample(logits_BV: Tensor, seeds: np.ndarray, counters: np.ndarray, params: SamplingParams) -> Sampled:
    return sample_tensors(logits_BV, torch.from_numpy(seeds.view(np.int64)), torch.from_numpy(counters), params)


def params_of(**changes: float) -> SamplingParams:
    return SamplingParams(**{"max_completion_length": 1} | changes)


def splitmix(seed: int, index: int) -> int:
    """SplitMix64 in plain integers: `nextSeed` taken index + 1 times, then `mix64variant13` (Steele et al., 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def seed_that_draws(bits: int) -> int:
    """The seed whose first number is exactly bits * 2^-53: SplitMix64 turned back."""

    def unshift(z: int, shift: int) -> int:
        result = z
        for _ in range(64 // shift):
            result = z ^ (result >> shift)
        return result

    z = unshift(bits << 11, 31)
    z = unshift(z * pow(0x94D049BB133111EB, -1, 2**64) & MASK, 27)
    z = unshift(z * pow(0xBF58476D1CE4E5B9, -1, 2**64) & MASK, 30)
    return (z - 0x9E3779B97F4A7C15) & MASK


def test_mix_is_splitmix64() -> None:
    """The reference's first numbers for seed 1234567, and plain integers for others."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix(1234567, np.arange(3)).tolist() == known
    for seed in (0, 1, 2**63 - 1, 2**63, MASK):
        assert mix(seed, np.arange(4)).tolist() == [splitmix(seed, i) for i in range(4)]
    seeds = np.array([3, MASK, 2**63], dtype=np.uint64)
    assert mix(seeds, np.array([0, 5, 9])).tolist() == [splitmix(s, i) for s, i in ((3, 0), (MASK, 5), (2**63, 9))]


@pytest.mark.parametrize("bits", [0, 1, 12345678901234, 2**53 - 1])
def test_uniforms_reach_from_0_to_just_below_1(bits: int) -> None:
    value = uniforms(np.array([seed_that_draws(bits)], dtype=np.uint64), np.array([0]))
    assert value.dtype == np.float64
    assert value.item() == bits * 2.0**-53 < 1


def test_uniforms_are_even_and_uncorrelated() -> None:
    seeds = np.repeat(np.arange(100, dtype=np.uint64), 200)
    values = uniforms(seeds, np.tile(np.arange(200), 100))
    assert len(np.unique(values)) == len(values)
    counts = np.histogram(values, bins=50, range=(0, 1))[0]
    assert p_value(counts, np.full(50, 1 / 50)) > 0.01
    grid = values.reshape(100, 200)
    for pair in ((grid[:, :-1], grid[:, 1:]), (grid[:-1], grid[1:])):  # neighbours in a stream; neighbouring streams
        assert abs(np.corrcoef(pair[0].ravel(), pair[1].ravel())[0, 1]) < 0.03


def p_value(counts: np.ndarray, probability: np.ndarray) -> float:
    """Of Pearson's chi-square test; cells of probability 0 must be empty."""
    assert counts[probability == 0].sum() == 0
    expected = probability[probability > 0] * counts.sum()
    assert expected.min() > 5
    statistic = float(((counts[probability > 0] - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))


LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.2, -2.0, 0.0, 1.9, -0.4, 0.8, -1.5])


def truncated_by_hand(logits_V: Tensor, params: SamplingParams) -> np.ndarray:
    """The probabilities that are left, in lists and fp64: top-k, then min-p, then top-p of what is left."""
    logits = (logits_V.double() / params.temperature).tolist()
    weights = [math.exp(logit - max(logits)) for logit in logits]
    ranking = sorted(range(len(weights)), key=lambda v: -weights[v])
    kept = ranking[: params.top_k] if params.top_k else ranking
    kept = [v for v in kept if weights[v] >= params.min_p * weights[ranking[0]]]
    total, nucleus, mass = sum(weights[v] for v in kept), [], 0.0
    for v in kept:
        if mass >= params.top_p:
            break
        nucleus.append(v)
        mass += weights[v] / total
    left = np.zeros(len(weights))
    left[nucleus] = [weights[v] for v in nucleus]
    return left / left.sum()


TRUNCATIONS = [
    {}, {"temperature": 0.7}, {"temperature": 1.5}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2},
    {"top_k": 6, "min_p": 0.15, "top_p": 0.9, "temperature": 1.3},
]  # fmt: skip


@pytest.mark.parametrize("changes", TRUNCATIONS, ids=str)
def test_draws_follow_the_distribution(changes: dict[str, float]) -> None:
    params, draws = params_of(**changes), 20_000
    sampled = sample(
        LOGITS.expand(draws, -1), np.arange(draws, dtype=np.uint64), np.zeros(draws, dtype=np.int64), params
    )
    wanted = truncated_by_hand(LOGITS, params)
    counts = torch.bincount(sampled.token_ids_B, minlength=len(LOGITS)).numpy()
    assert p_value(counts, wanted) > 0.01
    assert sampled.logprobs_B.exp().numpy() == pytest.approx(wanted[sampled.token_ids_B.numpy()], rel=1e-5)
    assert sampled.finite_B.all()


@pytest.mark.parametrize("changes", [{}, {"top_k": 40}])
def test_a_wide_vocabulary_is_drawn_from_alike(changes: dict[str, float]) -> None:
    """In two stages or in one: the same tokens, but where rounding moves a bound past a draw."""
    draws, width = 500, WIDE + 3
    logits_BV = 4 * torch.randn(1, width, generator=torch.Generator().manual_seed(0)).expand(draws, -1)
    seeds, counters = np.arange(draws, dtype=np.uint64), np.zeros(draws, dtype=np.int64)
    sampled = sample(logits_BV, seeds, counters, params_of(**changes))
    mass_BV = truncate(logits_BV, params_of(**changes)).double().softmax(dim=-1)
    ends_BV = mass_BV.cumsum(dim=-1)
    drawn_B1, uniform_B = sampled.token_ids_B[:, None], torch.from_numpy(uniforms(seeds, counters))
    end_B = ends_BV.gather(1, drawn_B1).squeeze(1)
    assert (uniform_B < end_B + 1e-6).all()
    assert (uniform_B > end_B - mass_BV.gather(1, drawn_B1).squeeze(1) - 1e-6).all()
    assert (mass_BV.gather(1, drawn_B1) > 0).all()
    assert len(sampled.token_ids_B.unique()) > 15


@pytest.mark.parametrize("bits", [0, 2**53 - 1])
def test_the_ends_of_a_wide_vocabulary_are_never_drawn_where_impossible(bits: int) -> None:
    logits_V = torch.full((2 * WIDE,), float("-1e9"))
    logits_V[[700, 701, 5000]] = torch.tensor([0.1, 1.0, -0.3])
    sampled = sample(logits_V[None], np.array([seed_that_draws(bits)], dtype=np.uint64), np.zeros(1, int), params_of())
    assert sampled.token_ids_B.tolist() == [5000 if bits else 700]


def test_a_wrong_distribution_is_found_out() -> None:
    """The same test, told that the temperature was 1.05."""
    draws = 20_000
    sampled = sample(LOGITS.expand(draws, -1), np.arange(draws, dtype=np.uint64), np.zeros(draws, int), params_of())
    counts = torch.bincount(sampled.token_ids_B, minlength=len(LOGITS)).numpy()
    assert p_value(counts, truncated_by_hand(LOGITS, params_of(temperature=1.05))) < 0.01


@pytest.mark.parametrize("top_k", [0, 1, 7, 40, 60])
@pytest.mark.parametrize("top_p", [0.05, 0.6, 0.95, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5])
def test_truncation_equals_brute_force(top_k: int, top_p: float, min_p: float) -> None:
    params = params_of(top_k=top_k, top_p=top_p, min_p=min_p)
    logits_BV = 2 * torch.randn(8, 40, generator=torch.Generator().manual_seed(top_k))
    got_BV = truncate(logits_BV, params)
    for got_V, logits_V in zip(got_BV, logits_BV, strict=True):
        wanted = truncated_by_hand(logits_V, params)
        assert np.array_equal(got_V.isfinite().numpy(), wanted > 0)
        assert torch.equal(got_V[got_V.isfinite()], logits_V[got_V.isfinite()])
        assert got_V.softmax(-1).numpy() == pytest.approx(wanted, abs=1e-6)


def test_tokens_as_likely_as_the_kth_stay_with_it() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert truncate(logits_BV, params_of(top_k=2)).isfinite().tolist() == [[False, True, True, True, False]]


def test_a_draw_depends_on_its_own_seed_and_counter_only() -> None:
    logits_BV = torch.randn(30, 50, generator=torch.Generator().manual_seed(0))
    seeds, counters = np.arange(30, dtype=np.uint64) * 7, np.arange(30) % 4
    together = sample(logits_BV, seeds, counters, params_of(top_p=0.9))
    again = sample(logits_BV, seeds, counters, params_of(top_p=0.9))
    assert torch.equal(together.token_ids_B, again.token_ids_B)
    for b in range(30):
        alone = sample(logits_BV[b : b + 1], seeds[b : b + 1], counters[b : b + 1], params_of(top_p=0.9))
        assert alone.token_ids_B.item() == together.token_ids_B[b].item()
        assert alone.logprobs_B.item() == pytest.approx(together.logprobs_B[b].item(), abs=1e-6)
    other = sample(logits_BV, seeds, counters + 1, params_of(top_p=0.9))
    assert not torch.equal(together.token_ids_B, other.token_ids_B)


EDGES = [0, 1, 2**52, 2**53 - 2, 2**53 - 1]


@pytest.mark.parametrize("bits", EDGES)
@pytest.mark.parametrize("possible", [[4], [0, 9], [3, 5, 6], [9], [0]], ids=str)
def test_impossible_tokens_are_never_drawn_even_at_the_edges(bits: int, possible: list[int]) -> None:
    """Probability exactly 0 first, last and between, under totals that rounding leaves on either side of 1."""
    generator = torch.Generator().manual_seed(0)
    logits_BV = torch.full((200, 10), -1e4)
    logits_BV[:, possible] = 3 * torch.randn(200, len(possible), generator=generator)
    seeds = np.full(200, seed_that_draws(bits), dtype=np.uint64)
    sampled = sample(logits_BV, seeds, np.zeros(200, dtype=np.int64), params_of())
    assert set(sampled.token_ids_B.tolist()) <= set(possible)
    assert sampled.logprobs_B.isfinite().all()
    if bits in (0, 2**53 - 1):
        assert set(sampled.token_ids_B.tolist()) == {min(possible) if bits == 0 else max(possible)}


@pytest.mark.parametrize("bits", EDGES)
def test_truncated_tokens_are_never_drawn_even_at_the_edges(bits: int) -> None:
    logits_BV = torch.randn(100, 50, generator=torch.Generator().manual_seed(0))
    params = params_of(top_k=5)
    seeds = np.full(100, seed_that_draws(bits), dtype=np.uint64)
    sampled = sample(logits_BV, seeds, np.zeros(100, dtype=np.int64), params)
    kept_B5 = logits_BV.topk(5).indices
    assert (kept_B5 == sampled.token_ids_B[:, None]).any(dim=1).all()


def test_greedy_takes_the_likeliest_and_draws_from_a_point_mass() -> None:
    logits_BV = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    sampled = sample(logits_BV, np.arange(20, dtype=np.uint64), np.zeros(20, dtype=np.int64), params_of(temperature=0))
    assert torch.equal(sampled.token_ids_B, logits_BV.argmax(dim=1))
    assert not sampled.logprobs_B.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_not_numbers_are_reported_and_spoil_no_other(bad: float, temperature: float) -> None:
    logits_BV = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    params, seeds, counters = params_of(temperature=temperature), np.arange(3, dtype=np.uint64), np.zeros(3, dtype=int)
    clean = sample(logits_BV, seeds, counters, params)
    logits_BV[1, 4] = bad
    sampled = sample(logits_BV, seeds, counters, params)
    assert sampled.finite_B.tolist() == [True, False, True]
    assert torch.equal(sampled.token_ids_B[[0, 2]], clean.token_ids_B[[0, 2]])
    assert 0 <= sampled.token_ids_B[1] < 10


def test_sequences_may_draw_from_the_logits_of_another_row() -> None:
    logits_RV = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    row_of_B, seeds, counters = torch.tensor([2, 0, 0, 1, 2]), torch.arange(5), torch.zeros(5, dtype=torch.int64)
    shared = sample_tensors(logits_RV, seeds, counters, params_of(), row_of_B)
    own = sample_tensors(logits_RV[row_of_B], seeds, counters, params_of())
    assert torch.equal(shared.token_ids_B, own.token_ids_B)
    assert torch.equal(shared.logprobs_B, own.logprobs_B)


@pytest.mark.parametrize("changes", [{}, {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.3}])
def test_the_kernel_draws_as_the_plain_form(changes: dict[str, float]) -> None:
    logits_BV = 3 * torch.randn(32, 61, generator=torch.Generator().manual_seed(0))
    seeds, counters = np.arange(7, 39, dtype=np.uint64), np.arange(32)
    by_feature_BV = logits_BV.t().contiguous().t()
    plain = sample(logits_BV.double(), seeds, counters, params_of(**changes))  # which no kernel takes
    for logits in (logits_BV, by_feature_BV):
        drawn = sample(logits, seeds, counters, params_of(**changes))
        assert torch.equal(drawn.token_ids_B, plain.token_ids_B)
        torch.testing.assert_close(drawn.logprobs_B.double(), plain.logprobs_B, atol=1e-5, rtol=0)
        assert drawn.finite_B.all()
    logits_BV[3, 7] = float("nan")
    assert sample(logits_BV, seeds, counters, params_of(**changes)).finite_B.tolist() == [b != 3 for b in range(32)]


@pytest.mark.parametrize("rows", [1, 19])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_that_lie_token_by_token_give_the_same_draws(rows: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BV = 3 * torch.randn(WIDE + 77, 32, generator=generator).t()[:rows]
    seeds, counters = np.arange(rows, dtype=np.uint64), np.arange(rows)
    params = params_of(temperature=temperature)
    mine = sample(logits_BV, seeds, counters, params)
    theirs = sample(torch.cat((logits_BV, logits_BV))[:rows], seeds, counters, params)
    assert torch.equal(mine.token_ids_B, theirs.token_ids_B)
    torch.testing.assert_close(mine.logprobs_B, theirs.logprobs_B, atol=1e-5, rtol=0)
    assert mine.finite_B.all()
    for fault in (float("nan"), float("inf"), float("-inf")):
        spoiled_BV = logits_BV.clone()
        spoiled_BV[rows - 1, 5] = fault
        finite_B = sample(spoiled_BV, seeds, counters, params).finite_B
        assert finite_B.tolist() == [True] * (rows - 1) + [False]
