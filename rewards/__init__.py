"""Rule-based rewards: what a completion earned, and why. Knows nothing of models, of RL or of launchers."""

from rewards.registry import resolve_reward
from rewards.types import Problem, RewardResult

__all__ = ["Problem", "RewardResult", "resolve_reward"]
