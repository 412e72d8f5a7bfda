"""What a rank really holds of a policy that lies over ranks, in bytes, for the plan to be held to."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from grpo.config import Config
from grpo.distributed import Ranks
from grpo.shares import Spread, share_of
from grpo.weights import Weights, keep_weights
from policy import Policy, cast_weights
from policy.lora import add_adapters
from tests.grpo.rollouts import tiny_config
from tests.policies import tiny_llama, tiny_policy

KINDS: dict[str, tuple[Callable[[], Policy], dict[str, Any]]] = {
    "dense, tied": (lambda: tiny_llama(tie_word_embeddings=True, num_hidden_layers=2), {}),
    "experts in bf16": (lambda: tiny_policy(num_hidden_layers=2), {"dtype": "bfloat16"}),
    "adapters in bf16": (lambda: tiny_llama(num_hidden_layers=1), {"dtype": "bfloat16", "lora": {"r": 3}}),
}
FIELDS = ("weights", "masters", "moments", "gradients", "sampler")


def config_of(kind: str) -> Config:
    return tiny_config(**KINDS[kind][1])


def held_bytes(ranks: Ranks) -> dict[str, dict[str, int]]:
    """Of each kind of policy, the fields of `Share` that are FIELDS, on this rank, after a backward pass."""
    found = {}
    for kind, (make, _) in KINDS.items():
        config = config_of(kind)
        policy = cast_weights(make(), getattr(torch, config.dtype))
        if config.lora is not None:
            add_adapters(policy, config.lora, seed=0)
        weights = keep_weights(policy, config, ranks)
        moments = _bytes(_kept(weights, ranks)["moments"])
        weights.optimizer.restart()
        loss = weights.policy.logits(torch.arange(3, 11).view(1, 8)).float().square().mean()
        weights.optimizer.backward(loss, is_last=True)
        weights.optimizer.reduce(loss.detach(), ranks)
        gradients = _bytes(_gradients(weights, ranks))
        weights.optimizer.step(1e-3, config.max_grad_norm)
        found[kind] = {name: _bytes(tensors) for name, tensors in _kept(weights, ranks).items()}
        found[kind]["gradients"] = gradients
        assert found[kind]["moments"] == moments, "there before the first step, which a trial before it shall feel"
    return found


def check_held(held: dict[str, dict[str, int]], spread: Spread) -> None:
    """Held to the plan, byte by byte."""
    assert held.keys() == KINDS.keys()
    for kind, found in held.items():
        shape = KINDS[kind][0]().config
        share = share_of(config_of(kind), shape, spread, is_gpu=False)
        planned = {field: getattr(share, field) for field in FIELDS}
        assert found == planned, (kind, spread.way)


def _bytes(tensors: Iterable[Tensor]) -> int:
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in own)


def _gradients(weights: Weights, ranks: Ranks) -> Iterable[Tensor]:
    """Summed up over ranks and micro-batches, before the step."""
    optimizer: Any = weights.optimizer
    if ranks.sharding == "fsdp2":
        parameters = [weight for group in optimizer.inner.param_groups for weight in group["params"]]
        return [weight.grad for weight in parameters if weight.grad is not None]
    zero = optimizer._engine.optimizer
    if ranks.sharding == "zero2":
        groups = zero.averaged_gradients or zero.all_grad_tensors
        return [gradient for group in groups.values() for gradient in group]
    return [zero.grad_partitions_flat_buffer]


def _kept(weights: Weights, ranks: Ranks) -> dict[str, Iterable[Tensor]]:
    """Between steps."""
    optimizer: Any = weights.optimizer
    inner = optimizer.inner if ranks.sharding == "fsdp2" else optimizer._inner
    parameters: list[Any] = list(weights.policy.parameters())
    masters: Iterable[Tensor] = ()
    if ranks.sharding == "zero2":
        frozen = [weight for weight in parameters if not weight.requires_grad]
        masters = optimizer._engine.optimizer.single_partition_of_fp32_groups
        parameters = [*optimizer._engine.optimizer.bit16_groups_flat, *frozen]
    elif ranks.sharding == "zero3":
        masters = optimizer._engine.optimizer.fp32_partitioned_groups_flat
        parameters = [weight.ds_tensor for weight in parameters]
    return {
        "weights": parameters,
        "masters": masters,
        "moments": [state[key] for state in inner.state.values() for key in ("exp_avg", "exp_avg_sq")],
        "sampler": () if weights.sampler is weights.policy else weights.sampler.parameters(),
    }
