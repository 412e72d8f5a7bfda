"""Weights in pieces over ranks: torch's FSDP2, a group of parameters for each block, and one for embedding and head.

Each rank holds a piece of each parameter, of its gradient and of both moments, in fp32; a block is put together for as
long as its pass takes, in the dtype that the recipe computes in, and its gradients are added up over ranks at once.
Routers' biases, which no gradient moves, are whole on each rank.

Embedding, final norm and head are read outside the policy's own pass too (log-probabilities, MTP modules), so they stay
together until the backward pass is through with them; `Optimizer.step` comes after one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from grpo.config import Config, ConfigError
from grpo.distributed import Ranks
from grpo.optimizers import make_optimizer
from grpo.weights import copy_policy, sampler_device
from policy import Policy


class Pieces:
    """A `Layout`: tensors are cut along their first dimension, as FSDP2 cuts them."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def own(self, tensor: Tensor) -> Tensor:
        """See `Layout.own`."""
        assert isinstance(tensor, DTensor)
        return tensor.to_local()

    def join(self, parameter: Tensor, part: Tensor) -> Tensor:
        """See `Layout.join`; on the host, where there is room, of the main rank, and empty on others."""
        whole = self._ranks.join(part, len(parameter))
        return whole.cpu() if self._ranks.is_main else whole.new_empty(0)

    def cut(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """See `Layout.cut`."""
        return self._ranks.cut(whole)

    def sum_up(self, gradients: Sequence[Tensor], loss: Tensor, ranks: Ranks) -> None:
        """The loss alone: FSDP2 has added the gradients up."""
        ranks.sum_([loss])

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """See `Layout.norm`."""
        squared = torch.nn.utils.get_total_norm(gradients, foreach=True).double().square()
        self._ranks.sum_([squared])
        return squared.sqrt().float()


class FsdpWeights:
    """Pieces for training, and a whole copy for sampling."""

    def __init__(self, policy: Policy, config: Config, ranks: Ranks) -> None:
        """Takes the policy apart, in place. Raises ConfigError for `offload_ref_model`."""
        if config.offload_ref_model:
            raise ConfigError("with weights in pieces the reference is in pieces too: offload_ref_model must be false")
        self.policy, self._ranks, self._pieces = policy, ranks, Pieces(ranks)
        self._dtype = policy.dtype
        self.sampler = copy_policy(policy, sampler_device(config, ranks.device))
        self._take_apart(policy, torch.float32)
        # FSDP2 may lay pieces out anew when they are first put together; the optimizer needs to see them after that.
        self.publish()
        self.optimizer = make_optimizer(policy, config, self._pieces)
        self.optimizer.start_moments()  # else the first step's trial would find room that later passes have not

    @torch.no_grad()
    def publish(self) -> None:
        """See `Weights.publish`; one block after the other."""
        _come_to_rest(self.policy)
        copies = dict(self.sampler.named_parameters())
        for prefix, module in _modules(self.policy):
            unit = _unit(module)
            unit.unshard()
            for name, weight in _own_parameters(prefix, module):
                copies[name].copy_(weight)
            unit.reshard()
        for ours, theirs in zip(self.sampler.buffers(), self.policy.buffers(), strict=True):
            ours.copy_(theirs)

    def freeze_copy(self) -> Policy:
        """See `Weights.freeze_copy`."""
        self.publish()
        copied = copy_policy(self.sampler, self._ranks.device)
        self._take_apart(copied, self._dtype)
        return copied

    def pieces(self, kept: Policy) -> Iterator[Tensor]:
        """See `Weights.pieces`."""
        _come_to_rest(kept)
        for weight in kept.parameters():
            yield self._pieces.own(weight.detach())

    def whole(self, kept: Policy) -> dict[str, Tensor]:
        """See `Weights.whole`."""
        pieces = self.pieces(kept)
        return {name: self._pieces.join(weight, next(pieces)) for name, weight in kept.named_parameters()}

    @torch.no_grad()
    def restore(self, kept: Policy, whole: Mapping[str, Tensor]) -> None:
        """See `Weights.restore`."""
        names = [name for name, _ in kept.named_parameters()]
        for name, piece in zip(names, self.pieces(kept), strict=True):
            piece.copy_(self._ranks.cut(whole[name]))

    def _take_apart(self, policy: Policy, dtype: torch.dtype) -> None:
        """Pieces of what is trained in `dtype`, of the rest as it is."""
        # Of the ranks' own group: `init_device_mesh` would ask NCCL where gloo serves a GPU.
        group = dist.group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, self._ranks.device.type)
        is_mixed = self._dtype != torch.float32
        precision = MixedPrecisionPolicy(
            param_dtype=self._dtype if is_mixed else None,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # rotations and whatever else comes in fp32 stays so
        )
        for prefix, module in _modules(policy):
            for _, weight in _own_parameters(prefix, module):
                if weight.requires_grad:
                    weight.data = weight.data.to(self._ranks.device, dtype)
            reshard = self._ranks.reshard_after_forward and module is not policy
            unit = fully_shard(module, mesh=mesh, reshard_after_forward=reshard, mp_policy=precision)
            # Sums, not means: the loss is divided by the tokens of all ranks already.
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)


def _modules(policy: Policy) -> Iterator[tuple[str, nn.Module]]:
    """What is put together at a time, with the prefix of its parameters' names; the policy itself last."""
    for prefix, modules in (("layers", policy.layers), ("mtp", policy.mtp)):
        for index, module in enumerate(modules):
            yield f"{prefix}.{index}.", module
    yield "", policy


def _unit(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module


def _own_parameters(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A unit's parameters by their names in the policy, without those of units within."""
    for name, weight in module.named_parameters():
        if prefix or not name.startswith(("layers.", "mtp.")):
            yield prefix + name, weight


def _come_to_rest(policy: Policy) -> None:
    """Take apart what a pass without a backward one left together; it would not see a step."""
    for _, module in _modules(policy):
        _unit(module).reshard()
