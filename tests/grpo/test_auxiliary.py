"""What an update does beside the policy's loss: nothing unless asked; then what was asked, however the batch is cut."""

import math

import pytest
import torch

from grpo.auxiliary import AuxiliaryStats, check_auxiliary
from grpo.batch import Row, make_batches
from grpo.config import ConfigError
from grpo.distributed import Ranks
from grpo.optimizer import MasterAdamW
from grpo.routers import RouterTotals
from grpo.update import UpdateStats, update
from policy import PackedRows, Policy
from policy.attention import Expanded
from policy.balance import RouterWatch
from policy.logprobs import ahead_losses
from policy.packing import Wanted
from tests.grpo.rollouts import make_groups, minibatches_of, rows_of, tiny_config
from tests.policies import tiny_policy

LOSSES = {"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01, "freeze_router": False}


def run(
    policy: Policy, rows: list[Row], max_tokens: int = 10**6, share_prompts: bool = True, **changes: object
) -> tuple[dict[str, torch.Tensor], UpdateStats]:
    """One update that moves no weight: the gradients are the optimizer's first moments, as its beta1 is 0."""
    optimizer = MasterAdamW(policy, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0)
    stats = update(
        policy,
        optimizer,
        minibatches_of(rows, max_tokens, share_prompts=share_prompts),
        learning_rate=0.0,
        config=tiny_config(max_grad_norm=1e9, **changes),
        ranks=Ranks(cpu=True),
    )
    state = optimizer.inner.state
    return {name: state[m]["exp_avg"] for name, m in optimizer.masters.items() if "exp_avg" in state[m]}, stats


def biases(policy: Policy) -> list[torch.Tensor]:
    layers = [*policy.moe_layers, *policy.mtp_moe_layers]
    return [bias.clone() for layer in layers if (bias := layer.gate.e_score_correction_bias) is not None]


def test_by_default_nothing_is_added_and_no_bias_moves() -> None:
    policy = tiny_policy(num_nextn_predict_layers=1)
    before = biases(policy)
    found, stats = run(policy, rows_of(make_groups(policy)))
    assert all(not found[name].any() for name in found if name.startswith("mtp."))
    assert all(torch.equal(a, b) for a, b in zip(before, biases(policy), strict=True))
    assert stats.auxiliary.mtp_loss is None
    assert stats.auxiliary.routers is not None
    assert len(stats.auxiliary.routers.load_ME) == 2
    assert stats.auxiliary.routers.balance_M is stats.auxiliary.routers.z_M is None


def test_modules_are_trained_on_completions_and_the_policy_does_not_notice() -> None:
    policy = tiny_policy(num_nextn_predict_layers=2)
    rows = rows_of(make_groups(policy))
    without, _ = run(policy, rows)
    found, stats = run(policy, rows, mtp_weight=0.3)
    for name in without:
        if not name.startswith("mtp."):
            assert torch.equal(without[name], found[name]), name
    policy.zero_grad()
    losses = []
    for row in rows:
        tokens, prompt = torch.tensor([*row.prompt_ids, *row.completion.token_ids]), len(row.prompt_ids)
        one = PackedRows.of([len(tokens)])
        hidden_NC = policy(tokens, one.position_ids_N, Expanded(rows=one)).hidden_NC.detach()
        wanted = Wanted.of(torch.arange(len(tokens)) >= prompt, one)
        losses += ahead_losses(policy, hidden_NC, tokens, one, wanted=wanted).sums
    mean = torch.stack(losses).sum() / 2 / sum(len(row.completion.token_ids) for row in rows)
    (0.3 * mean).backward()
    assert stats.auxiliary.mtp_loss == pytest.approx(float(mean.detach()), rel=1e-5)
    for name, weight in policy.named_parameters():
        if name.startswith("mtp."):
            assert torch.allclose(found[name], weight.grad, atol=1e-6), name


def test_the_last_module_learns_to_go_on_from_its_own_output() -> None:
    policy = tiny_policy(num_nextn_predict_layers=1)
    rows = rows_of(make_groups(policy))
    plain, _ = run(policy, rows, mtp_weight=0.3)
    recycled, stats = run(policy, rows, mtp_weight=0.3, mtp_num_recycled=2)
    cut, cut_stats = run(policy, rows, max_tokens=50, mtp_weight=0.3, mtp_num_recycled=2)
    for name in plain:
        is_same = torch.allclose(plain[name], recycled[name], atol=1e-6)
        assert is_same or name.startswith("mtp."), name
        assert torch.allclose(recycled[name], cut[name], atol=2e-6), name
    assert not all(torch.allclose(plain[name], recycled[name], atol=1e-6) for name in plain)
    assert cut_stats.auxiliary.mtp_loss == pytest.approx(stats.auxiliary.mtp_loss, rel=1e-5)


@pytest.mark.parametrize(
    "keys", [{"mtp_weight": 0.3}, LOSSES, {"mtp_weight": 0.3} | LOSSES], ids=["mtp", "routers", "both"]
)
def test_micro_batches_give_the_gradients_and_figures_of_one_batch(keys: dict[str, float]) -> None:
    policy = tiny_policy(num_nextn_predict_layers=1)
    rows = rows_of(make_groups(policy))
    whole, stats = run(policy, rows, **keys)
    plain, _ = run(policy, rows)
    assert not all(torch.allclose(whole[name], plain[name], atol=1e-6) for name in whole)
    cut, cut_stats = run(policy, rows, max_tokens=50, **keys)
    assert len(make_batches(rows, 50)) > 1
    for name in whole:
        assert torch.allclose(whole[name], cut[name], atol=2e-6), name
    for a, b in zip(figures(stats.auxiliary), figures(cut_stats.auxiliary), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_shared_prompts_count_in_each_of_their_rows() -> None:
    """As if each row were gone over by itself: gradients, losses, loads and entropies."""
    keys = {"mtp_weight": 0.3} | LOSSES
    policy = tiny_policy(num_nextn_predict_layers=1)
    rows = rows_of(make_groups(policy))
    assert all(batch.rows.shared is not None for batch in make_batches(rows, 50))
    shared, stats = run(policy, rows, max_tokens=50, **keys)
    alone, alone_stats = run(policy, rows, share_prompts=False, **keys)
    for name in alone:
        assert torch.allclose(shared[name], alone[name], atol=2e-6), name
    for a, b in zip(figures(stats.auxiliary), figures(alone_stats.auxiliary), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def figures(stats: AuxiliaryStats) -> list[float]:
    routers = stats.routers
    assert routers is not None
    per_layer = [routers.entropy_M, routers.balance_M or [], routers.z_M or [], *routers.load_ME]
    return [stats.mtp_loss or 0.0, *(figure for figures in per_layer for figure in figures)]


def test_biases_move_by_the_load_of_the_whole_batch_the_modules_too() -> None:
    policy = tiny_policy(num_nextn_predict_layers=1)
    rows = rows_of(make_groups(policy))
    before = biases(policy)
    _, stats = run(policy, rows, max_tokens=50, bias_update_rate=0.01, mtp_weight=0.1)
    assert stats.auxiliary.routers is not None
    loads = stats.auxiliary.routers.load_ME
    assert len(loads) == len(before) == 3
    for old, new, load in zip(before, biases(policy), loads, strict=True):
        steps = [0.01 * (share < 0.25) - 0.01 * (share > 0.25) for share in load]
        assert (new - old).tolist() == pytest.approx(steps, abs=1e-6)
        assert any(steps)


def test_a_skipped_step_moves_no_bias() -> None:
    policy = tiny_policy()
    rows = rows_of(make_groups(policy))
    with torch.no_grad():
        policy.lm_head.weight[0, 0] = math.nan
    before = biases(policy)
    _, stats = run(policy, rows, bias_update_rate=0.01)
    assert stats.num_skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, biases(policy), strict=True))


def test_totals_of_micro_batches_are_means() -> None:
    policy, tokens = tiny_policy(), torch.randint(3, 61, (12,), generator=torch.Generator().manual_seed(0))
    totals = RouterTotals(policy, with_mtp=False, with_losses=True)
    assert totals.stats(2) is not None
    rows = PackedRows.of([12])
    sums = policy(
        tokens, rows.position_ids_N, Expanded(rows=rows), watch=RouterWatch.of(rows, with_losses=True)
    ).routers
    for _ in range(3):
        totals.add(sums, num_rows=1)
    totals.reduce(Ranks(cpu=True))
    stats = totals.stats(2)
    assert stats is not None
    assert stats.balance_M == pytest.approx(sums.balance_M.tolist())
    assert stats.z_M == pytest.approx((sums.z_M / 12).tolist())
    assert stats.entropy_M == pytest.approx((sums.entropy_M / 12).tolist())
    assert stats.load_ME[0] == pytest.approx((sums.load_ME[0] / 24).tolist())
    assert RouterTotals(tiny_policy(first_k_dense_replace=3), with_mtp=False, with_losses=False).stats(2) is None


@pytest.mark.parametrize(
    ("keys", "shape", "message"),
    [
        ({"mtp_weight": 0.1}, {}, "mtp_weight is set, but the model has no MTP modules; set mtp_weight: 0"),
        ({"mtp_num_recycled": 1}, {}, "mtp_num_recycled is set, but mtp_weight is 0"),
        ({"bias_update_rate": 0.1}, {"first_k_dense_replace": 3}, "bias_update_rate is set, but .* no routed experts"),
        (LOSSES, {"first_k_dense_replace": 3}, "router_aux_loss_coef is set, but .* set router_aux_loss_coef: 0"),
        ({"bias_update_rate": 0.1}, {"model_type": "deepseek_v2"}, "routers of a deepseek_v2 model have no bias; set"),
    ],
)
def test_keys_that_the_shape_cannot_serve_are_refused(
    keys: dict[str, float], shape: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_auxiliary(tiny_config(**keys), tiny_policy(**shape).config)
    check_auxiliary(tiny_config(), tiny_policy(**shape).config)
