"""The policy: embedding, blocks, final norm, head, MTP modules. One module for training and for sampling.

It is not a sampler (rollouts/), knows no rewards and no losses, and shifts nothing (that is policy/logprobs.py).

Shapes: N packed tokens, B rows, S positions, C model width, V vocabulary, E experts, K experts per token,
M layers with routed experts, D MTP modules, P rotated width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.attention import AttentionPlan, Expanded
from policy.balance import RouterSums, RouterWatch
from policy.block import Block
from policy.config import PolicyConfig
from policy.head import project
from policy.moe import MixtureOfExperts, Routed
from policy.mtp import MultiTokenPredictor
from policy.norm import RMSNorm
from policy.packing import PackedRows
from policy.recompute import Recomputation, run_block
from policy.rope import Rotation, rope_frequencies, rotation_of


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyOutput:
    """What one pass over the trunk, or over one MTP module, gives."""

    hidden_NC: Tensor
    """After the final norm, ready for the head and for the MTP modules."""
    experts_MNK: Tensor | None
    """Experts chosen in each mixture-of-experts layer, int64; None where there is none."""
    routers: RouterSums | None
    """Of the same layers, where the pass was watched."""
    preferred_MNK: Tensor | None = None
    """Experts that the routers would have chosen, int64; None where no choice was given to them."""

    @classmethod
    def of(cls, hidden_NC: Tensor, routed: Sequence[Routed]) -> PolicyOutput:
        """From the hidden states and what became known of each router, in order."""
        preferred = [layer.preferred_NK for layer in routed if layer.preferred_NK is not None]
        return cls(
            hidden_NC=hidden_NC,
            experts_MNK=torch.stack([layer.experts_NK for layer in routed]) if routed else None,
            routers=RouterSums.join([layer.sums for layer in routed if layer.sums is not None]),
            preferred_MNK=torch.stack(preferred) if preferred else None,
        )


class Policy(nn.Module):
    """A language model of one of the families of policy/families.py, on packed rows."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.recomputation: Recomputation = "none"
        """What the trunk's blocks keep for the backward pass."""
        self.residual_in_fp32 = True
        """Whether the trunk's residual stream stays in fp32 where the weights are narrower."""
        self._frequencies: Tensor | None = None
        """RoPE's, [P/2], where the last pass was: a few small kernels that every pass would start again."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
        return _mixtures(cast(Block, layer) for layer in self.layers)

    @property
    def mtp_moe_layers(self) -> list[MixtureOfExperts]:
        """The MTP modules' mixtures of experts, [D], in order."""
        return _mixtures(cast(MultiTokenPredictor, module).block for module in self.mtp)

    def forward(
        self,
        token_ids_N: Tensor,
        position_ids_N: Tensor,
        plan: AttentionPlan,
        given_experts_MNK: Tensor | None = None,
        watch: RouterWatch | None = None,
    ) -> PolicyOutput:
        """Hidden states of packed tokens, attending as `plan` says.

        With `given_experts_MNK` (as returned by another pass, of any integer dtype) the routers take the choice as
        given, and choose where it is below 0; gradients still flow through the weights of the chosen experts. `watch`
        asks for sums of what the routers did.
        """
        config = self.config
        rotation = self._rotation_of(position_ids_N)
        x_NC = self.embed_tokens(token_ids_N)
        if self.residual_in_fp32:
            x_NC = x_NC.to(torch.promote_types(x_NC.dtype, torch.float32))
        routed: list[Routed] = []
        for index, layer in enumerate(self.layers):
            replay = given_experts_MNK is not None and config.is_moe_layer(index)
            given_NK = given_experts_MNK[len(routed)] if replay else None
            block = partial(layer, rotation=rotation, plan=plan, watch=watch)
            x_NC, of_layer = run_block(block, x_NC, given_NK, self.recomputation)
            if of_layer is not None:
                routed.append(of_layer)
        return PolicyOutput.of(self.norm(x_NC), routed)

    def predict_ahead(
        self,
        hidden_NC: Tensor,
        next_token_ids_N: Tensor,
        rows: PackedRows,
        *,
        given_experts_DNK: Tensor | None = None,
        watch: RouterWatch | None = None,
        is_detached: bool = False,
        num_recycled: int = 0,
    ) -> list[PolicyOutput]:
        """One output of every MTP module in turn; module k's hidden states speak of the token k + 2 ahead.

        Then `num_recycled` more of the last module, which takes its own output at the position before for the trunk's
        hidden state, as it does when it drafts further than there are modules (FastMTP, Cai et al., 2025); at a row's
        first position, which has none before it, it takes what it took at first. These speak of the token as far ahead
        as the module's first output does, are not watched, and choose experts by themselves.

        `next_token_ids_N` holds the token after each; module k shifts it on by k. Positions whose future lies beyond
        their row hold numbers without meaning: mask them (`watch` is that of the trunk, and does). With `is_detached`,
        gradients reach the modules' own weights but neither the trunk nor the embedding.
        """
        table_VC = self.embed_tokens.weight
        if is_detached:
            hidden_NC, table_VC = hidden_NC.detach(), table_VC.detach()
        rotation = self._rotation_of(rows.position_ids_N)
        is_first_N1, outputs = (rows.position_ids_N == 0)[:, None], []
        for k in range(len(self.mtp) + num_recycled):
            module, given_NK = self.mtp[min(k, len(self.mtp) - 1)], None
            if k < len(self.mtp):
                taken_NC = hidden_NC
                given_NK = None if given_experts_DNK is None else given_experts_DNK[k]
                watch = None if watch is None else watch.without_last()
                next_NC = F.embedding(next_token_ids_N.roll(-k), table_VC)
            else:
                taken_NC, watch = torch.where(is_first_N1, taken_NC, hidden_NC.roll(1, dims=0)), None
            hidden_NC, routed = module(taken_NC, next_NC, rotation, Expanded(rows=rows), given_NK, watch)
            outputs.append(PolicyOutput.of(hidden_NC, [routed] if routed is not None else []))
        return outputs

    def draft(
        self,
        hidden_NC: Tensor,
        next_token_ids_N: Tensor,
        position_ids_N: Tensor,
        plan: AttentionPlan,
        *,
        module: int = 0,
    ) -> PolicyOutput:
        """One MTP module over the cache; `project` makes logits of its hidden states.

        Module k takes the hidden states that the trunk (k = 0) or module k - 1 gave at positions i, and the tokens at
        i + k + 1, and speaks of the tokens at i + k + 2. Under `Expanded` it attends within rows and fills its rows of
        the cache where one is given; under `Absorbed` it takes one token of each sequence. Positions, slots and blocks
        are those of the trunk's own pass over i. Its layer of the cache is `num_hidden_layers` + k.
        """
        rotation = self._rotation_of(position_ids_N)
        hidden_NC, routed = self.mtp[module](hidden_NC, self.embed_tokens(next_token_ids_N), rotation, plan)
        return PolicyOutput.of(hidden_NC, [routed] if routed is not None else [])

    def _rotation_of(self, position_ids_N: Tensor) -> Rotation:
        if self._frequencies is None or self._frequencies.device != position_ids_N.device:
            self._frequencies = rope_frequencies(self.config, position_ids_N.device)
        return rotation_of(position_ids_N, self.config, self._frequencies)

    def project(self, hidden_NC: Tensor, *, is_detached: bool = False) -> Tensor:
        """Logits [N, V] of hidden states [N, C], in fp32 whatever the policy's dtype: `policy.head.project`.

        With `is_detached` no gradient reaches the head.
        """
        head_VC = self.lm_head.weight.detach() if is_detached else self.lm_head.weight
        return project(hidden_NC, head_VC)

    def logits(self, token_ids_BS: Tensor) -> Tensor:
        """Next-token logits [B, S, V] in fp32 of whole rows; for checks, since nothing is chunked."""
        batch, length = token_ids_BS.shape
        rows = PackedRows.of([length] * batch, token_ids_BS.device)
        output = self(token_ids_BS.flatten(), rows.position_ids_N, Expanded(rows=rows))
        return self.project(output.hidden_NC).unflatten(0, (batch, length))


def _mixtures(blocks: Iterable[Block]) -> list[MixtureOfExperts]:
    return [block.mlp for block in blocks if isinstance(block.mlp, MixtureOfExperts)]


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
