"""What a reward sees and what it answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

Message = Mapping[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

Status = Literal["ok", "unparsed", "timeout", "error"]
"""`ok`: a verdict was reached; `unparsed`: no answer could be read in the completion;
`timeout`: the deadline passed first; `error`: the reward function or its worker failed."""

STATUSES: Final[tuple[Status, ...]] = get_args(Status)
"""Every status, from the best to the worst."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One question with what is needed to grade an answer to it."""

    id: str
    """Unique within its dataset."""
    prompt: str | Sequence[Message]
    """The question: plain text, or messages for a chat template."""
    reward: str | None = None
    """Registry name or `module:function` of this problem's own reward; None: the run's rewards grade it."""
    answer: str | None = None
    """The gold answer as text, for rewards that compare with one."""
    tests: Mapping[str, Any] | None = None
    """What a code reward runs: a problem of `rewards.score_program`."""
    source: str = ""
    """Where the problem comes from, `file:row` or `dataset:split:row`, for error messages."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """All columns of the dataset's row, given to reward functions by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """One completion's reward and how it came about."""

    reward: float | None
    """The scalar that advantages are computed from; None: no reward function applies to this completion."""
    breakdown: Mapping[str, float] = field(default_factory=dict)
    """Unweighted score by reward name."""
    status: Status = "ok"
    """The worst status among the parts."""
    detail: str = ""
    """One line for a person: what was compared with what, or what failed."""
    elapsed_s: float = 0.0
    """Seconds spent grading."""

    def __post_init__(self) -> None:
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"a reward must be a finite number or None, got {self.reward}")
