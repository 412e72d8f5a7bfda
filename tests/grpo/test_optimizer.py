"""Master weights: what bf16 alone would lose, and what a checkpoint must bring back."""

import pytest
import torch

from grpo.optimizer import MasterAdamW, learning_rate_at
from policy import cast_weights
from tests.policies import tiny_policy

SETTINGS = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}


def backward(policy: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    policy.logits(torch.randint(0, 61, (2, 9))).square().mean().backward()


def test_fp32_step_equals_torchs_adamw() -> None:
    ours, theirs = tiny_policy(), tiny_policy()
    optimizer = MasterAdamW(ours, **SETTINGS)
    groups = [
        {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), eps=1e-8)
    for step in range(3):
        backward(ours, step)
        backward(theirs, step)
        optimizer.gather_gradients()
        norm = optimizer.step(1e-3, 0.5)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)), rel=1e-5)
        reference.step()
        reference.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_bf16_keeps_steps_too_small_for_its_weights() -> None:
    policy = cast_weights(tiny_policy(), torch.bfloat16)
    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    name, before = "lm_head.weight", optimizer.masters["lm_head.weight"].clone()
    start = policy.lm_head.weight.detach().clone()
    for step in range(3):
        backward(policy, step)
        optimizer.gather_gradients()
        optimizer.step(1e-6, 1.0)
    assert not torch.equal(optimizer.masters[name], before)
    assert (policy.lm_head.weight != start).float().mean() < 0.2
    assert torch.equal(policy.lm_head.weight, optimizer.masters[name].bfloat16())


def test_bf16_micro_batches_accumulate_in_fp32() -> None:
    policy = cast_weights(tiny_policy(), torch.bfloat16)
    optimizer = MasterAdamW(policy, **SETTINGS)
    total = torch.zeros_like(optimizer.masters["lm_head.weight"])
    for step in range(4):
        backward(policy, step)
        total += policy.lm_head.weight.grad.float()
        optimizer.gather_gradients()
        assert policy.lm_head.weight.grad is None
    assert torch.equal(optimizer.masters["lm_head.weight"].grad, total)


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    policy = tiny_policy()
    optimizer = MasterAdamW(policy, **SETTINGS)
    backward(policy, 0)
    policy.lm_head.weight.grad[0, 0] = float("nan")
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    optimizer.gather_gradients()
    assert not torch.tensor(optimizer.step(1e-3, 1.0)).isfinite()
    assert all(torch.equal(before[name], weight) for name, weight in policy.named_parameters())
    assert not optimizer.inner.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_continues_bit_for_bit(dtype: torch.dtype) -> None:
    one = cast_weights(tiny_policy(), dtype)
    optimizer = MasterAdamW(one, **SETTINGS)
    for step in range(2):
        backward(one, step)
        optimizer.gather_gradients()
        optimizer.step(1e-3, 1.0)
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    two = cast_weights(tiny_policy(seed=9), dtype)
    restored = MasterAdamW(two, **SETTINGS)
    restored.load_state_tensors(state)
    for policy, its in ((one, optimizer), (two, restored)):
        backward(policy, 5)
        its.gather_gradients()
        its.step(1e-3, 1.0)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("step", "kind", "expected"),
    [(0, "constant", 0.1), (9, "constant", 1.0), (50, "constant", 1.0), (10, "linear", 1.0), (60, "linear", 0.5)]
    + [(10, "cosine", 1.0), (60, "cosine", 0.55), (110, "cosine", 0.1)],
)
def test_learning_rate_by_hand(step: int, kind: str, expected: float) -> None:
    assert learning_rate_at(step, peak=1.0, warmup_steps=10, max_steps=110, kind=kind) == pytest.approx(expected)
