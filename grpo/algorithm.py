"""The choices that make an algorithm, and the named algorithms: rows of one table that set those choices.

Each choice is independent of the others and read by one file: `grpo/advantages.py` (baseline, scale),
`grpo/ratio.py` (level of the ratio), `grpo/clipping.py`, `grpo/aggregation.py`, `grpo/kl.py`, `grpo/entropy.py`,
`grpo/importance.py` (off-policy corrections). docs/algorithms.md has every formula with its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp"]
Baseline = Literal["group_mean", "leave_one_out", "none"]
Scale = Literal["group", "batch", "whiten", "mean", "none"]
Level = Literal["token", "sequence", "geometric_mean"]
Clipping = Literal["ppo", "cispo", "sapo", "dppo_tv", "dppo_kl", "none"]
Aggregation = Literal["tokens", "sequences", "prompts", "constant", "sums"]
Estimator = Literal["k1", "k2", "k3"]
Correction = Literal["off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
RoutingReplay = Literal["off", "sampler", "old_policy"]

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "grpo": {"loss_aggregation": "sequences"},
        "dr_grpo": {"scale_rewards": "none", "loss_aggregation": "constant"},
        "dapo": {"epsilon_high": 0.28, "mask_truncated_completions": True},
        "gspo": {
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
            "loss_aggregation": "sequences",
        },
        "cispo": {"clipping": "cispo", "epsilon_high": 5.0},
        "rloo": {
            "baseline": "leave_one_out",
            "scale_rewards": "none",
            "clipping": "none",
            "loss_aggregation": "sums",
            "kl_in": "reward",
            "kl_estimator": "k1",
        },
        "reinforce_pp": {"scale_rewards": "whiten", "kl_estimator": "k2"},
    }
)
"""What each named algorithm sets; every other key keeps its default, and a key of the recipe goes before both."""


class AlgorithmConfig(BaseModel):
    """How rewards become a gradient; the defaults are TRL 1.16's, with the loss over all tokens of the step."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    algorithm: Name | None = Field(default=None, description="a row of the table of presets; other keys override it")

    baseline: Baseline = Field(default="group_mean", description="what is taken from a reward")
    scale_rewards: Scale = Field(default="group", description="what the difference is divided by")
    advantage_epsilon: float = Field(default=0.0, ge=0, description="added to a standard deviation; TRL: 1e-4")
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    soft_punish_cache: int = Field(default=0, ge=0, description="last tokens of max_completion_length that cost reward")
    mask_truncated_completions: bool = Field(default=False, description="learn nothing from completions cut off")

    importance_sampling_level: Level = Field(default="token", description="of the ratio to the old policy")
    clipping: Clipping = Field(default="ppo", description="what holds the policy near the old one")
    epsilon: float = Field(default=0.2, gt=0, description="lower bound of the clipping")
    epsilon_high: float | None = Field(default=None, gt=0, description="upper bound; default: epsilon")
    delta: float | None = Field(default=None, gt=1, description="largest ratio where the advantage is negative, too")
    sapo_temperature_pos: float = Field(default=1.0, gt=0)
    sapo_temperature_neg: float = Field(default=1.05, gt=0)
    loss_aggregation: Aggregation = Field(default="tokens", description="how tokens are averaged")

    beta: float = Field(default=0.0, ge=0, description="weight of the KL penalty; 0 keeps no reference")
    kl_estimator: Estimator = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    use_bias_correction_kl: bool = Field(default=True, description="times the ratio to the old policy")
    offload_ref_model: bool = Field(default=False, description="keep the reference in host memory between uses")
    sync_ref_model: bool = Field(default=False, description="move the reference towards the policy now and then")
    ref_model_mixup_alpha: float = Field(default=0.6, gt=0, le=1, description="the policy's share in the mix")
    ref_model_sync_steps: int = Field(default=512, ge=1)

    entropy_coef: float = Field(default=0.0, ge=0, description="weight of the entropy bonus, its start if adaptive")
    use_adaptive_entropy: bool = False
    entropy_coef_min: float = Field(default=0.0, ge=0)
    entropy_coef_max: float = Field(default=1.0, ge=0)
    entropy_coef_delta: float = Field(default=0.005, gt=0)
    entropy_target: float = Field(default=0.2, ge=0, description="nats a token")
    top_entropy_quantile: float = Field(default=1.0, ge=0, le=1, description="share of tokens that are learned from")

    num_iterations: int = Field(default=1, ge=1, description="passes over each batch of completions")
    num_minibatches: int = Field(default=1, ge=1, description="optimizer steps a pass; prompts are dealt out to them")
    importance_sampling_correction: Correction = Field(default="off", description="from the sampler to the trainer")
    importance_sampling_clip_max: float | None = Field(default=3.0, gt=0)
    importance_sampling_clip_min: float | None = Field(default=None, ge=0)
    off_policy_mask_threshold: float | None = Field(default=None, gt=0, description="nats a token")
    routing_replay: RoutingReplay = Field(default="off", description="whose choice of experts an update repeats")

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("algorithm"), str):
            return {**PRESETS.get(values["algorithm"], {}), **values}
        return values

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        low, high = self.importance_sampling_clip_min, self.importance_sampling_clip_max
        wrong = [
            message
            for is_wrong, message in (
                (
                    self.clipping == "cispo" and self.epsilon_high is None,
                    "clipping cispo needs epsilon_high, the largest weight of a token (5.0 in ScaleRL)",
                ),
                (
                    self.importance_sampling_level == "geometric_mean" and self.clipping != "ppo",
                    "importance_sampling_level geometric_mean clips the logarithms that it averages; it needs "
                    f"clipping ppo, got {self.clipping}",
                ),
                (
                    self.clipping.startswith("dppo") and self.importance_sampling_level != "token",
                    f"clipping {self.clipping} compares probabilities of tokens; it needs importance_sampling_level "
                    f"token, got {self.importance_sampling_level}",
                ),
                (
                    self.multi_objective_aggregation == "normalize_then_sum"
                    and (self.baseline, self.scale_rewards, self.kl_in, self.soft_punish_cache)
                    != ("group_mean", "group", "loss", 0),
                    "multi_objective_aggregation normalize_then_sum standardises each reward itself; it needs "
                    "baseline group_mean, scale_rewards group, kl_in loss and soft_punish_cache 0",
                ),
                (
                    self.entropy_coef_min > self.entropy_coef_max,
                    f"entropy_coef_min ({self.entropy_coef_min}) is above entropy_coef_max ({self.entropy_coef_max})",
                ),
                (
                    low is not None and high is not None and low >= high,
                    f"importance_sampling_clip_min ({low}) must be below importance_sampling_clip_max ({high})",
                ),
                (
                    self.importance_sampling_correction.endswith("truncate") and low is None and high is None,
                    f"importance_sampling_correction {self.importance_sampling_correction} needs "
                    "importance_sampling_clip_max or importance_sampling_clip_min",
                ),
                (
                    self.sync_ref_model and not self.beta,
                    "sync_ref_model has no reference to move: set beta above 0, or sync_ref_model to false",
                ),
            )
            if is_wrong
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """`epsilon` and `epsilon_high`, the second the first where it is not given."""
        return self.epsilon, self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def takes_several_steps(self) -> bool:
        """Whether some optimizer step of a batch begins with a policy that is no longer the one it was sampled from."""
        return self.num_iterations * self.num_minibatches > 1
