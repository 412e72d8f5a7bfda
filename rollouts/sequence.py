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
    """Cache blocks for these tokens, once there is room for them."""
    num_computed: int = 0
    """Of these tokens, from the first: those that are in the blocks, or will be after the pass in hand."""
    num_found: int = 0
    """Of them, those that another prompt had put there."""
    keys: list[bytes] | None = None
    """Of its full blocks in the prefix cache, once they are made."""
    logits_V: Tensor | None = None
    """Next-token logits after the last token, once computed."""
    tail_WC: Tensor | None = None
    """The trunk's hidden states at the last W tokens, where they were computed for speculation."""

    @property
    def is_computed(self) -> bool:
        """Whether all of these tokens are in the cache, or will be after the pass in hand."""
        return self.num_computed == len(self.token_ids)

    def put_aside(self) -> None:
        """Forget what was computed: its blocks go to others."""
        self.blocks, self.logits_V, self.tail_WC = None, None, None
        self.num_computed, self.num_found = 0, 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A part of a prompt that one pass computes."""

    prefill: Prefill
    """What it is a part of."""
    begin: int
    """Index of its first token."""
    end: int
    """Index after its last token."""

    @property
    def token_ids(self) -> list[int]:
        """Its tokens."""
        return self.prefill.token_ids[self.begin : self.end]

    def ahead(self, count: int) -> list[int]:
        """The token so many places after each of its own; 0 where the prompt does not reach so far."""
        ahead = self.prefill.token_ids[self.begin + count : self.end + count]
        return ahead + [0] * (self.end - self.begin - len(ahead))

    @property
    def is_last(self) -> bool:
        """Whether what comes after it can be sampled."""
        return self.end == len(self.prefill.token_ids)
