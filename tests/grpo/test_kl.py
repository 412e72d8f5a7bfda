"""Estimates of the divergence: by hand, and in the mean over a whole distribution.

Shapes: V vocabulary.
"""

import math
from typing import get_args

import pytest
import torch

from grpo.algorithm import Estimator
from grpo.kl import ESTIMATORS, k1, k2, k3, penalise

ALL = torch.ones(50, dtype=torch.bool)


def test_every_named_estimator_is_there() -> None:
    assert ESTIMATORS.keys() == set(get_args(Estimator))


def test_estimators_by_hand() -> None:
    # log ref - log policy = ln 2
    logprob, ref = torch.tensor([-2.0]), torch.tensor([-2.0 + math.log(2)])
    assert k1(logprob, ref).item() == pytest.approx(-math.log(2), rel=1e-6)
    assert k2(logprob, ref).item() == pytest.approx(math.log(2) ** 2 / 2, rel=1e-6)
    assert k3(logprob, ref).item() == pytest.approx(1 - math.log(2), rel=1e-6)


def test_k3_is_never_negative_and_its_mean_is_the_divergence() -> None:
    torch.manual_seed(0)
    policy, reference = (torch.randn(50, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    assert (k3(policy, reference) >= 0).all()
    for estimator in (k1, k3):
        assert (policy.exp() * estimator(policy, reference)).sum().item() == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_corrected_the_mean_gradient_is_that_of_the_divergence_also_off_policy(estimator: str) -> None:
    torch.manual_seed(1)
    logits_V = torch.randn(50, dtype=torch.float64, requires_grad=True)
    old_V, ref_V = (torch.randn(50, dtype=torch.float64).log_softmax(0) for _ in range(2))
    logprobs_V = logits_V.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs_V.exp() * (logprobs_V - ref_V)).sum(), logits_V, retain_graph=True)
    kl_V = penalise(logprobs_V, ref_V, logprobs_V - old_V, ALL, estimator=estimator, is_corrected=True)
    (found,) = torch.autograd.grad((old_V.exp() * kl_V).sum(), logits_V, retain_graph=True)
    assert torch.allclose(found, exact, atol=1e-12)


def test_uncorrected_only_the_gradient_of_k2_is_right_on_policy() -> None:
    torch.manual_seed(1)
    logits_V = torch.randn(50, dtype=torch.float64, requires_grad=True)
    ref_V = torch.randn(50, dtype=torch.float64).log_softmax(0)
    logprobs_V = logits_V.log_softmax(0)
    (exact,) = torch.autograd.grad((logprobs_V.exp() * (logprobs_V - ref_V)).sum(), logits_V, retain_graph=True)
    is_right = {}
    for name in ESTIMATORS:
        kl_V = penalise(logprobs_V, ref_V, torch.zeros(50), ALL, estimator=name, is_corrected=False)
        (found,) = torch.autograd.grad((logprobs_V.detach().exp() * kl_V).sum(), logits_V, retain_graph=True)
        is_right[name] = torch.allclose(found, exact, atol=1e-12)
    assert is_right == {"k1": False, "k2": True, "k3": False}


def test_outside_the_mask_nothing_counts() -> None:
    logprobs = torch.tensor([-1.0, float("-inf")], requires_grad=True)
    mask = torch.tensor([True, False])
    kl = penalise(logprobs, torch.tensor([-1.5, 0.0]), torch.zeros(2), mask, estimator="k3", is_corrected=True)
    assert kl[1] == 0
    (slope,) = torch.autograd.grad(kl.sum(), logprobs)
    assert slope[0].isfinite()
