"""Triton kernels around a round of speculation: what is known of each sequence out of its slot, and back into it.
Imported only where a GPU is used.

The plain twins are in `rollouts/speculative.py`, which defines what they do; tests compare the two on the CPU
(TRITON_INTERPRET=1).

Shapes: A sequences, K drafts of a round, S = K + 1, W positions of the window, T = W + S, C model width, R = S * A rows
of the trunk's pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _enter_round_kernel(
    kept_hidden, kept_tokens, slots, last, hidden, known, width,
    WINDOW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1)
    rows = tl.num_programs(0)
    if at < WINDOW:
        source = tl.load(slots + row) * WINDOW + at
        tl.store(known + at * rows + row, tl.load(kept_tokens + source))
        column = tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(kept_hidden + source * width + column, mask=inside)
        tl.store(hidden + (at * rows + row) * width + column, x, mask=inside)
    else:
        tl.store(known + at * rows + row, tl.load(last + row))


def enter(
    kept_hidden: Tensor, kept_tokens: Tensor, slot_A: Tensor, last_A: Tensor, num_drafts: int
) -> tuple[Tensor, Tensor]:
    """See `rollouts.speculative.enter`."""
    (_, window, width), rows = kept_hidden.shape, len(slot_A)
    hidden_WAC = torch.empty(window, rows, width, dtype=kept_hidden.dtype, device=kept_hidden.device)
    known_TA = torch.empty(window + 1 + num_drafts, rows, dtype=torch.int64, device=kept_hidden.device)
    _enter_round_kernel[(rows, window + 1)](
        kept_hidden, kept_tokens, slot_A, last_A, hidden_WAC, known_TA, width, WINDOW=window,
        BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return hidden_WAC, known_TA


@triton.jit
def _leave_round_kernel(
    kept_hidden, kept_tokens, slots, last, lengths, counts, hidden, known, new_hidden, tokens, finite, logprobs, report,
    width, WINDOW: tl.constexpr, DRAFTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1)
    rows = tl.num_programs(0)
    accepted = 0
    agrees = 1
    for step in tl.static_range(DRAFTS):
        is_same = tl.load(tokens + step * rows + row) == tl.load(known + (WINDOW + 1 + step) * rows + row)
        agrees = agrees & (is_same & (tl.load(finite + step * rows + row) != 0)).to(tl.int32)
        accepted += agrees
    if at < WINDOW:
        moved = accepted + 1 + at
        target = tl.load(slots + row) * WINDOW + at
        tl.store(kept_tokens + target, tl.load(known + moved * rows + row))
        column = tl.arange(0, BLOCK)
        inside = column < width
        if moved < WINDOW:
            old = tl.load(hidden + (moved * rows + row) * width + column, mask=inside)
            tl.store(kept_hidden + target * width + column, old, mask=inside)
        else:
            new = tl.load(new_hidden + ((moved - WINDOW) * rows + row) * width + column, mask=inside)
            tl.store(kept_hidden + target * width + column, new, mask=inside)
    else:
        for step in tl.static_range(DRAFTS + 1):
            place = step * rows + row
            said = tl.where(tl.load(finite + place) != 0, tl.load(tokens + place), -1)
            tl.store(report + place, said.to(tl.int32))
            bits = tl.load(logprobs + place).to(tl.int32, bitcast=True)
            tl.store(report + (DRAFTS + 1) * rows + place, bits)
        tl.store(report + 2 * (DRAFTS + 1) * rows + row, accepted)
        at_last = accepted * rows + row
        said = tl.where(tl.load(finite + at_last) != 0, tl.load(tokens + at_last), 0)
        tl.store(last + row, said)
        tl.store(lengths + row, tl.load(lengths + row) + accepted + 1)
        tl.store(counts + row, tl.load(counts + row) + accepted + 1)


def leave(
    kept_hidden: Tensor,
    kept_tokens: Tensor,
    state: tuple[Tensor, Tensor, Tensor, Tensor],
    hidden_WAC: Tensor,
    known_TA: Tensor,
    new_hidden_RC: Tensor,
    sampled: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """See `rollouts.speculative.leave`; `state` is slot, last, length and count, `sampled` what the sampler gives."""
    (_, window, width), (slot_A, last_A, length_A, count_A) = kept_hidden.shape, state
    rows, steps = len(slot_A), len(known_TA) - window
    token_R, finite_R, logprob_R = sampled
    report = torch.empty(2 * steps + 1, rows, dtype=torch.int32, device=kept_hidden.device)
    _leave_round_kernel[(rows, window + 1)](
        kept_hidden, kept_tokens, slot_A, last_A, length_A, count_A, hidden_WAC, known_TA, new_hidden_RC.contiguous(),
        token_R, finite_R, logprob_R, report, width, WINDOW=window, DRAFTS=steps - 1,
        BLOCK=triton.next_power_of_2(width),
    )  # fmt: skip
    return report
