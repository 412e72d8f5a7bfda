"""Log-probabilities of tokens from hidden states. The shift by one lives here and nowhere else.

Position n of every `*_N` result speaks of token n given the tokens before it in its row; a row's first token has none
before it and gets 0.

Shapes: N packed tokens, C model width, V vocabulary, W wanted tokens, U tokens with shared prefixes counted once,
M layers with routed experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.attention import Expanded
from policy.balance import RouterSums, RouterWatch
from policy.head import score_tokens
from policy.model import Policy, PolicyOutput
from policy.packing import PackedRows, Wanted


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """What the policy thinks of each wanted token; zeros elsewhere."""

    logprobs_N: Tensor
    """Nats, fp32, differentiable."""
    entropy_N: Tensor
    """Entropy of the distribution the token was drawn from, nats, fp32, differentiable."""
    output: PolicyOutput
    """Of the trunk, for the MTP modules and the experts' load; see `run_trunk`."""


def token_logprobs(
    policy: Policy,
    token_ids_N: Tensor,
    rows: PackedRows,
    wanted: Wanted | Tensor,
    *,
    temperature: float = 1.0,
    given_experts_MNK: Tensor | None = None,
    watch: RouterWatch | None = None,
) -> TokenLogprobs:
    """Run the trunk over packed rows and read off log softmax(logits / temperature) at every wanted token.

    `wanted` may be a boolean mask [N], which a GPU is waited for to look through; a row's first token cannot be wanted.
    `given_experts_MNK` and `watch` are `Policy.forward`'s.
    """
    wanted_W = (Wanted.of(wanted, rows) if isinstance(wanted, Tensor) else wanted).token_W
    output = run_trunk(policy, token_ids_N, rows, given_experts_MNK, watch)
    before_WC = take_hidden(output.hidden_NC, rows, wanted_W - 1)
    logprobs_W, entropy_W = gather_logprobs(policy, before_WC, token_ids_N.index_select(0, wanted_W), temperature)
    empty_N = torch.zeros(len(token_ids_N), dtype=torch.float32, device=token_ids_N.device)
    return TokenLogprobs(
        logprobs_N=empty_N.index_copy(0, wanted_W, logprobs_W),
        entropy_N=empty_N.index_copy(0, wanted_W, entropy_W),
        output=output,
    )


def run_trunk(
    policy: Policy,
    token_ids_N: Tensor,
    rows: PackedRows,
    given_experts_MNK: Tensor | None = None,
    watch: RouterWatch | None = None,
) -> PolicyOutput:
    """`Policy.forward` over packed rows, what `rows.shared` has in common gone over once.

    Tokens and experts, given and chosen, are those of all N tokens; a prefix takes the experts given in the first row
    that has it. The hidden states are those of the U tokens that were gone over: `take_hidden` finds a token's.
    """
    shared = rows.shared
    if shared is None:
        return policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows), given_experts_MNK, watch)  # type: ignore[no-any-return]
    given_MUK = None if given_experts_MNK is None else given_experts_MNK.index_select(1, shared.token_U)
    token_ids_U = token_ids_N.index_select(0, shared.token_U)
    output: PolicyOutput = policy(token_ids_U, shared.position_ids_U, Expanded(rows=rows), given_MUK, watch)
    chosen, preferred = (
        None if experts_MUK is None else experts_MUK.index_select(1, shared.place_N)
        for experts_MUK in (output.experts_MNK, output.preferred_MNK)
    )
    return replace(output, experts_MNK=chosen, preferred_MNK=preferred)


def take_hidden(hidden_UC: Tensor, rows: PackedRows, token_W: Tensor) -> Tensor:
    """Hidden states [W, C] of some of the N tokens, from those that `run_trunk` gave."""
    if rows.shared is None:
        return hidden_UC.index_select(0, token_W)
    # As from a table: the last state of a prefix is taken by every row, and a table's gradient adds up in fp32 and in
    # one order on a GPU.
    return F.embedding(rows.shared.place_N.index_select(0, token_W), hidden_UC)


@dataclass(frozen=True, kw_only=True, slots=True)
class NextTokenLoss:
    """Cross-entropies in nats per token."""

    total: Tensor
    """What to differentiate."""
    trunk: Tensor
    """Of the next token."""
    mtp: Tensor
    """Mean over the MTP modules, unweighted."""
    routers: RouterSums | None
    """Of the trunk, then of the MTP modules that were run, where the pass was watched."""


