"""Gradients added up in one kernel against torch's additions, one after another."""

import pytest
import torch

from grpo.gradient_kernels import BLOCK, GradientSum
from grpo.optimizer import MasterAdamW
from policy import cast_weights
from tests.policies import tiny_policy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_first", [True, False])
def test_what_is_given_is_added_and_what_is_not_is_left_alone(dtype: torch.dtype, *, is_first: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (BLOCK,), (3, BLOCK - 1), (7,), (2, 5)]
    given = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    totals = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    wanted = [x.float() if is_first else total + x.float() for total, x in zip(totals, given, strict=True)]
    left, kept = 3, totals[3].clone()
    whole = GradientSum([total.numel() for total in totals], dtype, DEVICE)
    pairs = {index: pair for index, pair in enumerate(zip(totals, given, strict=True)) if index != left}
    whole.add(pairs, is_first=is_first)
    for index in pairs:
        assert torch.equal(totals[index], wanted[index])
    assert torch.equal(totals[left], kept)


def test_only_packed_and_aligned_memory_is_taken() -> None:
    whole = GradientSum([16], torch.bfloat16, DEVICE)
    total, given = torch.zeros(4, 4, device=DEVICE), torch.zeros(4, 4, dtype=torch.bfloat16, device=DEVICE)
    assert whole.takes(total, given)
    assert not whole.takes(total, given.t())
    assert not whole.takes(total, given.float())
    assert not whole.takes(total[:2, 1], torch.zeros(3, dtype=torch.bfloat16, device=DEVICE)[1:])


@pytest.mark.gpu
def test_masters_on_a_gpu_have_the_sums() -> None:
    policy = cast_weights(tiny_policy(), torch.bfloat16).to(DEVICE)
    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    totals = {name: torch.zeros_like(master) for name, master in optimizer.masters.items()}
    for step in range(3):
        policy.logits(torch.randint(0, 61, (2, 9 + step), device=DEVICE)).square().mean().backward()
        for name, weight in policy.named_parameters():
            if weight.grad is not None:
                totals[name] += weight.grad.float()
        optimizer.gather_gradients()
    for name, master in optimizer.masters.items():
        assert master.grad is not None
        assert torch.equal(master.grad, totals[name])
