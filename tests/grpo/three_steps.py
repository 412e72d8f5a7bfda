"""Three steps of every kind of policy, its weights kept as the launcher's file says; rank 0 writes what came of them.

accelerate launch --config_file fsdp2.yaml --num_processes 2 -m tests.grpo.three_steps result.pt
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grpo.advantages import step_advantages
from grpo.batch import make_minibatches, make_rows
from grpo.distributed import Ranks
from grpo.penalties import penalised_rewards
from grpo.reference import Reference
from grpo.update import update
from grpo.weights import keep_weights
from policy import Policy
from policy.lora import LoraConfig, add_adapters
from tests.grpo.rollouts import make_groups, tiny_config
from tests.policies import tiny_llama, tiny_policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One kind of run."""

    make: Callable[[], Policy]
    changes: dict[str, Any] = field(default_factory=dict)
    recomputation: str = "none"
    num_problems: int = 3
    rank: int = 0
    """Of the adapters; 0: none."""
    broken_step: int | None = None
    """In which one completion's advantage is no number."""


CASES = {
    "dense, tied, one problem": Case(
        make=lambda: tiny_llama(tie_word_embeddings=True, num_hidden_layers=1), num_problems=1
    ),
    "dense, recomputed, a step left out": Case(
        make=lambda: tiny_llama(num_hidden_layers=2), recomputation="full", broken_step=1
    ),
    "experts, MTP, router losses, reference": Case(
        make=lambda: tiny_policy(num_nextn_predict_layers=1, num_hidden_layers=2),
        changes={
            "mtp_weight": 0.1, "router_aux_loss_coef": 0.01, "bias_update_rate": 0.01, "beta": 0.1, "num_iterations": 2,
            "num_minibatches": 2, "sync_ref_model": True, "top_entropy_quantile": 0.5,
        },
        recomputation="selective",
    ),
    "experts, recomputed, reference in the reward": Case(
        make=lambda: tiny_policy(num_hidden_layers=2),
        changes={"beta": 0.1, "kl_in": "reward", "top_k": 7},
        recomputation="full",
    ),
    # An adapter of rank 1 has a row for one rank of two and none for the other.
    "adapters": Case(make=lambda: tiny_policy(num_hidden_layers=2), changes={"beta": 0.1}, rank=1),
}  # fmt: skip


def three_steps(ranks: Ranks) -> dict[str, Tensor]:
    """By case: losses and norms of each step, then weights, reference and what a checkpoint would hold."""
    found: dict[str, Tensor] = {}
    for name, case in CASES.items():
        changes = case.changes | ({"lora": {"r": case.rank}} if case.rank else {})
        # A larger epsilon: Adam's first step would blow up gradients that are nothing but rounding.
        config = tiny_config(
            max_grad_norm=0.5, max_tokens_per_micro_batch=60, weight_decay=0.1, adam_epsilon=1e-6, **changes
        )
        drawn = {key: case.changes[key] for key in ("top_k",) if key in case.changes}
        groups = make_groups(case.make(), num_problems=case.num_problems, length=8, **drawn)
        policy = case.make()
        policy.recomputation = case.recomputation  # type: ignore[assignment]
        if ranks.sharding == "zero3" and case.recomputation == "selective":
            policy.recomputation = "full"  # the next best that can be had there
        if case.rank:
            add_adapters(policy, LoraConfig(r=case.rank), seed=0)
        weights = keep_weights(policy, config, ranks)
        reference = Reference(policy, weights=weights) if config.beta else None
        mine = ranks.deal([group.num_tokens for group in groups])
        for step in range(3):
            own = [groups[place] for place in mine]
            rewards = penalised_rewards(own, config, policy=policy, reference=reference, ranks=ranks)
            by_place = dict(ranks.gather(list(zip(mine, rewards, strict=True))))
            advantages = step_advantages([by_place[place] for place in range(len(groups))], config)
            if step == case.broken_step:
                advantages[-1][0] = math.nan
            rows = make_rows(own, [advantages[place] for place in mine], mask_truncated=False, places=mine)
            stats = update(
                policy,
                weights.optimizer,
                make_minibatches(rows, config.num_minibatches, config.max_tokens_per_micro_batch, ranks),
                learning_rate=1e-3, config=config, ranks=ranks,
                reference=reference if config.kl_in == "loss" else None,
            )  # fmt: skip
            numbers = [stats.loss, stats.grad_norm, stats.kl, stats.entropy, stats.auxiliary.mtp_loss or 0.0]
            found[f"{name}: step {step}"] = torch.tensor([*numbers, stats.num_skipped]).nan_to_num(-1.0)
            if reference is not None and config.sync_ref_model:
                reference.follow(policy, 0.5)
        weights.publish()
        found |= {f"{name}: {key}": tensor.clone() for key, tensor in weights.sampler.state_dict().items()}
        found |= {f"{name}: {key}": tensor.clone() for key, tensor in weights.optimizer.state_tensors().items()}
        if reference is not None and not case.rank:
            found |= {f"{name}: reference {key}": t.clone() for key, t in weights.whole(reference.policy).items()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = Ranks(cpu=True)
    result = three_steps(here)
    if here.is_main:
        torch.save(result, Path(sys.argv[1]))
    here.wait()
    here.close()
