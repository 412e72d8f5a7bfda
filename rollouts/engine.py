"""The one interface to samplers, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from policy import Policy, load
from rollouts.types import Completion, EngineStats, OnGroup, SamplingParams

if TYPE_CHECKING:  # transformers takes seconds to import
    from policy.tokenizer import Tokenizer


class Engine(Protocol):
    """Samples groups of completions under the newest weights it was given."""

    @property
    def stats(self) -> EngineStats:
        """What it has done so far."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        prompt_seeds: Sequence[int] | None = None,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """`num_generations` completions of each prompt, [P][G], in the order asked.

        `prompt_seeds` [P] replaces the seeds that follow from `params.seed` and each prompt's place in the call, so
        that a prompt's completions do not depend on how prompts were dealt to calls or ranks. `on_group` is told of
        each prompt once, as soon as its completions are there while others are still sampled, in any order and always
        by the thread that called; what it raises ends the call.
        """
        ...

    def load_weights(self, policy: Policy, version: int) -> None:
        """Take the policy's weights as version `version`; free where engine and trainer share them."""
        ...

    def reset_prefix_cache(self) -> None:
        """Forget what is cached of earlier prompts, so that no bit of what follows depends on them."""
        ...

    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards."""
        ...


class VllmColocateConfig(BaseModel):
    """`engine.vllm_colocate`: vLLM inside the trainer's process."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    sleep_level: Literal["auto", 0, 1, 2] = Field(
        default="auto",
        description="freed while the policy trains: 0 nothing, 1 the cache (weights move to the host's memory), "
        "2 cache and weights; auto: 2 on a GPU, 0 on a CPU, where vLLM cannot sleep",
    )
    gpu_memory_utilization: float = Field(
        default=0.3, gt=0, le=1, description="share of the GPU that must be free when vLLM starts"
    )
    enforce_eager: bool = Field(default=False, description="neither compile nor capture graphs; always so on a CPU")


class VllmServerConfig(BaseModel):
    """`engine.vllm_server`: clients of `vllm serve`, here or on other machines."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    urls: tuple[str, ...] = Field(default=("http://127.0.0.1:8000",), min_length=1, description="one of each server")
    model: str | None = Field(default=None, description="the model's name there; none: the first that is served")
    api_key_env: str = Field(default="VLLM_API_KEY", description="environment variable with the servers' API key")
    weight_transfer: Literal["folder", "nccl"] = Field(
        default="folder", description="how new weights get there: a folder that both can read, or between GPUs"
    )
    weights_dir: Path | None = Field(
        default=None, description="where `folder` writes; the same path on every server; default: the system's own"
    )
    transfer_host: str = Field(
        default="127.0.0.1", description="this machine's address as the servers see it, for `nccl`"
    )
    request_timeout: float = Field(default=1800.0, gt=0, description="seconds for all completions of one prompt")
    retry_timeout: float = Field(default=600.0, ge=0, description="seconds that a server which fails is waited for")

    @field_validator("urls")
    @classmethod
    def _check_urls(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"engine.vllm_server.urls must be like http://127.0.0.1:8000, got {url!r}")
        if len(set(urls)) < len(urls):
            raise ValueError(f"a URL is listed twice in engine.vllm_server.urls: {', '.join(urls)}")
        return tuple(url.rstrip("/") for url in urls)


class SpeculativeConfig(BaseModel):
    """`engine.speculative`: the built-in engine drafts with the policy's own MTP modules."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_speculative_tokens: int = Field(default=0, ge=0, description="tokens drafted a round; 0: none")
    max_batch: int = Field(default=32, ge=1, description="most sequences decoded at once for which it drafts")


DEFAULT_CACHE_GIB = 1.0
"""Of a cache on a CPU, where `engine.cache_gib` does not say."""


class EngineConfig(BaseModel):
    """The `engine` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["builtin", "vllm_colocate", "vllm_server"] = Field(default="builtin", description="which sampler")
    block_size: int = Field(default=16, ge=1, description="tokens of one cache block (builtin)")
    max_num_seqs: int = Field(default=256, ge=1, description="sequences decoded at once")
    max_num_batched_tokens: int = Field(
        default=8192, ge=1, description="prompt tokens prefilled at once; a longer prompt takes several passes"
    )
    cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="most memory of the cache, GiB, taken as needed; default: 1, on a GPU 40% of what is free",
    )
    run_ahead: int = Field(default=8, ge=1, description="tokens sampled before the host looks at them")
    speculative: SpeculativeConfig = Field(default_factory=SpeculativeConfig)
    vllm_colocate: VllmColocateConfig = Field(default_factory=VllmColocateConfig)
    vllm_server: VllmServerConfig = Field(default_factory=VllmServerConfig)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind != "builtin" and self.speculative.num_speculative_tokens:
            raise ValueError(
                f"engine.speculative.num_speculative_tokens is {self.speculative.num_speculative_tokens}, but only the "
                f"built-in engine drafts with the policy's MTP modules: set it to 0, or engine.kind to builtin (it is "
                f"{self.kind})"
            )
        return self


def make_engine(
    policy_or_path: Policy | Path | str, config: EngineConfig, tokenizer: Tokenizer | None = None
) -> Engine:
    """The engine that `config.kind` names, holding the weights of a policy, or of a folder or hub id.

    Without a tokenizer it can end completions at tokens, but not at `SamplingParams.stop_strings`.

    Raises EngineError where vLLM is needed and absent, or a server does not answer or serves something else.
    """
    policy = policy_or_path if isinstance(policy_or_path, Policy) else load(policy_or_path)
    match config.kind:
        case "builtin":
            from rollouts.builtin_engine import BuiltinEngine

            return BuiltinEngine(policy, config, tokenizer)
        case "vllm_colocate":
            from rollouts.vllm_colocate import VllmColocateEngine

            return VllmColocateEngine(policy, config, tokenizer)
        case "vllm_server":
            from rollouts.vllm_server import VllmServerEngine

            return VllmServerEngine(policy, config.vllm_server, tokenizer)
