"""The policy model: decoders of DeepSeek, Llama and Qwen on packed rows, to and from Hugging Face folders."""

from policy.checkpoint import CheckpointError, load, save
from policy.config import PolicyConfig, ShapeError
from policy.model import Policy, cast_weights, initialise
from policy.packing import PackedRows

__all__ = [
    "CheckpointError",
    "PackedRows",
    "Policy",
    "PolicyConfig",
    "ShapeError",
    "cast_weights",
    "initialise",
    "load",
    "save",
]
