"""What flows through a training step.

Shapes: P problems, G completions of each (one more where an old one was added), B rows, N packed tokens, M layers with
routed experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from grpo.support import Support
from policy import PackedRows
from policy.packing import Wanted
from rewards import Problem, RewardResult
from rollouts import Completion


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a row comes from."""

    problem: int
    """Index among the problems of the step, over all ranks."""
    completion: int
    """Index within the problem's group."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One asking of a problem."""

    number: int
    """Place among all askings of the run, from 0; its completions' seeds follow from it."""
    place: int
    """Index of the problem in the dataset."""
    problem: Problem
    """The problem itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One problem with everything that was sampled for it."""

    problem: Problem
    prompt_ids: Sequence[int]
    """Token ids of the rendered prompt."""
    completions: Sequence[Completion]
    """[G]."""
    texts: Sequence[str]
    """Each completion decoded, [G]; what the rewards saw."""
    results: Sequence[RewardResult]
    """[G]."""

    @property
    def num_tokens(self) -> int:
        """Of all rows, each a prompt and a completion."""
        return sum(len(self.prompt_ids) + len(completion.token_ids) for completion in self.completions)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came back for a question."""

    question: Question
    """What was asked."""
    group: Group
    """What was sampled and graded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Rows of one micro-batch laid end to end: each row a prompt and one completion of it.

    Position n of every `*_N` speaks of token n given the tokens before it.
    """

    token_ids_N: Tensor
    """int64."""
    rows: PackedRows
    """Where each row lies, its prompt in each; and what of it a pass goes over once."""
    origins: tuple[Origin, ...]
    """Which completion each row is, [B]."""
    completion_mask_N: Tensor
    """True at the tokens that are learned from."""
    learned: Wanted
    """The same tokens by their places."""
    rollout_logprobs_N: Tensor
    """Nats, fp32, as recorded by the sampler; 0 outside completions."""
    advantages_N: Tensor
    """fp32; each row's advantage at its completion's tokens, 0 elsewhere."""
    prompt_tokens_B: Tensor
    """int64; learned tokens of all completions of the row's problem."""
    old_logprobs_N: Tensor | None = None
    """Nats, fp32, of the policy before its first step on these rows; None: those of the policy in hand."""
    ref_logprobs_N: Tensor | None = None
    """Nats, fp32, of the reference; None where the loss has no KL penalty."""
    support: Support | None = None
    """What the sampler could draw; None: the whole vocabulary, or what the policy in hand says."""
    certain_N: Tensor | None = None
    """True at tokens whose entropy is below the threshold, which keep no policy gradient; None: nowhere."""
    stale_N: Tensor | None = None
    """True at the tokens that an earlier version of the policy sampled, whose old log-probabilities are the recorded
    ones; None: nowhere."""
    experts_NMK: Tensor | None = None
    """int16; experts that tokens go to, below 0 where the router is to choose; None: everywhere."""
    differs_N: Tensor | None = None
    """True at the tokens that the policy would have sent to others before its first step; None: not known yet."""

    @property
    def is_idle(self) -> bool:
        """Whether its row is of no completion, and nothing learned from it: other ranks wait for the pass."""
        return not self.origins
