"""Recomputation: the same gradients as without, the same routing, and less kept.

Shapes: N packed tokens, M mixture-of-experts layers, K experts per token.
"""

import weakref
from dataclasses import dataclass
from typing import get_args

import pytest
import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks

from policy import PackedRows, Policy
from policy.logprobs import run_trunk, token_logprobs
from policy.recompute import Recomputation, forgetting, remade, run_block
from tests.policies import tiny_policy

LENGTHS = (7, 1, 9)
SHAPES: dict[str, dict[str, object]] = {"one_query_matrix": {}, "query_latent": {"q_lora_rank": 24}}


ROWS = {
    "alone": PackedRows.of(LENGTHS),
    "sharing": PackedRows.of((7, 5, 9, 4), prefixes=(3, 4), prefix_of_row=(0, 1, 0, 0)),
}


def run(
    policy: Policy, recomputation: Recomputation, rows: PackedRows
) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    policy.recomputation = recomputation
    token_ids_N = torch.randint(3, 61, (sum(rows.lengths),), generator=torch.Generator().manual_seed(0))
    policy.zero_grad()
    got = token_logprobs(policy, token_ids_N, rows, rows.position_ids_N > 0, temperature=0.9)
    (got.logprobs_N.sum() + 0.1 * got.entropy_N.sum()).backward()
    gradients = {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}
    return got.logprobs_N.detach(), got.output.experts_MNK, {name: grad.clone() for name, grad in gradients.items()}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recomputation", ["selective", "full"])
def test_recomputation_changes_no_bit(recomputation: Recomputation, shape: str, rows: PackedRows) -> None:
    policy = tiny_policy(**SHAPES[shape])
    plain, ours = run(policy, "none", rows), run(policy, recomputation, rows)
    assert torch.equal(plain[0], ours[0])
    assert plain[1] is not None
    assert ours[1] is not None
    assert torch.equal(plain[1], ours[1])
    assert plain[2].keys() == ours[2].keys()
    assert all(torch.equal(plain[2][name], ours[2][name]) for name in plain[2])


def count_kept(policy: Policy, recomputation: Recomputation, rows: PackedRows | None = None) -> int:
    """Bytes that autograd keeps of the trunk, each piece of memory once, weights left out."""
    rows = PackedRows.of([32] * 4) if rows is None else rows
    policy.recomputation = recomputation
    weights = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        if (address := x.untyped_storage().data_ptr()) not in weights:
            kept[address] = x
        return x

    token_ids_N = torch.randint(3, 61, (sum(rows.lengths),), generator=torch.Generator().manual_seed(0))
    with saved_tensors_hooks(note, lambda x: x):
        output = run_trunk(policy, token_ids_N, rows)
    assert output.hidden_NC.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_full_keeps_less_than_none() -> None:
    policy = tiny_policy()
    assert count_kept(policy, "full") < 0.2 * count_kept(policy, "none")


def test_sharing_a_prefix_keeps_less_and_selective_forgets_its_copies() -> None:
    """Of eight rows with 24 of 32 tokens in common."""
    policy = tiny_policy()
    rows = PackedRows.of([32] * 8, prefixes=[24], prefix_of_row=[0] * 8)
    kept = count_kept(policy, "none", rows), count_kept(policy, "selective", rows)
    assert kept[0] < 0.6 * count_kept(policy, "none", rows.alone)
    copied = 8 * 32 * (12 + 8 + 10) * 4 * 4 * policy.config.num_hidden_layers  # keys and values of every row
    assert kept[0] - kept[1] > copied


def test_what_is_remade_is_not_kept_and_is_made_once_for_all_its_users() -> None:
    calls = 0

    def double(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 2 * x

    x, weights = torch.randn(3, 4, requires_grad=True), [torch.randn(4, 4, requires_grad=True) for _ in range(3)]

    def use() -> tuple[Tensor, weakref.ref[UntypedStorage]]:
        made = remade(double, x)
        total = torch.stack([(made @ weight).sum() for weight in weights]).sum()
        return total, weakref.ref(made.untyped_storage())

    kept_total, kept = use()
    plain = torch.autograd.grad(kept_total, [x, *weights], retain_graph=True)
    with forgetting():
        total, forgotten = use()
    assert kept() is not None
    assert forgotten() is None
    calls = 0
    for a, b in zip(torch.autograd.grad(total, [x, *weights]), plain, strict=True):
        assert torch.equal(a, b)
    assert calls == 1


def test_a_chain_is_remade_from_its_start() -> None:
    norm, up = nn.RMSNorm(6), nn.Linear(6, 8, bias=False)
    x = torch.randn(5, 6, requires_grad=True)

    def use() -> Tensor:
        left, right = remade(lambda y: up(y).split([3, 5], dim=-1), remade(norm, x))
        return left.square().sum() + (right * right.exp()).sum()

    plain = torch.autograd.grad(use(), [x, up.weight, norm.weight])
    with forgetting():
        total = use()
    for a, b in zip(torch.autograd.grad(total, [x, up.weight, norm.weight]), plain, strict=True):
        assert torch.equal(a, b)


def test_remade_is_a_plain_call_elsewhere() -> None:
    x = torch.randn(3, requires_grad=True)
    assert torch.equal(remade(torch.exp, x), x.exp())
    with forgetting(), torch.no_grad():
        assert torch.equal(remade(torch.exp, x), x.exp())


def test_a_block_that_runs_again_gets_the_choice_of_its_first_run() -> None:
    """A router that would choose otherwise each time, as rounding could make one."""

    @dataclass
    class Chosen:
        experts_NK: Tensor

    given: list[Tensor | None] = []
    table_EC = torch.randn(5, 4)

    def block(x_NC: Tensor, *, given_experts_NK: Tensor | None) -> tuple[Tensor, Chosen]:
        given.append(given_experts_NK)
        chosen_NK = torch.full((3, 1), len(given)) if given_experts_NK is None else given_experts_NK
        return (x_NC * table_EC[chosen_NK[:, 0]]).sin(), Chosen(chosen_NK)

    x_NC = torch.randn(3, 4, requires_grad=True)
    out_NC, routed = run_block(block, x_NC, None, "full")
    [gradient] = torch.autograd.grad(out_NC.sum(), x_NC)
    assert given[0] is None
    assert routed is not None
    assert given[1] is routed.experts_NK
    assert torch.equal(gradient, (x_NC * table_EC[1]).cos() * table_EC[1])


def test_every_kind_of_recomputation_is_tried_here() -> None:
    assert set(get_args(Recomputation)) == {"none", "selective", "full"}
