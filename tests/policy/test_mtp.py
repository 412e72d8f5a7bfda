"""The MTP loss worked from its definition (DeepSeek-V3, equations 21 to 25), one row and one index at a time."""

import pytest
import torch
from torch import Tensor

from policy import PackedRows, Policy
from policy.attention import Expanded
from policy.logprobs import next_token_loss
from policy.rope import rotation_of
from tests.policies import tiny_policy

LENGTHS = (9, 4, 2, 1, 3, 6)


def make_policy(depth: int = 2) -> Policy:
    return tiny_policy(num_nextn_predict_layers=depth)


def draw_tokens(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.randint(3, 61, (sum(lengths),), generator=torch.Generator().manual_seed(0))


def mtp_losses_by_definition(policy: Policy, token_ids_N: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
    """L_MTP^k for k = 1..D; t[i] are a row's tokens and h[i] their hidden states, counted from 0.

    As in the trunk, what leaves a module has gone through its final norm.
    """
    terms: list[list[Tensor]] = [[] for _ in policy.mtp]
    for t in token_ids_N.split(lengths):
        rows = PackedRows.of([len(t)])
        h = policy(t, rows.position_ids_N, Expanded(rows=rows)).hidden_NC
        for k, module in enumerate(policy.mtp, start=1):
            count = len(t) - k
            if count < 1:
                break
            joined = []
            for i in range(count):
                embedding, state = module.enorm(policy.embed_tokens.weight[t[i + k]]), module.hnorm(h[i])
                joined.append(module.eh_proj(torch.cat((embedding, state))))  # equation 21
            rows = PackedRows.of([count])
            rotation = rotation_of(torch.arange(count), policy.config)
            h = module.norm(module.block(torch.stack(joined), rotation, Expanded(rows=rows))[0])  # equation 22
            for i in range(count - 1):
                logits_V = policy.lm_head.weight @ h[i]  # equation 23
                terms[k - 1].append(-logits_V.log_softmax(-1)[t[i + k + 1]])
    return [torch.stack(each).mean() for each in terms]  # equation 24, as a mean over the tokens that are predicted


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_loss_equals_the_definition_gradients_too(depth: int) -> None:
    policy, token_ids_N = make_policy(depth), draw_tokens()
    ours = next_token_loss(policy, token_ids_N, PackedRows.of(LENGTHS), mtp_weight=0.3)
    losses = mtp_losses_by_definition(policy, token_ids_N, LENGTHS)
    assert len(losses) == depth
    trunk = next_token_loss(policy, token_ids_N, PackedRows.of(LENGTHS)).total
    wanted = trunk + 0.3 / depth * torch.stack(losses).sum()  # equation 25
    assert torch.allclose(ours.mtp, torch.stack(losses).mean(), atol=1e-5)
    assert torch.allclose(ours.total, wanted, atol=1e-5)
    assert torch.allclose(ours.trunk, trunk)
    parameters = list(policy.parameters())
    for a, b in zip(torch.autograd.grad(ours.total, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)


def test_weight_zero_leaves_the_modules_out() -> None:
    policy = make_policy()
    loss = next_token_loss(policy, draw_tokens(), PackedRows.of(LENGTHS), mtp_weight=0.0)
    loss.total.backward()
    assert float(loss.mtp) == 0
    assert all(weight.grad is None for weight in policy.mtp.parameters())


def test_what_follows_in_other_rows_changes_nothing() -> None:
    """Positions near a row's end look into the next row when tokens are rolled; they must not count."""
    policy, lengths = make_policy(), (4, 5)
    token_ids_N = draw_tokens(lengths)
    both = next_token_loss(policy, token_ids_N, PackedRows.of(lengths), mtp_weight=1.0)
    parts = [
        next_token_loss(policy, row, PackedRows.of([len(row)]), mtp_weight=1.0) for row in token_ids_N.split(lengths)
    ]
    # By row length T: T - 1 tokens count for the trunk, T - 2 and T - 3 for the two modules.
    trunk = (3 * parts[0].trunk + 4 * parts[1].trunk) / 7
    losses = [mtp_losses_by_definition(policy, row, (len(row),)) for row in token_ids_N.split(lengths)]
    mtp = ((2 * losses[0][0] + 3 * losses[1][0]) / 5 + (1 * losses[0][1] + 2 * losses[1][1]) / 3) / 2
    assert torch.allclose(both.trunk, trunk, atol=1e-5)
    assert torch.allclose(both.mtp, mtp, atol=1e-5)


def test_rows_too_short_to_predict_ahead_add_nothing() -> None:
    policy, lengths = make_policy(), (2, 1, 2)
    loss = next_token_loss(policy, draw_tokens(lengths), PackedRows.of(lengths), mtp_weight=0.5)
    assert float(loss.mtp) == 0
    assert torch.equal(loss.total.detach(), loss.trunk)
    assert loss.trunk > 0
