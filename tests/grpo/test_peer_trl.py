"""Loss and gradients equal TRL's, on the same weights, tokens, log-probabilities and rewards, through TRL's own code.

`make test-peer` installs TRL 1.16.0 into an environment of its own and runs this. TRL's trainer is given completions
that a policy near the first sampled (through its `rollout_func`), computes old and reference log-probabilities,
importance weights and advantages itself, gets other weights, and differentiates its loss; ours does the same in its own
way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import policy as policies
from grpo.advantages import step_advantages
from grpo.batch import make_rows
from grpo.distributed import Ranks
from grpo.reference import Reference
from grpo.types import Group
from grpo.update import backward, prepare
from policy import Policy
from policy.checkpoint import read_tensors
from tests.grpo.rollouts import make_groups, minibatches_of, tiny_config
from tests.policies import tiny_policy

pytestmark = pytest.mark.peer
trl = pytest.importorskip("trl", reason="make test-peer installs TRL")

LENGTH = 20
WEIGHTS = [1.0, 0.5]
"""Of the two rewards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What both sides learn from."""

    start: Policy
    """The old policy and the reference."""
    now: Policy
    """The policy that is differentiated."""
    groups: list[Group]
    """Sampled by a third policy near both."""
    scores: Tensor
    """[rewards, B]."""
    folders: dict[str, Path]
    """`start` and `now` in the layout of transformers."""


def dense_policy() -> Policy:
    """Without experts, whose choice of two near each other could turn on the last bit, and without a pad token, whose
    embedding transformers keeps from learning.
    """
    return tiny_policy(first_k_dense_replace=3, initializer_range=0.1, pad_token_id=None)


def nearby(policy: Policy, seed: int, size: float) -> Policy:
    other, generator = dense_policy(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight, own in zip(other.parameters(), policy.parameters(), strict=True):
            weight.copy_(own + size * torch.randn(own.shape, generator=generator))
    return other


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    start = dense_policy()
    now, sampler = nearby(start, 1, 0.02), nearby(start, 2, 0.01)
    folders = {name: tmp_path_factory.mktemp(name) for name in ("start", "now")}
    policies.save(start, folders["start"])
    policies.save(now, folders["now"])
    groups = make_groups(sampler, num_problems=3, num_generations=4, length=LENGTH)
    scores = torch.rand(2, 12, generator=torch.Generator().manual_seed(5)).round(decimals=1)
    return Setting(start=start, now=now, groups=groups, scores=scores, folders=folders)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = WordLevel({f"t{n}": n for n in range(61)}, unk_token="t3")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="t0", bos_token="t1", eos_token="t2")


def theirs(setting: Setting, folder: Path, settings: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """TRL's loss and gradients, the latter by the names of transformers."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    from trl.experimental.gmpo import GMPOConfig, GMPOTrainer

    settings = dict(settings)
    corrects_sampler = "vllm_importance_sampling_mode" in settings
    make_config, make_trainer = (GMPOConfig, GMPOTrainer) if settings.pop("gmpo", False) else (GRPOConfig, GRPOTrainer)
    completions = [completion for group in setting.groups for completion in group.completions]

    def rollout(prompts: Sequence[Any], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [list(group.prompt_ids) for group in setting.groups for _ in group.completions],
            "completion_ids": [list(completion.token_ids) for completion in completions],
            "logprobs": [list(completion.logprobs) for completion in completions],
        }

    def first_reward(**_: Any) -> list[float]:
        return setting.scores[0].tolist()

    def second_reward(**_: Any) -> list[float]:
        return setting.scores[1].tolist()

    arguments = {
        "output_dir": str(folder), "report_to": "none", "use_cpu": True, "bf16": False, "num_iterations": 2,
        "per_device_train_batch_size": 12, "num_generations": 4, "max_completion_length": LENGTH, "temperature": 1.0,
        "gradient_checkpointing": False, "reward_weights": WEIGHTS, "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    trainer = make_trainer(
        model=str(setting.folders["start"]),
        reward_funcs=[first_reward, second_reward],
        args=make_config(**(arguments | settings)),
        train_dataset=Dataset.from_list([{"prompt": "t5"}] * 12),
        processing_class=tokenizer(),
        rollout_func=rollout,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    # Its own samplers are vLLM, which is not needed to weigh log-probabilities that are given.
    trainer.use_vllm, trainer._last_loaded_step = corrects_sampler, trainer.state.global_step
    inputs = trainer._generate_and_score_completions([{"prompt": "t5"}] * 12)
    now = AutoModelForCausalLM.from_pretrained(setting.folders["now"], dtype=torch.float32)
    trainer.model.load_state_dict(now.state_dict())
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), {name: w.grad for name, w in trainer.model.named_parameters() if w.grad is not None}


