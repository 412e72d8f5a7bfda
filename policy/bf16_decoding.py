"""Which layers kernels decode in bf16 on the CPU, and what they need of one (policy/cpu_bf16_layer.py).

Torch's operations define what is computed and take all else. Numba is not imported, nor anything compiled, before a
layer is decoded in bf16.

Shapes: N rows (one token of each sequence), C model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from policy.decode_layout import has_bf16_products
from policy.grouped_attention import GroupedQueryAttention
from policy.linear import Linear
from policy.moe import FeedForward
from policy.norm import RMSNorm
from policy.paged_attention import Absorbed
from policy.rope import Rotation

if TYPE_CHECKING:
    from policy.block import Block

WHOLE = 32
"""Numbers of a vector: all widths are whole ones."""
WHOLE_BLOCK = 4
"""Positions whose scores are taken at a time: cache blocks are whole ones."""


def reason_for_torch(layer: Block, cache: Tensor) -> str | None:
    """Why torch's operations decode this layer over this cache; None where the kernel does."""
    attention, mlp = layer.self_attn, layer.mlp
    if cache.dtype != torch.bfloat16 or not cache.is_cpu:
        return "the cache is not bf16 on a CPU"
    if not has_bf16_products():
        return "the processor has no avx512_bf16"
    if not (isinstance(attention, GroupedQueryAttention) and isinstance(mlp, FeedForward)):
        return "the kernel is for grouped-query attention with a dense feed-forward"
    if cache.shape[2] % WHOLE_BLOCK:
        return f"engine.block_size is {cache.shape[2]}, not a multiple of {WHOLE_BLOCK}"
    config = attention.config
    widths = (config.hidden_size, config.intermediate_size, config.head_dim)
    if any(width % WHOLE for width in widths):
        return f"hidden_size, intermediate_size and head_dim are {widths}, not all multiples of {WHOLE}"
    linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    linear += (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if any(type(module) is not Linear for module in linear) or attention.o_proj.bias is not None:
        return "a projection has an adapter, or the attention's output a bias"
    if not all(_is_plain(module.weight, (module.out_features, module.in_features)) for module in linear):
        return "the weights are not whole bf16 matrices in this process"
    return None


def _is_plain(weight: Tensor, shape: tuple[int, int]) -> bool:
    is_whole = type(weight) is nn.Parameter and weight.shape == shape and weight.is_contiguous()
    return is_whole and weight.dtype == torch.bfloat16 and weight.is_cpu


def decode(layer: Block, x_NC: Tensor, rotation: Rotation, plan: Absorbed) -> Tensor | None:
    """The layer's output [N, C], feature by feature, from the stream in fp32; None where torch has to do it."""
    if x_NC.dtype != torch.float32 or torch.is_grad_enabled() or reason_for_torch(layer, plan.cache) is not None:
        return None
    from policy import cpu_bf16_layer

    attention, mlp = layer.self_attn, layer.mlp
    assert isinstance(attention, GroupedQueryAttention)
    assert isinstance(mlp, FeedForward)
    weights = (
        layer.input_layernorm.weight, attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight,
        attention.o_proj.weight, layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight,
        mlp.down_proj.weight, attention.q_proj.bias, attention.k_proj.bias, attention.v_proj.bias,
        *(norm.weight if isinstance(norm, RMSNorm) else None for norm in (attention.q_norm, attention.k_norm)),
    )  # fmt: skip
    addresses = np.array([0 if weight is None else weight.data_ptr() for weight in weights])
    config = attention.config
    return cpu_bf16_layer.decode(
        x_NC, addresses, config.rms_norm_eps, config.intermediate_size, rotation, plan, attention.layer,
        attention.layout, config.num_attention_heads, attention.scale,
    )  # fmt: skip
