"""What an update does beside the policy's own loss: keep the MTP modules in step, and the experts' load even.

Shapes: N packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.config import Config, ConfigError
from grpo.distributed import Ranks
from grpo.routers import RouterStats, RouterTotals, balance
from grpo.types import Batch
from policy import Policy, PolicyConfig
from policy.balance import RouterSums, RouterWatch, router_loss
from policy.logprobs import ahead_losses
from policy.model import PolicyOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxiliaryStats:
    """Of all ranks."""

    mtp_loss: float | None
    """Cross-entropy of the MTP modules on completions, nats per completion token; None where they are not trained."""
    routers: RouterStats | None
    """None for a policy without experts."""


class Auxiliary:
    """The auxiliary losses of one optimizer step, and what they and the routers come to over its micro-batches."""

    def __init__(
        self, policy: Policy, batches: Sequence[Batch], *, num_tokens: int, config: Config, ranks: Ranks
    ) -> None:
        """`num_tokens` are the learned tokens of all ranks, the losses' denominator."""
        self._policy, self._config, self._ranks = policy, config, ranks
        self._num_tokens = max(1, num_tokens)
        self._has_routers = bool(policy.moe_layers or policy.mtp_moe_layers)
        self._with_router_losses = config.router_aux_loss_coef > 0 or config.router_z_loss_coef > 0
        self.restart()
        self._num_rows = self._num_routed = 1
        if self._with_router_losses:
            self._num_rows = max(1, int(ranks.sum_number(sum(len(batch.rows.lengths) for batch in batches))))
            self._num_routed = max(1, int(ranks.sum_number(sum(len(batch.token_ids_N) for batch in batches))))

    def restart(self) -> None:
        """Forget the micro-batches so far: they will be done again."""
        policy, config = self._policy, self._config
        self._totals = RouterTotals(policy, with_mtp=config.mtp_weight > 0, with_losses=self._with_router_losses)
        self._mtp_loss = torch.zeros((), dtype=torch.float64, device=policy.device)

    def watch(self, batch: Batch) -> RouterWatch | None:
        """What the pass over a micro-batch is to sum up of the routers; None where there are none."""
        if not self._has_routers:
            return None
        return RouterWatch.of(batch.rows, with_losses=self._with_router_losses)

    def loss(self, batch: Batch, output: PolicyOutput, watch: RouterWatch | None) -> Tensor:
        """What one micro-batch adds to the loss, after a pass over the trunk that was watched; 0 unless asked for.

        The MTP modules' loss moves these modules alone: what a policy says is reward's business.
        """
        config, routers = self._config, output.routers
        total = torch.zeros((), device=output.hidden_NC.device)
        if config.mtp_weight:
            ahead = ahead_losses(
                self._policy,
                output.hidden_NC,
                batch.token_ids_N,
                batch.rows,
                wanted=batch.learned,
                temperature=config.temperature,
                watch=watch,
                is_detached=True,
                num_recycled=config.mtp_num_recycled,
            )
            mtp_loss = torch.stack(ahead.sums).mean()
            total = total + config.mtp_weight * mtp_loss / self._num_tokens
            if not batch.is_idle:
                self._mtp_loss += mtp_loss.detach()
            routers = RouterSums.join([sums for sums in (routers, ahead.routers) if sums is not None])
        if self._with_router_losses and routers is not None:
            total = total + router_loss(
                routers,
                aux_loss_coef=config.router_aux_loss_coef,
                z_loss_coef=config.router_z_loss_coef,
                num_rows=self._num_rows,
                num_tokens=self._num_routed,
            )
        if not batch.is_idle:
            self._totals.add(routers, len(batch.rows.lengths))
        return total

    def finish(self, *, is_skipped: bool) -> AuxiliaryStats:
        """After the last micro-batch and the optimizer's step: balance the routers, unless the step was skipped."""
        self._totals.reduce(self._ranks)
        if (rate := self._config.bias_update_rate) and not is_skipped:
            balance(self._policy, self._totals.load_ME, rate=rate, mtp_rate=rate)
        self._ranks.sum_([self._mtp_loss])
        return AuxiliaryStats(
            mtp_loss=float(self._mtp_loss) / self._num_tokens if self._config.mtp_weight else None,
            routers=self._totals.stats(self._policy.config.num_experts_per_tok),
        )


def check_auxiliary(config: Config, shape: PolicyConfig) -> None:
    """Refuse, with a ConfigError, keys that ask of a policy what its shape has not."""
    if config.mtp_weight and not shape.num_nextn_predict_layers:
        raise ConfigError("mtp_weight is set, but the model has no MTP modules; set mtp_weight: 0")
    if config.mtp_num_recycled and not config.mtp_weight:
        raise ConfigError("mtp_num_recycled is set, but mtp_weight is 0, which trains no MTP module; set mtp_weight")
    for key in ("bias_update_rate", "router_aux_loss_coef", "router_z_loss_coef"):
        if getattr(config, key) and not shape.num_moe_layers:
            raise ConfigError(f"{key} is set, but the model has no routed experts; set {key}: 0")
    if config.routing_replay != "off" and not shape.num_moe_layers:
        raise ConfigError("routing_replay is set, but the model has no routed experts; set routing_replay: off")
    if config.bias_update_rate and shape.topk_method != "noaux_tc":
        raise ConfigError(
            f"bias_update_rate is set, but the routers of a {shape.model_type} model have no bias; set "
            "bias_update_rate: 0 (router_aux_loss_coef balances any router)"
        )
