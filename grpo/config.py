"""A recipe: everything that a run depends on, strict, in one YAML file with `a.b=value` overrides.

Keys use TRL's names where TRL has the thing. Sections live beside the code that reads them (`EngineConfig`,
`CountdownConfig`, ...).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from grpo.algorithm import AlgorithmConfig
from grpo.countdown import AttemptsConfig, CountdownConfig
from grpo.curriculum import CurriculumConfig
from grpo.dynamic_sampling import DynamicSamplingConfig
from grpo.replay_buffer import ReplayBufferConfig
from grpo.schedule import LengthScheduleConfig
from policy import PolicyConfig
from policy.lora import LoraConfig
from policy.recompute import Recomputation
from rewards.registry import reward_name
from rewards.secrets import is_secret
from rollouts import EngineConfig

DEFAULT_CONTEXT = 512
"""Tokens that a base model may see where `base.shape` does not say."""


class ConfigError(ValueError):
    """A recipe that cannot be used; the message names the key and the remedy."""


class Section(BaseModel):
    """Strict and frozen: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class DatasetConfig(Section):
    """Where problems come from: `countdown` (generated) or `path` (a file or hub id)."""

    countdown: CountdownConfig | None = Field(default=None, description="generate countdown problems")
    path: str | None = Field(default=None, description="a .jsonl, .json or .parquet file, or a hub id")
    config_name: str | None = Field(default=None, description="configuration of a hub dataset")
    split: str = Field(default="train", description="split of a hub dataset")
    prompt_column: str = Field(default="prompt", description="column with the question: text or messages")
    answer_column: str = Field(default="answer", description="column with the gold answer")
    num_problems: int = Field(default=8192, ge=1, description="training problems generated, or read at most")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.countdown is None) == (self.path is None):
            raise ValueError(
                "dataset needs exactly one of `countdown` (generated problems) and `path` (a file or hub id)"
            )
        return self


class BaseConfig(Section):
    """How a base model is trained from nothing, where `model` names none."""

    shape: dict[str, Any] = Field(
        description="the policy's shape in Hugging Face's names; vocab_size comes from the task"
    )
    attempts: AttemptsConfig = Field(default_factory=AttemptsConfig, description="the text of unguided attempts")
    max_steps: int = Field(ge=1, description="optimizer steps")
    tokens_per_step: int = Field(default=6144, ge=64, description="tokens of one batch, padding counted")
    learning_rate: float = Field(default=3e-3, gt=0)
    warmup_steps: int = Field(default=50, ge=0)
    weight_decay: float = Field(default=0.1, ge=0)
    mtp_weight: float = Field(default=0.1, ge=0, description="weight of the multi-token-prediction loss")
    mtp_interval: int = Field(default=1, ge=1, description="train the MTP modules on every n-th step only")
    bias_update_rate: float = Field(default=1e-3, ge=0, description="step of the routers' balancing bias")
    mtp_bias_update_rate: float = Field(default=0.0, ge=0, description="the same in the MTP modules, when trained")
    router_aux_loss_coef: float = Field(default=0.0, ge=0, description="weight of the sequence-wise balance loss")
    router_z_loss_coef: float = Field(default=0.0, ge=0, description="weight of the routers' z-loss")
    cache_dir: Path = Field(default=Path("cache"), description="finished base models, by the hash of what made them")

    @field_validator("shape")
    @classmethod
    def _check_shape(cls, shape: dict[str, Any]) -> dict[str, Any]:
        if "vocab_size" in shape:
            raise ValueError("base.shape.vocab_size comes from the task; leave it out")
        try:
            PolicyConfig.model_validate({"max_position_embeddings": DEFAULT_CONTEXT, **shape, "vocab_size": 1})
        except ValidationError as error:
            raise ValueError(explain(error, PolicyConfig, "base.shape")) from None
        return shape


class EvaluationConfig(Section):
    """Held-out accuracy before, during and after training."""

    num_problems: int = Field(default=500, ge=0, description="held-out problems; 0 evaluates nothing")
    k: int = Field(default=8, ge=1, description="completions a problem at `temperature`, for avg@k and pass@k")
    eval_steps: int = Field(default=0, ge=0, description="also evaluate every so many steps; 0: before and after only")
    path: str | None = Field(default=None, description="held-out problems; default: a split the training never sees")
    batch_size: int = Field(default=256, ge=1, description="prompts given to the engine at once")


