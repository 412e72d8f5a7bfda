"""What an engine is asked for and what it gives back.

Shapes: M layers with routed experts, K experts per token, S prompt tokens, T tokens of a completion but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]
"""`stop`: a stop token or the last token of a stop string was sampled; `length`: the limit was reached; `abort`: the
engine gave this sequence up."""


class SamplingError(ValueError):
    """A request that cannot be served; the message says what was given and what is allowed."""


class EngineError(SamplingError):
    """An engine that cannot be made or no longer answers; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How completions are drawn; the same for all prompts of a call."""

    max_completion_length: int
    """Most tokens of one completion, the stop token included."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities sum to at least p."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one."""
    stop_token_ids: tuple[int, ...] = ()
    """A completion ends with the first of these, which is part of it."""
    stop_strings: tuple[str, ...] = ()
    """A completion ends with the token that completes the first of these in its text, which is part of it."""
    seed: int = 0
    """A completion depends on this, its place in the call and its prompt; not on what else is sampled beside it."""
    record_experts: bool = False
    """Whether completions come with the experts that their tokens went to; a policy without experts has none."""

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise SamplingError(f"max_completion_length must be at least 1, got {self.max_completion_length}")
        if self.temperature < 0:
            raise SamplingError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if self.top_k < 0:
            raise SamplingError(f"top_k must be 0 (all) or above, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise SamplingError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise SamplingError(f"min_p must be at least 0 and below 1, got {self.min_p}")
        if "" in self.stop_strings:
            raise SamplingError(f"stop_strings must not hold an empty text, got {list(self.stop_strings)}")


def check_prompts(
    prompts: Sequence[Sequence[int]], params: SamplingParams, context: int, limit: str = "the model's context"
) -> None:
    """Raise SamplingError for a prompt without tokens, or one that leaves too little of `context`, in tokens."""
    for place, prompt in enumerate(prompts):
        if not prompt:
            raise SamplingError(f"prompt {place} is empty")
        if len(prompt) + params.max_completion_length > context:
            raise SamplingError(
                f"prompt {place} has {len(prompt)} tokens; with max_completion_length={params.max_completion_length} "
                f"that exceeds {limit} of {context}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What was sampled after one prompt."""

    token_ids: Sequence[int]
    """Sampled tokens, the stop token included."""
    logprobs: Sequence[float]
    """Of each token, in nats, under the distribution it was drawn from (after temperature and truncation)."""
    finish_reason: FinishReason
    """Why it ended."""
    policy_version: int
    """Version of the weights that sampled it, as given to `Engine.load_weights`."""
    experts_MTK: np.ndarray | None = field(default=None, compare=False)
    """Experts of each token but the last, which was never fed: uint8, int16 for many experts; None: not recorded."""
    prompt_experts_MSK: np.ndarray | None = field(default=None, compare=False)
    """Experts of the prompt's tokens, one array for all completions of a group; None: not recorded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What an engine has done over its life, as far as it tells; the difference of two is what it did in between."""

    num_drafted: int = 0
    """Tokens drafted by speculation."""
    num_accepted: int = 0
    """Of them, tokens that became part of a completion."""
    num_cached_tokens: int = 0
    """Prompt tokens that another prompt had left in the cache; a group's prompt counts as one."""
    num_preemptions: int = 0
    """Sequences that stepped back for want of cache blocks."""

    def __sub__(self, before: EngineStats) -> EngineStats:
        """What was done since `before`."""
        return EngineStats(
            num_drafted=self.num_drafted - before.num_drafted,
            num_accepted=self.num_accepted - before.num_accepted,
            num_cached_tokens=self.num_cached_tokens - before.num_cached_tokens,
            num_preemptions=self.num_preemptions - before.num_preemptions,
        )


OnGroup = Callable[[int, list[Completion]], None]
"""Told of a prompt's place in the call and of its completions, [G], as soon as the last of them has ended."""
