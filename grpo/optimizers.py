"""The optimizer that a recipe asks for."""

from __future__ import annotations

from grpo.config import Config, ConfigError
from grpo.layout import Layout
from grpo.optimizer import MasterAdamW
from grpo.optimizer_offload import OffloadedMasterAdamW
from policy import Policy


def make_optimizer(policy: Policy, config: Config, layout: Layout | None = None) -> MasterAdamW:
    """Over the policy's trained weights, whole or as `layout` says; on a CPU there is nothing to offload from.

    Raises ConfigError for what is not done with weights in pieces.
    """
    betas, eps, decay = (config.adam_beta1, config.adam_beta2), config.adam_epsilon, config.weight_decay
    if layout is not None:
        check_in_pieces(config)
        return MasterAdamW(policy, betas=betas, eps=eps, weight_decay=decay, layout=layout)
    if config.offload_optimizer and policy.device.type != "cpu":
        return OffloadedMasterAdamW(policy, betas=betas, eps=eps, weight_decay=decay)
    return MasterAdamW(policy, betas=betas, eps=eps, weight_decay=decay, is_8bit=config.optimizer == "adamw_8bit")


def check_in_pieces(config: Config) -> None:
    """Refuse, with a ConfigError, an optimizer that is not done over ranks."""
    if config.optimizer == "adamw_8bit" or config.offload_optimizer:
        key = "offload_optimizer: false" if config.offload_optimizer else "optimizer: adamw"
        raise ConfigError(f"in pieces over ranks the optimizer's state is in fp32 on the device; set {key}")