class Config(AlgorithmConfig):
    """One run: its own keys and those of its algorithm."""

    name: str = Field(description="the run's folder below output_dir", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    output_dir: Path = Path("runs")
    seed: int = Field(default=0, ge=0)
    model: str | None = Field(default=None, description="folder or hub id of the model to start from; none: `base`")
    base: BaseConfig | None = None
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="what the policy computes in")
    residual_in_fp32: bool = Field(
        default=True, description="keep the residual stream in fp32 where dtype is bfloat16; costs memory, not products"
    )
    device: Literal["auto", "cpu"] = "auto"
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads a process; default: torch's own choice"
    )

    dataset: DatasetConfig
    prompt_template: str = Field(default="r1_zero", description="`r1_zero`, `chat`, or a text with {prompt} in it")
    rewards: tuple[str, ...] = Field(default=("countdown", "format"), min_length=1)
    reward_weights: tuple[float, ...] | None = None
    reward_workers: int = Field(default=1, ge=0, description="grading processes; 0 grades in the trainer, unprotected")
    reward_timeout: float = Field(default=10.0, gt=0, description="seconds for one completion")
    reward_memory_mb: int | None = Field(default=2048, ge=1, description="most memory of a grading process, MiB")
    reward_env: tuple[str, ...] = Field(
        default=(), description="environment variables that grading processes get although they look like secrets"
    )
    shuffle_rewards: bool = Field(default=False, description="control: deal each step's rewards out at random")

    prompts_per_step: int = Field(default=32, ge=1)
    num_generations: int = Field(default=8, ge=2)
    max_completion_length: int = Field(ge=1)
    temperature: float = Field(default=1.0, gt=0)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    stop_strings: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="texts that end a completion, beside the tokenizer's end-of-sequence token"
    )

    rollout_lag: Literal[0, 1] = Field(
        default=0, description="1: vllm servers sample a step with the weights of the one before, while that trains"
    )

    max_steps: int = Field(ge=1)
    learning_rate: float = Field(default=1e-6, gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(default=10, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.99, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="adamw_8bit keeps the two moments in 8 bits a number"
    )
    offload_optimizer: bool = Field(
        default=False, description="keep moments and fp32 masters in the host's memory between steps (adamw)"
    )
    max_tokens_per_micro_batch: int = Field(default=8192, ge=1)
    share_prompts: bool = Field(
        default=True, description="go over a group's prompt once for all its completions, where that pays"
    )
    max_skipped_steps: int = Field(default=5, ge=1, description="updates that are not finite before the run stops")
    activation_recomputation: Recomputation = Field(
        default="none", description="what the backward pass makes again to save memory: none, selective, full (blocks)"
    )
    lora: LoraConfig | None = Field(default=None, description="train low-rank adapters only; {} takes the defaults")
    freeze_router: bool = Field(default=True, description="train all of a mixture of experts but its routers' weights")
    bias_update_rate: float = Field(default=0.0, ge=0, description="step of the routers' balancing bias; 0 keeps it")
    router_aux_loss_coef: float = Field(default=0.0, ge=0, description="weight of the sequence-wise balance loss")
    router_z_loss_coef: float = Field(default=0.0, ge=0, description="weight of the routers' z-loss")
    mtp_weight: float = Field(
        default=0.0, ge=0, description="weight of the MTP modules' loss on completions; it moves these modules alone"
    )
    mtp_num_recycled: int = Field(
        default=0, ge=0, description="further tokens that the last MTP module learns to draft from its own output"
    )

    dynamic_sampling: DynamicSamplingConfig | None = Field(default=None, description="replace groups without signal")
    curriculum: CurriculumConfig | None = Field(default=None, description="choose problems by their pass rates")
    length_schedule: LengthScheduleConfig | None = Field(default=None, description="max_completion_length that grows")
    replay_buffer: ReplayBufferConfig | None = Field(
        default=None, description="add old successes to groups in which all failed"
    )

    engine: EngineConfig = Field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    save_steps: int = Field(default=50, ge=0, description="checkpoint every so many steps; 0: at the end only")
    save_total_limit: int = Field(default=2, ge=1, description="checkpoints kept")
    stop_timeout: float = Field(
        default=20.0, gt=0, description="seconds after SIGTERM until a step that is still sampling is given up"
    )
    ddp_timeout: float = Field(
        default=1800.0, gt=0, description="seconds that a rank waits for another before the run ends, with stacks"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.model is None and self.base is None:
            raise ValueError("the recipe names no `model` to start from and has no `base` section to train one")
        if self.base is not None and self.model is None and self.dataset.countdown is None:
            raise ValueError("`base` writes text for generated problems; give `dataset.countdown`, or a `model`")
        if len(set(self.rewards)) < len(self.rewards):
            raise ValueError(f"a reward is listed twice in rewards: {', '.join(self.rewards)}")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise ValueError(f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards")
        if self.lora is not None and (self.bias_update_rate or self.mtp_weight):
            raise ValueError("lora freezes all but the adapters: bias_update_rate and mtp_weight must be 0 beside it")
        if self.lora is not None and self.sync_ref_model:
            raise ValueError(
                "lora takes the policy without its adapters for the reference: sync_ref_model must be false"
            )
        if self.routing_replay == "sampler" and self.engine.kind != "builtin":
            raise ValueError(
                f"routing_replay: sampler needs engine.kind builtin (vLLM does not say which experts a token went to), "
                f"got {self.engine.kind}; old_policy works with any engine"
            )
        if self.freeze_router and (self.router_aux_loss_coef or self.router_z_loss_coef):
            raise ValueError(
                "router_aux_loss_coef and router_z_loss_coef teach the routers, which freeze_router holds: set "
                "freeze_router: false, or both to 0 (bias_update_rate balances a router that is frozen, too)"
            )
        names = ["reward", *map(reward_name, self.rewards)]
        if self.rollout_lag and self.engine.kind != "vllm_server":
            why = {"builtin": "samples from the very weights", "vllm_colocate": "samples on the very devices"}
            raise ValueError(
                f"rollout_lag: {self.rollout_lag} samples while the policy trains, but engine.kind: {self.engine.kind} "
                f"{why[self.engine.kind]} that are trained; set engine.kind: vllm_server, or rollout_lag: 0"
            )
        if self.dynamic_sampling is not None and self.dynamic_sampling.metric not in names:
            raise ValueError(
                f"dynamic_sampling.metric must be one of {', '.join(names)}, got {self.dynamic_sampling.metric!r}"
            )
        if self.length_schedule is not None and self.length_schedule.start > self.max_completion_length:
            raise ValueError(
                f"length_schedule.start ({self.length_schedule.start}) must not exceed max_completion_length "
                f"({self.max_completion_length}), where the schedule ends"
            )
        if self.prompt_template not in ("r1_zero", "chat") and "{prompt}" not in self.prompt_template:
            raise ValueError(
                f"prompt_template must be r1_zero, chat, or a text with {{prompt}} in it, got {self.prompt_template!r}"
            )
        if self.model is None and "{prompt}" not in self.prompt_template.split():
            raise ValueError(
                "`base` needs a prompt_template with {prompt} as a word of its own (its tokenizer knows whole words "
                f"only), such as 'User : {{prompt}} Assistant :', got {self.prompt_template!r}"
            )
        if self.offload_optimizer and self.optimizer != "adamw":
            raise ValueError(f"offload_optimizer goes with optimizer: adamw, got optimizer: {self.optimizer}")
        if self.soft_punish_cache > self.max_completion_length:
            raise ValueError(
                f"soft_punish_cache ({self.soft_punish_cache}) is above max_completion_length "
                f"({self.max_completion_length})"
            )
        if self.num_minibatches > self.prompts_per_step:
            raise ValueError(
                f"num_minibatches ({self.num_minibatches}) is above prompts_per_step ({self.prompts_per_step}): some "
                "would be empty"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.output_dir / self.name

    def to_yaml(self) -> str:
        """The resolved recipe, every key given, those of the algorithm last."""
        values = self.model_dump(mode="json")
        ordered = {key: values.pop(key) for key in [*values] if key not in AlgorithmConfig.model_fields} | values
        return yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True)


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and lay `a.b=value` overrides over it (values are YAML).

    Raises ConfigError for a missing or unreadable file, an unknown key (naming the nearest one) or a bad value.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"no recipe {str(path)!r} (looked from {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(values).__name__}")
    for override in overrides:
        _apply(values, override)
    _refuse_secrets(values, str(path))
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Config)}") from None


