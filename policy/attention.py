"""Multi-head Latent Attention (DeepSeek-V2, section 2.1), written twice.

Expanded (training, prefill): keys and values of every head are made from the latent, then plain attention.
Absorbed (decoding): the up-projections are folded into query and output, so that the cache holds per token only the
latent and one rotated key, and attention runs over these as if there were one key-value head.

Shapes: N packed tokens, B sequences, C model width, H heads, D qk_nope, P rope, V value width, R kv_lora_rank,
W = R + P cache width, L cached positions, S longest row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.config import PolicyConfig
from policy.packing import PackedRows
from policy.rope import Rotation, rotate


@dataclass(frozen=True, kw_only=True, slots=True)
class Expanded:
    """Attend within each packed row; where a cache is given, also write what decoding will need."""

    rows: PackedRows
    cache: Tensor | None = None
    """[layers, blocks, block_size, W], or None while training."""
    slot_N: Tensor | None = None
    """Flat position of each token in the cache, block * block_size + offset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Absorbed:
    """Attend from one new token per sequence over its cached positions, the new one included."""

    cache: Tensor
    """[layers, blocks, block_size, W]."""
    slot_B: Tensor
    """Flat cache position where each sequence's new token goes."""
    block_table_BL: Tensor
    """[B, blocks of the longest], block ids in order."""
    bias_B1L: Tensor
    """[B, 1, L] fp32, 0 at a sequence's positions and -inf beyond."""


AttentionPlan = Expanded | Absorbed


SHORT_ROW = 256
"""Up to here, in tokens, two plain batched products beat the fused kernel on a CPU (1.7 times at 128 tokens)."""


def attend_causally(query_BHSQ: Tensor, key_BHSQ: Tensor, value_BHSV: Tensor, scale: float) -> Tensor:
    """Causal softmax attention [B, H, S, V]; the softmax is in fp32 either way."""
    length = query_BHSQ.shape[2]
    if query_BHSQ.device.type != "cpu" or length > SHORT_ROW:
        return F.scaled_dot_product_attention(query_BHSQ, key_BHSQ, value_BHSV, is_causal=True, scale=scale)
    bias_SS = torch.full((length, length), float("-inf"), dtype=query_BHSQ.dtype).triu(1)
    query, key, value = (x.flatten(0, 1) for x in (query_BHSQ, key_BHSQ, value_BHSV))
    scores = torch.baddbmm(bias_SS, query, key.transpose(1, 2), alpha=scale)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.bmm(weights, value).unflatten(0, query_BHSQ.shape[:2])


def write_cache(blocks: Tensor, slot_N: Tensor, latent_NR: Tensor, k_rope_NP: Tensor) -> None:
    """Put what decoding will read at flat positions `slot_N` of one layer's blocks [blocks, block_size, W], in place.

    What is not a number is written as 0. It still spoils the sequence it comes from, through that sequence's own hidden
    states; in the cache it would spoil the block's next holder too, since weight 0 times NaN is NaN.
    """
    entries_NW = torch.cat((latent_NR, k_rope_NP), dim=-1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    blocks.flatten(0, 1).index_copy_(0, slot_N, entries_NW.to(blocks.dtype))


class LatentAttention(nn.Module):
    """MLA. Parameter names follow transformers' `DeepseekV3Attention`."""

    def __init__(self, config: PolicyConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(width, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(width, config.q_lora_rank, bias=False)
            self.q_a_layernorm = nn.RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(width, config.cache_width, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, width, bias=False)
        self.scale = config.qk_head_dim**-0.5

    def forward(self, x_NC: Tensor, rotation: Rotation, plan: AttentionPlan) -> Tensor:
        """[N, C] to [N, C]; under `Absorbed`, N is one token of each sequence."""
        config = self.config
        query_NHQ = self._query(x_NC).unflatten(-1, (config.num_attention_heads, config.qk_head_dim))
        q_nope_NHD, q_rope_NHP = query_NHQ.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        q_rope_NHP = rotate(q_rope_NHP, rotation)
        latent_NR, k_rope_NP = self.kv_a_proj_with_mqa(x_NC).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        latent_NR = self.kv_a_layernorm(latent_NR)
        k_rope_NP = rotate(k_rope_NP[:, None], rotation)[:, 0]
        if isinstance(plan, Absorbed):
            attended = self._absorbed(q_nope_NHD, q_rope_NHP, latent_NR, k_rope_NP, plan)
        else:
            attended = self._expanded(q_nope_NHD, q_rope_NHP, latent_NR, k_rope_NP, plan)
        out: Tensor = self.o_proj(attended.flatten(-2))
        return out

    def _query(self, x_NC: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(x_NC)  # type: ignore[no-any-return]
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_NC)))  # type: ignore[no-any-return]

    def _expanded(
        self, q_nope_NHD: Tensor, q_rope_NHP: Tensor, latent_NR: Tensor, k_rope_NP: Tensor, plan: Expanded
    ) -> Tensor:
        config, rows = self.config, plan.rows
        if plan.cache is not None:
            assert plan.slot_N is not None
            write_cache(plan.cache[self.layer], plan.slot_N, latent_NR, k_rope_NP)
        heads = config.num_attention_heads
        keys_values = self.kv_b_proj(latent_NR).unflatten(-1, (heads, config.qk_nope_head_dim + config.v_head_dim))
        k_nope_NHD, value_NHV = keys_values.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        query_NHQ = torch.cat((q_nope_NHD, q_rope_NHP), dim=-1)
        key_NHQ = torch.cat((k_nope_NHD, k_rope_NP[:, None].expand(-1, heads, -1)), dim=-1)
        # Causal attention never looks right, so zeros padded after a row's end change nothing inside it.
        query, key, value = (rows.pad(x).transpose(1, 2) for x in (query_NHQ, key_NHQ, value_NHV))
        return rows.unpad(attend_causally(query, key, value, self.scale).transpose(1, 2))

    def _absorbed(
        self, q_nope_BHD: Tensor, q_rope_BHP: Tensor, latent_BR: Tensor, k_rope_BP: Tensor, plan: Absorbed
    ) -> Tensor:
        config = self.config
        blocks = plan.cache[self.layer]
        write_cache(blocks, plan.slot_B, latent_BR, k_rope_BP)
        cached_BLW = blocks.index_select(0, plan.block_table_BL.flatten()).view(
            len(plan.block_table_BL), -1, config.cache_width
        )
        up_HXR = self.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        key_up_HDR, value_up_HVR = up_HXR.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        q_latent_BHR = torch.bmm(q_nope_BHD.transpose(0, 1), key_up_HDR).transpose(0, 1)
        query_BHW = torch.cat((q_latent_BHR, q_rope_BHP), dim=-1)
        scores_BHL = torch.bmm(query_BHW, cached_BLW.transpose(1, 2)).float() * self.scale + plan.bias_B1L
        weights_BHL = scores_BHL.softmax(dim=-1).to(cached_BLW.dtype)
        mixed_BHR = torch.bmm(weights_BHL, cached_BLW[..., : config.kv_lora_rank])
        return torch.bmm(mixed_BHR.transpose(0, 1), value_up_HVR.transpose(1, 2)).transpose(0, 1)
