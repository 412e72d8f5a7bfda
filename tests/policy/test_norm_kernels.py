"""RMSNorm from a wide stream to narrow products, and the stream itself.

Shapes: N tokens, C model width.
"""

import pytest
import torch
from torch import Tensor

from policy import PackedRows, Policy, cast_weights
from policy.attention import Expanded
from policy.logprobs import token_logprobs
from policy.norm import RMSNorm, normalise
from policy.recompute import Recomputation
from tests.policies import tiny_llama, tiny_policy

pytest.importorskip("triton")

from policy import norm_kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NARROW = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter has numpy's numbers


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    x_NC, weight_C = x_NC.double(), weight_C.double()
    return x_NC * (x_NC.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * weight_C


def is_close(ours: Tensor, wanted: Tensor, bound: float) -> bool:
    return bool((ours.double() - wanted).norm() <= bound * wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, NARROW])
@pytest.mark.parametrize("width", [7, 700])
def test_kernels_equal_their_definition(width: int, dtype: torch.dtype) -> None:
    x_NC, weight_C, grad_NC = 3 * draw(5, width), draw(width, seed=1).to(dtype), draw(5, width, seed=2).to(dtype)
    x, weight = (tensor.double().requires_grad_() for tensor in (x_NC, weight_C))
    out = exact(x, weight, 1e-2)
    wanted = torch.autograd.grad(out, (x, weight), grad_NC.double())
    rounding = 1e-6 if dtype == torch.float32 else 1e-3 if dtype == torch.float16 else 5e-3
    ours_NC = norm_kernels.normalise(x_NC, weight_C, 1e-2)
    assert ours_NC.dtype == dtype
    assert is_close(ours_NC, out.detach(), rounding)
    x_grad_NC, weight_grad_C = norm_kernels.normalise_backward(x_NC, weight_C, grad_NC, 1e-2, programs=3)
    assert x_grad_NC.dtype == weight_grad_C.dtype == torch.float32
    assert is_close(x_grad_NC, wanted[0], 1e-5)
    assert is_close(weight_grad_C, wanted[1], 1e-5)


def test_no_rows_have_no_gradient() -> None:
    weight_C = draw(8)
    assert norm_kernels.normalise(draw(0, 8), weight_C, 1e-6).shape == (0, 8)
    assert not norm_kernels.normalise_backward(draw(0, 8), weight_C, draw(0, 8), 1e-6)[1].any()


def test_it_rounds_once_and_of_one_dtype_is_torchs_own() -> None:
    norm = RMSNorm(48, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(draw(48, seed=1).cpu())
    x_NC = 3 * draw(5, 48).cpu()
    norm.to(torch.bfloat16)
    assert torch.equal(norm(x_NC), exact(x_NC, norm.weight, 1e-6).bfloat16())
    assert torch.equal(norm(x_NC), normalise(x_NC, norm.weight, 1e-6))
    narrow_NC = x_NC.bfloat16()
    assert torch.equal(norm(narrow_NC), torch.nn.RMSNorm.forward(norm, narrow_NC))


def logprobs_of(policy: Policy) -> Tensor:
    rows = PackedRows.of([23, 17])
    token_ids_N = torch.randint(3, 61, (40,), generator=torch.Generator().manual_seed(0))
    return token_logprobs(policy, token_ids_N, rows, rows.position_ids_N > 0).logprobs_N


@pytest.mark.parametrize("make", [tiny_policy, tiny_llama])
def test_a_wide_stream_is_nearer_to_exact_than_a_narrow_one(make: type[Policy]) -> None:
    policy = cast_weights(make(num_hidden_layers=8, initializer_range=0.1), torch.bfloat16)
    wide = logprobs_of(policy)
    policy.residual_in_fp32 = False
    narrow = logprobs_of(policy)
    policy.float()
    exactly = logprobs_of(policy)
    policy.residual_in_fp32 = True
    assert torch.equal(logprobs_of(policy), exactly), "an fp32 policy has no other stream"
    errors = [float((each - exactly).detach().abs().mean()) for each in (wide, narrow)]
    assert 0 < errors[0] < 0.8 * errors[1]


def test_the_stream_is_in_fp32_from_block_to_block_and_what_the_head_gets_is_not() -> None:
    policy = cast_weights(tiny_policy(), torch.bfloat16)
    seen: list[torch.dtype] = []
    for layer in policy.layers:
        layer.register_forward_hook(lambda module, inputs, outputs: seen.append(outputs[0].dtype))
    rows = PackedRows.of([9])
    hidden_NC = policy(torch.arange(9), rows.position_ids_N, Expanded(rows=rows)).hidden_NC
    assert seen == [torch.float32] * 3
    assert hidden_NC.dtype == torch.bfloat16


@pytest.mark.parametrize("recomputation", ["selective", "full"])
def test_recomputing_changes_no_gradient_of_a_wide_stream(recomputation: Recomputation) -> None:
    found = []
    for kind in ("none", recomputation):
        policy = cast_weights(tiny_policy(), torch.bfloat16)
        policy.recomputation = kind
        logprobs_of(policy).sum().backward()
        found.append({name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
