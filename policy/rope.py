"""Rotary position embedding, interleaved as in DeepSeek-V3's official `inference/model.py` (`apply_rotary_emb`).

Shapes: N tokens, H heads, P rotated width (qk_rope_head_dim).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """Cosine and sine of every token's angles, computed once a forward and shared by all layers."""

    cos: Tensor
    """[N, P/2], fp32."""
    sin: Tensor
    """[N, P/2], fp32."""


def rotation_of(position_ids_N: Tensor, width: int, theta: float) -> Rotation:
    """Angles of each position: position * theta^(-2i/width), i < width/2 (RoFormer, equation 15)."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=position_ids_N.device) / width
    frequencies = (1.0 / theta**exponents).float()
    angles = position_ids_N.float()[:, None] * frequencies
    return Rotation(cos=angles.cos(), sin=angles.sin())


def rotate(x_NHP: Tensor, rotation: Rotation) -> Tensor:
    """Turn each neighbouring pair (x[2i], x[2i+1]) by its token's angle; fp32 inside, the input's dtype outside."""
    pairs = x_NHP.float().unflatten(-1, (-1, 2))
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = rotation.cos[:, None], rotation.sin[:, None]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x_NHP.dtype)
