"""Multi-head Latent Attention (DeepSeek-V2, section 2.1), written twice.

Expanded (training, prefill): keys and values of every head are made from the latent, then plain attention.
Absorbed (decoding): the up-projections are folded into query and output, so that the cache holds per token only the
latent and one rotated key, and attention runs over these as if there were one key-value head.

Shapes: N packed tokens, B sequences, C model width, H heads, D qk_nope, P rope, V value width, R kv_lora_rank,
W = R + P cache width, L cached positions (of all rows together, where rows go on from the cache).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from policy.attention import AttentionPlan, Expanded, attend_in_rows, write_cache
from policy.config import PolicyConfig
from policy.continued_attention import Continued, attend_to_context
from policy.decode_layout import LEAST_ROWS
from policy.fused import split_keys_values
from policy.linear import Linear, plain_matrices
from policy.norm import RMSNorm
from policy.paged_attention import Absorbed, CacheLayout, attend_over_cache
from policy.recompute import remade
from policy.rope import Rotation, attention_scale, rotate

if TYPE_CHECKING:
    from policy.cpu_operations import Operation

LATENT_NORM_EPS = 1e-6
"""Of the norms on the two latents, whatever `rms_norm_eps` is: so do DeepSeek's own code and transformers."""


class LatentAttention(nn.Module):
    """MLA. Parameter names follow transformers' `DeepseekV3Attention`."""

    def __init__(self, config: PolicyConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        width, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = Linear(width, config.cache_width, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=LATENT_NORM_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = Linear(heads * config.v_head_dim, width, bias=False)
        self.scale = attention_scale(config)
        self.layout = CacheLayout(
            groups=1, key_width=config.cache_width, value_start=0, value_width=config.kv_lora_rank
        )

    def forward(self, x_NC: Tensor, rotation: Rotation, plan: AttentionPlan) -> Tensor:
        """[N, C] to [N, C]; under `Absorbed`, N is one token of each sequence."""
        config = self.config
        if isinstance(plan, Absorbed) and x_NC.is_cuda and not torch.is_grad_enabled():
            return self.o_proj(self._decode_on_gpu(x_NC, rotation, plan).flatten(-2))  # type: ignore[no-any-return]
        query_NHQ = self._query(x_NC).unflatten(-1, (config.num_attention_heads, config.qk_head_dim))
        query_NHQ = rotate(query_NHQ, rotation)
        latent_NR, k_rope_NP = self.kv_a_proj_with_mqa(x_NC).split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        latent_NR = remade(self.kv_a_layernorm, latent_NR)
        k_rope_NP = rotate(k_rope_NP[:, None], rotation)[:, 0]
        if isinstance(plan, Absorbed):
            attended = self._absorbed(query_NHQ, latent_NR, k_rope_NP, plan)
        elif isinstance(plan, Continued):
            attended = self._continued(query_NHQ, latent_NR, k_rope_NP, plan)
        else:
            attended = self._expanded(query_NHQ, latent_NR, k_rope_NP, plan)
        out: Tensor = self.o_proj(attended.flatten(-2))
        return out

    def decode_on_cpu(self, x_NC: Tensor, norm: RMSNorm, rotation: Rotation, plan: Absorbed) -> Tensor:
        """x + attention of norm(x), absorbed, in one kernel or in one between the projections."""
        from policy import cpu_operations, cpu_paged_attention

        if x_NC.shape[0] >= LEAST_ROWS:
            operation = self.operation_on_cpu(norm, plan.cache, rotation.cos.shape[1], rotation.is_interleaved)
            if operation is not None:
                return cpu_operations.run_alone(operation, x_NC, rotation, plan)
        inner_NC = norm(x_NC)
        attended_NX = cpu_paged_attention.attend_latent(
            self._query(inner_NC), self.kv_a_proj_with_mqa(inner_NC), self.kv_a_layernorm.weight, LATENT_NORM_EPS,
            self.kv_b_proj.weight, rotation, plan, self.layer, self.config.num_attention_heads, self.scale,
        )  # fmt: skip
        return x_NC + self.o_proj(attended_NX)

    def operation_on_cpu(self, norm: RMSNorm, cache: Tensor, half: int, is_interleaved: bool) -> Operation | None:
        """x + attention of norm(x) as a part of a decoding step on the CPU; None where it takes several."""
        from policy import cpu_paged_attention

        layers = (self.q_proj, self.kv_a_proj_with_mqa, self.o_proj) if self.config.q_lora_rank is None else ()
        if (matrices := plain_matrices(*layers)) is None:
            return None
        return cpu_paged_attention.latent_half(
            norm.weight, norm.epsilon, *matrices, self.kv_a_layernorm.weight, LATENT_NORM_EPS, self.kv_b_proj.weight,
            cache, self.layer, self.config.num_attention_heads, half, is_interleaved, self.scale,
        )  # fmt: skip

    def _query(self, x_NC: Tensor) -> Tensor:
        if self.config.q_lora_rank is None:
            return self.q_proj(x_NC)  # type: ignore[no-any-return]
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_NC)))  # type: ignore[no-any-return]

    def _expanded(self, query_NHQ: Tensor, latent_NR: Tensor, k_rope_NP: Tensor, plan: Expanded) -> Tensor:
        if plan.cache is not None:
            assert plan.slot_N is not None
            write_cache(plan.cache[self.layer], plan.slot_N, latent_NR, k_rope_NP)
        key_NHQ, value_NHV = remade(self._keys_and_values, latent_NR, k_rope_NP)
        return attend_in_rows(query_NHQ, key_NHQ, value_NHV, plan.rows, self.scale)

    def _continued(self, query_NHQ: Tensor, latent_NR: Tensor, k_rope_NP: Tensor, plan: Continued) -> Tensor:
        config = self.config
        write_cache(plan.cache[self.layer], plan.slot_N, latent_NR, k_rope_NP)
        latent_LR, k_rope_LP = plan.read(self.layer).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        return attend_to_context(query_NHQ, *self._keys_and_values(latent_LR, k_rope_LP), plan, self.scale)

    def _keys_and_values(self, latent_NR: Tensor, k_rope_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [N, H, Q] and values [N, H, V] of every head."""
        config, heads = self.config, self.config.num_attention_heads
        keys_values = self.kv_b_proj(latent_NR).unflatten(-1, (heads, config.qk_nope_head_dim + config.v_head_dim))
        return split_keys_values(keys_values, k_rope_NP, config.qk_nope_head_dim)

    def _absorbed(self, query_BHQ: Tensor, latent_BR: Tensor, k_rope_BP: Tensor, plan: Absorbed) -> Tensor:
        q_nope_BHD, q_rope_BHP = query_BHQ.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        write_cache(plan.cache[self.layer], plan.slot_B, latent_BR, k_rope_BP)
        key_up_HDR, value_up_HVR = self._ups()
        q_latent_BHR = torch.bmm(q_nope_BHD.transpose(0, 1), key_up_HDR).transpose(0, 1)
        return self._attend(torch.cat((q_latent_BHR, q_rope_BHP), dim=-1), value_up_HVR, plan)

    def _decode_on_gpu(self, x_BC: Tensor, rotation: Rotation, plan: Absorbed) -> Tensor:
        """The same from the layer's input on, with one kernel between the products."""
        from policy import layer_kernels

        config, heads = self.config, self.config.num_attention_heads
        query_BX, latent_BW = self._query(x_BC), self.kv_a_proj_with_mqa(x_BC)
        query_BHW = layer_kernels.enter_latent(
            query_BX, latent_BW, self.kv_a_layernorm.weight, LATENT_NORM_EPS, rotation.cos, rotation.sin, plan.slot_B,
            plan.cache[self.layer], heads, is_interleaved=rotation.is_interleaved,
        )  # fmt: skip
        key_up_HDR, value_up_HVR = self._ups()
        q_nope_BHD = query_BX.unflatten(-1, (heads, -1))[..., : config.qk_nope_head_dim]
        q_latent_BHR = query_BHW[..., : config.kv_lora_rank]
        torch.bmm(q_nope_BHD.transpose(0, 1), key_up_HDR, out=q_latent_BHR.transpose(0, 1))
        return self._attend(query_BHW, value_up_HVR, plan)

    def _ups(self) -> tuple[Tensor, Tensor]:
        """Up-projections of keys [H, D, R] and values [H, V, R]."""
        config = self.config
        up_HXR = self.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank)
        key_up_HDR, value_up_HVR = up_HXR.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return key_up_HDR, value_up_HVR

    def _attend(self, query_BHW: Tensor, value_up_HVR: Tensor, plan: Absorbed) -> Tensor:
        value_up_HRV = value_up_HVR.transpose(1, 2)
        if query_BHW.dtype not in (torch.bfloat16, torch.float16):
            mixed_BHR = attend_over_cache(query_BHW, self.layer, plan, self.layout, self.scale)
            return torch.bmm(mixed_BHR.transpose(0, 1), value_up_HRV).transpose(0, 1)
        # The expanded form has no latent mixture to round: here it comes as two numbers, for one product in fp32.
        halves_2BHR = attend_over_cache(query_BHW, self.layer, plan, self.layout, self.scale, in_two=True)
        out_H2BV = _multiply_wide(halves_2BHR.flatten(0, 1).transpose(0, 1), value_up_HRV)
        if out_H2BV.is_cuda and not torch.is_grad_enabled():
            from policy import step_kernels

            return step_kernels.add_halves(out_H2BV, query_BHW.dtype)
        return torch.add(*out_H2BV.chunk(2, dim=1)).to(query_BHW.dtype).transpose(0, 1)


def _multiply_wide(a_HBR: Tensor, b_HRV: Tensor) -> Tensor:
    """Products [H, B, V] in fp32 of half-precision matrices."""
    if a_HBR.is_cuda and not torch.is_grad_enabled():  # autograd does not know it
        return torch.bmm(a_HBR, b_HRV, out_dtype=torch.float32)
    return torch.bmm(a_HBR.float(), b_HRV.float())
