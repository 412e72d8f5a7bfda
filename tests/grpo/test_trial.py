"""What fits is found out on a rank's own weights, before a pass that other ranks are in."""

import copy
from typing import Any

import pytest
import torch

from grpo.distributed import Ranks
from grpo.memory import DeviceMemoryError
from grpo.optimizer import MasterAdamW
from grpo.trial import Trial, halved
from grpo.update import UpdateStats, update
from grpo.weights import WholeWeights
from policy import Policy
from policy.lora import LoraConfig, add_adapters
from tests.grpo.rollouts import make_groups, minibatches_of, rows_of, tiny_config
from tests.policies import tiny_llama, tiny_policy
from tests.small_memory import room_for


class Apart(WholeWeights):
    """As where weights lie in pieces: what samples is a copy without gradients."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy, MasterAdamW(policy, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0))
        self.sampler = copy.deepcopy(policy).requires_grad_(False)


def step(weights: Apart, trial: Trial | None, **choices: Any) -> UpdateStats:
    config = tiny_config(**choices)
    minibatches = minibatches_of(rows_of(make_groups(tiny_policy()), config), 10**6, 2)
    return update(
        weights.policy, weights.optimizer, minibatches, learning_rate=1e-3, config=config, ranks=Ranks(cpu=True),
        trial=trial,
    )  # fmt: skip


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize(
    "choices", [{}, {"mtp_weight": 0.1, "router_aux_loss_coef": 0.01, "freeze_router": False, "num_iterations": 2}]
)
def test_micro_batches_are_halved_before_a_pass_that_counts(choices: dict[str, Any], in_backward: bool) -> None:
    """The step that follows is the one of whole micro-batches, and the trial leaves nothing behind."""
    plain, tried = (Apart(tiny_policy(num_nextn_predict_layers=1)) for _ in range(2))
    before, trial = step(plain, None, **choices), Trial(tried)
    with room_for(tried.sampler, 60, in_backward=in_backward) as refused:
        after = step(tried, trial, **choices)
        asked = len(refused)
        step(tried, trial, **choices)
    assert asked >= 2
    assert after.num_halvings > before.num_halvings == 0
    assert after.loss == pytest.approx(before.loss, abs=1e-6)
    assert not any(weight.requires_grad or weight.grad is not None for weight in tried.sampler.parameters())


def test_what_fitted_once_is_not_tried_again() -> None:
    weights, passes = Apart(tiny_policy()), list[int]()
    trial = Trial(weights)
    with room_for(weights.sampler, 10**6):
        weights.sampler.norm.register_forward_hook(lambda norm, inputs, output: passes.append(len(output)))
        for _ in range(3):
            assert step(weights, trial).num_halvings == 0
    assert len(passes) == len(set(passes)) <= 2


def test_adapters_alone_are_tried() -> None:
    policy = tiny_llama()
    add_adapters(policy, LoraConfig(r=2), seed=0)
    weights = Apart(policy)
    reached = list[bool]()
    weights.sampler.norm.register_forward_hook(lambda norm, inputs, output: reached.append(output.requires_grad))
    step(weights, Trial(weights))
    assert reached
    assert all(reached)


def test_a_row_that_does_not_fit_alone_is_an_error() -> None:
    weights = Apart(tiny_policy())
    with room_for(weights.sampler, 3), pytest.raises(DeviceMemoryError, match="on one row"):
        step(weights, Trial(weights))


def test_halves_of_halves_hold_every_row() -> None:
    [minibatch] = minibatches_of(rows_of(make_groups(tiny_policy())), 10**6)
    [batch] = minibatch.batches
    for times, num in ((0, 1), (1, 2), (2, 4), (9, len(batch.rows.lengths))):
        parts = halved(batch, times)
        assert len(parts) == num
        assert torch.equal(torch.cat([part.token_ids_N for part in parts]), batch.token_ids_N)
