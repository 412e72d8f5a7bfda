"""Rule-based rewards: what a completion earned, and why. Knows nothing of models, of RL or of launchers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rewards.registry import resolve_reward
from rewards.types import Problem, RewardResult

if TYPE_CHECKING:
    from rewards.code_reward import score_program
    from rewards.grader import Grader
    from rewards.math_policy import MathPolicy
    from rewards.math_reward import verify_math, verify_math_many

__all__ = [
    "Grader",
    "MathPolicy",
    "Problem",
    "RewardResult",
    "resolve_reward",
    "score_program",
    "verify_math",
    "verify_math_many",
]

_LAZY = {
    "Grader": "rewards.grader",
    "MathPolicy": "rewards.math_policy",
    "score_program": "rewards.code_reward",
    "verify_math": "rewards.math_reward",
    "verify_math_many": "rewards.math_reward",
}
"""Name -> module of what is imported when it is first asked for: a grading worker imports this package too."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
