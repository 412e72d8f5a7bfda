"""Samplers: groups of completions from prompts, with the log-probability of every token."""

from rollouts.engine import Engine, EngineConfig, make_engine
from rollouts.types import Completion, EngineError, EngineStats, SamplingError, SamplingParams

__all__ = [
    "Completion",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "SamplingError",
    "SamplingParams",
    "make_engine",
]
