"""What an update asks of a GPU's host: to wait for nothing within a micro-batch, and to start few kernels.

Counts are of operations, not of time: see `tests/pretended_gpu.py`.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grpo.auxiliary import Auxiliary
from grpo.batch import Minibatch, count_learned, make_batches, make_rows
from grpo.distributed import Ranks
from grpo.optimizer import MasterAdamW
from grpo.types import Group
from grpo.update import Step, _Sums, backward
from policy import Policy, cast_weights
from rewards import Problem
from rollouts import Completion
from tests.grpo.rollouts import tiny_config
from tests.policies import tiny_llama, tiny_policy
from tests.pretended_gpu import Waited, pretended_gpu


def make_group(num_recorded: int = 0) -> Group:
    """A prompt with two completions, enough of it shared for a GPU; experts of so many layers are recorded."""
    completions = []
    for g in range(2):
        count, records = 2 + g, {}
        if num_recorded:  # the last token was never fed
            lengths = {"experts_MTK": count - 1, "prompt_experts_MSK": 4}
            records = {name: np.full((num_recorded, length, 2), [g, 3], np.uint8) for name, length in lengths.items()}
        completions.append(
            Completion(
                token_ids=[5, 6 + g, 2][-count:],
                logprobs=[-4.0, -4.2, -3.9][-count:],
                finish_reason="stop",
                policy_version=0,
                **records,
            )  # fmt: skip
        )
    problem = Problem(id="0", prompt="?")
    return Group(problem=problem, prompt_ids=[3, 4, 7, 8], completions=completions, texts=["", ""], results=[])


def run(
    make: Callable[[], Policy], *, is_gpu: bool, dtype: torch.dtype = torch.float32, share: bool = True, **choices: Any
) -> tuple[Tensor, Counter[str]]:
    """Loss and gradient of one micro-batch, in one row; and the kernels that it took."""
    config, ranks, policy = tiny_config(**choices), Ranks(cpu=True), cast_weights(make(), dtype)
    group = make_group(len(policy.moe_layers) if config.routing_replay == "sampler" else 0)
    rows = make_rows([group], [[1.0, -0.5]], mask_truncated=False)
    with pretended_gpu(may_wait=True):  # laid out as for a GPU either way
        batches = make_batches(rows, 10**6, "cuda", share_prompts=share)
    assert len(batches) == 1
    assert (batches[0].rows.shared is not None) is share
    counts = count_learned(rows, ranks)
    step = Step(minibatch=Minibatch(batches=batches, counts=counts), num_kept=counts.tokens, entropy_coef=0.01)
    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    optimizer.restart()
    auxiliary = Auxiliary(policy, batches, num_tokens=counts.tokens, config=config, ranks=ranks)
    more = _Sums(policy), auxiliary, partial(optimizer.backward, is_last=True)
    kernels = Counter[str]()
    if is_gpu:
        with pretended_gpu() as kernels:
            terms = backward(policy, batches[0], step, config, *more)
    else:
        terms = backward(policy, batches[0], step, config, *more)
    gradients = [gradient.flatten() for gradient in optimizer.gather_gradients()]
    return torch.cat([terms.loss.detach()[None], *gradients]), kernels


def dense(num_hidden_layers: int = 1, **changes: Any) -> Policy:
    return tiny_llama(model_type="qwen2", hidden_size=64, num_hidden_layers=num_hidden_layers, **changes)


def latent(num_hidden_layers: int = 1, **changes: Any) -> Policy:
    shape = {"hidden_size": 64, "qk_nope_head_dim": 24, "v_head_dim": 16, "kv_lora_rank": 32}
    return tiny_policy(**shape, num_hidden_layers=num_hidden_layers, first_k_dense_replace=num_hidden_layers, **changes)


def experts(**changes: Any) -> Policy:
    return tiny_policy(num_hidden_layers=1, first_k_dense_replace=0, **changes)


CASES: dict[str, tuple[Callable[[], Policy], dict[str, Any]]] = {
    "dense": (dense, {}),
    "dense, rows by themselves": (dense, {"share": False}),
    "experts": (experts, {"router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.01, "freeze_router": False}),
    "experts replayed": (experts, {"routing_replay": "sampler"}),
    "MTP modules": (partial(latent, num_nextn_predict_layers=1), {"mtp_weight": 0.3, "mtp_num_recycled": 1}),
    "whole completions weighed": (dense, {"importance_sampling_correction": "sequence_truncate"}),
    "off-policy rows dropped": (dense, {"off_policy_mask_threshold": 0.01, "algorithm": "gspo"}),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU need not be pretended")
@pytest.mark.parametrize(("make", "choices"), CASES.values(), ids=CASES)
def test_a_micro_batch_waits_for_nothing(make: Callable[[], Policy], choices: dict[str, Any]) -> None:
    """And what a GPU's branches give is what the CPU's give."""
    ours, _ = run(make, is_gpu=True, **choices)
    plain, _ = run(make, is_gpu=False, **choices)
    assert torch.allclose(ours, plain, atol=1e-6 * float(plain.abs().max()), rtol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU need not be pretended")
@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: torch.arange(3).repeat_interleave(torch.arange(3, device=x.device)),
        lambda x: torch.arange(3, device=x.device).repeat_interleave(torch.arange(3, device=x.device)),
    ],
)
def test_what_waits_is_found(wait: Callable[[Tensor], object]) -> None:
    x = torch.ones(3)
    with pytest.raises(Waited), pretended_gpu():
        wait(x)
    with pretended_gpu(may_wait=True):
        wait(x)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU need not be pretended")
@pytest.mark.parametrize(
    ("make", "most_of_a_layer"),
    [(dense, 63), pytest.param(latent, 76, marks=pytest.mark.slow)],
    ids=["dense", "latent"],
)
def test_kernels_of_a_micro_batch_stay_few(make: Callable[..., Policy], most_of_a_layer: int) -> None:
    """Of one layer, and of all that is in none: forward, backward and summing up."""
    one, two = (run(partial(make, layers), is_gpu=True, dtype=torch.bfloat16)[1].total() for layers in (1, 2))
    assert two - one <= most_of_a_layer
    assert 2 * one - two <= 137


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("make", "choices"), CASES.values(), ids=CASES)
def test_a_micro_batch_waits_for_no_gpu(
    make: Callable[[], Policy], choices: dict[str, Any], dtype: torch.dtype
) -> None:
    """The same on a device that says by itself when it is waited for; after a first one, which compiles kernels."""
    policy, choices = cast_weights(make(), dtype).cuda(), dict(choices)
    share, ranks = choices.pop("share", True), Ranks(cpu=False)
    config = tiny_config(**choices, device="auto")
    group = make_group(len(policy.moe_layers) if config.routing_replay == "sampler" else 0)
    rows = make_rows([group], [[1.0, -0.5]], mask_truncated=False)
    batches = make_batches(rows, 10**6, "cuda", share_prompts=share)
    counts = count_learned(rows, ranks)
    step = Step(minibatch=Minibatch(batches=batches, counts=counts), num_kept=counts.tokens, entropy_coef=0.01)
    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    auxiliary = Auxiliary(policy, batches, num_tokens=counts.tokens, config=config, ranks=ranks)
    sums = _Sums(policy)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            backward(policy, batches[0], step, config, sums, auxiliary, partial(optimizer.backward, is_last=True))
        finally:
            torch.cuda.set_sync_debug_mode("default")
