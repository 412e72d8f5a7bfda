"""The alignment rule by brute force: position n speaks of token n given the tokens before it in its row.

Shapes: N packed tokens, V vocabulary, W wanted tokens.
"""

import math
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from policy import PackedRows, Policy
from policy.balance import RouterWatch
from policy.logprobs import TokenLogprobs, ahead_losses, gather_logprobs, next_token_loss, token_logprobs
from policy.packing import Wanted
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy

LENGTHS = (6, 1, 9, 2)


def draw_tokens(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return torch.randint(3, 61, (sum(lengths),), generator=torch.Generator().manual_seed(0))


def log_distributions(policy: Policy, token_ids_N: Tensor, temperature: float = 1.0) -> list[Tensor | None]:
    """Of each token given those before it, [V], every prefix run through the policy by itself; None at rows' starts."""
    found: list[Tensor | None] = []
    for row in token_ids_N.split(LENGTHS):
        found.append(None)
        for n in range(1, len(row)):
            found.append((policy.logits(row[None, :n])[0, -1] / temperature).log_softmax(-1))
    return found


def not_first() -> Tensor:
    return PackedRows.of(LENGTHS).position_ids_N > 0


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all_wanted", "some_wanted"])
@torch.no_grad()
def test_each_position_speaks_of_its_own_token(temperature: float, share: float) -> None:
    policy, token_ids_N = tiny_policy(), draw_tokens()
    wanted_N = not_first() & (torch.rand(len(token_ids_N), generator=torch.Generator().manual_seed(1)) < share)
    got = token_logprobs(policy, token_ids_N, PackedRows.of(LENGTHS), wanted_N, temperature=temperature)
    assert 0 < wanted_N.sum() <= not_first().sum()
    for n, log_V in enumerate(log_distributions(policy, token_ids_N, temperature)):
        if log_V is None or not wanted_N[n]:
            assert got.logprobs_N[n] == got.entropy_N[n] == 0
        else:
            assert float(got.logprobs_N[n]) == pytest.approx(float(log_V[token_ids_N[n]]), abs=1e-5)
            assert float(got.entropy_N[n]) == pytest.approx(-float((log_V.exp() * log_V).sum()), abs=1e-5)


def test_gradient_equals_that_of_every_prefix_by_itself() -> None:
    policy, token_ids_N = tiny_policy(), draw_tokens()
    weights_N = torch.randn(len(token_ids_N), generator=torch.Generator().manual_seed(2))
    got = token_logprobs(policy, token_ids_N, PackedRows.of(LENGTHS), not_first(), temperature=0.8)
    parameters = list(policy.parameters())
    ours = torch.autograd.grad((got.logprobs_N * weights_N).sum(), parameters)
    brute = sum(
        weights_N[n] * log_V[token_ids_N[n]]
        for n, log_V in enumerate(log_distributions(policy, token_ids_N, 0.8))
        if log_V is not None
    )
    for a, b in zip(ours, torch.autograd.grad(brute, parameters), strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_a_rows_first_token_cannot_be_wanted() -> None:
    wanted_N = not_first()
    wanted_N[6] = True
    with pytest.raises(AssertionError):
        token_logprobs(tiny_policy(), draw_tokens(), PackedRows.of(LENGTHS), wanted_N)


def test_nothing_wanted_gives_zeros_and_no_gradient() -> None:
    policy, token_ids_N = tiny_policy(), draw_tokens()
    got = token_logprobs(policy, token_ids_N, PackedRows.of(LENGTHS), torch.zeros_like(token_ids_N, dtype=torch.bool))
    assert not got.logprobs_N.any()
    got.logprobs_N.sum().backward()
    assert all(w.grad is None or not w.grad.any() for w in policy.parameters())


def test_entropy_of_nearly_equal_and_of_certain_tokens() -> None:
    policy = tiny_policy()
    hidden_WC, token_ids_W = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    assert torch.allclose(gather_logprobs(policy, hidden_WC, token_ids_W, 1e6)[1], torch.full((4,), math.log(61)))
    assert torch.allclose(gather_logprobs(policy, hidden_WC, token_ids_W, 1e-4)[1], torch.zeros(4), atol=1e-5)


def test_next_token_loss_is_the_mean_cross_entropy_of_all_but_first_tokens() -> None:
    policy, token_ids_N = tiny_policy(), draw_tokens()
    ours = next_token_loss(policy, token_ids_N, PackedRows.of(LENGTHS))
    pairs = [(policy.logits(row[None])[0, :-1], row[1:]) for row in token_ids_N.split(LENGTHS)]
    wanted = F.cross_entropy(torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs]))
    assert torch.allclose(ours.total, wanted, atol=1e-5)
    assert torch.equal(ours.total, ours.trunk)
    assert float(ours.mtp) == 0
    parameters = list(policy.parameters())
    for a, b in zip(torch.autograd.grad(ours.total, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        assert torch.allclose(a, b, atol=1e-5, rtol=1e-4)


def draw_groups() -> tuple[Tensor, PackedRows, Tensor]:
    """Tokens of six rows over two prompts, the rows in no order; the rows; what comes after the prompts."""
    prompts, of_row, rests = [5, 8], [1, 0, 1, 1, 0, 1], [7, 1, 3, 12, 6, 1]
    generator = torch.Generator().manual_seed(4)
    starts = [torch.randint(3, 61, (length,), generator=generator) for length in prompts]
    ends = [torch.randint(3, 61, (length,), generator=generator) for length in rests]
    rows = PackedRows.of(
        [prompts[f] + rest for f, rest in zip(of_row, rests, strict=True)], prefixes=prompts, prefix_of_row=of_row
    )
    token_ids_N = torch.cat([torch.cat((starts[f], end)) for f, end in zip(of_row, ends, strict=True)])
    own = [torch.arange(prompts[f] + rest) >= prompts[f] for f, rest in zip(of_row, rests, strict=True)]
    return token_ids_N, rows, torch.cat(own)


FAMILIES: dict[str, Callable[[], Policy]] = {
    "deepseek_v3": tiny_policy, "llama": tiny_llama, "qwen3_moe": lambda: tiny_llama(**TINY_QWEN3_MOE),
}  # fmt: skip


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_prefixes_change_values_and_gradients_by_rounding_only(family: str, recomputation: str) -> None:
    policy, (token_ids_N, rows, wanted_N) = FAMILIES[family](), draw_groups()
    policy.recomputation = recomputation  # type: ignore[assignment]
    weights_N = torch.randn(len(token_ids_N), generator=torch.Generator().manual_seed(2)) / len(token_ids_N)

    def run(rows: PackedRows, given: Tensor | None = None) -> tuple[TokenLogprobs, list[Tensor]]:
        watch = RouterWatch.of(rows, with_losses=True)
        got = token_logprobs(policy, token_ids_N, rows, wanted_N, temperature=0.8, given_experts_MNK=given, watch=watch)
        loss = (weights_N * (got.logprobs_N + 0.3 * got.entropy_N)).sum()
        if got.output.routers is not None:
            loss = loss + 0.01 * (got.output.routers.balance_M.sum() + got.output.routers.z_M.sum() / len(weights_N))
        return got, list(torch.autograd.grad(loss, list(policy.parameters())))

    alone, wanted_gradients = run(rows.alone)
    experts_MNK = alone.output.experts_MNK
    for given in (None, experts_MNK) if experts_MNK is not None else (None,):
        shared, gradients = run(rows, given)
        assert len(shared.output.hidden_NC) == len(token_ids_N) - 3 * 8 - 1 * 5
        assert torch.allclose(shared.logprobs_N, alone.logprobs_N, atol=5e-6)
        assert torch.allclose(shared.entropy_N, alone.entropy_N, atol=5e-6)
        for a, b in zip(gradients, wanted_gradients, strict=True):
            assert torch.allclose(a, b, atol=1e-6, rtol=1e-5)
        if experts_MNK is not None:
            assert shared.output.experts_MNK is not None
            assert shared.output.routers is not None
            assert torch.equal(shared.output.experts_MNK, experts_MNK)
            for field in fields(shared.output.routers):
                ours, theirs = (getattr(x.output.routers, field.name) for x in (shared, alone))
                assert torch.allclose(ours, theirs, rtol=1e-5), field.name


def test_given_experts_are_those_of_the_first_row_with_a_prefix() -> None:
    policy, (token_ids_N, rows, wanted_N) = tiny_policy(), draw_groups()
    first = token_logprobs(policy, token_ids_N, rows, wanted_N)
    assert first.output.experts_MNK is not None
    given_MNK = (first.output.experts_MNK + 1) % 4  # another choice everywhere
    moved = token_logprobs(policy, token_ids_N, rows, wanted_N, given_experts_MNK=given_MNK)
    alone = token_logprobs(policy, token_ids_N, rows.alone, wanted_N, given_experts_MNK=given_MNK)
    assert torch.allclose(moved.logprobs_N, alone.logprobs_N, atol=5e-6)
    assert (moved.logprobs_N - first.logprobs_N).abs().max() > 0.01


def test_modules_that_look_ahead_see_each_row_by_itself() -> None:
    policy, (token_ids_N, rows, wanted_N) = tiny_policy(num_nextn_predict_layers=2), draw_groups()
    found = []
    for given in (rows.alone, rows):
        watch = RouterWatch.of(given, with_losses=True)
        output = token_logprobs(policy, token_ids_N, given, wanted_N).output
        wanted = Wanted.of(wanted_N, given)
        ahead = ahead_losses(policy, output.hidden_NC, token_ids_N, given, wanted=wanted, watch=watch)
        assert ahead.routers is not None
        gradients = torch.autograd.grad(
            torch.stack(ahead.sums).sum() / 30, list(policy.parameters()), allow_unused=True
        )
        found.append((ahead.counts, [*ahead.sums, ahead.routers.load_ME, ahead.routers.balance_M], gradients))
    assert found[0][0] == found[1][0]
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(a, b, rtol=1e-5)
    for a, b in zip(found[0][2], found[1][2], strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, atol=2e-6, rtol=1e-5)
