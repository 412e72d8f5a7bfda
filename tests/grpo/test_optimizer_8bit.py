"""Moments in 8 bits: how far off a number may be, that a policy learns as with exact moments, and resuming."""

from pathlib import Path

import pytest
import torch

from grpo.checkpoint import load_checkpoint, save_checkpoint
from grpo.optimizer import MasterAdamW
from grpo.optimizer_8bit import BLOCK, CHUNK, MIN_NUMBERS, AdamW8bit, decode, dynamic_values, encode
from grpo.weights import WholeWeights
from policy import CheckpointError, Policy, cast_weights
from policy.tokenizer import build_word_tokenizer
from tests.policies import tiny_llama

SETTINGS = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}


def small_policy(seed: int = 0) -> Policy:
    """Large enough that most of its weights have quantised moments."""
    return tiny_llama(seed, hidden_size=64, intermediate_size=96, vocab_size=128)


def backward(policy: Policy, seed: int) -> None:
    torch.manual_seed(seed)
    policy.logits(torch.randint(0, 61, (2, 9))).square().mean().backward()


@pytest.mark.parametrize("is_signed", [True, False])
def test_values_are_256_and_reach_one(is_signed: bool) -> None:
    values = dynamic_values(is_signed=is_signed)
    assert len(values.unique()) == 256
    assert (values.diff() > 0).all()
    assert values[-1] == 1
    assert (values == 0).sum() == 1
    assert float(values[0]) == pytest.approx(-0.993, abs=1e-3) if is_signed else values[0] == 0
    smallest = float(values[values > 0][0])
    assert smallest == pytest.approx(0.55e-6 if is_signed else 0.325e-6)