def next_token_loss(
    policy: Policy,
    token_ids_N: Tensor,
    rows: PackedRows,
    mtp_weight: float = 0.0,
    watch: RouterWatch | None = None,
) -> NextTokenLoss:
    """Mean cross-entropy of every token but each row's first, plus `mtp_weight` times the mean over MTP modules.

    DeepSeek-V3, equations 24 and 25, each loss a mean over the tokens it predicts.
    """
    output = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows), watch=watch)
    loss_sum, count = _sum_losses(policy, output.hidden_NC, token_ids_N, _places_from(1, rows), ahead=1)
    loss = loss_sum / max(1, count)
    mtp_loss = torch.zeros_like(loss)
    routers = [output.routers]
    if policy.mtp and mtp_weight:
        ahead = ahead_losses(policy, output.hidden_NC, token_ids_N, rows, watch=watch)
        means = [loss_sum / max(1, count) for loss_sum, count in zip(ahead.sums, ahead.counts, strict=True)]
        mtp_loss = torch.stack(means).mean()
        routers.append(ahead.routers)
    return NextTokenLoss(
        total=loss + mtp_weight * mtp_loss,
        trunk=loss.detach(),
        mtp=mtp_loss.detach(),
        routers=RouterSums.join([sums for sums in routers if sums is not None]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AheadLosses:
    """Cross-entropies of the MTP modules, in order."""

    sums: list[Tensor]
    """Over the tokens that each module predicts, nats, [D], then those from its own output; differentiable."""
    counts: list[int]
    """How many these are."""
    routers: RouterSums | None
    """Of the modules, where the pass was watched."""


def ahead_losses(
    policy: Policy,
    hidden_NC: Tensor,
    token_ids_N: Tensor,
    rows: PackedRows,
    *,
    wanted: Wanted | None = None,
    temperature: float = 1.0,
    watch: RouterWatch | None = None,
    is_detached: bool = False,
    num_recycled: int = 0,
) -> AheadLosses:
    """What every MTP module makes of the tokens that it predicts from the trunk's hidden states (of `run_trunk`).

    A module looks at the next token too, which at a prefix's end is another in each row: it goes over rows one by one.
    The last one also predicts `num_recycled` times from its own output: see `Policy.predict_ahead`.
    `wanted` leaves all other tokens out. With `is_detached` the gradient reaches the modules' own weights alone: not
    the trunk, not the embedding, not the head.
    """
    if rows.shared is not None:
        hidden_NC = F.embedding(rows.shared.place_N, hidden_NC)
        watch = None if watch is None else replace(watch, place_N=None)
    outputs = policy.predict_ahead(
        hidden_NC, token_ids_N.roll(-1), rows.alone, watch=watch, is_detached=is_detached, num_recycled=num_recycled
    )
    sums, counts = list[Tensor](), list[int]()
    for k, output in enumerate(outputs):
        loss_sum, count = _sum_losses(
            policy,
            output.hidden_NC,
            token_ids_N,
            _places_from(k + 2, rows, wanted),
            ahead=min(k, len(policy.mtp) - 1) + 2,
            temperature=temperature,
            is_detached=is_detached,
        )
        sums.append(loss_sum)
        counts.append(count)
    routers = [output.routers for output in outputs if output.routers is not None]
    return AheadLosses(sums=sums, counts=counts, routers=RouterSums.join(routers))


def gather_logprobs(
    policy: Policy, hidden_WC: Tensor, token_ids_W: Tensor, temperature: float = 1.0, *, is_detached: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token under its hidden state, and the entropy there, both [W] in nats, differentiable.

    See `policy.head.score_tokens`. With `is_detached` no gradient reaches the head.
    """
    head_VC = policy.lm_head.weight
    return score_tokens(hidden_WC, head_VC.detach() if is_detached else head_VC, token_ids_W, temperature)


def _places_from(position: int, rows: PackedRows, wanted: Wanted | None = None) -> Tensor:
    """Places of the wanted tokens that stand at this position of their row or after it; a GPU is waited for where some
    may not."""
    if wanted is None:
        return (rows.position_ids_N >= position).nonzero().squeeze(1)
    if wanted.first_position >= position:
        return wanted.token_W
    return wanted.token_W[rows.position_ids_N.index_select(0, wanted.token_W) >= position]


def _sum_losses(
    policy: Policy,
    hidden_NC: Tensor,
    token_ids_N: Tensor,
    target_W: Tensor,
    *,
    ahead: int,
    temperature: float = 1.0,
    is_detached: bool = False,
) -> tuple[Tensor, int]:
    """Sum of -log p(token n | hidden n - ahead) over the tokens at these places, and their number."""
    before_WC = hidden_NC.index_select(0, target_W - ahead)
    logprobs_W, _ = gather_logprobs(policy, before_WC, token_ids_N[target_W], temperature, is_detached=is_detached)
    return -logprobs_W.sum(), len(target_W)
