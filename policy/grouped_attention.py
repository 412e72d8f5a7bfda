"""Grouped-query attention (Ainslie et al., 2023): several query heads share one key-value head.

A cache entry is the token's rotated keys, then its values, of all key-value heads.

Shapes: N packed tokens, L tokens of packed rows with those before them, C model width, H query heads, G key-value
heads, D head width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.attention import AttentionPlan, attend_in_rows, write_cache
from policy.config import PolicyConfig
from policy.continued_attention import Continued, attend_to_context
from policy.decode_layout import LEAST_ROWS
from policy.linear import Linear, plain_matrices
from policy.norm import RMSNorm
from policy.paged_attention import Absorbed, CacheLayout, attend_over_cache
from policy.rope import Rotation, attention_scale, rotate

if TYPE_CHECKING:
    from policy.cpu_operations import Operation


class GroupedQueryAttention(nn.Module):
    """Attention of Llama and Qwen; parameter names follow transformers' `Qwen3Attention`."""

    def __init__(self, config: PolicyConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, head, family = config.hidden_size, config.head_dim, config.family
        bias = config.attention_bias
        self.q_proj = Linear(width, config.num_attention_heads * head, bias=bias)
        self.k_proj = Linear(width, config.num_key_value_heads * head, bias=bias)
        self.v_proj = Linear(width, config.num_key_value_heads * head, bias=bias)
        self.o_proj = Linear(config.num_attention_heads * head, width, bias=bias and family.has_output_bias)
        self.q_norm = RMSNorm(head, eps=config.rms_norm_eps) if family.has_qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head, eps=config.rms_norm_eps) if family.has_qk_norm else nn.Identity()
        self.joins_projections = True
        """Whether one product may stand for three: not where a module's weights are there only while it runs itself."""
        self.scale = attention_scale(config)
        groups = config.num_key_value_heads
        self.layout = CacheLayout(groups=groups, key_width=head, value_start=groups * head, value_width=head)

    def forward(self, x_NC: Tensor, rotation: Rotation, plan: AttentionPlan) -> Tensor:
        """[N, C] to [N, C]; under `Absorbed`, N is one token of each sequence."""
        head = self.config.head_dim
        query_NHD, key_NGD, value_NGD = (x.unflatten(-1, (-1, head)) for x in self._project(x_NC))
        query_NHD = rotate(self.q_norm(query_NHD), rotation)
        key_NGD = rotate(self.k_norm(key_NGD), rotation)
        if isinstance(plan, Absorbed):
            write_cache(plan.cache[self.layer], plan.slot_B, key_NGD.flatten(1), value_NGD.flatten(1))
            attended = attend_over_cache(query_NHD, self.layer, plan, self.layout, self.scale)
        elif isinstance(plan, Continued):
            write_cache(plan.cache[self.layer], plan.slot_N, key_NGD.flatten(1), value_NGD.flatten(1))
            key_LGD, value_LGD = plan.read(self.layer).unflatten(-1, (-1, head)).chunk(2, dim=1)
            attended = attend_to_context(query_NHD, key_LGD, value_LGD, plan, self.scale)
        else:
            if plan.cache is not None:
                assert plan.slot_N is not None
                write_cache(plan.cache[self.layer], plan.slot_N, key_NGD.flatten(1), value_NGD.flatten(1))
            attended = attend_in_rows(query_NHD, key_NGD, value_NGD, plan.rows, self.scale)
        out: Tensor = self.o_proj(attended.flatten(-2))
        return out

    def _project(self, x_NC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before their norms and rotation, heads side by side.

        Training on a GPU, one product makes all three of what it reads once; and its backward pass one gradient of x.
        """
        layers = (self.q_proj, self.k_proj, self.v_proj)
        is_plain = all(type(layer) is Linear for layer in layers) and not self.config.family.has_qk_norm
        if not (self.joins_projections and is_plain and x_NC.is_cuda and torch.is_grad_enabled()):
            return self.q_proj(x_NC), self.k_proj(x_NC), self.v_proj(x_NC)
        biases = [layer.bias for layer in layers if layer.bias is not None]
        joined_NX = F.linear(x_NC, torch.cat([layer.weight for layer in layers]), torch.cat(biases) if biases else None)
        query_NX, key_NX, value_NX = joined_NX.split([len(layer.weight) for layer in layers], dim=-1)
        # A copy: as it is, it would keep all three from the forward pass to the backward pass.
        return query_NX, key_NX, value_NX.contiguous()

    def decode_on_cpu(self, x_NC: Tensor, norm: RMSNorm, rotation: Rotation, plan: Absorbed) -> Tensor:
        """x + attention of norm(x) under `Absorbed`, in one kernel or in one between the projections."""
        from policy import cpu_operations, cpu_paged_attention

        if x_NC.shape[0] >= LEAST_ROWS:
            operation = self.operation_on_cpu(norm, plan.cache, rotation.cos.shape[1], rotation.is_interleaved)
            if operation is not None:
                return cpu_operations.run_alone(operation, x_NC, rotation, plan)
        inner_NC, head = norm(x_NC), (-1, self.config.head_dim)
        query_NX = self.q_norm(self.q_proj(inner_NC).unflatten(-1, head)).flatten(-2)
        key_NX = self.k_norm(self.k_proj(inner_NC).unflatten(-1, head)).flatten(-2)
        attended_NX = cpu_paged_attention.attend_grouped(
            query_NX, key_NX, self.v_proj(inner_NC), rotation, plan, self.layer, self.layout, self.scale
        )
        return x_NC + self.o_proj(attended_NX)

    def operation_on_cpu(self, norm: RMSNorm, cache: Tensor, half: int, is_interleaved: bool) -> Operation | None:
        """x + attention of norm(x) as a part of a decoding step on the CPU; None where it takes several."""
        from policy import cpu_paged_attention

        layers = (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
        if self.config.family.has_qk_norm or (matrices := plain_matrices(*layers)) is None:
            return None
        return cpu_paged_attention.grouped_half(
            norm.weight, norm.epsilon, *matrices, cache, self.layer, self.layout, half, is_interleaved, self.scale
        )
