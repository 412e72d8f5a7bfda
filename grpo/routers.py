"""What a step does with the routers of a mixture of experts: losses, sums over micro-batches and ranks, balancing.

Shapes: M layers with routed experts (the trunk's, then the MTP modules' where these are trained), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.distributed import Ranks
from policy import Policy
from policy.balance import RouterSums


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterStats:
    """What the routers of all ranks did."""

    load_ME: list[list[float]]
    """Share of each layer's token-expert pairs on each expert."""
    entropy_M: list[float]
    """Mean over tokens of the entropy of a token's scores, nats; log E where no expert is preferred."""
    balance_M: list[float] | None
    """Mean over rows of the balance loss, 1 where each row's load is even; None where no loss is in use."""
    z_M: list[float] | None
    """Mean over tokens of the z-loss; None where no loss is in use."""


class RouterTotals:
    """Running sums over micro-batches, then over ranks; of no layer for a policy without experts."""

    def __init__(self, policy: Policy, *, with_mtp: bool, with_losses: bool) -> None:
        num_layers = len(policy.moe_layers) + (len(policy.mtp_moe_layers) if with_mtp else 0)
        self._with_losses = with_losses
        self.load_ME = torch.zeros(
            num_layers, policy.config.n_routed_experts, dtype=torch.float64, device=policy.device
        )
        """Token-expert pairs."""
        self._others_4M = torch.zeros(4, num_layers, dtype=torch.float64, device=policy.device)

    def add(self, sums: RouterSums | None, num_rows: int) -> None:
        """Take in one micro-batch of `num_rows` rows."""
        if sums is None:
            return
        self.load_ME += sums.load_ME
        self._others_4M[:3] += torch.stack((sums.entropy_M, sums.balance_M, sums.z_M)).detach()
        self._others_4M[3] += num_rows

    def reduce(self, ranks: Ranks) -> None:
        """Add up over all ranks, in place."""
        ranks.sum_([self.load_ME, self._others_4M])

    def stats(self, num_experts_per_tok: int) -> RouterStats | None:
        """Means, of all ranks once reduced; None without a layer."""
        if not len(self.load_ME):
            return None
        pairs_M = self.load_ME.sum(dim=-1).clamp(min=1)
        tokens_M = pairs_M / num_experts_per_tok
        entropy_M, balance_M, z_M, rows_M = self._others_4M
        return RouterStats(
            load_ME=(self.load_ME / pairs_M[:, None]).tolist(),
            entropy_M=(entropy_M / tokens_M).tolist(),
            balance_M=(balance_M / rows_M.clamp(min=1)).tolist() if self._with_losses else None,
            z_M=(z_M / tokens_M).tolist() if self._with_losses else None,
        )


def balance(policy: Policy, load_ME: Tensor, *, rate: float, mtp_rate: float) -> None:
    """Move the routers' biases by the load of all ranks towards an even one: the trunk's, and the modules' if there."""
    layers, num_trunk = [*policy.moe_layers, *policy.mtp_moe_layers], len(policy.moe_layers)
    for index, (layer, load_E) in enumerate(zip(layers[: len(load_ME)], load_ME, strict=True)):
        if step := rate if index < num_trunk else mtp_rate:
            layer.gate.balance(load_E, step)