@pytest.mark.parametrize("is_signed", [True, False])
@pytest.mark.parametrize("count", [BLOCK, 1000, 3])
def test_error_is_at_most_half_the_gap_between_values(is_signed: bool, count: int) -> None:
    values = dynamic_values(is_signed=is_signed)
    x = torch.randn(count, generator=torch.Generator().manual_seed(count)) * torch.logspace(-4, 2, count)
    x = x if is_signed else x.abs()
    codes, scale = encode(x, values)
    assert codes.dtype == torch.uint8
    assert codes.shape == x.shape
    assert scale.shape == (-(-count // BLOCK),)
    got = decode(codes, scale, values)
    block = torch.arange(count) // BLOCK
    assert torch.equal(scale, torch.stack([x[block == b].abs().max() for b in range(len(scale))]))
    # Largest gap 0.9 / 64 (signed) or 0.9 / 128; nothing is negative beyond the lowest value.
    gap = float(values.diff().max())
    assert ((got - x).abs() <= (gap / 2 + 1e-6) * scale[block]).all()
    # Where a number is within three decades of its block's largest, it is off by a fifth at most.
    near = x.abs() > 1e-3 * scale[block]
    assert ((got - x).abs()[near] <= 0.2 * x.abs()[near]).all()


def test_zeros_stay_zeros_and_nothing_else_becomes_one() -> None:
    values = dynamic_values(is_signed=False)
    x = torch.tensor([0.0, 1e-12, 1e-7, 1.0] * 64)
    got = decode(*encode(x, values), values)
    assert torch.equal(got == 0, x == 0)
    assert torch.equal(decode(*encode(torch.zeros(300), values), values), torch.zeros(300))


def test_first_step_is_that_of_adamw() -> None:
    ours, theirs = small_policy(), small_policy()
    optimizers = MasterAdamW(ours, **SETTINGS, is_8bit=True), MasterAdamW(theirs, **SETTINGS)
    for policy, optimizer in zip((ours, theirs), optimizers, strict=True):
        backward(policy, 0)
        optimizer.gather_gradients()
        optimizer.step(1e-3, 1.0)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_learns_as_exact_moments_do() -> None:
    losses = []
    for is_8bit in (True, False):
        policy = small_policy()
        optimizer = MasterAdamW(policy, **SETTINGS, is_8bit=is_8bit)
        token_ids_BS = torch.randint(0, 61, (4, 12), generator=torch.Generator().manual_seed(0))
        for _ in range(15):
            logits = policy.logits(token_ids_BS)[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_ids_BS[:, 1:].flatten())
            loss.backward()
            optimizer.gather_gradients()
            optimizer.step(3e-3, 1.0)
        losses.append(float(loss.detach()))
    assert losses[0] < 2.0
    assert losses[0] == pytest.approx(losses[1], rel=0.2, abs=0.02)


def test_moments_take_two_bytes_a_weight() -> None:
    policy = cast_weights(small_policy(), torch.bfloat16)
    optimizer = MasterAdamW(policy, **SETTINGS, is_8bit=True)
    backward(policy, 0)
    optimizer.gather_gradients()
    optimizer.step(1e-3, 1.0)
    for master in optimizer.masters.values():
        state = optimizer.inner.state[master]
        size = sum(tensor.nbytes for name, tensor in state.items() if name != "step")
        is_small = master.numel() < MIN_NUMBERS
        assert size == (8 * master.numel() if is_small else 2 * (master.numel() + 4 * -(-master.numel() // BLOCK)))


def test_chunks_change_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    start, grad = torch.randn(90, 100, generator=generator), torch.randn(90, 100, generator=generator)
    stepped = []
    for chunk in (CHUNK, 4 * BLOCK):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = grad
        optimizer = AdamW8bit([{"params": [weight]}], lr=1e-2, betas=(0.9, 0.99), eps=1e-8, chunk=chunk)
        for _ in range(3):
            optimizer.step()
        stepped.append((weight.detach(), *optimizer.state[weight].values()))
    assert all(torch.equal(a, b) for a, b in zip(*stepped, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_continues_bit_for_bit(dtype: torch.dtype) -> None:
    one, two = cast_weights(small_policy(), dtype), cast_weights(small_policy(seed=9), dtype)
    optimizer, restored = (MasterAdamW(policy, **SETTINGS, is_8bit=True) for policy in (one, two))
    for step in range(2):
        backward(one, step)
        optimizer.gather_gradients()
        optimizer.step(1e-3, 1.0)
    restored.load_state_tensors({name: tensor.clone() for name, tensor in optimizer.state_tensors().items()})
    for policy, its in ((one, optimizer), (two, restored)):
        backward(policy, 5)
        its.gather_gradients()
        its.step(1e-3, 1.0)
    before, after = optimizer.state_tensors(), restored.state_tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_checkpoint_brings_codes_and_scales_back(tmp_path: Path) -> None:
    policy = small_policy()
    optimizer = MasterAdamW(policy, **SETTINGS, is_8bit=True)
    backward(policy, 0)
    optimizer.gather_gradients()
    optimizer.step(1e-3, 1.0)
    tokenizer = build_word_tokenizer([f"w{n}" for n in range(124)], 128)
    folder = save_checkpoint(tmp_path, 1, policy, tokenizer, optimizer.state_tensors(), 1)
    again = small_policy(seed=3)
    restored = MasterAdamW(again, **SETTINGS, is_8bit=True)
    load_checkpoint(folder, WholeWeights(again, restored))
    before, after = optimizer.state_tensors(), restored.state_tensors()
    assert {tensor.dtype for tensor in after.values()} == {torch.uint8, torch.float32}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("saved", "asked"), [(True, False), (False, True)])
def test_moments_of_the_other_kind_are_refused(saved: bool, asked: bool) -> None:
    policy = small_policy()
    optimizer = MasterAdamW(policy, **SETTINGS, is_8bit=saved)
    backward(policy, 0)
    optimizer.gather_gradients()
    optimizer.step(1e-3, 1.0)
    with pytest.raises(CheckpointError, match=f"optimizer: {'adamw_8bit' if saved else 'adamw'};"):
        MasterAdamW(policy, **SETTINGS, is_8bit=asked).load_state_tensors(optimizer.state_tensors())
