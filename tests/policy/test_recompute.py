"""Recomputation: the same gradients as without, the same routing, and less kept.

Shapes: N packed tokens, M mixture-of-experts layers, K experts per token.
"""

import weakref
from typing import get_args

import pytest
import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks

from policy import PackedRows, Policy
from policy.attention import Expanded
from policy.logprobs import token_logprobs
from policy.recompute import Recomputation, forgetting, remade
from tests.policies import tiny_policy

LENGTHS = (7, 1, 9)
SHAPES: dict[str, dict[str, object]] = {"one_query_matrix": {}, "query_latent": {"q_lora_rank": 24}}


def run(policy: Policy, recomputation: Recomputation) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
    policy.recomputation = recomputation
    rows = PackedRows.of(LENGTHS)
    token_ids_N = torch.randint(3, 61, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
    policy.zero_grad()
    got = token_logprobs(policy, token_ids_N, rows, rows.position_ids_N > 0, temperature=0.9)
    (got.logprobs_N.sum() + 0.1 * got.entropy_N.sum()).backward()
    gradients = {name: weight.grad for name, weight in policy.named_parameters() if weight.grad is not None}
    return got.logprobs_N.detach(), got.output.experts_MNK, {name: grad.clone() for name, grad in gradients.items()}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("recomputation", ["selective", "full"])
def test_recomputation_changes_no_bit(recomputation: Recomputation, shape: str) -> None:
    policy = tiny_policy(**SHAPES[shape])
    plain, ours = run(policy, "none"), run(policy, recomputation)
    assert torch.equal(plain[0], ours[0])
    assert plain[1] is not None
    assert ours[1] is not None
    assert torch.equal(plain[1], ours[1])
    assert plain[2].keys() == ours[2].keys()
    assert all(torch.equal(plain[2][name], ours[2][name]) for name in plain[2])


def count_kept(policy: Policy, recomputation: Recomputation) -> int:
    """Numbers that autograd keeps of the trunk, each piece of memory once, weights left out."""
    policy.recomputation = recomputation
    weights = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}
    kept: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        if (address := x.untyped_storage().data_ptr()) not in weights:
            kept[address] = x
        return x

    rows = PackedRows.of([32] * 4)
    token_ids_N = torch.randint(3, 61, (128,), generator=torch.Generator().manual_seed(0))
    with saved_tensors_hooks(note, lambda x: x):
        output = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows))
    assert output.hidden_NC.requires_grad
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def test_full_keeps_less_than_none() -> None:
    policy = tiny_policy()
    assert count_kept(policy, "full") < 0.2 * count_kept(policy, "none")


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


def test_every_kind_of_recomputation_is_tried_here() -> None:
    assert set(get_args(Recomputation)) == {"none", "selective", "full"}
