"""A micro-batch tried and then done, its weights in pieces: how much of a GPU either took, and what becomes of it where
there is less memory.

accelerate launch --config_file fsdp2.yaml --num_processes 1 -m tests.grpo.trial_memory FILE [dsv3_05]

FILE, JSON, has of each of four updates the loss, halvings, and GiB: `tried` (with what was set aside), `done`; the
third is on less memory, in which `tried` does not fit, the fourth keeps what the third found.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.rollouts import WORKS
from grpo.batch import make_minibatches, make_rows
from grpo.distributed import Ranks
from grpo.shares import Spread, share_of
from grpo.throughput import Phases
from grpo.trial import Trial
from grpo.types import Group
from grpo.update import update
from grpo.weights import keep_weights
from policy import Policy, cast_weights, initialise
from rewards import Problem
from rollouts import Completion
from tests.grpo.rollouts import tiny_config

GIB = 2**30


def main(file: Path, work: str) -> None:
    """On a CPU, of which less memory cannot be had, two updates of a smaller policy."""
    ranks = Ranks(cpu=not torch.cuda.is_available())
    assert ranks.sharding is not None
    is_gpu = ranks.device.type == "cuda"
    shape = WORKS[work if is_gpu else "cpu_ds"].shape.model_copy(update={"num_hidden_layers": 6 if is_gpu else 1})
    policy = Policy(shape)
    initialise(policy, seed=0)
    cast_weights(policy, torch.bfloat16 if is_gpu else torch.float32)
    config = tiny_config(
        dtype="bfloat16" if is_gpu else "float32", device="auto", weight_decay=0.0, max_tokens_per_micro_batch=10**6,
        activation_recomputation="full" if ranks.sharding == "zero3" and policy.moe_layers else "none",
    )  # fmt: skip
    policy.recomputation = config.activation_recomputation
    spread = Spread(way=ranks.sharding, num_processes=ranks.size, reshard_after_forward=ranks.reshard_after_forward)
    share = share_of(config, shape, spread, is_gpu=is_gpu)
    weights, length = keep_weights(policy, config, ranks), 512 if is_gpu else 8
    groups = [make_group(length, shape.vocab_size, seed) for seed in range(4)]
    rows = make_rows(groups, [[float(g - 3) for g in range(8)]] * 4, mask_truncated=False)

    def step(trial: Trial) -> dict[str, Any]:
        phases, before = Phases(ranks.device), torch.cuda.memory_allocated() if is_gpu else 0
        stats = update(
            weights.policy, weights.optimizer, make_minibatches(rows, 1, 10**6, ranks),
            learning_rate=0.0, config=config, ranks=ranks, phases=phases, trial=trial,
        )  # fmt: skip
        peaks = phases.take_peaks()
        of_pass = max(peaks[name] for name in ("forward_backward", "sync", "optimizer")) if peaks else 0
        return {
            "loss": stats.loss, "halvings": stats.num_halvings, "held": before / GIB,
            "tried": peaks.get("logprobs", 0) / GIB, "done": of_pass / GIB,
        }  # fmt: skip

    found = [step(Trial(weights, set_aside=share.beside_trial)) for _ in range(2)]
    if is_gpu:
        held, needed = found[-1]["held"], found[-1]["tried"] - found[-1]["held"]
        least = share.beside_trial / GIB
        allowed = held + least + 0.6 * (needed - least)
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory / GIB
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        trial = Trial(weights, set_aside=share.beside_trial)
        found += [{**step(trial), "allowed": allowed} for _ in range(2)]
    if ranks.is_main:
        file.write_text(json.dumps({"set_aside": share.beside_trial / GIB, "steps": found}, indent=2))
    ranks.wait()
    ranks.close()


def make_group(length: int, vocab_size: int, seed: int) -> Group:
    """Eight completions of one question, of random tokens."""
    draw = random.Random(seed)
    completions = [
        Completion(
            token_ids=[draw.randrange(4, vocab_size) for _ in range(length)],
            logprobs=[-10.0] * length,
            finish_reason="length",
            policy_version=0,
        )
        for _ in range(8)
    ]
    prompt = [draw.randrange(4, vocab_size) for _ in range(16)]
    return Group(
        problem=Problem(id=str(seed), prompt="?"),
        prompt_ids=prompt,
        completions=completions,
        texts=[""] * 8,
        results=[],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), (sys.argv[2:] or ["qwen05"])[0])
