"""Scores of tokens by slices of the vocabulary against the plain formula: values, gradients, memory.

Shapes: N tokens, C model width, V vocabulary.
"""

import pytest
import torch
from torch import Tensor

from policy.head import WIDENED_ROWS, project, score_tokens

N, C, V = 9, 12, 50


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_NC = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_VC = torch.randn(V, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    token_ids_N = torch.randint(0, V, (N,), generator=generator)
    token_ids_N[:2] = torch.tensor([0, V - 1])
    return hidden_NC, weight_VC, token_ids_N


def score_plainly(hidden_NC: Tensor, weight_VC: Tensor, token_ids_N: Tensor, temperature: float) -> list[Tensor]:
    log_all_NV = (hidden_NC @ weight_VC.T / temperature).log_softmax(dim=-1)
    return [log_all_NV[torch.arange(N), token_ids_N], -(log_all_NV.exp() * log_all_NV).sum(dim=-1)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("width", [1, 7, 25, V - 1, V, V + 3, None])
def test_slices_equal_the_plain_formula_gradients_too(width: int | None, temperature: float) -> None:
    hidden_NC, weight_VC, token_ids_N = draw()
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(2, N, generator=generator)

    def differentiate(scores: list[Tensor]) -> list[Tensor]:
        total = sum((score * direction).sum() for score, direction in zip(scores, directions, strict=True))
        return [*scores, *torch.autograd.grad(total, [hidden_NC, weight_VC])]

    ours = score_tokens(hidden_NC, weight_VC, token_ids_N, temperature, slice_width=width)
    wanted = score_plainly(hidden_NC, weight_VC, token_ids_N, temperature)
    for a, b in zip(differentiate(list(ours)), differentiate(wanted), strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)
        assert (a - b).norm() <= 1e-6 * b.norm()


@pytest.mark.parametrize("width", [3, None])
def test_gradients_equal_finite_differences(width: int | None) -> None:
    hidden_NC, weight_VC, _ = draw(torch.float64)
    token_ids_N = torch.tensor([0, 6, 3])

    def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return score_tokens(hidden, weight, token_ids_N, 0.8, slice_width=width)

    pieces = (x.detach().clone().requires_grad_() for x in (hidden_NC[:3, :2], weight_VC[:7, :2]))
    assert torch.autograd.gradcheck(both, tuple(pieces))


@pytest.mark.parametrize("width", [16, None])
def test_extreme_logits_cost_no_digits(width: int | None) -> None:
    """A certain token has log-probability and entropy 0, however far the other logits are."""
    hidden_NC, weight_VC, _ = draw()
    token_ids_N = (hidden_NC @ weight_VC.T).argmax(dim=-1)
    logprobs_N, entropy_N = score_tokens(hidden_NC, weight_VC, token_ids_N, 1e-4, slice_width=width)
    assert torch.equal(logprobs_N, torch.zeros(N))
    assert torch.allclose(entropy_N, torch.zeros(N), atol=1e-6)


def test_a_head_that_is_not_trained_gets_no_gradient() -> None:
    hidden_NC, weight_VC, token_ids_N = draw()
    logprobs_N, _ = score_tokens(hidden_NC, weight_VC.detach(), token_ids_N, slice_width=16)
    logprobs_N.sum().backward()
    wanted = torch.autograd.grad(score_plainly(hidden_NC, weight_VC, token_ids_N, 1.0)[0].sum(), hidden_NC)[0]
    assert hidden_NC.grad is not None
    assert torch.allclose(hidden_NC.grad, wanted, atol=1e-5)
    assert weight_VC.grad is None


def test_no_tokens_give_no_scores_and_no_gradient() -> None:
    hidden_NC, weight_VC, token_ids_N = draw()
    logprobs_N, entropy_N = score_tokens(hidden_NC[:0], weight_VC, token_ids_N[:0], slice_width=16)
    assert len(logprobs_N) == len(entropy_N) == 0
    logprobs_N.sum().backward()
    assert weight_VC.grad is not None
    assert not weight_VC.grad.any()


def test_logits_of_half_precision_are_those_of_its_numbers_in_full() -> None:
    hidden_NC, weight_VC, _ = draw(torch.bfloat16)
    logits_NV = project(hidden_NC, weight_VC)
    assert logits_NV.dtype == torch.float32
    assert torch.allclose(logits_NV.double(), hidden_NC.double() @ weight_VC.double().T, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [7, 32, V, None])
def test_scores_on_a_gpu_equal_those_of_fp64(dtype: torch.dtype, width: int | None) -> None:
    hidden_NC, weight_VC, token_ids_N = draw(dtype)
    directions = torch.randn(2, N, generator=torch.Generator().manual_seed(1))

    def run(device: str, dtype: torch.dtype, slice_width: int | None) -> list[Tensor]:
        hidden, weight = (x.detach().to(device, dtype).requires_grad_() for x in (hidden_NC, weight_VC))
        scores = score_tokens(hidden, weight, token_ids_N.to(device), 0.7, slice_width=slice_width)
        total = sum((score * d.to(device)).sum() for score, d in zip(scores, directions, strict=True))
        return [x.detach().cpu().double() for x in (*scores, *torch.autograd.grad(total, [hidden, weight]))]

    ours, wanted = run("cuda", dtype, width), run("cpu", torch.float64, None)
    for index, (a, b) in enumerate(zip(ours, wanted, strict=True)):
        bound = 1e-5 if dtype == torch.float32 or index < 2 else 1e-2
        assert (a - b).norm() <= bound * b.norm()


@pytest.mark.gpu
def test_a_large_vocabulary_takes_under_a_gibibyte_beyond_its_inputs() -> None:
    """32,768 tokens, a vocabulary of 151,936: the logits alone would be 18.5 GiB in fp32. Gradients are counted."""
    hidden_NC = torch.randn(32768, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight_VC = torch.randn(151936, 896, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    token_ids_N = torch.randint(0, 151936, (32768,), device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprobs_N, entropy_N = score_tokens(hidden_NC, weight_VC, token_ids_N, 0.9)
    (logprobs_N.mean() + 0.01 * entropy_N.mean()).backward()
    assert torch.cuda.max_memory_allocated() - before < 2**30


def test_a_wide_head_widened_by_slices_gives_the_same_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden_NC = torch.randn(5, 16, generator=generator).bfloat16()
    weight_VC = torch.randn(2 * WIDENED_ROWS + 7, 16, generator=generator).bfloat16()
    whole = hidden_NC.float() @ weight_VC.float().T
    with torch.no_grad():
        logits_NV = project(hidden_NC, weight_VC)
    assert logits_NV.dtype == torch.float32
    assert torch.allclose(logits_NV, whole, rtol=1e-6, atol=1e-6)
    assert torch.allclose(project(hidden_NC, weight_VC.requires_grad_()), whole, rtol=1e-6, atol=1e-6)
