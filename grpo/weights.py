"""How a policy's weights, gradients and optimizer state are kept over ranks: the seam that the trainer, the update and
the checkpoints look through. Here the plain way, every rank whole; the launcher's file chooses (`Ranks.sharding`).

Whatever the way, the same recipe gives the same steps, and a checkpoint holds the same tensors: any number of ranks can
go on from it, kept in any way.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from grpo.config import Config
from grpo.distributed import Ranks
from grpo.optimizer import Optimizer
from grpo.optimizers import make_optimizer
from policy import Policy


class Weights(Protocol):
    """One policy that is trained, and everything of it that ranks share out among them.

    Where weights lie in pieces (`Ranks.sharding`), each method and each pass over `policy` waits for all ranks: they
    must do the same, as often, in the same order.
    """

    @property
    def policy(self) -> Policy:
        """What is trained. Its passes are exact; its parameters may be pieces, or lie with other ranks."""
        ...

    @property
    def sampler(self) -> Policy:
        """Whole weights on this rank, as of the last `publish`, for engines and checkpoints; the policy itself if that
        is whole.
        """
        ...

    @property
    def optimizer(self) -> Optimizer:
        """Takes the policy's gradients and steps."""
        ...

    def publish(self) -> None:
        """Bring `sampler` to where the policy is, routers' biases included."""
        ...

    def freeze_copy(self) -> Policy:
        """A copy of the policy as it is now, without gradients, kept as the policy is: for a reference."""
        ...

    def pieces(self, kept: Policy) -> Iterable[Tensor]:
        """This rank's part of each parameter of the policy or of a `freeze_copy`, in order; between passes they may be
        changed in place.
        """
        ...

    def whole(self, kept: Policy) -> dict[str, Tensor]:
        """Parameters of the policy or of a `freeze_copy` by name, whole, for a file; of use on the main rank only."""
        ...

    def restore(self, kept: Policy, whole: Mapping[str, Tensor]) -> None:
        """Put back what `whole` gave."""
        ...


class WholeWeights:
    """Every rank holds all weights and states; gradients are summed over ranks once a step."""

    def __init__(self, policy: Policy, optimizer: Optimizer) -> None:
        self.policy = self.sampler = policy
        self.optimizer = optimizer

    def publish(self) -> None:
        """Nothing to do: the sampler is the policy."""

    def freeze_copy(self) -> Policy:
        """See `Weights.freeze_copy`."""
        return copy.deepcopy(self.policy).requires_grad_(False)

    def pieces(self, kept: Policy) -> Iterable[Tensor]:
        """See `Weights.pieces`."""
        return kept.parameters()

    def whole(self, kept: Policy) -> dict[str, Tensor]:
        """See `Weights.whole`."""
        return {name: weight.detach().contiguous() for name, weight in kept.named_parameters()}

    def restore(self, kept: Policy, whole: Mapping[str, Tensor]) -> None:
        """See `Weights.restore`."""
        kept.load_state_dict(dict(whole), strict=False)  # without the buffers, which do not move


def copy_policy(policy: Policy, device: torch.device, *, shared: Iterable[Tensor] = ()) -> Policy:
    """A copy without gradients on another device or the same, made without a second one on the way there; tensors that
    are `shared` are the policy's own.
    """
    memo: dict[int, Tensor] = {id(tensor): tensor for tensor in shared}
    for weight in policy.parameters():
        memo.setdefault(id(weight), nn.Parameter(weight.detach().to(device, copy=True), requires_grad=False))
    for buffer in policy.buffers():
        memo.setdefault(id(buffer), buffer.detach().to(device, copy=True))
    return copy.deepcopy(policy, memo)


def sampler_device(config: Config, device: torch.device) -> torch.device:
    """Where a copy of the weights lies that is there to be sampled from: on the rank's own device, unless vLLM's
    servers sample, who read it from files; then in the host's memory.
    """
    engine = config.engine
    is_read_from_files = engine.kind == "vllm_server" and engine.vllm_server.weight_transfer == "folder"
    return torch.device("cpu") if is_read_from_files else device


def keep_weights(policy: Policy, config: Config, ranks: Ranks) -> Weights:
    """`policy` kept as the launcher's file says; it is changed in place, and may lie on the host where it will be in
    pieces. Raises ConfigError for keys that this way cannot serve.
    """
    match ranks.sharding:
        case "fsdp2":
            from grpo.fsdp import FsdpWeights

            return FsdpWeights(policy, config, ranks)
        case "zero2" | "zero3":
            from grpo.zero import ZeroWeights

            return ZeroWeights(policy, config, ranks)
        case None:
            return WholeWeights(policy, make_optimizer(policy, config))
