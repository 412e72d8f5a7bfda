"""DeepSpeed's settings: what the launcher's file says, and what the recipe says in words of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from grpo.config import Config, ConfigError
from grpo.optimizers import check_in_pieces

RECIPES = {
    "optimizer": "learning_rate and the adam_ keys",
    "scheduler": "lr_scheduler_type",
    "gradient_clipping": "max_grad_norm",
    "fp16": "dtype",
    "bf16": "dtype",
    "amp": "dtype",
}
"""DeepSpeed's names of what a recipe says, and the recipe's keys."""
BATCHES = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
"""Of no meaning here: a micro-batch is what fits, and a step takes as many as there are."""


def settings_of(given: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """For `deepspeed.initialize`, from the settings that accelerate made of the launcher's file.

    Raises ConfigError where the file says what is the recipe's to say, or either asks for what is not done.
    """
    check_in_pieces(config)
    for key, ours in RECIPES.items():
        value = given.get(key, "auto")
        if value != "auto" and not (isinstance(value, Mapping) and value.get("enabled") in (False, "auto")):
            raise ConfigError(f"the launcher's file sets DeepSpeed's {key}: leave it out; {ours} in the recipe says it")
    zero = {key: value for key, value in given["zero_optimization"].items() if value not in (None, "auto")}
    for key in ("offload_optimizer", "offload_param"):
        if (device := zero.pop(key, {}).get("device", "none")) != "none":
            raise ConfigError(f"{key}_device must be none in the launcher's file, got {device}: it is not done here")
    if zero["stage"] == 3 and config.activation_recomputation == "selective":
        raise ConfigError(
            "ZeRO-3 cannot make single outputs again within the backward pass: set activation_recomputation to none or "
            "full, got selective"
        )
    others = {key: value for key, value in given.items() if key not in {*RECIPES, *BATCHES}}
    return {
        "communication_data_type": "fp32",  # of gradients, unless the file knows better
        **others,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": config.dtype == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
