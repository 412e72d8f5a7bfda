"""Gradients and optimizer state in pieces over ranks (ZeRO-2), and weights too (ZeRO-3): DeepSpeed. The only file that
imports it.

DeepSpeed divides gradients by the number of ranks; the loss is divided by the tokens of all ranks already, so it is
multiplied by that number first. Masters and moments lie in flat pieces of its own, and are handed out whole.

Under ZeRO-3 a module's weights are put together when it is called and taken apart after, those of a mixture of experts
as one, since ranks call different experts. Embedding, final norm and head, which log-probabilities and MTP modules read
without a call, stay whole on every rank.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor, nn

from grpo.config import Config
from grpo.distributed import Ranks
from grpo.weights import copy_policy, sampler_device
from grpo.zero_settings import settings_of
from policy import Policy
from policy.grouped_attention import GroupedQueryAttention
from policy.moe import MixtureOfExperts

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroWeights:
    """A `Weights` on DeepSpeed.

    Under ZeRO-2 the policy is whole and samples itself, under ZeRO-3 a whole copy does. A reference is whole.
    """

    def __init__(self, policy: Policy, config: Config, ranks: Ranks) -> None:
        """Takes the policy apart, in place. Raises ConfigError for what cannot be."""
        self.policy = self.sampler = policy
        self._is_whole = ranks.sharding == "zero2"
        if not self._is_whole:
            self.sampler = copy_policy(policy, sampler_device(config, ranks.device))
        self.optimizer = ZeroOptimizer(policy, config, ranks)
        self._ranks = ranks

    @torch.no_grad()
    def publish(self) -> None:
        """See `Weights.publish`; one block after the other."""
        if self._is_whole:
            return
        copies = dict(self.sampler.named_parameters())
        for weights in self.optimizer.gathered():
            for name, weight in weights.items():
                copies[name].copy_(weight)
        for ours, theirs in zip(self.sampler.buffers(), self.policy.buffers(), strict=True):
            ours.copy_(theirs)

    def freeze_copy(self) -> Policy:
        """See `Weights.freeze_copy`; whole."""
        self.publish()
        return copy_policy(self.sampler, self._ranks.device)

    def pieces(self, kept: Policy) -> Iterator[Tensor]:
        """See `Weights.pieces`; those of the policy are whole, and of use to be read only."""
        if kept is self.policy:
            self.publish()
            kept = self.sampler
        yield from kept.parameters()

    def whole(self, kept: Policy) -> dict[str, Tensor]:
        """See `Weights.whole`."""
        if kept is self.policy:
            self.publish()
            kept = self.sampler
        return {name: weight.detach().contiguous() for name, weight in kept.named_parameters()}

    def restore(self, kept: Policy, whole: Mapping[str, Tensor]) -> None:
        """See `Weights.restore`; of a `freeze_copy` only: the policy's weights follow its masters."""
        assert kept is not self.policy
        kept.load_state_dict(dict(whole), strict=False)  # without the buffers, which do not move


