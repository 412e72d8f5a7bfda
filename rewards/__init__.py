"""Rule-based rewards: what a completion earned, and why. Knows nothing of models, of RL or of launchers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rewards.registry import resolve_reward
from rewards.types import Problem, RewardResult

if TYPE_CHECKING:
    from rewards.grader import Grader

__all__ = ["Grader", "Problem", "RewardResult", "resolve_reward"]

_LAZY = {"Grader": "rewards.grader"}
"""Name -> module of what is imported when it is first asked for: a grading worker imports this package too."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
