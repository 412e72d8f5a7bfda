"""The loss against numbers worked by hand."""

import math

import pytest
import torch

from grpo.loss import clipped_loss, k3

LOG = math.log


def loss_of(ratio: float, advantage: float, **changes: float) -> float:
    terms = clipped_loss(
        torch.tensor([LOG(ratio)]),
        torch.tensor([0.0]),
        torch.tensor([advantage]),
        torch.tensor([True]),
        **({"epsilon": 0.2} | changes),
    )
    return terms.loss_N.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [
        (1.0, 2.0, -2.0),
        (1.1, 2.0, -2.2),
        (1.5, 2.0, -2.4),  # clipped at 1.2
        (0.5, 2.0, -1.0),  # not clipped: moving up is wanted
        (0.5, -2.0, 1.6),  # clipped at 0.8
        (1.5, -2.0, 3.0),  # not clipped: moving down is wanted
    ],
)
def test_clipping_by_hand(ratio: float, advantage: float, expected: float) -> None:
    assert loss_of(ratio, advantage) == pytest.approx(expected, rel=1e-6)


def test_clip_higher_by_hand() -> None:
    assert loss_of(1.5, 2.0, epsilon_high=0.28) == pytest.approx(-2.56, rel=1e-6)
    assert loss_of(0.5, -2.0, epsilon_high=0.28) == pytest.approx(1.6, rel=1e-6)


def test_gradient_at_the_old_policy_is_the_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([0.5, -1.5, 2.0])
    clipped_loss(
        logprobs, logprobs.detach(), advantages, torch.ones(3, dtype=torch.bool), epsilon=0.2
    ).loss_N.sum().backward()
    assert torch.allclose(logprobs.grad, -advantages)


@pytest.mark.parametrize(("ratio", "advantage"), [(1.5, 1.0), (0.5, -1.0)])
def test_clipped_tokens_have_no_gradient_and_are_counted(ratio: float, advantage: float) -> None:
    logprobs = torch.tensor([LOG(ratio)], requires_grad=True)
    terms = clipped_loss(
        logprobs, torch.zeros(1), torch.tensor([advantage]), torch.ones(1, dtype=torch.bool), epsilon=0.2
    )
    terms.loss_N.sum().backward()
    assert logprobs.grad.item() == 0
    assert terms.clipped_N.tolist() == [True]


def test_outside_the_mask_nothing_counts_not_even_infinities() -> None:
    logprobs = torch.tensor([-1.0, float("-inf")], requires_grad=True)
    mask = torch.tensor([True, False])
    terms = clipped_loss(
        logprobs,
        torch.tensor([-1.0, 0.0]),
        torch.tensor([1.0, 5.0]),
        mask,
        epsilon=0.2,
        ref_logprobs_N=torch.tensor([-1.5, 0.0]),
        beta=0.1,
    )
    assert terms.loss_N[1] == 0
    assert terms.kl_N[1] == 0
    terms.loss_N.sum().backward()
    assert logprobs.grad[0].isfinite()


def test_k3_by_hand() -> None:
    # d = log ref - log policy = ln 2: e^d - d - 1 = 1 - ln 2
    assert k3(torch.tensor([-2.0]), torch.tensor([-2.0 + LOG(2)])).item() == pytest.approx(1 - LOG(2), rel=1e-6)


def test_k3_is_never_negative_and_its_mean_is_the_divergence() -> None:
    torch.manual_seed(0)
    policy, reference = (torch.randn(50, dtype=torch.float64).log_softmax(0) for _ in range(2))
    estimates = k3(policy, reference)
    assert (estimates >= 0).all()
    exact = (policy.exp() * (policy - reference)).sum()
    assert (policy.exp() * estimates).sum().item() == pytest.approx(exact.item(), rel=1e-9)


def test_kl_penalty_is_added_with_its_weight() -> None:
    logprobs, ref = torch.tensor([-1.0]), torch.tensor([-1.4])
    mask = torch.tensor([True])
    plain = clipped_loss(logprobs, logprobs, torch.tensor([1.0]), mask, epsilon=0.2)
    with_kl = clipped_loss(logprobs, logprobs, torch.tensor([1.0]), mask, epsilon=0.2, ref_logprobs_N=ref, beta=0.3)
    assert (with_kl.loss_N - plain.loss_N).item() == pytest.approx(0.3 * k3(logprobs, ref).item(), rel=1e-5)
