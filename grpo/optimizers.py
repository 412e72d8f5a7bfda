"""The optimizer that a recipe asks for."""

from __future__ import annotations

from grpo.config import Config
from grpo.optimizer import MasterAdamW
from grpo.optimizer_offload import OffloadedMasterAdamW
from policy import Policy


def make_optimizer(policy: Policy, config: Config) -> MasterAdamW:
    """Over the policy's trained weights; on a CPU there is nothing to offload from."""
    betas, eps, decay = (config.adam_beta1, config.adam_beta2), config.adam_epsilon, config.weight_decay
    if config.offload_optimizer and policy.device.type != "cpu":
        return OffloadedMasterAdamW(policy, betas=betas, eps=eps, weight_decay=decay)
    return MasterAdamW(policy, betas=betas, eps=eps, weight_decay=decay, is_8bit=config.optimizer == "adamw_8bit")
