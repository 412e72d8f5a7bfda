"""Triton kernels against the formulas in torch that define them: by Triton's interpreter on the CPU, else on the GPU.

Shapes: N tokens, I inner width, H heads, P rotated width, S slice of the vocabulary.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from policy.fused import join_softmaxes, split_keys_values
from policy.head import Running, fold, gradient_of_logits

pytest.importorskip("triton")

from policy import gpu_kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(ours: Tensor, wanted: Tensor) -> bool:
    bound = 1e-6 if ours.dtype == torch.float32 else 5e-3
    return bool((ours.double() - wanted.double()).norm() <= bound * wanted.double().norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 48, gpu_kernels.COLUMNS + 3])
def test_silu_gate_equals_its_definition_on_halves_of_one_tensor(width: int, dtype: torch.dtype) -> None:
    gate, up = draw(5, 2 * width, dtype=dtype).chunk(2, dim=-1)
    grad = draw(5, width, seed=1, dtype=dtype)
    exact_gate, exact_up = (x.double().requires_grad_() for x in (gate, up))
    exact = F.silu(exact_gate) * exact_up
    wanted = torch.autograd.grad(exact, (exact_gate, exact_up), grad.double())
    assert close(gpu_kernels.silu_gate_forward(gate, up), exact.detach())
    for ours, theirs in zip(gpu_kernels.silu_gate_backward(gate, up, grad).chunk(2, dim=-1), wanted, strict=True):
        assert close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_interleaved", [True, False])
@pytest.mark.parametrize("heads", [1, 3, 9])
def test_turned_pairs_are_multiplied_by_a_complex_number_and_turn_back(
    heads: int, is_interleaved: bool, dtype: torch.dtype
) -> None:
    width = 12
    x_NHP = draw(4, heads, width + 5, dtype=dtype)[..., 5:]  # a part of wider heads, as MLA's queries have it
    angles = draw(4, width // 2, seed=1)
    turned = gpu_kernels.turn(x_NHP, angles.cos(), angles.sin(), is_interleaved=is_interleaved)
    pairs = [slice(0, None, 2), slice(1, None, 2)] if is_interleaved else [slice(0, 6), slice(6, 12)]
    a, b = (x_NHP.double()[..., pair] for pair in pairs)
    product = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
    assert close(turned[..., pairs[0]], product.real)
    assert close(turned[..., pairs[1]], product.imag)
    back = gpu_kernels.turn(turned, angles.cos(), angles.sin(), is_interleaved=is_interleaved, is_inverse=True)
    assert close(back, x_NHP)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_before_the_pairs_are_kept(dtype: torch.dtype) -> None:
    x_NHQ, angles = draw(3, 5, 7 + 8, dtype=dtype), draw(3, 4, seed=1)
    cos, sin = angles.cos(), angles.sin()
    turned = gpu_kernels.turn(x_NHQ, cos, sin, is_interleaved=True)
    assert torch.equal(turned[..., :7], x_NHQ[..., :7])
    assert torch.equal(turned[..., 7:], gpu_kernels.turn(x_NHQ[..., 7:], cos, sin, is_interleaved=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 5, 9])
def test_keys_are_joined_and_their_gradient_parted(heads: int, dtype: torch.dtype) -> None:
    own, shared, value = 12, 6, 10
    both = draw(3, heads, own + value, dtype=dtype)
    rope_NP = draw(3, shared + 4, seed=1, dtype=dtype)[:, 4:]
    exact, exact_rope = (x.double().cpu().requires_grad_() for x in (both, rope_NP))
    key, values = split_keys_values(exact, exact_rope, own)
    assert torch.equal(gpu_kernels.join_keys(both[..., :own], rope_NP).cpu().double(), key.detach())
    key_grad = draw(3, heads, own + shared, seed=2, dtype=dtype)
    value_grad = draw(heads, 3, value, seed=3, dtype=dtype).transpose(0, 1)
    grads = (key_grad.cpu().double(), value_grad.cpu().double())
    wanted = torch.autograd.grad((key, values), (exact, exact_rope), grads)
    for ours, theirs in zip(gpu_kernels.part_gradients(key_grad, value_grad, own), wanted, strict=True):
        assert close(ours.cpu(), theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "per_token"), [(5, 1), (48, 3), (gpu_kernels.COLUMNS + 7, 2)])
def test_rows_are_mixed_as_by_the_formula_gradients_too(width: int, per_token: int, dtype: torch.dtype) -> None:
    rows_TC = draw(4 * per_token, width, dtype=dtype)
    places_NK = torch.randperm(4 * per_token, generator=torch.Generator().manual_seed(1)).view(4, per_token).to(DEVICE)
    weights_NK, grad_NC = draw(4, per_token, seed=2), draw(4, width, seed=3, dtype=dtype)
    exact_rows, exact_weights = (x.double().requires_grad_() for x in (rows_TC, weights_NK))
    exact = (exact_rows[places_NK] * exact_weights[..., None]).sum(1)
    wanted = torch.autograd.grad(exact, (exact_rows, exact_weights), grad_NC.double())
    assert close(gpu_kernels.mix_rows(rows_TC, places_NK, weights_NK), exact.detach())
    assert close(gpu_kernels.mix_rows(rows_TC, places_NK, None), rows_TC.double()[places_NK].sum(1))
    for ours, theirs in zip(
        gpu_kernels.mix_rows_backward(grad_NC, rows_TC, places_NK, weights_NK), wanted, strict=True
    ):
        assert close(ours, theirs)


@pytest.mark.parametrize("width", [1, 30, gpu_kernels.COLUMNS + 5])
def test_folding_and_gradient_equal_the_formulas_in_torch(width: int) -> None:
    """Two slices, the second narrower; tokens in the first, in the second, and at the ends."""
    first_NS, second_NS = 5 * draw(4, width), 5 * draw(4, 7, seed=1)
    token_ids_N = torch.tensor([0, width - 1, width, width + 6])
    ours = theirs = Running.start(4, first_NS.cpu())
    state = tuple(x.clone().to(DEVICE) for x in (ours.peak, ours.total, ours.moment, ours.picked))
    for first, logits_NS in ((0, first_NS), (width, second_NS)):
        gpu_kernels.fold_logits(logits_NS, first, token_ids_N.to(DEVICE), 1.25, state)  # type: ignore[arg-type]
        theirs = fold(theirs, logits_NS.cpu(), first, token_ids_N, 1.25)
    for a, b in zip(state, (theirs.peak, theirs.total, theirs.moment, theirs.picked), strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-5, atol=1e-5)
    grads = draw(4, seed=2).cpu(), draw(4, seed=3).cpu()
    known = theirs.log_total_N, theirs.entropy_N, *grads
    for first, logits_NS in ((0, first_NS), (width, second_NS)):
        wanted = gradient_of_logits(logits_NS.cpu(), first, token_ids_N, 1.25, *known, torch.float32)
        on_device = (x.to(DEVICE) for x in known)
        got = gpu_kernels.logit_gradient(logits_NS, first, token_ids_N.to(DEVICE), 1.25, *on_device, torch.float32)
        assert torch.allclose(got.cpu(), wanted, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width"), [(1, 1), (5, 24), (14, 64)])
def test_joined_softmaxes_are_one_softmax_over_both_sets_of_keys(heads: int, width: int, dtype: torch.dtype) -> None:
    """The first two of five queries have no second set of keys, as a prefix's own have none."""
    scores = 4 * draw(heads, 5, 9), 4 * draw(heads, 5, 3, seed=1)
    values = draw(heads, 9, width, seed=2), draw(heads, 3, width, seed=3)
    outs = [(x.softmax(-1) @ v).transpose(0, 1).contiguous().to(dtype) for x, v in zip(scores, values, strict=True)]
    totals = [x.logsumexp(-1) for x in scores]
    both = torch.cat(scores, -1)[:, 2:]
    wanted = (both.softmax(-1) @ torch.cat(values, 1)).transpose(0, 1)
    before = [outs[0][:2].clone(), totals[0][:, :2].clone()]
    for join in (gpu_kernels.join_softmaxes, join_softmaxes):
        out, total = outs[0].clone(), totals[0].clone()
        join(out[2:], total[:, 2:], outs[1][2:], totals[1][:, 2:])
        assert close(out[2:], wanted.to(dtype))
        assert close(total[:, 2:], both.logsumexp(-1))
        assert torch.equal(out[:2], before[0])
        assert torch.equal(total[:, :2], before[1])
