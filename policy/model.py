"""The policy: embedding, blocks, final norm, head, MTP modules. One module for training and for sampling.

It is not a sampler (rollouts/), knows no rewards and no losses, and shifts nothing (that is policy/logprobs.py).

Shapes: N packed tokens, B rows, S positions, C model width, V vocabulary, E experts, K experts per token,
M layers with routed experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.attention import AttentionPlan, Expanded
from policy.block import Block
from policy.config import PolicyConfig
from policy.moe import MixtureOfExperts
from policy.mtp import MultiTokenPredictor
from policy.packing import PackedRows
from policy.rope import rotation_of


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyOutput:
    """What one pass over the trunk gives."""

    hidden_NC: Tensor
    """After the final norm, ready for the head and for the MTP modules."""
    experts_MNK: Tensor | None
    """Experts chosen in each mixture-of-experts layer, int64; None for a policy without any."""


class Policy(nn.Module):
    """A language model of one of the families of policy/families.py, on packed rows."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.mtp = nn.ModuleList(
            MultiTokenPredictor(config, config.num_hidden_layers + k) for k in range(config.num_nextn_predict_layers)
        )

    def tie_weights(self) -> None:
        """Let embedding and head be one tensor where the shape says so; needed again after `to_empty`."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the trunk computes in."""
        return self.embed_tokens.weight.dtype

    @property
    def moe_layers(self) -> list[MixtureOfExperts]:
        """The trunk's mixtures of experts, [M], in order."""
        blocks = (cast(Block, layer) for layer in self.layers)
        return [block.mlp for block in blocks if isinstance(block.mlp, MixtureOfExperts)]

    def forward(
        self,
        token_ids_N: Tensor,
        position_ids_N: Tensor,
        plan: AttentionPlan,
        given_experts_MNK: Tensor | None = None,
    ) -> PolicyOutput:
        """Hidden states of packed tokens, attending as `plan` says.

        With `given_experts_MNK` (as returned by another pass) the routers take the choice as given; gradients still
        flow through the weights of the chosen experts.
        """
        config = self.config
        rotation = rotation_of(position_ids_N, config)
        x_NC = self.embed_tokens(token_ids_N)
        chosen: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            replay = given_experts_MNK is not None and config.is_moe_layer(index)
            x_NC, experts_NK = layer(x_NC, rotation, plan, given_experts_MNK[len(chosen)] if replay else None)
            if experts_NK is not None:
                chosen.append(experts_NK)
        return PolicyOutput(hidden_NC=self.norm(x_NC), experts_MNK=torch.stack(chosen) if chosen else None)

    def predict_ahead(self, hidden_NC: Tensor, next_token_ids_N: Tensor, rows: PackedRows) -> list[Tensor]:
        """Hidden states of every MTP module in turn, each [N, C]; module k's speak of the token k + 2 ahead.

        `next_token_ids_N` holds the token after each; module k shifts it on by k. Positions whose future lies beyond
        their row hold numbers without meaning: mask them.
        """
        rotation = rotation_of(rows.position_ids_N, self.config)
        outs = []
        for module in self.mtp:
            hidden_NC, _ = module(hidden_NC, self.embed_tokens(next_token_ids_N), rotation, Expanded(rows=rows))
            outs.append(hidden_NC)
            next_token_ids_N = next_token_ids_N.roll(-1)
        return outs

    def project(self, hidden_NC: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., C], in fp32 whatever the policy's dtype.

        Rounding logits to bf16 alone moves log-probabilities by percents (MiniMax-M1, section 3.2), and sampler and
        trainer round differently.
        """
        return F.linear(hidden_NC.float(), self.lm_head.weight.float())

    def logits(self, token_ids_BS: Tensor) -> Tensor:
        """Next-token logits [B, S, V] in fp32 of whole rows; for checks, since nothing is chunked."""
        batch, length = token_ids_BS.shape
        rows = PackedRows.of([length] * batch, token_ids_BS.device)
        output = self(token_ids_BS.flatten(), rows.position_ids_N, Expanded(rows=rows))
        return self.project(output.hidden_NC).unflatten(0, (batch, length))


def initialise(policy: Policy, seed: int) -> None:
    """Draw every weight from N(0, initializer_range), norms to one, as the DeepSeek-V3 report does (section 4.2).

    Biases are 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in policy.named_parameters():
        with torch.no_grad():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1:
                weight.fill_(1.0)
            else:
                assert "norm" not in name
                values = torch.randn(weight.shape, generator=generator) * policy.config.initializer_range
                weight.copy_(values)


def cast_weights(policy: Policy, dtype: torch.dtype) -> Policy:
    """Weights to `dtype`, in place; the routers' correction biases stay fp32, as they steer by tiny steps."""
    for weight in policy.parameters():
        weight.data = weight.data.to(dtype)
    return policy
