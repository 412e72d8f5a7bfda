"""How much each token counts in the loss of one optimizer step: its sum over all ranks and micro-batches is the loss.

Weights instead of means, so that cutting a step into micro-batches or over ranks changes nothing.

Shapes: N packed tokens, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo.ratio import row_counts, spread_over_rows
from grpo.types import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """What one optimizer step learns from, over all ranks; the denominators of the loss."""

    tokens: int
    """Completion tokens that are learned from."""
    sequences: int
    """Completions with such a token."""
    prompts: int
    """Problems with such a completion."""


def by_tokens(batch: Batch, counts: Counts, longest: int) -> float:
    """1 / tokens of the step (DAPO, arXiv 2503.14476, equation 12; TRL's `dapo`)."""
    return 1 / max(1, counts.tokens)


def by_sequences(batch: Batch, counts: Counts, longest: int) -> Tensor:
    """1 / (tokens of the row * sequences): a long completion counts as much as a short one (GRPO, DeepSeekMath, arXiv
    2402.03300, equation 3).
    """
    return 1 / (_row_tokens(batch) * counts.sequences)


def by_prompts(batch: Batch, counts: Counts, longest: int) -> Tensor:
    """1 / (tokens of all completions of the prompt * prompts): the mean over problems of their means over tokens
    (ScaleRL, arXiv 2510.13786).
    """
    return 1 / (batch.prompt_tokens_B.double().clamp(min=1) * counts.prompts)


def by_constant(batch: Batch, counts: Counts, longest: int) -> float:
    """1 / (sequences * max_completion_length): no length plays a part (Dr. GRPO, arXiv 2503.20783, section 3.1)."""
    return 1 / max(1, counts.sequences * longest)


def by_sums(batch: Batch, counts: Counts, longest: int) -> float:
    """1 / sequences: the mean over completions of their sums, as log pi of a completion is a sum (RLOO, arXiv
    2402.14740; TRL's `luspo` with ratios of sequences).
    """
    return 1 / max(1, counts.sequences)


AGGREGATIONS: Mapping[str, Callable[[Batch, Counts, int], Tensor | float]] = {
    "tokens": by_tokens,
    "sequences": by_sequences,
    "prompts": by_prompts,
    "constant": by_constant,
    "sums": by_sums,
}
"""By the value of `loss_aggregation`; each gives a weight a row, or one for all."""


def token_weights(batch: Batch, counts: Counts, aggregation: str, max_completion_length: int) -> Tensor:
    """[N] fp32 weight of each learned token, 0 elsewhere."""
    weight = AGGREGATIONS[aggregation](batch, counts, max_completion_length)
    if isinstance(weight, Tensor):
        weight = spread_over_rows(weight.float(), batch.rows)
    return torch.where(batch.completion_mask_N, weight, 0.0)


def _row_tokens(batch: Batch) -> Tensor:
    """In double precision, so that a weight is rounded once."""
    return row_counts(batch.completion_mask_N, batch.rows).clamp(min=1).double()
