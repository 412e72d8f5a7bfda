"""What each clipping gives and what gradient it leaves, by hand."""

import math
from typing import Any, get_args

import pytest
import torch

from grpo.algorithm import AlgorithmConfig, Clipping
from grpo.clipping import CLIPPINGS, Gain, Tokens, binary_divergence, total_variation


def gain_of(clipping: str, ratio: float, advantage: float, old: float = 0.2, **choices: Any) -> tuple[Gain, float]:
    """The gain of one token of old probability `old`, and its slope by the token's log-probability."""
    logprob = torch.tensor([math.log(old * ratio)], requires_grad=True)
    old_logprob = torch.tensor([math.log(old)])
    tokens = Tokens(
        ratio_N=(logprob - old_logprob).exp(),
        logprobs_N=logprob,
        old_logprobs_N=old_logprob,
        advantages_N=torch.tensor([advantage]),
    )
    gain = CLIPPINGS[clipping](tokens, AlgorithmConfig(clipping=clipping, **choices))
    (slope,) = torch.autograd.grad(gain.gain_N.sum(), logprob)
    return gain, slope.item()


def test_every_named_clipping_is_there() -> None:
    assert CLIPPINGS.keys() == set(get_args(Clipping))


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.0, 2.0, 2.0, 2.0),
        (1.1, 2.0, 2.2, 2.2),
        (1.5, 2.0, 2.4, 0.0),  # clipped at 1.2
        (0.5, 2.0, 1.0, 1.0),  # not clipped: moving up is wanted
        (0.5, -2.0, -1.6, 0.0),  # clipped at 0.8
        (1.5, -2.0, -3.0, -3.0),  # not clipped: moving down is wanted
    ],
)
def test_ppo_by_hand(ratio: float, advantage: float, expected: float, slope: float) -> None:
    gain, found = gain_of("ppo", ratio, advantage)
    assert gain.gain_N.item() == pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(slope, rel=1e-5)
    assert (gain.low_N.item(), gain.high_N.item()) == (slope == 0 and ratio < 1, slope == 0 and ratio > 1)


def test_clip_higher_by_hand() -> None:
    assert gain_of("ppo", 1.5, 2.0, epsilon_high=0.28)[0].gain_N.item() == pytest.approx(2.56, rel=1e-5)
    assert gain_of("ppo", 0.5, -2.0, epsilon_high=0.28)[0].gain_N.item() == pytest.approx(-1.6, rel=1e-5)


def test_dual_clip_bounds_the_loss_of_what_went_wrong() -> None:
    gain, slope = gain_of("ppo", 4.0, -2.0, delta=3.0)
    assert gain.gain_N.item() == pytest.approx(-6.0, rel=1e-5)
    assert (slope, gain.high_N.item()) == (0.0, True)
    assert gain_of("ppo", 2.5, -2.0, delta=3.0)[1] == pytest.approx(-5.0, rel=1e-5)
    assert gain_of("ppo", 1.1, 2.0, delta=3.0)[1] == pytest.approx(2.2, rel=1e-5)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_bounds_the_weight_and_keeps_a_gradient(advantage: float) -> None:
    gain, slope = gain_of("cispo", 4.0, advantage, epsilon_high=3.0)
    assert gain.gain_N.item() == pytest.approx(3.0 * advantage * math.log(0.8), rel=1e-5)
    assert slope == pytest.approx(3.0 * advantage, rel=1e-5)
    assert gain.high_N.item()
    gain, slope = gain_of("cispo", 0.1, advantage, epsilon_high=3.0)
    assert (slope, gain.low_N.item()) == (pytest.approx(0.1 * advantage, rel=1e-5), False)


def test_sapo_by_hand() -> None:
    # 4 / tau * sigmoid(tau * (r - 1)) * A; at r = 1 the value is 2 A / tau and the slope A
    gain, slope = gain_of("sapo", 1.0, 3.0)
    assert (gain.gain_N.item(), slope) == (pytest.approx(6.0, rel=1e-5), pytest.approx(3.0, rel=1e-5))
    gain, slope = gain_of("sapo", 2.0, -1.0, sapo_temperature_neg=2.0)
    sigmoid = 1 / (1 + math.exp(-2.0))
    assert gain.gain_N.item() == pytest.approx(-2 * sigmoid, rel=1e-5)
    assert slope == pytest.approx(-4 * sigmoid * (1 - sigmoid) * 2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("old", "ratio", "advantage", "is_masked"),
    [
        (0.5, 1.6, 1.0, True),  # 0.5 to 0.8: 0.3 up
        (0.5, 1.6, -1.0, False),  # moving back is wanted
        (0.5, 0.4, -1.0, True),  # 0.5 to 0.2: 0.3 down
        (0.5, 0.4, 1.0, False),
        (0.01, 3.0, 1.0, False),  # a rare token may triple
    ],
)
def test_dppo_masks_by_total_variation(old: float, ratio: float, advantage: float, is_masked: bool) -> None:
    gain, slope = gain_of("dppo_tv", ratio, advantage, old, epsilon=0.2)
    assert slope == pytest.approx(0.0 if is_masked else ratio * advantage, rel=1e-5)
    assert (gain.low_N | gain.high_N).item() == is_masked


def test_dppo_bounds_the_weight() -> None:
    assert gain_of("dppo_tv", 30.0, 1.0, 0.01, epsilon=0.5, delta=20.0)[1] == pytest.approx(20.0, rel=1e-5)


def test_binary_divergences_by_hand() -> None:
    new, old = torch.tensor([math.log(0.8)]), torch.tensor([math.log(0.5)])
    assert total_variation(new, old).item() == pytest.approx(0.3, rel=1e-5)
    expected = 0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2)
    assert binary_divergence(new, old).item() == pytest.approx(expected, rel=1e-5)
    certain = torch.zeros(1)
    assert binary_divergence(certain, certain).item() == 0
    assert binary_divergence(certain, old).isfinite().all()


def test_dppo_masks_by_divergence() -> None:
    # KL of 0.5 to 0.8 is 0.223 nats
    assert gain_of("dppo_kl", 1.6, 1.0, 0.5, epsilon=0.2)[1] == 0
    assert gain_of("dppo_kl", 1.6, 1.0, 0.5, epsilon=0.25)[1] == pytest.approx(1.6, rel=1e-5)


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_at_the_old_policy_every_gradient_is_the_policy_gradient(clipping: str) -> None:
    assert gain_of(clipping, 1.0, -1.5, epsilon_high=5.0)[1] == pytest.approx(-1.5, rel=1e-5)
