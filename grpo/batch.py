"""From groups to packed micro-batches under a token budget.

Rows are sorted by length, so that the rows of one micro-batch are about equally long; nothing has to divide
anything, and
which rows share a micro-batch changes the gradient only by rounding.
"""

from __future__ import annotations

import collections.abc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from grpo.aggregation import Counts
from grpo.distributed import Ranks
from grpo.routing_replay import pack_experts
from grpo.types import Batch, Group, Origin
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
    origin: Origin
    is_stale: bool = False
    """Whether an earlier version of the policy sampled it."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion.token_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Minibatch:
    """What one optimizer step learns from."""

    batches: list[Batch]
    """This rank's micro-batches."""
    counts: Counts
    """Over all ranks."""


def make_rows(
    groups: Sequence[Group],
    advantages: Sequence[Sequence[float]],
    *,
    mask_truncated: bool,
    places: Sequence[int] | None = None,
    version: int = 0,
) -> list[Row]:
    """One row per completion, [B], in order; completions without a token are left out.

    `places` are the groups' indices among those of all ranks (None: 0, 1, ...), `version` that of the policy in hand:
    what an earlier one sampled is stale.
    """
    return [
        Row(
            prompt_ids=group.prompt_ids,
            completion=completion,
            advantage=advantage,
            learned=completion.finish_reason != "abort"
            and not (mask_truncated and completion.finish_reason == "length"),
            origin=Origin(problem=place, completion=g),
            is_stale=completion.policy_version < version,
        )
        for place, group, of_group in zip(places or range(len(groups)), groups, advantages, strict=True)
        for g, (completion, advantage) in enumerate(zip(group.completions, of_group, strict=True))
        if completion.token_ids
    ]


def make_minibatches(rows: Sequence[Row], num_minibatches: int, max_tokens: int, ranks: Ranks) -> list[Minibatch]:
    """Deal the problems out in turn to this many optimizer steps, and cut each part into micro-batches.

    Whole problems, by their index in the step, so that neither the number of ranks nor the aggregation matters.
    """
    parts = [[row for row in rows if row.origin.problem % num_minibatches == m] for m in range(num_minibatches)]
    return [
        Minibatch(batches=make_batches(part, max_tokens, ranks.device), counts=count_learned(part, ranks))
        for part in parts
    ]


def count_learned(rows: Sequence[Row], ranks: Ranks) -> Counts:
    """Tokens, completions and problems that the loss runs over, of all ranks; a problem is on one rank only."""
    learned = [row for row in rows if row.learned]
    tokens = sum(len(row.completion.token_ids) for row in learned)
    problems = len({row.origin.problem for row in learned})
    tokens, sequences, problems = (int(ranks.sum_number(count)) for count in (tokens, len(learned), problems))
    return Counts(tokens=tokens, sequences=sequences, prompts=problems)


def make_batches(rows: Sequence[Row], max_tokens: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Cut length-sorted rows into micro-batches of at most `max_tokens` padded tokens (or one row, if longer).

    Rows that are not learned from are left out; those without advantage stay, for their entropy and KL.
    """
    learned = [row for row in rows if row.learned]
    prompt_tokens = Counter[int]()
    for row in learned:
        prompt_tokens[row.origin.problem] += len(row.completion.token_ids)
    return [_pack(part, prompt_tokens, device) for part in cut_by_tokens(learned, max_tokens)]


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


def _pack(rows: Sequence[Row], prompt_tokens: Counter[int], device: torch.device | str) -> Batch:
    token_ids, mask, logprobs, advantages = list[int](), list[bool](), list[float](), list[float]()
    stale = list[bool]()
    for row in rows:
        prompt, length = len(row.prompt_ids), len(row.completion.token_ids)
        token_ids += [*row.prompt_ids, *row.completion.token_ids]
        mask += [False] * prompt + [True] * length
        logprobs += [0.0] * prompt + list(row.completion.logprobs)
        advantages += [0.0] * prompt + [row.advantage] * length
        stale += [False] * prompt + [row.is_stale] * length
    experts_NMK = pack_experts([(len(row.prompt_ids), row.completion) for row in rows])
    return Batch(
        token_ids_N=torch.tensor(token_ids, device=device),
        rows=PackedRows.of([len(row) for row in rows], device),
        origins=tuple(row.origin for row in rows),
        completion_mask_N=torch.tensor(mask, device=device),
        rollout_logprobs_N=torch.tensor(logprobs, dtype=torch.float32, device=device),
        advantages_N=torch.tensor(advantages, dtype=torch.float32, device=device),
        prompt_tokens_B=torch.tensor([prompt_tokens[row.origin.problem] for row in rows], device=device),
        stale_N=torch.tensor(stale, device=device) if any(stale) else None,
        experts_NMK=None if experts_NMK is None else experts_NMK.to(device),
    )
