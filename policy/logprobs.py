"""Log-probabilities of tokens from hidden states. The shift by one lives here and nowhere else.

Position n of every `*_N` result speaks of token n given the tokens before it in its row; a row's first token has none
before it and gets 0.

Shapes: N packed tokens, C model width, V vocabulary, W wanted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from policy.attention import Expanded
from policy.model import Policy, PolicyOutput
from policy.packing import PackedRows

CHUNK_ELEMENTS = 1 << 26
"""Logits held at once, in numbers (256 MiB in fp32); more wanted tokens than fit are done in chunks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """What the policy thinks of each wanted token; zeros elsewhere."""

    logprobs_N: Tensor
    """Nats, fp32, differentiable."""
    entropy_N: Tensor
    """Entropy of the distribution the token was drawn from, nats, fp32, differentiable."""
    output: PolicyOutput
    """Of the trunk, for the MTP modules and the experts' load."""


def token_logprobs(
    policy: Policy,
    token_ids_N: Tensor,
    rows: PackedRows,
    wanted_N: Tensor,
    *,
    temperature: float = 1.0,
    given_experts_MNK: Tensor | None = None,
) -> TokenLogprobs:
    """Run the trunk over packed rows and read off log softmax(logits / temperature) at every wanted token.

    `wanted_N` is a boolean mask; a row's first token cannot be wanted.
    """
    output = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows), given_experts_MNK)
    wanted_W = wanted_N.nonzero().squeeze(1)
    assert rows.position_ids_N[wanted_W].all(), "a row's first token has nothing before it"
    before_WC = output.hidden_NC.index_select(0, wanted_W - 1)
    logprobs_W, entropy_W = gather_logprobs(policy, before_WC, token_ids_N.index_select(0, wanted_W), temperature)
    empty_N = torch.zeros(len(token_ids_N), dtype=torch.float32, device=token_ids_N.device)
    return TokenLogprobs(
        logprobs_N=empty_N.index_copy(0, wanted_W, logprobs_W),
        entropy_N=empty_N.index_copy(0, wanted_W, entropy_W),
        output=output,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class NextTokenLoss:
    """Cross-entropies in nats per token."""

    total: Tensor
    """What to differentiate."""
    trunk: Tensor
    """Of the next token."""
    mtp: Tensor
    """Mean over the MTP modules, unweighted."""
    output: PolicyOutput
    """Of the trunk, for the experts' load."""


def next_token_loss(policy: Policy, token_ids_N: Tensor, rows: PackedRows, mtp_weight: float = 0.0) -> NextTokenLoss:
    """Mean cross-entropy of every token but each row's first, plus `mtp_weight` times the mean over MTP modules.

    DeepSeek-V3, equations 24 and 25, each loss a mean over the tokens it predicts.
    """
    output = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows))
    loss = _mean_loss(policy, output.hidden_NC, token_ids_N, rows, ahead=1)
    mtp_loss = torch.zeros_like(loss)
    if policy.mtp and mtp_weight:
        hiddens = policy.predict_ahead(output.hidden_NC, token_ids_N.roll(-1), rows)
        losses = [_mean_loss(policy, h, token_ids_N, rows, ahead=k + 2) for k, h in enumerate(hiddens)]
        mtp_loss = torch.stack(losses).mean()
    return NextTokenLoss(total=loss + mtp_weight * mtp_loss, trunk=loss.detach(), mtp=mtp_loss.detach(), output=output)


def gather_logprobs(
    policy: Policy,
    hidden_WC: Tensor,
    token_ids_W: Tensor,
    temperature: float = 1.0,
    *,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token under its hidden state, and the entropy there, both [W] in nats.

    Done in chunks of at most `chunk_elements` logits that are recomputed in the backward pass, so that [W, V] never
    exists as a whole.
    """

    def one_chunk(hidden: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = policy.project(hidden) / temperature
        log_all = logits.log_softmax(dim=-1)
        entropy = -(log_all.exp() * log_all).sum(dim=-1)
        return log_all.gather(1, token_ids[:, None]).squeeze(1), entropy

    rows_at_once = max(1, chunk_elements // policy.config.vocab_size)
    if len(hidden_WC) <= rows_at_once:
        return one_chunk(hidden_WC, token_ids_W)
    pieces = [
        checkpoint(one_chunk, h, t, use_reentrant=False)
        for h, t in zip(hidden_WC.split(rows_at_once), token_ids_W.split(rows_at_once), strict=True)
    ]
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])


def _mean_loss(policy: Policy, hidden_NC: Tensor, token_ids_N: Tensor, rows: PackedRows, ahead: int) -> Tensor:
    """Mean of -log p(token n | hidden n - ahead) over tokens with `ahead` others before them in their row, or 0."""
    target_W = (rows.position_ids_N >= ahead).nonzero().squeeze(1)
    logprobs_W, _ = gather_logprobs(policy, hidden_NC.index_select(0, target_W - ahead), token_ids_N[target_W])
    return -logprobs_W.sum() / max(1, len(target_W))
