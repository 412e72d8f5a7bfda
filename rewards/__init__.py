"""Rule-based rewards: what a completion earned, and why. Knows nothing of models, of RL or of launchers."""

from typing import Any

from rewards.registry import resolve_reward
from rewards.types import Problem, RewardResult

__all__ = ["Problem", "RewardResult", "resolve_reward", "score_program"]


def __getattr__(name: str) -> Any:
    if name == "score_program":
        from rewards.code_reward import score_program

        return score_program
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
