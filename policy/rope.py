"""Rotary position embedding (RoFormer), its two layouts and its scalings for longer contexts.

Interleaved, as in DeepSeek-V3's official `inference/model.py` (`apply_rotary_emb`): neighbours are pairs. In halves, as
in Llama and Qwen: the first half of a head pairs with the second.

Shapes: N tokens, H heads, P rotated width, Q head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from policy.config import PolicyConfig, RopeScaling
from policy.fused import turn_pairs


@dataclass(frozen=True, kw_only=True, slots=True)
class Rotation:
    """Cosine and sine of every token's angles, computed once a forward and shared by all layers."""

    cos: Tensor
    """[N, P/2], fp32."""
    sin: Tensor
    """[N, P/2], fp32."""
    is_interleaved: bool
    """Whether pairs are neighbours (x[2i], x[2i+1]), not halves (x[i], x[i + P/2])."""


def rotation_of(position_ids_N: Tensor, config: PolicyConfig, frequencies: Tensor | None = None) -> Rotation:
    """Angles of each position: position * frequency, for P/2 frequencies (None: `rope_frequencies`)."""
    frequencies = rope_frequencies(config, position_ids_N.device) if frequencies is None else frequencies
    growth = 1.0
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "yarn":
        growth = _yarn_growth(config.rope_scaling)
    is_interleaved = config.family.has_interleaved_rope
    if position_ids_N.is_cuda:
        from policy import step_kernels

        cos, sin = step_kernels.rotation(position_ids_N, frequencies, growth)
        return Rotation(cos=cos, sin=sin, is_interleaved=is_interleaved)
    angles = position_ids_N.float()[:, None] * frequencies
    return Rotation(cos=angles.cos() * growth, sin=angles.sin() * growth, is_interleaved=is_interleaved)


def rotate(x_NHQ: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of a head's last P numbers by its token's angle; fp32 inside, the input's dtype outside."""
    return turn_pairs(x_NHQ, rotation.cos, rotation.sin, is_interleaved=rotation.is_interleaved)


def attention_scale(config: PolicyConfig) -> float:
    """What scores are multiplied with: width^-0.5, for MLA under YaRN times the square of its growth.

    As `DeepseekV3Attention.softmax_scale` of the released code: where `mscale` equals `mscale_all_dim`, all of the
    growth is here and none in the rotation.
    """
    scale, scaling = 1 / math.sqrt(config.qk_head_dim), config.rope_scaling
    if config.family.attention == "latent" and scaling is not None:
        scale *= _mscale(scaling.factor, scaling.mscale_all_dim) ** 2
    return scale


def rope_frequencies(config: PolicyConfig, device: torch.device | str = "cpu") -> Tensor:
    """[P/2] fp32: theta^(-2i/P) (RoFormer, equation 15), scaled as the configuration says."""
    width, theta, scaling = config.rope_width, config.rope_theta, config.rope_scaling
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    plain = 1.0 / theta**exponents
    if scaling is None:
        return plain.float()
    stretched = plain / scaling.factor
    if scaling.rope_type == "linear":
        return stretched.float()
    old_context = scaling.original_max_position_embeddings
    assert old_context is not None
    if scaling.rope_type == "llama3":
        # How often a pair turns over the old context says how much of its frequency is kept.
        turns = old_context * plain / (2 * math.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    else:
        low, high = (_yarn_pair(turns, width, theta, old_context) for turns in (scaling.beta_fast, scaling.beta_slow))
        first, last = max(math.floor(low), 0), min(math.ceil(high), width - 1)
        pairs = torch.arange(width // 2, dtype=torch.float64, device=device)
        kept = 1 - (pairs - first) / max(last - first, 0.001)
    return torch.lerp(stretched, plain, kept.clamp(0, 1)).float()


def _yarn_pair(turns: float, width: int, theta: float, context: int) -> float:
    """Index of the pair that turns so many times over a context (YaRN, section 3.2)."""
    return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))


def _yarn_growth(scaling: RopeScaling) -> float:
    """Factor on rotated queries and on rotated keys (YaRN, equation 22), less what `attention_scale` has of it."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return _mscale(scaling.factor, scaling.mscale) / _mscale(scaling.factor, scaling.mscale_all_dim)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0
