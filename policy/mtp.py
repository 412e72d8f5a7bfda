"""Multi-token prediction (DeepSeek-V3, section 2.2): a module that, from the trunk's hidden state at a token and the
next token, predicts the token after that. One block of its own; embedding and head are shared with the trunk.

Module k stands in the checkpoint as `model.layers.{num_hidden_layers + k}`.

Shapes: N packed tokens, C model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from policy.attention import AttentionPlan
from policy.balance import RouterWatch
from policy.block import Block
from policy.config import PolicyConfig
from policy.linear import Linear
from policy.moe import Routed
from policy.norm import RMSNorm
from policy.rope import Rotation


class MultiTokenPredictor(nn.Module):
    """h' = block(eh_proj[norm(embedding of the next token); norm(h)]) (equations 21 to 23)."""

    def __init__(self, config: PolicyConfig, layer: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, layer)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_NC: Tensor,
        next_embedding_NC: Tensor,
        rotation: Rotation,
        plan: AttentionPlan,
        given_experts_NK: Tensor | None = None,
        watch: RouterWatch | None = None,
    ) -> tuple[Tensor, Routed | None]:
        """Hidden states for the token after next [N, C], ready for the head, and what became known of the router."""
        if hidden_NC.is_cuda and not torch.is_grad_enabled():
            from policy import layer_kernels

            weights = self.enorm.weight, self.hnorm.weight
            both = layer_kernels.join_normed(next_embedding_NC, hidden_NC, *weights, self.enorm.epsilon)
        else:
            both = torch.cat((self.enorm(next_embedding_NC), self.hnorm(hidden_NC)), dim=-1)
        out_NC, routed = self.block(self.eh_proj(both), rotation, plan, given_experts_NK, watch)
        return self.norm(out_NC), routed
