"""An update's products on the CPU against torch's in fp64, gradients too; which tensors are for them."""

import pytest
import torch
from torch import Tensor

from policy import cpu_training_products as products
from policy.linear import Linear, has_tiles, takes_on_cpu


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def near(ours: Tensor | None, exact: Tensor | None) -> bool:
    """Within 1e-6 of the largest number."""
    assert ours is not None
    assert exact is not None
    return ours.shape == exact.shape and bool((ours - exact).abs().max() <= 1e-6 * exact.abs().max())


@pytest.mark.parametrize("rows", [1, 7, 8, 13, products.ROWS_AT_ONCE + 9])
@pytest.mark.parametrize(("width", "depth"), [(16, 32), (48, 16), (64, 80)])
def test_outputs_and_gradients_are_those_of_torch(rows: int, width: int, depth: int) -> None:
    wide, weight_OI, back = draw(rows, depth + 3), draw(width, depth, seed=1), draw(rows, width, seed=2)
    results = []
    for dtype in (torch.float32, torch.float64):
        x_NI, matrix = (x.detach().to(dtype).requires_grad_() for x in (wide, weight_OI))
        part_NI = x_NI[:, 3:]  # rows that lie apart
        out_NO = products.linear(part_NI, matrix) if dtype == torch.float32 else part_NI @ matrix.T
        out_NO.backward(back.to(dtype))
        results.append([out_NO.detach(), x_NI.grad, matrix.grad])
    assert all(near(ours, exact) for ours, exact in zip(*results, strict=True))


@pytest.mark.parametrize("ends", [[5, 5, 30, 41], [0, 41, 41, 41], [1, 9, 25, 41]])
def test_each_row_meets_the_matrix_of_its_group(ends: list[int]) -> None:
    x_TI, weight_EOI, back = draw(41, 32), draw(4, 48, 32, seed=1), draw(41, 48, seed=2)
    ours_x, ours_weight = x_TI.clone().requires_grad_(), weight_EOI.clone().requires_grad_()
    out_TO = products.grouped_linear(ours_x, ours_weight, torch.tensor(ends, dtype=torch.int32))
    out_TO.backward(back)
    exact_x, exact_weight = x_TI.double().requires_grad_(), weight_EOI.double().requires_grad_()
    group_T = torch.searchsorted(torch.tensor(ends), torch.arange(41), right=True)
    exact = torch.einsum("ti,toi->to", exact_x, exact_weight[group_T])
    exact.backward(back.double())
    assert near(out_TO.detach(), exact.detach())
    assert near(ours_x.grad, exact_x.grad)
    assert near(ours_weight.grad, exact_weight.grad)


def test_a_row_does_not_depend_on_the_others_and_runs_repeat() -> None:
    x_NI, weight_OI, back = draw(70, 64), draw(32, 64, seed=1), draw(70, 32, seed=2)
    gradients = []
    for _ in range(2):
        matrix = weight_OI.clone().requires_grad_()
        out_NO = products.linear(x_NI, matrix)
        out_NO.backward(back)
        gradients.append(matrix.grad)
    assert torch.equal(gradients[0], gradients[1])
    for first in (1, 8, 63):
        assert torch.equal(products.linear(x_NI[first:], weight_OI), out_NO[first:])


def test_a_frozen_matrix_and_an_input_without_gradient_get_none() -> None:
    x_NI, weight_OI = draw(9, 32), draw(16, 32, seed=1)
    for x, matrix in ((x_NI.clone().requires_grad_(), weight_OI), (x_NI, weight_OI.clone().requires_grad_())):
        products.linear(x, matrix).sum().backward()
        assert [y.grad is not None for y in (x, matrix)] == [x.requires_grad, matrix.requires_grad]


def test_which_tensors_are_for_them() -> None:
    x_NI, weight_OI = draw(5, 32), draw(16, 32, seed=1)
    assert takes_on_cpu(x_NI, weight_OI) == has_tiles()
    assert not takes_on_cpu(x_NI.double(), weight_OI.double())
    assert not takes_on_cpu(x_NI[:, :24], weight_OI[:, :24])
    assert not takes_on_cpu(x_NI[:0], weight_OI)
    with torch.no_grad():
        assert not takes_on_cpu(x_NI, weight_OI)


def test_a_layer_has_its_bias_and_any_shape() -> None:
    layer, exact = Linear(32, 16), torch.nn.Linear(32, 16)
    exact.load_state_dict(layer.state_dict())
    x = draw(2, 3, 32)
    layer(x).square().sum().backward()
    exact(x).square().sum().backward()
    assert near(layer(x).detach(), exact(x).detach())
    assert near(layer.bias.grad, exact.bias.grad)
    assert near(layer.weight.grad, exact.weight.grad)
