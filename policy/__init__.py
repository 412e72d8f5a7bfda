"""The policy model: DeepSeek-V3's MLA and mixture of experts with multi-token prediction, on packed rows."""

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
