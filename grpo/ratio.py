"""Logarithms of the ratio between the policy and the old policy, at the level that an algorithm asks for.

Pure functions of per-token tensors, 0 outside the mask. A row is never split over micro-batches, so that a mean over a
row is always whole.

Shapes: N packed tokens, B rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy import PackedRows


def token_log_ratios(logprobs_N: Tensor, old_logprobs_N: Tensor, mask_N: Tensor) -> Tensor:
    """log pi(token) - log pi_old(token) (PPO, arXiv 1707.06347, section 3)."""
    return torch.where(mask_N, logprobs_N - old_logprobs_N, 0.0)


def sequence_log_ratios(log_ratio_N: Tensor, mask_N: Tensor, rows: PackedRows) -> Tensor:
    """The mean over a row's tokens, at each of them: GSPO (arXiv 2507.18071), equation 7.

    The loss at every token of a row is then the same; its gradient reaches all of them.
    """
    return row_means(log_ratio_N, mask_N, rows)


def geometric_log_ratios(
    log_ratio_N: Tensor, advantages_N: Tensor, mask_N: Tensor, rows: PackedRows, *, low: float, high: float
) -> Tensor:
    """The mean over a row's tokens of ratios clipped to e^-low and e^high on the side that the advantage moves to.

    GMPO (arXiv 2507.20673): clipping before the geometric mean, so that one token cannot outweigh its row.
    """
    clipped_N = log_ratio_N.clamp(-low, high)
    held_N = torch.where(advantages_N > 0, torch.minimum(log_ratio_N, clipped_N), torch.maximum(log_ratio_N, clipped_N))
    return row_means(held_N, mask_N, rows)


def row_means(x_N: Tensor, mask_N: Tensor, rows: PackedRows) -> Tensor:
    """Each row's mean of `x_N` over its masked tokens, at each of those tokens; a row without any has 0."""
    means_N = spread_over_rows(row_sums(x_N, mask_N, rows) / row_counts(mask_N, rows).clamp(min=1), rows)
    return torch.where(mask_N, means_N, 0.0)


def row_sums(x_N: Tensor, mask_N: Tensor, rows: PackedRows) -> Tensor:
    """[B] sums over each row's masked tokens. Padded and summed, which is deterministic on every device."""
    return rows.pad(torch.where(mask_N, x_N, 0.0)).sum(dim=1)


def row_counts(mask_N: Tensor, rows: PackedRows) -> Tensor:
    """[B] number of each row's masked tokens."""
    return rows.pad(mask_N.int()).sum(dim=1)


def spread_over_rows(x_B: Tensor, rows: PackedRows) -> Tensor:
    """Each row's number at all of its tokens, [N]."""
    return rows.unpad(x_B[:, None].expand(-1, rows.longest))
