"""Passes that learn nothing, for a rank whose weights lie in pieces and that has fewer micro-batches than another.

Each pass over such weights waits for all ranks, so all must do equally many.

Shapes: N packed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from grpo.distributed import Ranks
from grpo.types import Batch
from policy import PackedRows, Policy
from policy.packing import Wanted


def fill_up(batches: Sequence[Batch], policy: Policy, ranks: Ranks) -> list[Batch]:
    """The batches, then idle ones up to the number that the busiest rank has, at least one; as given where ranks need
    not agree.
    """
    if ranks.sharding is None:
        return list(batches)
    missing = max(1, int(ranks.max_number(len(batches)))) - len(batches)
    return [*batches, *(_idle(policy, ranks.device) for _ in range(missing))]


def _idle(policy: Policy, device: torch.device) -> Batch:
    """One row, just long enough that trunk, head and every MTP module have a token to predict: all take part."""
    length = 2 + policy.config.num_nextn_predict_layers
    zero_N, rows, mask_N = torch.zeros(length, device=device), PackedRows.of([length], device), torch.arange(length) > 0
    return Batch(
        token_ids_N=zero_N.long(),
        rows=rows,
        origins=(),
        completion_mask_N=mask_N.to(device),
        learned=Wanted.of(mask_N, rows),
        rollout_logprobs_N=zero_N,
        advantages_N=zero_N,
        prompt_tokens_B=torch.ones(1, dtype=torch.int64, device=device),
    )