def ours(setting: Setting, folder: Path, choices: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    """Our loss and gradients, the latter by the names of transformers."""
    # Two iterations, so that the old policy is the one that TRL takes too; micro-batches, as TRL does not have here.
    config = tiny_config(
        **({"num_iterations": 2, "max_completion_length": LENGTH, "advantage_epsilon": 1e-4} | choices)
    )
    rewards = (setting.scores * torch.tensor(WEIGHTS)[:, None]).sum(0).view(3, 4).tolist()
    parts = [
        [{"a": float(setting.scores[0, 4 * p + g]), "b": float(setting.scores[1, 4 * p + g])} for g in range(4)]
        for p in range(3)
    ]
    advantages = step_advantages(rewards, config, parts=parts, weights={"a": WEIGHTS[0], "b": WEIGHTS[1]})
    rows = make_rows(setting.groups, advantages, mask_truncated=False)
    reference = Reference(setting.start) if config.beta else None
    ranks = Ranks(cpu=True)
    minibatches = minibatches_of(rows, 10**6 if config.top_entropy_quantile < 1 else 120)
    [step] = prepare(setting.start, minibatches, config, ranks, reference, config.entropy_coef)
    if (
        config.top_entropy_quantile < 1
    ):  # TRL ranks the entropies of the policy in hand, ours those before its first step
        [now] = prepare(setting.now, minibatches, config, ranks)
        certain = [batch.certain_N for batch in now.minibatch.batches]
        for batch, certain_N in zip(step.minibatch.batches, certain, strict=True):
            assert batch.certain_N is not None
            assert certain_N is not None
            batch.certain_N.copy_(certain_N)
    setting.now.zero_grad()
    loss = sum(float(backward(setting.now, batch, step, config).loss.detach()) for batch in step.minibatch.batches)
    gradient = dense_policy()  # gradients in the place of weights, to be saved by their names
    with torch.no_grad():
        for place, weight in zip(gradient.parameters(), setting.now.parameters(), strict=True):
            place.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
    policies.save(gradient, folder)
    return loss, read_tensors(folder)


CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"loss_type": "dapo"}, {}),
    ({"loss_type": "bnpo"}, {}),
    ({"loss_type": "grpo"}, {"algorithm": "grpo"}),
    ({"loss_type": "dr_grpo", "scale_rewards": "none"}, {"algorithm": "dr_grpo"}),
    ({"loss_type": "dapo", "epsilon_high": 0.28}, {"epsilon_high": 0.28}),
    ({"loss_type": "dapo", "delta": 1.3}, {"delta": 1.3}),
    ({"loss_type": "cispo", "epsilon_high": 1.05}, {"algorithm": "cispo", "epsilon_high": 1.05}),
    ({"loss_type": "sapo"}, {"clipping": "sapo", "loss_aggregation": "sequences"}),
    (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"algorithm": "gspo"},
    ),
    (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"},
        {"importance_sampling_level": "sequence", "loss_aggregation": "sums"},
    ),
    (
        {"gmpo": True, "epsilon": 0.05},
        {"importance_sampling_level": "geometric_mean", "loss_aggregation": "sequences", "epsilon": 0.05},
    ),
    ({"loss_type": "dapo", "beta": 0.3}, {"beta": 0.3}),
    (
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
        {"algorithm": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
    ),
    ({"loss_type": "dapo", "scale_rewards": "batch"}, {"scale_rewards": "batch"}),
    ({"loss_type": "dapo", "scale_rewards": "none"}, {"scale_rewards": "none"}),
    (
        {"loss_type": "dapo", "multi_objective_aggregation": "normalize_then_sum"},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ),
    ({"loss_type": "dapo", "top_entropy_quantile": 0.3}, {"top_entropy_quantile": 0.3}),
    ({"loss_type": "dapo", "off_policy_mask_threshold": 0.01}, {"off_policy_mask_threshold": 0.01}),
    *(
        (
            {
                "loss_type": "dapo",
                "vllm_importance_sampling_mode": f"{level}_{how}",
                "vllm_importance_sampling_clip_max": high,
                "vllm_importance_sampling_clip_min": low,
            },
            {
                "importance_sampling_correction": f"{level}_{how}",
                "importance_sampling_clip_max": high,
                "importance_sampling_clip_min": low,
            },
        )
        for level, low, high in (("token", 0.95, 1.02), ("sequence", 0.8, 1.2))
        for how in ("truncate", "mask")
    ),  # fmt: skip
    ({"loss_type": "dapo", "entropy_coef": 0.3}, {"entropy_coef": 0.3}),
]


@pytest.mark.parametrize(("peer", "choices"), CASES, ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()))
def test_loss_and_gradients_are_those_of_trl(
    peer: dict[str, Any], choices: dict[str, Any], setting: Setting, tmp_path: Path
) -> None:
    their_loss, their_gradients = theirs(setting, tmp_path / "theirs", peer)
    our_loss, our_gradients = ours(setting, tmp_path / "ours", choices)
    assert our_loss == pytest.approx(their_loss, abs=1e-6, rel=1e-6)
    assert their_gradients.keys() == our_gradients.keys()
    largest = max(float(gradient.abs().max()) for gradient in their_gradients.values())
    assert largest > 1e-3
    for name, gradient in their_gradients.items():
        difference = float((our_gradients[name] - gradient).abs().max())
        assert difference < 1e-6 * max(1.0, largest), (name, difference, largest)
