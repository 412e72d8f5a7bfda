"""RMSNorm on a CPU against torch's, gradients too, and against its formula in fp64."""

import pytest
import torch
import torch.nn.functional as F

from policy.norm import RMSNorm


def norm_and_input(shape: tuple[int, ...]) -> tuple[RMSNorm, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(shape[-1], eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(shape[-1], generator=generator))
    return norm, 3 * torch.randn(shape, generator=generator)


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 3, 8), (1, 1), (12,)])
def test_output_and_gradients_equal_the_formula_in_fp64(shape: tuple[int, ...]) -> None:
    norm, x = norm_and_input(shape)
    back = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    wide = x.double().requires_grad_()
    weight = norm.weight.detach().double().requires_grad_()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    x.requires_grad_()
    expected.backward(back.double())
    norm(x).backward(back)
    assert torch.allclose(norm(x).double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(x.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    assert torch.allclose(norm.weight.grad.double(), weight.grad, rtol=1e-5, atol=1e-6)


def test_without_a_gradient_the_same_bits() -> None:
    norm, x = norm_and_input((6, 16))
    with torch.no_grad():
        silent = norm(x)
    assert torch.equal(silent, norm(x))


def test_columns_of_a_wider_tensor_and_a_row_of_zeros() -> None:
    norm, x = norm_and_input((6, 16))
    wide = torch.cat((x, x), dim=-1)
    wide[2] = 0
    part = wide[:, :16]
    assert torch.allclose(norm(part), F.rms_norm(part, (16,), norm.weight, 1e-5), rtol=1e-6, atol=1e-6)
    assert not norm(part)[2].any()


def test_a_frozen_weight_gets_no_gradient() -> None:
    norm, x = norm_and_input((6, 16))
    norm.weight.requires_grad_(False)
    norm(x.requires_grad_()).sum().backward()
    assert norm.weight.grad is None
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_torchs_own(dtype: torch.dtype) -> None:
    norm, x = norm_and_input((6, 16))
    norm, x = norm.to(dtype), x.to(dtype)
    assert torch.equal(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-5))
