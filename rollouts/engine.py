"""The one interface to samplers, and the choice among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from policy import Policy
from rollouts.types import Completion, SamplingParams


class Engine(Protocol):
    """Samples groups of completions under the newest weights it was given."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        prompt_seeds: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """`num_generations` completions of each prompt, [P][G], in the order asked.

        `prompt_seeds` [P] replaces the seeds that follow from `params.seed` and each prompt's place in the call, so
        that a prompt's completions do not depend on how prompts were dealt to calls or ranks.
        """
        ...

    def load_weights(self, policy: Policy, version: int) -> None:
        """Take the policy's weights as version `version`; free where engine and trainer share them."""
        ...

    def close(self) -> None:
        """Free everything; the engine cannot be used afterwards."""
        ...


class EngineConfig(BaseModel):
    """The `engine` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["builtin"] = Field(default="builtin", description="which sampler")
    block_size: int = Field(default=16, ge=1, description="tokens of one cache block")
    max_num_seqs: int = Field(default=256, ge=1, description="sequences decoded at once")
    max_num_batched_tokens: int = Field(default=8192, ge=1, description="prompt tokens prefilled at once")
    cache_gib: float | None = Field(
        default=None, gt=0, description="most memory of the cache, GiB, taken as needed; default: 1, on a GPU 40% of what is free"
    )
    run_ahead: int = Field(default=8, ge=1, description="tokens a GPU samples before the host looks at them")


def make_engine(policy: Policy, config: EngineConfig) -> Engine:
    """The engine that `config.kind` names, sampling from `policy`'s own weights."""
    from rollouts.builtin_engine import BuiltinEngine

    return BuiltinEngine(policy, config)
