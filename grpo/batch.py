"""From groups to packed micro-batches under a token budget.

A group's rows begin with one prompt. Where it pays, they stay together, and a pass goes over the prompt once for all of
them that share a micro-batch. Elsewhere rows are sorted by length, so that those of one micro-batch are about equally
long. Nothing has to divide anything, and which rows share a micro-batch changes the gradient only by rounding.
"""

from __future__ import annotations

import collections.abc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from grpo.aggregation import Counts
from grpo.distributed import Ranks
from grpo.routing_replay import pack_experts
from grpo.types import Batch, Group, Origin
from policy import PackedRows
from policy.packing import Wanted
from rollouts import Completion

Sized = TypeVar("Sized", bound=collections.abc.Sized)

LEAST_SAVED, LEAST_SAVED_ON_CPU = 0.2, 0.05
"""Share of a step's tokens that sharing prompts has to save, or each row is gone over by itself: attention in two
passes costs a GPU what a tenth of the tokens do, and more beside cuDNN's kernel for rows of one length.
"""


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


def make_minibatches(
    rows: Sequence[Row], num_minibatches: int, max_tokens: int, ranks: Ranks, *, share_prompts: bool = True
) -> list[Minibatch]:
    """Deal the problems out in turn to this many optimizer steps, and cut each part into micro-batches.

    Whole problems, by their index in the step, so that neither the number of ranks nor the aggregation matters.
    """
    parts = [[row for row in rows if row.origin.problem % num_minibatches == m] for m in range(num_minibatches)]
    return [
        Minibatch(
            batches=make_batches(part, max_tokens, ranks.device, share_prompts=share_prompts),
            counts=count_learned(part, ranks),
        )
        for part in parts
    ]


def count_learned(rows: Sequence[Row], ranks: Ranks) -> Counts:
    """Tokens, completions and problems that the loss runs over, of all ranks; a problem is on one rank only."""
    learned = [row for row in rows if row.learned]
    tokens = sum(len(row.completion.token_ids) for row in learned)
    problems = len({row.origin.problem for row in learned})
    tokens, sequences, problems = (int(ranks.sum_number(count)) for count in (tokens, len(learned), problems))
    return Counts(tokens=tokens, sequences=sequences, prompts=problems)


def make_batches(
    rows: Sequence[Row], max_tokens: int, device: torch.device | str = "cpu", *, share_prompts: bool = True
) -> list[Batch]:
    """Cut rows into micro-batches of at most `max_tokens` tokens (or one row, if longer).

    Rows that are not learned from are left out; those without advantage stay, for their entropy and KL. Prompts are
    shared where that saves enough of the tokens (`LEAST_SAVED`), and are then counted once; elsewhere the tokens are
    those of rows padded to the longest.
    """
    learned = [row for row in rows if row.learned]
    prompt_tokens = Counter[int]()
    for row in learned:
        prompt_tokens[row.origin.problem] += len(row.completion.token_ids)
    if share_prompts:
        parts = cut_by_prompts(learned, max_tokens)
        least = LEAST_SAVED_ON_CPU if torch.device(device).type == "cpu" else LEAST_SAVED
        if sum(map(count_sharing, parts)) <= (1 - least) * sum(map(len, learned)):
            return [_pack(part, prompt_tokens, device, share_prompts=True) for part in parts]
    parts = cut_by_tokens(learned, max_tokens)
    return [_pack(part, prompt_tokens, device, share_prompts=False) for part in parts]


def cut_by_prompts(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Rows problem by problem, cut into parts of at most `max_tokens` with each prompt counted once (or one row).

    Problems come in order of their longest row, the rows of each in order of length. A problem for which there is no
    room left in a part goes on in the next, with its prompt again.
    """
    longest = dict[int, int]()
    for row in rows:
        longest[row.origin.problem] = max(longest.get(row.origin.problem, 0), len(row))
    parts, total = list[list[Row]](), 0
    for row in sorted(rows, key=lambda row: (longest[row.origin.problem], row.origin.problem, len(row))):
        is_known = bool(parts) and parts[-1][-1].origin.problem == row.origin.problem
        added = len(row.completion.token_ids) if is_known else len(row)
        if not parts or total + added > max_tokens:
            parts.append([])
            total, added = 0, len(row)
        parts[-1].append(row)
        total += added
    return parts


def count_sharing(rows: Sequence[Row]) -> int:
    """Tokens of all completions, and of each problem's prompt once."""
    prompts = {row.origin.problem: len(row.prompt_ids) for row in rows}
    return sum(prompts.values()) + sum(len(row.completion.token_ids) for row in rows)


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


def _pack(
    rows: Sequence[Row], prompt_tokens: Counter[int], device: torch.device | str, *, share_prompts: bool
) -> Batch:
    if share_prompts and torch.device(device).type == "cpu":
        rows = sorted(rows, key=lambda row: len(row.completion.token_ids))  # its attention pads neighbours together
    token_ids, logprobs = list[int](), list[float]()
    for row in rows:
        token_ids += [*row.prompt_ids, *row.completion.token_ids]
        logprobs += row.completion.logprobs
    # By NumPy, which reads lists several times as fast as torch does: a GPU has nothing to do meanwhile.
    counts = np.array([(len(row.prompt_ids), len(row.completion.token_ids)) for row in rows]).ravel()
    mask_N = _spread([True] * len(rows), counts)
    logprobs_N = torch.zeros(len(mask_N))
    logprobs_N[mask_N] = torch.from_numpy(np.array(logprobs, dtype=np.float32))
    stale = [row.is_stale for row in rows]
    experts_NMK = pack_experts([(len(row.prompt_ids), row.completion) for row in rows])
    packed = _lay_out(rows, device, share_prompts=share_prompts)
    return Batch(
        token_ids_N=torch.from_numpy(np.array(token_ids)).to(device),
        rows=packed,
        origins=tuple(row.origin for row in rows),
        completion_mask_N=mask_N.to(device),
        learned=Wanted.of(mask_N, packed),
        rollout_logprobs_N=logprobs_N.to(device),
        advantages_N=_spread([row.advantage for row in rows], counts).float().to(device),
        prompt_tokens_B=torch.tensor([prompt_tokens[row.origin.problem] for row in rows], device=device),
        stale_N=_spread(stale, counts).to(device) if any(stale) else None,
        experts_NMK=None if experts_NMK is None else experts_NMK.to(device),
    )


def _spread(of_completions: Sequence[bool] | Sequence[float], counts: NDArray[np.int64]) -> Tensor:
    """A number of each completion at each of its tokens, [N], and 0 at those of the prompts between.

    `counts` are the tokens of each prompt and completion in turn.
    """
    values = np.zeros(len(counts), dtype=np.array(of_completions).dtype)
    values[1::2] = of_completions
    return torch.from_numpy(np.repeat(values, counts))


def _lay_out(rows: Sequence[Row], device: torch.device | str, *, share_prompts: bool) -> PackedRows:
    lengths = [len(row) for row in rows]
    if not share_prompts:
        return PackedRows.of(lengths, device)
    prompts = {row.origin.problem: len(row.prompt_ids) for row in rows}
    number = {problem: prefix for prefix, problem in enumerate(prompts)}
    of_row = [number[row.origin.problem] for row in rows]
    return PackedRows.of(lengths, device, prefixes=list(prompts.values()), prefix_of_row=of_row)
