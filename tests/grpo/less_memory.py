"""`grpo train` on a part of a GPU's memory, which is too little for the update or for all sequences at once.

python -m tests.grpo.less_memory (update | sampling) FOLDER; prints the GiB allowed, and what the steps say of memory.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.grpo_step import REWARD, character_tokenizer, make_problems
from benchmarks.rollouts import WORKS
from grpo.config import load_config
from grpo.plan import Device, estimate
from grpo.run import run
from policy import Policy, cast_weights, initialise, save

RECIPE: dict[str, Any] = {
    "name": "less", "prompt_template": "{prompt}", "max_steps": 2, "learning_rate": 1e-6, "save_steps": 0,
    "reward_workers": 0, "evaluation": {"num_problems": 0},
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "update": {"prompts_per_step": 16, "num_generations": 16, "max_tokens_per_micro_batch": 10**6},
    "sampling": {
        "prompts_per_step": 64, "num_generations": 16, "engine": {"max_num_seqs": 1024}, "lora": {"r": 8},
        "max_tokens_per_micro_batch": 2048,
    },
}  # fmt: skip
"""What is too large in each; adapters alone leave the update small beside the sampler's cache."""
LAYERS = {"update": 4, "sampling": 12}


def main(kind: str, folder: Path) -> None:
    """On a CPU, which cannot be kept from its memory, a tiny run."""
    is_gpu = torch.cuda.is_available()
    shape = WORKS["qwen05" if is_gpu else "cpu_ds"].shape
    if is_gpu:
        shape = shape.model_copy(update={"num_hidden_layers": LAYERS[kind]})
    policy = Policy(shape)
    initialise(policy, seed=0)
    save(cast_weights(policy, torch.bfloat16 if is_gpu else torch.float32), folder / "model")
    character_tokenizer().save_pretrained(folder / "model")
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_problems()))
    (folder / "reward.py").write_text(REWARD)
    recipe = RECIPE | KINDS[kind] | {
        "output_dir": str(folder), "model": str(folder / "model"), "dataset": {"path": str(folder / "problems.jsonl")},
        "rewards": [f"{folder / 'reward.py'}:distinct"], "dtype": "bfloat16" if is_gpu else "float32",
        "max_completion_length": 512 if is_gpu else 4,
    }  # fmt: skip
    if not is_gpu:
        recipe |= {"prompts_per_step": 2, "num_generations": 2}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if is_gpu:
        device = Device.detect(is_gpu=True)
        planned = estimate(load_config(folder / "recipe.yaml"), shape, device, prompt_tokens=64)
        kept = planned.resident - planned.cache - planned.graphs
        needed = (planned.update_peak if kind == "update" else planned.sampling_peak) - kept
        allowed = kept + needed // (4 if kind == "update" else 2)
        torch.cuda.set_per_process_memory_fraction(allowed / device.memory)
        print(f"{kind}: needs {(kept + needed) / 2**30:.1f} GiB, may have {allowed / 2**30:.1f}", flush=True)
    run(folder / "recipe.yaml", [], resume=False)
    for line in (folder / "less" / "metrics.jsonl").read_text().splitlines():
        step = json.loads(line)
        print({key: step[key] for key in step if key.startswith("memory/") or key in ("update/halvings", "step_time")})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
