"""Routing, experts and balancing against plain loops.

Shapes: N tokens, C model width, E experts, K experts per token, I expert width.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from policy import PackedRows, Policy
from policy.attention import Expanded
from policy.logprobs import next_token_loss
from policy.moe import Experts, MixtureOfExperts
from policy.router import Router
from tests.policies import tiny_policy

SHAPES: dict[str, dict[str, object]] = {
    "plain": {},
    "scaled": {"routed_scaling_factor": 2.5},
    "not_normalised": {"norm_topk_prob": False, "routed_scaling_factor": 16.0},
    "groups": {"n_group": 4, "topk_group": 2},
    "one_group_of_four": {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2},
    "groups_of_one_expert": {"n_group": 8, "topk_group": 5},
}


def make_moe(**changes: object) -> MixtureOfExperts:
    moe = tiny_policy(**{"n_routed_experts": 8, "num_experts_per_tok": 3} | changes).moe_layers[0]
    moe.gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8)[torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])])
    return moe


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def route_one(router: Router, x_C: Tensor) -> dict[int, float]:
    """Chosen experts of one token and their weights: `Gate.forward` of the official code, in loops and fp64."""
    config = router.config
    logits = router.weight.detach().double().numpy() @ x_C.double().numpy()
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    biased = [score + float(bias) for score, bias in zip(scores, router.e_score_correction_bias, strict=True)]
    size = config.n_routed_experts // config.n_group
    groups = [range(g * size, (g + 1) * size) for g in range(config.n_group)]
    if config.n_group > 1:
        rating = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
        kept = sorted(range(config.n_group), key=lambda g: -rating[g])[: config.topk_group]
        biased = [biased[e] if e // size in kept else -math.inf for e in range(config.n_routed_experts)]
    chosen = sorted(range(config.n_routed_experts), key=lambda e: -biased[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shift", [0.0, -3.0], ids=["mixed_bias", "all_biases_negative"])
def test_router_equals_the_official_formula(shape: str, shift: float) -> None:
    """With all biased scores negative, a group masked with 0 instead of -inf would win."""
    gate = make_moe(**SHAPES[shape]).gate
    gate.e_score_correction_bias += shift
    x_NC = draw(200, 32)
    experts_NK, weights_NK = gate(x_NC)
    for x_C, experts, weights in zip(x_NC, experts_NK.tolist(), weights_NK, strict=True):
        wanted = route_one(gate, x_C)
        assert set(experts) == set(wanted)
        assert weights.tolist() == pytest.approx([wanted[e] for e in experts], rel=1e-5)


def test_bias_steers_the_choice_but_not_the_weights() -> None:
    gate = make_moe().gate
    x_NC = draw(50, 32)
    gate.e_score_correction_bias[6] = 2.0
    experts_NK, weights_NK = gate(x_NC)
    assert (experts_NK == 6).any(dim=1).all()
    gate.e_score_correction_bias.zero_()
    assert torch.equal(gate(x_NC, experts_NK)[1], weights_NK)


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


@pytest.mark.parametrize(
    ("tokens", "per_token", "num_used"), [(40, 3, 8), (40, 3, 5), (1, 2, 8), (6, 1, 1)],
    ids=["all_used", "three_idle", "one_token", "one_used"],
)  # fmt: skip
def test_experts_equal_a_loop_over_them_gradients_too(tokens: int, per_token: int, num_used: int) -> None:
    experts = make_moe().experts
    rng = np.random.default_rng(0)
    experts_NK = torch.tensor([rng.permutation(num_used)[:per_token].tolist() for _ in range(tokens)])
    x_NC, weights_NK = draw(tokens, 32).requires_grad_(), draw(tokens, per_token, seed=1).requires_grad_()
    inputs = (x_NC, weights_NK, experts.gate_up_proj, experts.down_proj)
    direction = draw(tokens, 32, seed=2)
    ours, loops = experts(x_NC, experts_NK, weights_NK), mix_in_loops(experts, x_NC, experts_NK, weights_NK)
    assert torch.allclose(ours, loops, atol=1e-5)
    gradients = torch.autograd.grad((ours * direction).sum(), inputs)
    for got, wanted in zip(gradients, torch.autograd.grad((loops * direction).sum(), inputs), strict=True):
        assert torch.allclose(got, wanted, atol=1e-4)
    idle = torch.arange(8)[count_experts(experts_NK, 8) == 0]
    assert gradients[2][idle].abs().sum() == 0


@pytest.mark.parametrize("shared", [0, 2])
def test_mixture_is_shared_plus_routed(shared: int) -> None:
    moe = make_moe(n_shared_experts=shared)
    x_NC = draw(20, 32)
    out_NC, experts_NK = moe(x_NC)
    wanted = mix_in_loops(moe.experts, x_NC, *moe.gate(x_NC))
    if shared:
        assert moe.shared_experts is not None
        assert moe.shared_experts.gate_proj.weight.shape == (shared * 16, 32)
        wanted = wanted + moe.shared_experts(x_NC)
    assert (moe.shared_experts is not None) == bool(shared)
    assert torch.allclose(out_NC, wanted, atol=1e-5)
    assert torch.equal(experts_NK, moe.gate(x_NC)[0])


def test_replayed_choice_gives_the_same_output_and_gradients() -> None:
    policy = tiny_policy(n_routed_experts=8)
    rows = PackedRows.of([7, 4])
    token_ids_N = torch.randint(3, 61, (11,), generator=torch.Generator().manual_seed(0))
    direction = draw(11, 32)

    def run(given: Tensor | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        policy.zero_grad()
        output = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows), given)
        (output.hidden_NC * direction).sum().backward()
        grads = {name: weight.grad.clone() for name, weight in policy.named_parameters() if weight.grad is not None}
        return output.hidden_NC.detach(), output.experts_MNK, grads

    hidden, experts_MNK, grads = run(None)
    for layer in policy.moe_layers:  # a choice of its own would now be another one
        layer.gate.e_score_correction_bias.copy_(draw(8, seed=3))
    replayed_hidden, replayed_MNK, replayed_grads = run(experts_MNK)
    assert torch.equal(hidden, replayed_hidden)
    assert torch.equal(experts_MNK, replayed_MNK)
    assert all(torch.equal(grads[name], replayed_grads[name]) for name in grads)
    assert all(replayed_grads[f"layers.{layer}.mlp.gate.weight"].abs().sum() > 0 for layer in (1, 2))
    assert not torch.equal(run(None)[1], experts_MNK)


def test_replayed_weights_come_from_the_given_experts() -> None:
    gate = make_moe(norm_topk_prob=False).gate
    x_NC, given_NK = draw(5, 32), torch.tensor([[0, 1, 2], [7, 3, 4], [5, 6, 0], [2, 1, 7], [4, 0, 6]])
    experts_NK, weights_NK = gate(x_NC, given_NK)
    assert torch.equal(experts_NK, given_NK)
    scores_NE = torch.sigmoid(x_NC @ gate.weight.T)
    wanted = torch.stack([scores_NE[n, e] for n, row in enumerate(given_NK) for e in row]).view(5, 3)
    assert torch.allclose(weights_NK, wanted)


def test_count_experts() -> None:
    chosen = [[0, 3], [3, 1], [3, 0], [5, 3]]
    counts = count_experts(torch.tensor(chosen), 7)
    assert counts.tolist() == [sum(row.count(e) for row in chosen) for e in range(7)]
    assert counts.dtype == torch.int64


def test_balance_moves_each_bias_one_step_towards_the_mean() -> None:
    gate = make_moe().gate
    gate.e_score_correction_bias.fill_(0.5)
    gate.balance(torch.tensor([9, 1, 4, 4, 0, 4, 5, 5]), rate=0.01)  # the mean is 4
    steps = [-1, 1, 0, 0, 1, 0, -1, -1]
    assert gate.e_score_correction_bias.tolist() == pytest.approx([0.5 + 0.01 * step for step in steps])


def make_lopsided_policy() -> Policy:
    """A policy whose routers at first send every token to experts 0 and 1."""
    policy = tiny_policy(vocab_size=24, num_hidden_layers=2, n_routed_experts=8, initializer_range=0.1)
    with torch.no_grad():
        policy.embed_tokens.weight[:, 0] += 1.0
        gate = policy.moe_layers[0].gate
        gate.weight[:, 0] = -1.0
        gate.weight[:2, 0] = 1.0
    return policy


def train(policy: Policy, *, rate: float, steps: int) -> tuple[float, float, float]:
    """Load (max over mean) at first, then load and loss of the last 20 steps; token n is a function of n-1 and n-2."""
    table = torch.randint(3, 24, (24, 24), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=4e-3, fused=True)
    rows = PackedRows.of([12] * 24)
    gate = policy.moe_layers[0].gate
    loads, losses = [], []
    for _ in range(steps):
        row_BS = torch.randint(3, 24, (24, 2), generator=generator)
        while row_BS.shape[1] < 12:
            row_BS = torch.cat((row_BS, table[row_BS[:, -2], row_BS[:, -1]][:, None]), dim=1)
        loss = next_token_loss(policy, row_BS.flatten(), rows)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        assert loss.output.experts_MNK is not None
        load_E = count_experts(loss.output.experts_MNK[0], 8)
        gate.balance(load_E, rate)
        loads.append(load_E.double())
        losses.append(float(loss.trunk))
    last_E = torch.stack(loads[-20:]).mean(0)
    return float(loads[0].max() / loads[0].mean()), float(last_E.max() / last_E.mean()), float(np.mean(losses[-20:]))


def test_balancing_evens_the_load_and_costs_no_loss() -> None:
    first, unbalanced, loss_without = train(make_lopsided_policy(), rate=0.0, steps=150)
    first_again, balanced, loss_with = train(make_lopsided_policy(), rate=0.02, steps=150)
    assert first == first_again == 4, "all on 2 of 8 experts"
    assert unbalanced > 2
    assert balanced < 1.5
    assert loss_with < 1.02 * loss_without
