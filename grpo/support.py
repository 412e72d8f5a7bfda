"""Log-probabilities within the tokens that the sampler could draw: exact ratios under top-k, top-p and min-p.

The sampler draws from pi(. | K), the policy restricted to a set K of tokens, and records log pi(token | K). A ratio to
the trainer's log pi(token) over the whole vocabulary would be off by the mass of K, a different factor at every token
(so in TRL 1.16). Here old policy, policy and reference are all renormalised over the same K ("Keep Sampling Mask",
DeepSeek-V3.2, arXiv 2512.02556, section 3.1).

K is found once a batch, by the sampler's own `truncate` on the logits of the policy before its first step, and kept
for the steps after. Where sampler and trainer share weights that is the sampler's set but for tokens that rounding
moves over its edge; the drawn token is always in it. An engine with weights or kernels of its own differs at the edge a
little more: `sampling/logp_difference` shows it, `importance_sampling_correction` corrects it.

Shapes: N packed tokens, W wanted tokens, V vocabulary, C model width, K kept tokens of all positions together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from policy import PackedRows, Policy
from policy.balance import RouterWatch
from policy.logprobs import TokenLogprobs, run_trunk, take_hidden
from policy.packing import Wanted
from rollouts import SamplingParams
from rollouts.sampler import truncate

CHUNK_ELEMENTS = 1 << 26
"""Logits held at once, in numbers (256 MiB in fp32); more positions than fit are done in chunks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Support:
    """The tokens that could be drawn at each wanted position."""

    token_ids_K: Tensor
    """int32, position after position."""
    counts_W: Tensor
    """How many of them belong to each position, int64, at least 1."""


def is_truncated(params: SamplingParams) -> bool:
    """Whether the sampler draws from less than the whole vocabulary."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def supported_logprobs(
    policy: Policy,
    token_ids_N: Tensor,
    rows: PackedRows,
    wanted: Wanted | Tensor,
    params: SamplingParams,
    support: Support | None = None,
    *,
    given_experts_MNK: Tensor | None = None,
    watch: RouterWatch | None = None,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[TokenLogprobs, Support]:
    """`policy.logprobs.token_logprobs` over pi(. | K), and K: `support`, or found on this policy where None."""
    wanted_W = (Wanted.of(wanted, rows) if isinstance(wanted, Tensor) else wanted).token_W
    output = run_trunk(policy, token_ids_N, rows, given_experts_MNK, watch)
    hidden_WC = take_hidden(output.hidden_NC, rows, wanted_W - 1)
    drawn_W = token_ids_N.index_select(0, wanted_W)
    at_once = max(1, chunk_elements // policy.config.vocab_size)
    if support is None:
        support = _find_support(policy, hidden_WC.detach(), drawn_W, params, at_once)

    def one_chunk(hidden_WC: Tensor, drawn_W: Tensor, token_ids_K: Tensor, counts_W: Tensor) -> tuple[Tensor, Tensor]:
        logits_WV = policy.project(hidden_WC) / params.temperature
        kept_WV = _as_mask(token_ids_K, counts_W, logits_WV.shape[1])
        log_all_WV = logits_WV.masked_fill(~kept_WV, float("-inf")).log_softmax(dim=-1)
        # Finite outside K, where the probability is 0: the gradient of 0 * log 0 would be nan.
        surprise_WV = torch.where(kept_WV, log_all_WV, 0.0)
        entropy_W = -(log_all_WV.exp() * surprise_WV).sum(dim=-1)
        return log_all_WV.gather(1, drawn_W[:, None]).squeeze(1), entropy_W

    pieces = [
        checkpoint(one_chunk, h, d, k, c, use_reentrant=False)
        for h, d, (k, c) in zip(
            hidden_WC.split(at_once), drawn_W.split(at_once), _chunks(support, at_once), strict=True
        )
    ]
    empty_N = torch.zeros(len(token_ids_N), dtype=torch.float32, device=token_ids_N.device)
    logprobs_W, entropy_W = (torch.cat([piece[i] for piece in pieces]) if pieces else empty_N[:0] for i in (0, 1))
    result = TokenLogprobs(
        logprobs_N=empty_N.index_copy(0, wanted_W, logprobs_W),
        entropy_N=empty_N.index_copy(0, wanted_W, entropy_W),
        output=output,
    )
    return result, support


@torch.no_grad()
def _find_support(policy: Policy, hidden_WC: Tensor, drawn_W: Tensor, params: SamplingParams, at_once: int) -> Support:
    ids, counts = [], []
    for hidden, drawn in zip(hidden_WC.split(at_once), drawn_W.split(at_once), strict=True):
        kept_WV = truncate(policy.project(hidden) / params.temperature, params) > float("-inf")
        kept_WV.scatter_(1, drawn[:, None], True)
        ids.append(kept_WV.nonzero()[:, 1].int())
        counts.append(kept_WV.sum(dim=1))
    device = hidden_WC.device
    return Support(
        token_ids_K=torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int32, device=device),
        counts_W=torch.cat(counts) if counts else torch.zeros(0, dtype=torch.int64, device=device),
    )


def _chunks(support: Support, at_once: int) -> list[tuple[Tensor, Tensor]]:
    counts = support.counts_W.split(at_once)
    sizes: list[int] = torch.stack([c.sum() for c in counts]).tolist() if counts else []  # a GPU is waited for once
    return list(zip(support.token_ids_K.split(sizes), counts, strict=True))


def _as_mask(token_ids_K: Tensor, counts_W: Tensor, vocabulary: int) -> Tensor:
    place_W = torch.arange(len(counts_W), device=counts_W.device)
    position_K = place_W.repeat_interleave(counts_W, output_size=len(token_ids_K))
    mask_WV = torch.zeros(len(counts_W), vocabulary, dtype=torch.bool, device=counts_W.device)
    return mask_WV.index_put((position_K, token_ids_K.long()), torch.ones((), dtype=torch.bool, device=mask_WV.device))
