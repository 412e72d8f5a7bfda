"""Three steps of every kind of policy, its weights kept as the launcher's file says, and a checkpoint saved and loaded;
rank 0 writes what came of them, and what it holds (held_bytes.py).

accelerate launch --config_file fsdp2.yaml --num_processes 2 -m tests.grpo.three_steps FOLDER [gpu]
"""

import json
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
from grpo.checkpoint import load_checkpoint, save_checkpoint
from grpo.config import Config
from grpo.distributed import Ranks
from grpo.penalties import penalised_rewards
from grpo.reference import Reference
from grpo.trial import Trial
from grpo.update import update
from grpo.weights import Weights, keep_weights
from policy import Policy, cast_weights
from policy.lora import add_adapters
from policy.tokenizer import build_word_tokenizer
from tests.grpo.held_bytes import held_bytes
from tests.grpo.rollouts import make_groups, tiny_config
from tests.policies import tiny_llama, tiny_policy
from tests.small_memory import room_for


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One kind of run."""

    make: Callable[[], Policy]
    changes: dict[str, Any] = field(default_factory=dict)
    recomputation: str = "none"
    num_problems: int = 3
    rank: int = 0
    """Of the adapters; 0: none."""
    dtype: torch.dtype = torch.float32
    """bf16: a row a micro-batch, since what shares one changes what is rounded."""
    room: int | None = None
    """Tokens of a micro-batch that the first rank has memory for, where weights lie in pieces; None: enough."""
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
            "freeze_router": False,
        },
        recomputation="selective",
        room=24,
    ),
    "experts, recomputed, reference in the reward": Case(
        make=lambda: tiny_policy(num_hidden_layers=2),
        changes={"beta": 0.1, "kl_in": "reward", "top_k": 7},
        recomputation="full",
    ),
    "experts in bf16": Case(make=lambda: tiny_policy(num_hidden_layers=2), num_problems=2, dtype=torch.bfloat16),
    # An adapter of rank 1 has a row for one rank of two and none for the other.
    "adapters": Case(make=lambda: tiny_policy(num_hidden_layers=2), changes={"beta": 0.1}, rank=1),
    "adapters in bf16": Case(
        make=lambda: tiny_llama(num_hidden_layers=1), num_problems=2, dtype=torch.bfloat16, rank=1
    ),
}  # fmt: skip


def three_steps(ranks: Ranks, folder: Path) -> dict[str, Tensor]:
    """By case: losses and norms of each step, then weights, reference and what a checkpoint holds."""
    found: dict[str, Tensor] = {}
    for name, case in CASES.items():
        is_refused = ranks.sharding == "zero3" and case.recomputation == "selective"
        changes = case.changes | {"activation_recomputation": "full" if is_refused else case.recomputation}
        changes |= {"lora": {"r": case.rank}} if case.rank else {}
        # A larger epsilon: Adam's first step would blow up gradients that are nothing but rounding.
        config = tiny_config(
            max_grad_norm=0.5, weight_decay=0.1, adam_epsilon=1e-6,
            max_tokens_per_micro_batch=60 if case.dtype == torch.float32 else 1, **changes,
        )  # fmt: skip
        drawn = {key: case.changes[key] for key in ("top_k",) if key in case.changes}
        groups = make_groups(case.make(), num_problems=case.num_problems, length=8, **drawn)
        weights, reference = start(case, config, ranks)
        trial = None if ranks.sharding is None else Trial(weights)
        is_short = trial is not None and case.room is not None
        mine = ranks.deal([group.num_tokens for group in groups])
        for step in range(3):
            own = [groups[place] for place in mine]
            rewards = penalised_rewards(own, config, policy=weights.policy, reference=reference, ranks=ranks)
            by_place = dict(ranks.gather(list(zip(mine, rewards, strict=True))))
            advantages = step_advantages([by_place[place] for place in range(len(groups))], config)
            if step == case.broken_step:
                advantages[-1][0] = math.nan
            rows = make_rows(own, [advantages[place] for place in mine], mask_truncated=False, places=mine)
            room = case.room if is_short and case.room and ranks.is_main else 10**6
            with room_for(weights.sampler, room):
                stats = update(
                    weights.policy,
                    weights.optimizer,
                    make_minibatches(rows, config.num_minibatches, config.max_tokens_per_micro_batch, ranks),
                    learning_rate=1e-3, config=config, ranks=ranks,
                    reference=reference if config.kl_in == "loss" else None, trial=trial,
                )  # fmt: skip
            assert (stats.num_halvings > 0) == is_short, f"{name}: halved {stats.num_halvings} times"
            numbers = [stats.loss, stats.grad_norm, stats.kl, stats.entropy, stats.auxiliary.mtp_loss or 0.0]
            found[f"{name}: step {step}"] = torch.tensor([*numbers, stats.num_skipped]).nan_to_num(-1.0)
            if reference is not None and config.sync_ref_model:
                reference.follow(weights.policy, 0.5)
        kept = everything(weights, reference)
        again, other = start(case, config, ranks)
        path, trained = folder / f"step_{len(found):06d}", weights.optimizer.state_tensors()
        referred = {key.removeprefix("reference "): t for key, t in kept.items() if key.startswith("reference ")}
        if ranks.is_main:
            save_checkpoint(
                folder, len(found), weights.sampler, build_word_tokenizer(["a"], 128), trained, keep=99,
                reference=referred or None, lora=config.lora,
            )  # fmt: skip
        ranks.wait()
        load_checkpoint(path, again, None if other is None else other.policy)
        loaded = everything(again, other)
        if ranks.is_main:
            changed = [key for key in kept if not torch.equal(loaded[key], kept[key])]
            assert not changed, f"{name}: not what was saved: {changed}"
        found |= {f"{name}: {key}": tensor for key, tensor in kept.items() if tensor.dtype == torch.float32}
    return found


def start(case: Case, config: Config, ranks: Ranks) -> tuple[Weights, Reference | None]:
    """Before the first step."""
    policy = cast_weights(case.make(), case.dtype)
    if ranks.sharding is None:
        policy = policy.to(ranks.device)
    policy.recomputation = config.activation_recomputation
    if config.lora is not None:
        add_adapters(policy, config.lora, seed=0)
    weights = keep_weights(policy, config, ranks)
    return weights, Reference(policy, weights=weights) if config.beta else None


def everything(weights: Weights, reference: Reference | None) -> dict[str, Tensor]:
    """That a checkpoint is made of."""
    weights.publish()
    found = {**weights.sampler.state_dict(), **weights.optimizer.state_tensors()}
    if reference is not None and reference.policy is not weights.policy:
        found |= {f"reference {key}": tensor for key, tensor in weights.whole(reference.policy).items()}
    return {key: tensor.detach().cpu().clone() for key, tensor in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = Ranks(cpu=sys.argv[2:] != ["gpu"])
    result = three_steps(here, Path(sys.argv[1]))
    if here.is_main:
        torch.save(result, Path(sys.argv[1]) / "result.pt")
    if here.sharding is not None and here.device.type == "cpu":
        held = held_bytes(here)
        if here.is_main:
            (Path(sys.argv[1]) / "held.json").write_text(json.dumps(held))
    here.wait()
    here.close()