def _refuse_secrets(value: Any, path: str, key: str = "") -> None:
    """Before anything could repeat it: a recipe is saved with the run, and shown in its report."""
    if isinstance(value, str) and is_secret(value):
        raise ConfigError(
            f"{path}: {key} looks like a secret, and a recipe is saved and shown; put it into an environment variable "
            "(engine.vllm_server.api_key_env names the one for vLLM, reward_env those that rewards get)"
        )
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        _refuse_secrets(part, path, f"{key}.{name}" if key else str(name))


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """One line for a person: each key that is wrong and what is allowed there; `prefix` is where `model` stands."""
    return "; ".join(_explain(item, model, prefix) for item in error.errors())


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form a.b=value")
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from None


def _explain(item: Any, model: type[BaseModel], prefix: str) -> str:
    path = [str(part) for part in item["loc"]]
    where = [prefix, *path] if prefix else path
    key = ".".join(where)
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        allowed = _keys_at(model, path[:-1])
        near = difflib.get_close_matches(path[-1], allowed, n=1, cutoff=0.5)
        if near:
            return f"unknown key {key!r}; did you mean {'.'.join([*where[:-1], near[0]])!r}?"
        return f"unknown key {key!r}; known there: {', '.join(sorted(allowed))}"
    if item["type"] == "missing":
        return f"key {key!r} is required"
    return f"{key}: {message}, got {item['input']!r}" if path and item["type"] != "value_error" else message


def _keys_at(model: type[BaseModel], path: Iterable[str]) -> list[str]:
    """The keys of the section at `path`; a section may be optional."""
    for part in path:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
