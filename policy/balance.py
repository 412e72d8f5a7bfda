"""What keeps the experts' load even, and what tells whether it is: sums over tokens of each router in a pass.

The sequence-wise balance loss of a layer and a row of T tokens is sum_e f_e P_e (DeepSeek-V3, equations 17 to 20) with

    f_e = E / (K T) * (tokens of the row that go to e),    P_e = 1 / T * sum of the tokens' scores for e,

scores normalised to add up to 1 over the experts; only P has a gradient. It is 1 where the load is even. The z-loss is
(log sum_e exp logit_e)^2 at each token (ST-MoE, equation 5).

Shapes: N tokens, B rows, E routed experts, K experts per token, M layers, U tokens with shared prefixes counted once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from policy.packing import PackedRows
from policy.router import Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterWatch:
    """What to sum up of the routers that packed rows go through."""

    row_N: Tensor
    """Row of each token, int64; B for one that does not count."""
    after_N: Tensor
    """Tokens that count after each in its row, int64."""
    lengths_B: Tensor
    """Tokens of each row that count, fp32, at least 1."""
    with_losses: bool
    """Whether the balance loss and the z-loss are wanted; both are 0 otherwise."""
    place_N: Tensor | None = None
    """Place of each token among those that the routers see, int64, where rows share some of them; None: its own."""

    @classmethod
    def of(cls, rows: PackedRows, *, with_losses: bool) -> RouterWatch:
        """Count all tokens, those that rows share in each of them."""
        # From what the device has: for what the host sends, it would wait.
        ends_B = rows.bounds[1:].long()
        place_N = torch.arange(len(rows.position_ids_N), device=ends_B.device)
        row_N = torch.searchsorted(ends_B, place_N, right=True)
        return cls(
            row_N=row_N,
            after_N=ends_B.index_select(0, row_N) - place_N - 1,
            lengths_B=rows.bounds.diff().float(),
            with_losses=with_losses,
            place_N=None if rows.shared is None else rows.shared.place_N,
        )

    def without_last(self) -> RouterWatch:
        """The same with the last token of each row not counted, for a module that looks one token further ahead."""
        assert self.place_N is None, "such a module goes over each row by itself"
        return RouterWatch(
            row_N=self.row_N.masked_fill(self.after_N == 0, len(self.lengths_B)),
            after_N=self.after_N - 1,
            lengths_B=(self.lengths_B - 1).clamp(min=1),
            with_losses=self.with_losses,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterSums:
    """Sums over the tokens that count, of M routers."""

    load_ME: Tensor
    """Token-expert pairs on each expert, int64."""
    entropy_M: Tensor
    """Entropy of each token's scores, normalised to add up to 1 over all experts, nats, fp32."""
    balance_M: Tensor
    """The rows' balance losses, fp32, differentiable."""
    z_M: Tensor
    """The tokens' z-losses, fp32, differentiable."""

    @classmethod
    def join(cls, parts: Sequence[RouterSums]) -> RouterSums | None:
        """The sums of all layers, in order; None where there are none."""
        if not parts:
            return None
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})


def sum_up(routing: Routing, watch: RouterWatch) -> RouterSums:
    """What `watch` asks for, of one router (M = 1)."""
    if watch.place_N is not None:
        routing = routing.spread(watch.place_N)
    num_experts, num_rows = routing.scores_NE.shape[1], len(watch.lengths_B)
    load_BE = _count_by_row(routing.experts_NK, watch.row_N, num_rows, num_experts)
    counts_N = watch.row_N < num_rows
    with torch.no_grad():
        entropy_N = torch.special.entr(_normalise(routing.scores_NE)).sum(dim=-1)
        entropy = torch.where(counts_N, entropy_N, 0.0).sum()
    balance = z = torch.zeros_like(entropy)
    if watch.with_losses:
        # P has the gradient 1 / T at each of a row's scores, so that sum_e f_e P_e is the tokens' sum of f_e / T * s_e.
        per_token = routing.experts_NK.shape[1]
        factor_BE = load_BE[:num_rows] * (num_experts / per_token) / watch.lengths_B[:, None].square()
        factor_BE = torch.cat((factor_BE, torch.zeros_like(factor_BE[:1])))
        balance = (_normalise(routing.scores_NE) * factor_BE.index_select(0, watch.row_N)).sum()
        z = torch.where(counts_N, routing.logits_NE.logsumexp(dim=-1).square(), 0.0).sum()
    # Copies, not views: FSDP2 hooks on to what leaves a block, and a view could lose the hook.
    found = (load_BE[:num_rows].sum(0), entropy, balance, z)
    load_ME, entropy_M, balance_M, z_M = (torch.stack([of_layer]) for of_layer in found)
    return RouterSums(load_ME=load_ME, entropy_M=entropy_M, balance_M=balance_M, z_M=z_M)


def router_loss(
    sums: RouterSums, *, aux_loss_coef: float, z_loss_coef: float, num_rows: int, num_tokens: int
) -> Tensor:
    """Balance loss as a mean over rows and z-loss as a mean over tokens, weighted, added up over the layers."""
    return aux_loss_coef * sums.balance_M.sum() / num_rows + z_loss_coef * sums.z_M.sum() / num_tokens


def _normalise(scores_NE: Tensor) -> Tensor:
    return scores_NE / scores_NE.sum(dim=-1, keepdim=True)


def _count_by_row(experts_NK: Tensor, row_N: Tensor, num_rows: int, num_experts: int) -> Tensor:
    """Pairs on each expert by row, int64 [B + 1, E]; the last row is of tokens that do not count."""
    pair_T = (row_N[:, None] * num_experts + experts_NK).flatten()
    counts = pair_T.new_zeros((num_rows + 1) * num_experts)
    return counts.index_add_(0, pair_T, torch.ones_like(pair_T)).view(num_rows + 1, num_experts)
