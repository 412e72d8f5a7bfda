"""One transformer layer: attention and feed-forward, each behind an RMSNorm and beside a residual.

Shapes: N packed tokens, C model width, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policy import bf16_decoding
from policy.attention import AttentionPlan
from policy.balance import RouterWatch
from policy.config import PolicyConfig
from policy.decode_layout import by_feature
from policy.grouped_attention import GroupedQueryAttention
from policy.latent_attention import LatentAttention
from policy.moe import FeedForward, MixtureOfExperts, Routed
from policy.norm import RMSNorm
from policy.paged_attention import Absorbed
from policy.recompute import remade
from policy.rope import Rotation


class Block(nn.Module):
    """Pre-norm layer: attention by `config.family`, feed-forward dense or experts by `config.is_moe_layer(layer)`."""

    def __init__(self, config: PolicyConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn: LatentAttention | GroupedQueryAttention
        if config.family.attention == "latent":
            self.self_attn = LatentAttention(config, layer)
        else:
            self.self_attn = GroupedQueryAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: FeedForward | MixtureOfExperts
        if config.is_moe_layer(layer):
            self.mlp = MixtureOfExperts(config)
        else:
            self.mlp = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_NC: Tensor,
        rotation: Rotation,
        plan: AttentionPlan,
        given_experts_NK: Tensor | None = None,
        watch: RouterWatch | None = None,
    ) -> tuple[Tensor, Routed | None]:
        """Output [N, C], in the dtype of x, and for a mixture of experts what became known of its router."""
        if isinstance(plan, Absorbed) and given_experts_NK is None and watch is None:
            if plan.is_by_feature:
                x_NC = self.self_attn.decode_on_cpu(by_feature(x_NC), self.input_layernorm, rotation, plan)
                return self.mlp.decode_on_cpu(x_NC, self.post_attention_layernorm)
            if x_NC.is_cuda and not torch.is_grad_enabled():
                return self._decode_on_gpu(x_NC, rotation, plan)
            if (decoded_NC := bf16_decoding.decode(self, x_NC, rotation, plan)) is not None:
                return decoded_NC, None
        x_NC = x_NC + self.self_attn(remade(self.input_layernorm, x_NC), rotation, plan)
        inner_NC = remade(self.post_attention_layernorm, x_NC)
        if isinstance(self.mlp, MixtureOfExperts):
            out_NC, routed = self.mlp(inner_NC, given_experts_NK, watch)
            return x_NC + out_NC, routed
        return x_NC + self.mlp(inner_NC), None

    def _decode_on_gpu(self, x_NC: Tensor, rotation: Rotation, plan: Absorbed) -> tuple[Tensor, Routed | None]:
        """The same in fewer kernels, which are what a decoding step waits for."""
        from policy import layer_kernels

        attended_NC, norm = self.self_attn(self.input_layernorm(x_NC), rotation, plan), self.post_attention_layernorm
        x_NC, inner_NC = layer_kernels.add_normalise(x_NC, attended_NC, norm.weight, norm.epsilon)
        if isinstance(self.mlp, MixtureOfExperts):
            return self.mlp.decode_on_gpu(x_NC, inner_NC)
        return x_NC + self.mlp(inner_NC), None
