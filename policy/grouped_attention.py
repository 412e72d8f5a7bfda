"""Grouped-query attention (Ainslie et al., 2023): several query heads share one key-value head.

A cache entry is the token's rotated keys, then its values, of all key-value heads.

Shapes: N packed tokens, B sequences, C model width, H query heads, G key-value heads, D head width, K = H/G query heads
of one key-value head, W = 2*G*D cache width, L cached positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policy.attention import Absorbed, AttentionPlan, attend_in_rows, read_cache, write_cache
from policy.config import PolicyConfig
from policy.rope import Rotation, attention_scale, rotate


class GroupedQueryAttention(nn.Module):
    """Attention of Llama and Qwen; parameter names follow transformers' `Qwen3Attention`."""

    def __init__(self, config: PolicyConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, head, family = config.hidden_size, config.head_dim, config.family
        bias = config.attention_bias
        self.q_proj = nn.Linear(width, config.num_attention_heads * head, bias=bias)
        self.k_proj = nn.Linear(width, config.num_key_value_heads * head, bias=bias)
        self.v_proj = nn.Linear(width, config.num_key_value_heads * head, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * head, width, bias=bias and family.has_output_bias)
        self.q_norm = nn.RMSNorm(head, eps=config.rms_norm_eps) if family.has_qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head, eps=config.rms_norm_eps) if family.has_qk_norm else nn.Identity()
        self.scale = attention_scale(config)

    def forward(self, x_NC: Tensor, rotation: Rotation, plan: AttentionPlan) -> Tensor:
        """[N, C] to [N, C]; under `Absorbed`, N is one token of each sequence."""
        head = self.config.head_dim
        query_NHD = rotate(self.q_norm(self.q_proj(x_NC).unflatten(-1, (-1, head))), rotation)
        key_NGD = rotate(self.k_norm(self.k_proj(x_NC).unflatten(-1, (-1, head))), rotation)
        value_NGD = self.v_proj(x_NC).unflatten(-1, (-1, head))
        if isinstance(plan, Absorbed):
            attended = self._over_cache(query_NHD, key_NGD, value_NGD, plan)
        else:
            if plan.cache is not None:
                assert plan.slot_N is not None
                write_cache(plan.cache[self.layer], plan.slot_N, _entries(key_NGD, value_NGD))
            attended = attend_in_rows(query_NHD, key_NGD, value_NGD, plan.rows, self.scale)
        out: Tensor = self.o_proj(attended.flatten(-2))
        return out

    def _over_cache(self, query_BHD: Tensor, key_BGD: Tensor, value_BGD: Tensor, plan: Absorbed) -> Tensor:
        blocks, groups = plan.cache[self.layer], self.config.num_key_value_heads
        write_cache(blocks, plan.slot_B, _entries(key_BGD, value_BGD))
        cached = read_cache(blocks, plan.block_table_BL).unflatten(-1, (2, groups, -1))
        key_BGLD, value_BGLD = cached.permute(2, 0, 3, 1, 4).unbind(0)
        query_BGKD = query_BHD.unflatten(1, (groups, -1))
        scores_BGKL = query_BGKD @ key_BGLD.transpose(-1, -2)
        scores_BGKL = scores_BGKL.float() * self.scale + plan.bias_B1L[:, None]
        weights_BGKL = scores_BGKL.softmax(dim=-1).to(cached.dtype)
        mixed_BGKD: Tensor = weights_BGKL @ value_BGLD
        return mixed_BGKD.flatten(1, 2)


def _entries(key_NGD: Tensor, value_NGD: Tensor) -> Tensor:
    return torch.cat((key_NGD.flatten(1), value_NGD.flatten(1)), dim=-1)