class ZeroOptimizer:
    """An `Optimizer`: torch's AdamW, which DeepSpeed gives its flat pieces of the masters to step."""

    def __init__(self, policy: Policy, config: Config, ranks: Ranks) -> None:
        self._policy, self._ranks = policy, ranks
        self._max_grad_norm = config.max_grad_norm
        self._is_whole = ranks.sharding == "zero2"
        self._weights = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        self._has_gradients, self._is_finite = False, True
        self._inner = torch.optim.AdamW(
            [
                {"params": [w for w in self._weights.values() if w.ndim > 1], "weight_decay": config.weight_decay},
                {"params": [w for w in self._weights.values() if w.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        self._engine = self._start(settings_of(ranks.deepspeed, config))
        self._start_moments()
        self._roots: list[Any] = [
            *policy.embed_tokens.parameters(),
            *policy.norm.parameters(),
            *policy.lm_head.parameters(),
        ]
        if not self._is_whole:
            for weight in self._roots:
                weight.is_external_param = True  # not taken apart when the module that owns it is through
            self._gather_roots()

    def _start(self, settings: dict[str, Any]) -> Any:
        """DeepSpeed's engine around the policy's parts."""
        policy, device = self._policy, self._ranks.device
        deepspeed.utils.logger.setLevel(logging.WARNING)
        if device.type == "cpu":
            # Else each first start compiles a way for processes of one host to share memory, and waits for a lock that
            # a start which was killed leaves behind.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if policy.moe_layers or policy.mtp_moe_layers:
            set_z3_leaf_modules(policy, [MixtureOfExperts])
        biases = [bias.clone() for bias in policy.buffers()]
        engine, *_ = deepspeed.initialize(model=_Parts(policy), optimizer=self._inner, config=settings)
        dist.distributed_c10d._set_pg_timeout(self._ranks.timeout, engine.data_parallel_group)  # a group of its own
        for bias, before in zip(policy.buffers(), biases, strict=True):
            bias.data = before.to(device)  # which DeepSpeed has rounded to the weights' dtype
        if not self._is_whole:
            # Its record of the order of modules, by which it fetches ahead, begins with its own pass; here with ours.
            offload = engine.optimizer.parameter_offload
            offload.fwd_pre_hook.remove()
            policy.register_forward_pre_hook(lambda *_: offload.get_param_coordinator().reset_step())
            for module in policy.modules():
                if isinstance(module, GroupedQueryAttention):
                    module.joins_projections = False
        return engine

    def _start_moments(self) -> None:
        """Moments of 0, as AdamW would make them at its first step: they may have to be loaded before."""
        zero = self._engine.optimizer
        pieces = zero.single_partition_of_fp32_groups if self._is_whole else zero.fp32_partitioned_groups_flat
        for piece in pieces:
            self._inner.state[piece] = {
                "step": torch.zeros((), dtype=torch.float32, device=piece.device),
                **{key: torch.zeros_like(piece) for key in MOMENTS},
            }
        if self._is_whole:
            # DeepSpeed finds moments after the step of the first group of weights, when the second has none yet.
            zero._lazy_init_hp_params_optimizer_state()

    @property
    def trained(self) -> frozenset[str]:
        """See `Optimizer.trained`."""
        return frozenset(self._weights)

    def restart(self) -> None:
        """See `Optimizer.restart`. Whole steps only can be left out, and only those whose loss is not finite."""
        if self._has_gradients:
            assert not self._is_finite
            self.step(0.0, self._max_grad_norm)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See `Optimizer.backward`."""
        self._is_finite = self._is_finite and bool(loss.isfinite())
        if is_last:
            # DeepSpeed leaves out steps whose gradient is not finite. Where a loss is not, the gradient shall not be.
            self._is_finite = not self._ranks.any(not self._is_finite)
        factor = self._ranks.size if self._is_finite or not is_last else math.nan
        (loss,) = self._engine(loss * factor)
        self._engine.backward(loss, scale_wrt_gas=False)
        self._has_gradients = True

    def reduce(self, loss: Tensor, ranks: Ranks) -> None:
        """See `Optimizer.reduce`; DeepSpeed has added the gradients up."""
        ranks.sum_([loss])

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """See `Optimizer.step`."""
        assert max_grad_norm == self._max_grad_norm
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        self._gather_roots()
        self._has_gradients, self._is_finite = False, True
        return float(self._engine.get_global_grad_norm())

    @torch.no_grad()
    def gathered(self) -> Iterator[dict[str, Tensor]]:
        """The policy's weights by name, whole on every rank: a block at a time, until the next is asked for."""
        self._gather_roots()
        roots = {id(weight) for weight in self._roots}
        yield {name: weight for name, weight in self._policy.named_parameters() if id(weight) in roots}
        for prefix, modules in (("layers", self._policy.layers), ("mtp", self._policy.mtp)):
            for index, module in enumerate(modules):
                with deepspeed.zero.GatheredParameters(module.parameters()):
                    yield {f"{prefix}.{index}.{name}": weight for name, weight in module.named_parameters()}

    def state_tensors(self) -> dict[str, Tensor]:
        """See `Optimizer.state_tensors`; on the host of the main rank, and empty on others."""
        step = next((state["step"] for state in self._inner.state.values()), torch.zeros(()))
        state: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            state[f"master.{name}"] = self._handed_over(safe_get_full_fp32_param(weight))
            if step > 0:
                state[f"step.{name}"] = step.clone()
                for key in MOMENTS:
                    state[f"{key}.{name}"] = self._handed_over(safe_get_full_optimizer_state(weight, key))
        return state

    @torch.no_grad()
    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """See `Optimizer.load_state_tensors`."""
        device = self._ranks.device
        for name, weight in self._weights.items():
            master = state[f"master.{name}"].to(device)
            safe_set_full_fp32_param(weight, master)
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                weight.copy_(master)
            for key in MOMENTS:
                if f"{key}.{name}" in state:
                    safe_set_full_optimizer_state(weight, state[f"{key}.{name}"].to(device), key)
        steps = {float(value) for key, value in state.items() if key.startswith("step.")}
        assert len(steps) <= 1, "all weights have taken the same steps"
        for of_piece in self._inner.state.values():
            of_piece["step"].fill_(max(steps, default=0.0))
        self._gather_roots()

    def _handed_over(self, whole: Tensor) -> Tensor:
        return whole.cpu() if self._ranks.is_main else whole.new_empty(0)

    def _gather_roots(self) -> None:
        missing = [w for w in self._roots if not self._is_whole and w.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        if missing:
            missing[0].all_gather(param_list=missing)


class _Parts(nn.Module):
    """What DeepSpeed sees of a policy: its parts, but not itself, whose output its hooks could not look into.

    The pass is the policy's own; only its loss goes through here.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        for name, part in policy.named_children():
            self.add_module(name, part)

    def forward(self, loss: Tensor) -> tuple[Tensor]:
        """The loss, for DeepSpeed to prepare its backward pass."""
        return (loss,)
