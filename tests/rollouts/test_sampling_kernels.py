"""The sampling kernel against the plain sampler, by Triton's interpreter or on the GPU.

Shapes: B sequences, R rows of logits, V vocabulary.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from rollouts.sampler import Sampled, sample
from rollouts.types import SamplingParams

pytest.importorskip("triton")

from rollouts import sampling_kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT, VOCABULARY = 48, 61


def draw() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, whose row each sequence reads, seeds and counters."""
    logits_RV = 3 * torch.randn(10, VOCABULARY, generator=torch.Generator().manual_seed(0))
    seeds = np.random.default_rng(0).integers(0, 2**64, COUNT, dtype=np.uint64)
    return logits_RV, torch.arange(COUNT) % 10, torch.from_numpy(seeds.view(np.int64)), torch.arange(COUNT)


def by_kernel(logits_RV: Tensor, temperature: float, *, is_truncated: bool = False, block: int = 64) -> Sampled:
    _, row_of_B, seeds_B, counters_B = draw()
    tokens_B, logprobs_B, finite_B = sampling_kernels.sample(
        logits_RV.to(DEVICE), row_of_B.to(DEVICE), seeds_B.to(DEVICE), counters_B.to(DEVICE),
        1 / (temperature or 1.0), is_greedy=temperature == 0, is_truncated=is_truncated, block=block,
    )  # fmt: skip
    return Sampled(token_ids_B=tokens_B.cpu(), logprobs_B=logprobs_B.cpu(), finite_B=finite_B.cpu())


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_kernel_draws_what_the_plain_sampler_draws(temperature: float, block: int) -> None:
    logits_RV, row_of_B, seeds_B, counters_B = draw()
    params = SamplingParams(max_completion_length=1, temperature=temperature)
    wanted = sample(logits_RV, seeds_B, counters_B, params, row_of_B)
    got = by_kernel(logits_RV, temperature, block=block)
    assert torch.equal(got.token_ids_B, wanted.token_ids_B)
    assert (got.logprobs_B - wanted.logprobs_B).abs().max() < 1e-5
    assert got.finite_B.all()


def test_a_sequence_without_a_row_named_draws_from_its_own() -> None:
    logits_RV, _, seeds_B, counters_B = (x[:5].to(DEVICE) for x in draw())
    rows_B = torch.arange(5, device=DEVICE)
    ours, named = (
        sampling_kernels.sample(logits_RV, rows, seeds_B, counters_B, 1.0, is_greedy=False, is_truncated=False)
        for rows in (None, rows_B)
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, named, strict=True))


def test_tokens_ruled_out_are_never_drawn() -> None:
    logits_RV = draw()[0]
    logits_RV[:, ::3] = float("-inf")
    got = by_kernel(logits_RV, 1.0, is_truncated=True)
    assert got.finite_B.all()
    assert (got.token_ids_B % 3 != 0).all()
    assert got.logprobs_B.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_numbers_are_reported_and_spoil_no_other(bad: float, temperature: float) -> None:
    logits_RV, row_of_B, _, _ = draw()
    clean = by_kernel(logits_RV, temperature)
    logits_RV[3, 5] = bad
    got = by_kernel(logits_RV, temperature)
    assert torch.equal(got.finite_B, row_of_B != 3)
    assert torch.equal(got.token_ids_B[row_of_B != 3], clean.token_ids_B[row_of_B != 3])
    assert ((got.token_ids_B >= 0) & (got.token_ids_B < VOCABULARY)).all()
