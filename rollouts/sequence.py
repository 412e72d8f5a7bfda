"""A completion in the making, and the prompt that several of them share."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion: where it belongs, and what it had sampled when it was last put aside."""

    place: int
    """Index among all completions of the call."""
    prompt: list[int]
    """Token ids."""
    seed: int
    """Of its own random stream, 64 bits."""
    token_ids: list[int] = field(default_factory=list)
    """Sampled before a preemption; empty for a fresh sequence."""
    logprobs: list[float] = field(default_factory=list)
    """Of `token_ids`, nats."""


@dataclass(slots=True, eq=False)
class Prefill:
    """Tokens to be run through the trunk once, for all sequences that continue from them."""

    token_ids: list[int]
    """The prompt; after a preemption also what was sampled."""
    sequences: list[Sequence]
    """Those that have not started yet."""
    blocks: np.ndarray | None = None
    """Cache blocks holding these tokens, once they are computed."""
    logits_V: Tensor | None = None
    """Next-token logits after the last token, once computed."""
    tail_WC: Tensor | None = None
    """The trunk's hidden states at the last W tokens, where they were computed for speculation."""
