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

ALIGNED: dict[str, Any] = {"hidden_size": 64, "qk_nope_head_dim": 24, "v_head_dim": 16, "kv_lora_rank": 32}
"""Widths that a GPU's attention takes in half precision."""
NUM_EXPERTS_LAYERS, PER_TOKEN = 2, 2


def make_groups(*, records: bool) -> list[Group]:
    """Two prompts with two completions each, which share enough for a GPU; experts are recorded on demand."""
    groups = []
    for p in range(2):
        completions = []
        for g in range(2):
            count = 3 + g
            experts = {"experts_MTK": (count - 1, g), "prompt_experts_MSK": (4, 0)} if records else {}
            completions.append(
                Completion(
                    token_ids=[5 + p, 6 + g, 9, 2][-count:],
                    logprobs=[-4.0, -4.2, -3.9, -4.1][-count:],
                    finish_reason="stop",
                    policy_version=0,
                    **{
                        name: np.full((NUM_EXPERTS_LAYERS, length, PER_TOKEN), [expert, 3], dtype=np.uint8)
                        for name, (length, expert) in experts.items()
                    },
                )  # fmt: skip
            )
        groups.append(
            Group(
                problem=Problem(id=str(p), prompt="?"),
                prompt_ids=[3, 4 + p, 7, 8],
                completions=completions,
                texts=["", ""],
                results=[],
            )  # fmt: skip
        )
    return groups


def run(
    make: Callable[[], Policy], *, is_gpu: bool, dtype: torch.dtype = torch.float32, share: bool = True, **choices: Any
) -> tuple[Tensor, Counter[str]]:
    """Loss and gradient of one micro-batch, in one row; and the kernels that it took."""
    config, ranks, policy = tiny_config(**choices), Ranks(cpu=True), cast_weights(make(), dtype)
    groups = make_groups(records=config.routing_replay == "sampler")
    rows = make_rows(groups, [[1.0, -0.5], [-1.0, 0.3]], mask_truncated=False)
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


CASES: dict[str, tuple[Callable[[], Policy], dict[str, Any]]] = {
    "dense": (tiny_llama, {}),
    "dense, rows by themselves": (tiny_llama, {"share": False}),
    "experts": (tiny_policy, {"router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.01}),
    "experts replayed": (tiny_policy, {"routing_replay": "sampler"}),
    "MTP modules": (partial(tiny_policy, num_nextn_predict_layers=1), {"mtp_weight": 0.3, "mtp_num_recycled": 1}),
    "whole completions weighed": (tiny_llama, {"importance_sampling_correction": "sequence_truncate"}),
    "off-policy rows dropped": (tiny_llama, {"off_policy_mask_threshold": 0.01, "algorithm": "gspo"}),
}


@pytest.mark.parametrize(("make", "choices"), CASES.values(), ids=CASES)
def test_a_micro_batch_waits_for_nothing(make: Callable[[], Policy], choices: dict[str, Any]) -> None:
    """And what a GPU's branches give is what the CPU's give."""
    ours, _ = run(make, is_gpu=True, **choices)
    plain, _ = run(make, is_gpu=False, **choices)
    assert torch.allclose(ours, plain, atol=1e-6 * float(plain.abs().max()), rtol=1e-4)


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


def layer_of(make: Callable[[int], Policy], **choices: Any) -> tuple[Counter[str], Counter[str]]:
    """Kernels of one layer more, and of all that is not in a layer."""
    two, three = (run(partial(make, layers), is_gpu=True, dtype=torch.bfloat16, **choices)[1] for layers in (2, 3))
    return three - two, two - (three - two) - (three - two)


def test_kernels_of_a_micro_batch() -> None:
    def qwen(layers: int) -> Policy:
        return tiny_llama(model_type="qwen2", hidden_size=64, num_hidden_layers=layers)

    def dense_deepseek(layers: int) -> Policy:
        return tiny_policy(**ALIGNED, num_hidden_layers=layers, first_k_dense_replace=layers)

    for make, share in ((qwen, True), (qwen, False), (dense_deepseek, True)):
        layer, rest = layer_of(make, share=share)
        print(make.__name__, share, layer.total(), rest.total(), layer.most_common(), rest.most_common(), sep="\n")
