"""Experts against plain loops.

Shapes: N tokens, C model width, E experts, K experts per token, I expert width.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from policy.grouped import has_grouped_product
from policy.moe import Experts, MixtureOfExperts
from tests.policies import tiny_policy


def make_moe(**changes: object) -> MixtureOfExperts:
    return tiny_policy(**{"n_routed_experts": 8, "num_experts_per_tok": 3} | changes).moe_layers[0]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mix_in_loops(experts: Experts, x_NC: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """Every token through its experts one by one."""
    rows = []
    for n, x_C in enumerate(x_NC):
        total = torch.zeros_like(x_C)
        for k, e in enumerate(experts_NK[n].tolist()):
            gate_I, up_I = (experts.gate_up_proj[e] @ x_C).chunk(2)
            total = total + weights_NK[n, k] * (experts.down_proj[e] @ (gate_I * torch.sigmoid(gate_I) * up_I))
        rows.append(total)
    return torch.stack(rows)


WIDTHS = [(32, 16), (30, 15)]
"""Widths of the model and of an expert that torch's grouped product takes, and that go through blocks instead."""


@pytest.mark.parametrize("widths", WIDTHS, ids=["grouped", "blocks"])
@pytest.mark.parametrize(
    ("tokens", "per_token", "num_used"), [(40, 3, 8), (40, 3, 5), (1, 2, 8), (6, 1, 1), (150, 8, 8)],
    ids=["all_used", "three_idle", "one_token", "one_used", "many"],
)  # fmt: skip
def test_experts_equal_a_loop_over_them_gradients_too(
    widths: tuple[int, int], tokens: int, per_token: int, num_used: int
) -> None:
    width, inner = widths
    experts = make_moe(hidden_size=width, moe_intermediate_size=inner).experts
    rng = np.random.default_rng(0)
    experts_NK = torch.tensor([rng.permutation(num_used)[:per_token].tolist() for _ in range(tokens)])
    x_NC, weights_NK = draw(tokens, width).requires_grad_(), draw(tokens, per_token, seed=1).requires_grad_()
    assert has_grouped_product(x_NC, experts.down_proj) == (widths == (32, 16))
    inputs = (x_NC, weights_NK, experts.gate_up_proj, experts.down_proj)
    direction = draw(tokens, width, seed=2)
    ours, loops = experts(x_NC, experts_NK, weights_NK), mix_in_loops(experts, x_NC, experts_NK, weights_NK)
    assert torch.allclose(ours, loops, atol=1e-5)
    gradients = torch.autograd.grad((ours * direction).sum(), inputs)
    for got, wanted in zip(gradients, torch.autograd.grad((loops * direction).sum(), inputs), strict=True):
        assert torch.allclose(got, wanted, atol=1e-4)
    idle = torch.bincount(experts_NK.flatten(), minlength=8) == 0
    assert gradients[2][idle].abs().sum() == 0


@pytest.mark.parametrize("shared", [0, 2])
def test_mixture_is_shared_plus_routed(shared: int) -> None:
    moe = make_moe(n_shared_experts=shared)
    x_NC = draw(20, 32)
    out_NC, routed = moe(x_NC)
    routing = moe.gate(x_NC)
    wanted = mix_in_loops(moe.experts, x_NC, routing.experts_NK, routing.weights_NK)
    if shared:
        assert moe.shared_experts is not None
        assert moe.shared_experts.gate_proj.weight.shape == (shared * 16, 32)
        wanted = wanted + moe.shared_experts(x_NC)
    assert (moe.shared_experts is not None) == bool(shared)
    assert torch.allclose(out_NC, wanted, atol=1e-5)
    assert torch.equal(routed.experts_NK, routing.experts_NK)
    assert routed.sums is None
