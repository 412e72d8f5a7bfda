"""What is summed up of the routers, against loops over the equations; and training from a lopsided start.

Shapes: N tokens, E experts, K experts per token, M layers.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from policy import PackedRows, Policy
from policy.attention import Expanded
from policy.balance import RouterSums, RouterWatch, router_loss, sum_up
from policy.logprobs import next_token_loss
from policy.recompute import Recomputation
from policy.router import Routing
from tests.policies import tiny_policy

LENGTHS = (5, 1, 8)


def make_routing(num_experts: int = 6, per_token: int = 2, seed: int = 0) -> Routing:
    """Sigmoid scores of random logits and a choice of their best."""
    generator = torch.Generator().manual_seed(seed)
    logits_NE = torch.randn(sum(LENGTHS), num_experts, generator=generator).requires_grad_()
    scores_NE = logits_NE.sigmoid()
    chosen = scores_NE.topk(per_token)
    return Routing(experts_NK=chosen.indices, weights_NK=chosen.values, logits_NE=logits_NE, scores_NE=scores_NE)


def balance_loss_in_loops(scores_TE: Tensor, experts: list[list[int]]) -> Tensor:
    """Equations 17 to 20 of DeepSeek-V3 for one row, without alpha."""
    num_tokens, num_experts = scores_TE.shape
    total = torch.zeros(())
    for i in range(num_experts):
        f_i = num_experts / (len(experts[0]) * num_tokens) * sum(i in chosen for chosen in experts)
        p_i = sum(scores_TE[t, i] / scores_TE[t].sum() for t in range(num_tokens)) / num_tokens
        total = total + f_i * p_i
    return total


def test_balance_loss_equals_the_equations_gradients_too() -> None:
    routing, rows = make_routing(), PackedRows.of(LENGTHS)
    sums = sum_up(routing, RouterWatch.of(rows, with_losses=True))
    parts = zip(routing.scores_NE.split(LENGTHS), routing.experts_NK.split(LENGTHS), strict=True)
    wanted = torch.stack([balance_loss_in_loops(scores, experts.tolist()) for scores, experts in parts]).sum()
    assert sums.balance_M.tolist() == pytest.approx([wanted.item()], rel=1e-5)
    ours, theirs = (
        torch.autograd.grad(x.sum(), routing.logits_NE, retain_graph=True)[0] for x in (sums.balance_M, wanted)
    )
    assert ours.abs().sum() > 0
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_balance_loss_by_hand() -> None:
    """Two tokens, three experts, one for each: f = 3/2 (2, 0, 0), P = ((0.5 + 0.8)/2, ...), so f P = 3 * 0.65."""
    scores_NE = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.05, 0.05]])
    routing = Routing(
        experts_NK=torch.tensor([[0], [0]]), weights_NK=torch.ones(2, 1), logits_NE=scores_NE.log(), scores_NE=scores_NE
    )
    sums = sum_up(routing, RouterWatch.of(PackedRows.of([2]), with_losses=True))
    assert float(sums.balance_M) == pytest.approx(3 * 0.65)
    assert sums.load_ME.tolist() == [[2, 0, 0]]
    entropies = [
        -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2)),
        -(0.8 * math.log(0.8) + 2 * 0.1 * math.log(0.1)),
    ]
    assert float(sums.entropy_M) == pytest.approx(sum(entropies))
    assert float(sums.z_M) == pytest.approx(math.log(0.5) ** 2)  # the sums of exp are 1 and 0.5


def test_even_load_has_balance_loss_one_and_entropy_log_e() -> None:
    routing = Routing(
        experts_NK=torch.arange(6)[:, None], weights_NK=torch.ones(6, 1), logits_NE=torch.zeros(6, 6),
        scores_NE=torch.full((6, 6), 0.5),
    )  # fmt: skip
    sums = sum_up(routing, RouterWatch.of(PackedRows.of([6]), with_losses=True))
    assert float(sums.balance_M) == pytest.approx(1)
    assert float(sums.entropy_M) == pytest.approx(6 * math.log(6))
    assert float(sums.z_M) == pytest.approx(6 * math.log(6) ** 2)


def test_last_tokens_of_rows_can_be_left_out() -> None:
    """As if each row were shorter; a row of one token then adds nothing."""
    routing = make_routing()
    kept = [n for start, length in ((0, 5), (5, 1), (6, 8)) for n in range(start, start + length - 1)]
    shorter = Routing(
        experts_NK=routing.experts_NK[kept], weights_NK=routing.weights_NK[kept],
        logits_NE=routing.logits_NE[kept], scores_NE=routing.scores_NE[kept],
    )  # fmt: skip
    ours = sum_up(routing, RouterWatch.of(PackedRows.of(LENGTHS), with_losses=True).without_last())
    wanted = sum_up(shorter, RouterWatch.of(PackedRows.of([4, 7]), with_losses=True))
    assert ours.load_ME.tolist() == wanted.load_ME.tolist()
    for name in ("entropy_M", "balance_M", "z_M"):
        assert getattr(ours, name).tolist() == pytest.approx(getattr(wanted, name).tolist(), rel=1e-5)
    twice = sum_up(routing, RouterWatch.of(PackedRows.of(LENGTHS), with_losses=False).without_last().without_last())
    assert int(twice.load_ME.sum()) == 2 * (3 + 6)
    assert float(twice.balance_M) == float(twice.z_M) == 0


def test_a_watched_pass_is_the_same_pass_and_gives_one_sum_a_layer() -> None:
    policy, rows = tiny_policy(num_hidden_layers=4, num_nextn_predict_layers=2), PackedRows.of(LENGTHS)
    token_ids_N = torch.randint(3, 61, (14,), generator=torch.Generator().manual_seed(0))
    watch = RouterWatch.of(rows, with_losses=True)
    plain = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows))
    output = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows), watch=watch)
    assert plain.routers is None
    assert torch.equal(plain.hidden_NC, output.hidden_NC)
    assert output.routers.load_ME.tolist() == [
        torch.bincount(e.flatten(), minlength=4).tolist() for e in output.experts_MNK
    ]
    assert output.routers.balance_M.shape == output.routers.z_M.shape == output.routers.entropy_M.shape == (3,)
    loss = next_token_loss(policy, token_ids_N, rows, mtp_weight=0.3, watch=watch)
    assert loss.routers is not None
    # Module k looks k + 1 tokens ahead: rows of 5, 1 and 8 tokens have that many less.
    assert loss.routers.load_ME.sum(dim=1).tolist() == [28, 28, 28, 2 * (4 + 7), 2 * (3 + 6)]
    dense = tiny_policy(first_k_dense_replace=3)
    assert dense(token_ids_N, rows.position_ids_N, Expanded(rows=rows), watch=watch).routers is None


def test_sums_of_rows_apart_add_up_to_those_of_rows_together() -> None:
    policy = tiny_policy()
    token_ids_N = torch.randint(3, 61, (14,), generator=torch.Generator().manual_seed(0))

    def run(token_ids: Tensor, lengths: tuple[int, ...]) -> RouterSums:
        rows = PackedRows.of(lengths)
        watch = RouterWatch.of(rows, with_losses=True)
        routers = policy(token_ids, rows.position_ids_N, Expanded(rows=rows), watch=watch).routers
        assert routers is not None
        return routers

    together = run(token_ids_N, LENGTHS)
    alone = [run(row, (len(row),)) for row in token_ids_N.split(LENGTHS)]
    assert torch.equal(together.load_ME, sum(part.load_ME for part in alone))
    for name in ("entropy_M", "balance_M", "z_M"):
        assert torch.allclose(getattr(together, name), sum(getattr(part, name) for part in alone), rtol=1e-5)


@pytest.mark.parametrize("recomputation", ["selective", "full"])
def test_recomputation_changes_no_sum_and_no_gradient(recomputation: Recomputation) -> None:
    policy, rows = tiny_policy(), PackedRows.of(LENGTHS)
    token_ids_N = torch.randint(3, 61, (14,), generator=torch.Generator().manual_seed(0))

    def run() -> list[Tensor]:
        loss = next_token_loss(policy, token_ids_N, rows, watch=RouterWatch.of(rows, with_losses=True))
        assert loss.routers is not None
        extra = router_loss(loss.routers, aux_loss_coef=0.5, z_loss_coef=0.1, num_rows=3, num_tokens=14)
        weights = [weight for _, weight in policy.named_parameters()]
        return [extra.detach(), loss.routers.load_ME, *torch.autograd.grad(loss.total + extra, weights)]

    plain = run()
    policy.recomputation = recomputation
    assert all(torch.equal(a, b) for a, b in zip(plain, run(), strict=True))


def test_router_loss_is_a_mean_over_rows_and_tokens() -> None:
    sums = RouterSums(
        load_ME=torch.zeros(2, 4),
        entropy_M=torch.zeros(2),
        balance_M=torch.tensor([3.0, 5.0]),
        z_M=torch.tensor([8.0, 2.0]),
    )
    loss = router_loss(sums, aux_loss_coef=0.5, z_loss_coef=0.1, num_rows=2, num_tokens=20)
    assert float(loss) == pytest.approx(0.5 * 8 / 2 + 0.1 * 10 / 20)


def make_lopsided_policy(**changes: object) -> Policy:
    """A policy whose routers at first send every token to experts 0 and 1."""
    shape = {"vocab_size": 24, "num_hidden_layers": 2, "n_routed_experts": 8, "initializer_range": 0.1} | changes
    policy = tiny_policy(**shape)
    with torch.no_grad():
        policy.embed_tokens.weight[:, 0] += 1.0
        gate = policy.moe_layers[0].gate
        gate.weight[:, 0] = -1.0
        gate.weight[:2, 0] = 1.0
    return policy


def train(policy: Policy, seed: int, *, rate: float = 0.0, aux_loss_coef: float = 0.0) -> tuple[float, float, float]:
    """Load (max over mean) at first, then load and loss of the last 20 of 120 steps.

    Token n is a function of n-1 and n-2.
    """
    table = torch.randint(3, 24, (24, 24), generator=torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 100)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=4e-3, fused=True)
    rows = PackedRows.of([12] * 24)
    watch = RouterWatch.of(rows, with_losses=aux_loss_coef > 0)
    loads, losses = [], []
    for _ in range(120):
        row_BS = torch.randint(3, 24, (24, 2), generator=generator)
        while row_BS.shape[1] < 12:
            row_BS = torch.cat((row_BS, table[row_BS[:, -2], row_BS[:, -1]][:, None]), dim=1)
        loss = next_token_loss(policy, row_BS.flatten(), rows, watch=watch)
        assert loss.routers is not None
        extra = router_loss(loss.routers, aux_loss_coef=aux_loss_coef, z_loss_coef=0.0, num_rows=24, num_tokens=288)
        optimizer.zero_grad()
        (loss.total + extra).backward()
        optimizer.step()
        policy.moe_layers[0].gate.balance(loss.routers.load_ME[0], rate)
        loads.append(loss.routers.load_ME[0].double())
        losses.append(float(loss.trunk))
    last_E = torch.stack(loads[-20:]).mean(0)
    return float(loads[0].max() / loads[0].mean()), float(last_E.max() / last_E.mean()), float(np.mean(losses[-20:]))


@pytest.mark.parametrize(
    ("shape", "balancing", "num_seeds"),
    [
        ({}, {"rate": 0.02}, 3),
        ({"model_type": "deepseek_v2", "routed_scaling_factor": 2.0}, {"aux_loss_coef": 0.05}, 2),
    ],
    ids=["bias_of_a_sigmoid_router", "auxiliary_loss_of_a_softmax_router"],
)
def test_balancing_evens_the_load_and_costs_no_loss(
    shape: dict[str, object], balancing: dict[str, float], num_seeds: int
) -> None:
    losses_with, losses_without = [], []
    for seed in range(num_seeds):
        first, unbalanced, loss_without = train(make_lopsided_policy(**shape), seed)
        first_again, balanced, loss_with = train(make_lopsided_policy(**shape), seed, **balancing)
        assert first == first_again == 4, "all on 2 of 8 experts"
        assert unbalanced > 2
        assert balanced < 1.5
        losses_with.append(loss_with)
        losses_without.append(loss_without)
    assert np.mean(losses_with) < 1.02 * np.mean(losses_without)
