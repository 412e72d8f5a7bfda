"""The optimizer on the host is the optimizer on the device, to the bit."""

from pathlib import Path

import pytest
import torch

from grpo.checkpoint import load_checkpoint, save_checkpoint
from grpo.optimizer import MasterAdamW
from grpo.optimizer_offload import OffloadedMasterAdamW
from grpo.weights import WholeWeights
from policy import Policy, cast_weights
from policy.tokenizer import build_word_tokenizer
from tests.policies import tiny_llama, tiny_policy

SETTINGS = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}


def backward(policy: Policy, seed: int) -> None:
    ids_BS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(seed))
    policy.logits(ids_BS.to(policy.device)).square().mean().backward()


def train(policy: Policy, optimizer: MasterAdamW, steps: range) -> list[float]:
    norms = []
    for step in steps:
        for part in range(2):
            backward(policy, 10 * step + part)
            optimizer.gather_gradients()
        norms.append(optimizer.step(1e-3, 0.5))
    return norms


def expect_same(one: tuple[Policy, MasterAdamW], other: tuple[Policy, MasterAdamW]) -> None:
    for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)
    before, after = one[1].state_tensors(), other[1].state_tensors()
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name].cpu(), after[name].cpu()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bucket", [64, 1 << 20])
def test_steps_are_those_of_the_device(bucket: int, dtype: torch.dtype) -> None:
    ours, theirs = (cast_weights(tiny_llama(), dtype) for _ in range(2))
    offloaded, plain = OffloadedMasterAdamW(ours, **SETTINGS, bucket=bucket), MasterAdamW(theirs, **SETTINGS)
    assert train(ours, offloaded, range(3)) == train(theirs, plain, range(3))
    expect_same((ours, offloaded), (theirs, plain))


def test_checkpoints_are_interchangeable(tmp_path: Path) -> None:
    one = cast_weights(tiny_policy(), torch.bfloat16)
    optimizer = MasterAdamW(one, **SETTINGS)
    train(one, optimizer, range(2))
    two = cast_weights(tiny_policy(seed=5), torch.bfloat16)
    offloaded = OffloadedMasterAdamW(two, **SETTINGS, bucket=512)
    tokenizer = build_word_tokenizer([f"w{n}" for n in range(57)], 128)
    load_checkpoint(
        save_checkpoint(tmp_path / "one", 2, one, tokenizer, optimizer.state_tensors(), 1), WholeWeights(two, offloaded)
    )
    three = cast_weights(tiny_policy(seed=7), torch.bfloat16)
    back = MasterAdamW(three, **SETTINGS)
    load_checkpoint(
        save_checkpoint(tmp_path / "two", 2, two, tokenizer, offloaded.state_tensors(), 1), WholeWeights(three, back)
    )
    for policy, its in ((one, optimizer), (two, offloaded), (three, back)):
        train(policy, its, range(2, 4))
    expect_same((one, optimizer), (two, offloaded))
    expect_same((one, optimizer), (three, back))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    policy = tiny_llama()
    optimizer = OffloadedMasterAdamW(policy, **SETTINGS)
    backward(policy, 0)
    policy.lm_head.weight.grad[0, 0] = float("nan")
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    [gradient] = optimizer.gather_gradients()
    assert len(gradient) == sum(weight.numel() for weight in policy.parameters())
    assert not torch.tensor(optimizer.step(1e-3, 1.0)).isfinite()
    assert all(torch.equal(before[name], weight) for name, weight in policy.named_parameters())
    assert not any(name.startswith("exp_avg") for name in optimizer.state_tensors())


def test_gradients_can_be_forgotten() -> None:
    policy = tiny_llama()
    optimizer = OffloadedMasterAdamW(policy, **SETTINGS)
    backward(policy, 0)
    first = optimizer.gather_gradients()[0].clone()
    optimizer.restart()
    backward(policy, 0)
    assert torch.equal(optimizer.gather_gradients()[0], first)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_the_device_on_a_gpu(dtype: torch.dtype) -> None:
    ours, theirs = (cast_weights(tiny_llama(), dtype).cuda() for _ in range(2))
    offloaded, plain = OffloadedMasterAdamW(ours, **SETTINGS, bucket=512), MasterAdamW(theirs, **SETTINGS)
    assert all(master.is_pinned() for master in offloaded.masters.values())
    assert train(ours, offloaded, range(4)) == train(theirs, plain, range(4))
    expect_same((ours, offloaded), (theirs, plain))
