"""From groups to packed micro-batches under a token budget.

Rows are sorted by length, so that the rows of one micro-batch are about equally long; nothing has to divide
anything, and
which rows share a micro-batch changes the gradient only by rounding.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from grpo.types import Batch, Group
from policy import PackedRows
from rollouts import Completion

Sized = TypeVar("Sized", bound=collections.abc.Sized)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One completion with its prompt and its advantage."""

    prompt_ids: Sequence[int]
    completion: Completion
    advantage: float
    learned: bool
    """False where nothing is learned from the row: truncated under `mask_truncated_completions`, or aborted."""
    is_stale: bool = False
    """Whether an earlier version of the policy sampled it."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion.token_ids)


def make_rows(
    groups: Sequence[Group], advantages: Sequence[Sequence[float]], *, mask_truncated: bool, version: int = 0
) -> list[Row]:
    """One row per completion, [B], in order; completions without a token are left out.

    `version` is that of the policy in hand; what an earlier one sampled is stale.
    """
    return [
        Row(
            prompt_ids=group.prompt_ids,
            completion=completion,
            advantage=advantage,
            learned=completion.finish_reason != "abort"
            and not (mask_truncated and completion.finish_reason == "length"),
            is_stale=completion.policy_version < version,
        )
        for group, of_group in zip(groups, advantages, strict=True)
        for completion, advantage in zip(group.completions, of_group, strict=True)
        if completion.token_ids
    ]


def count_learned_tokens(rows: Sequence[Row]) -> int:
    """Completion tokens that the loss runs over: this rank's part of its denominator."""
    return sum(len(row.completion.token_ids) for row in rows if row.learned)


def make_batches(rows: Sequence[Row], max_tokens: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Cut length-sorted rows into micro-batches of at most `max_tokens` padded tokens (or one row, if longer).

    Rows that teach nothing are left out: those not learned from, and, as their gradient is 0, those without advantage
    would be too if their entropy and KL were not measured.
    """
    return [_pack(part, device) for part in cut_by_tokens([row for row in rows if row.learned], max_tokens)]


def cut_by_tokens(items: Sequence[Sized], max_tokens: int) -> list[list[Sized]]:
    """Items in order of length, cut into parts of at most `max_tokens` when padded (or one item, if longer).

    Every part but the last is full: one item more would not have fitted.
    """
    parts, current = [], list[Sized]()
    for item in sorted(items, key=len):
        if current and (len(current) + 1) * len(item) > max_tokens:
            parts.append(current)
            current = []
        current.append(item)
    return [*parts, current] if current else parts


def _pack(rows: Sequence[Row], device: torch.device | str) -> Batch:
    token_ids, mask, logprobs, advantages = list[int](), list[bool](), list[float](), list[float]()
    stale = list[bool]()
    for row in rows:
        prompt, length = len(row.prompt_ids), len(row.completion.token_ids)
        token_ids += [*row.prompt_ids, *row.completion.token_ids]
        mask += [False] * prompt + [True] * length
        logprobs += [0.0] * prompt + list(row.completion.logprobs)
        advantages += [0.0] * prompt + [row.advantage] * length
        stale += [False] * prompt + [row.is_stale] * length
    return Batch(
        token_ids_N=torch.tensor(token_ids, device=device),
        rows=PackedRows.of([len(row) for row in rows], device),
        completion_mask_N=torch.tensor(mask, device=device),
        rollout_logprobs_N=torch.tensor(logprobs, dtype=torch.float32, device=device),
        advantages_N=torch.tensor(advantages, dtype=torch.float32, device=device),
        stale_N=torch.tensor(stale, device=device) if any(stale) else None,
    )
