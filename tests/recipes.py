"""A recipe that does everything a real one does, in seconds."""

from pathlib import Path
from typing import Any

import yaml

TINY: dict[str, Any] = {
    "name": "tiny",
    "device": "cpu",
    "base": {
        "shape": {
            "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
            "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "num_attention_heads": 2,
            "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
            "max_position_embeddings": 64, "num_nextn_predict_layers": 1, "initializer_range": 0.1,
        },
        "attempts": {"max_attempts": 2},
        "max_steps": 3,
        "tokens_per_step": 256,
        "warmup_steps": 1,
    },
    "dataset": {"countdown": {"high": 9, "operators": "+-", "max_value": 30}, "num_problems": 32},
    "prompt_template": "User : {prompt} Assistant :",
    "rewards": ["countdown", "format"],
    "reward_workers": 0,
    "prompts_per_step": 2,
    "num_generations": 4,
    "max_completion_length": 16,
    "max_steps": 3,
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "evaluation": {"num_problems": 8, "k": 2},
    "save_steps": 1,
}  # fmt: skip
"""A policy of some thousand weights, 3 steps of base training, 3 of GRPO on 2 problems x 4 completions."""


def write_recipe(folder: Path, **changes: Any) -> Path:
    """`tiny.yaml` in `folder`, runs and base models below it; `changes` replace top-level keys, None takes one out."""
    values = TINY | {"output_dir": str(folder / "runs")} | changes
    if values["base"] is not None:
        values["base"] = {"cache_dir": str(folder / "cache")} | values["base"]
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return file
