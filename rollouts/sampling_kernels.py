"""Two Triton kernels from logits to tokens, one pass over the logits. Imported only where a GPU is used.

The first takes peak and sum of every part of a row, many parts at once; the second finds the part where the draw falls,
and the token in it.

The plain twin is `rollouts.sampler.sample`, which defines it: the uniform number is the same hash of a sequence's seed
and the token's index, so that the same logits give the same token but where rounding moves a boundary past it.

Shapes: B sequences, R rows of logits, V vocabulary, U parts of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
"""Logits of a part, which one program looks at."""


@triton.jit
def _uniform(seed, counter):
    """SplitMix64's output function at (seed, counter), its upper 24 bits as a number in [0, 1)."""
    z = seed.to(tl.uint64, bitcast=True) + (counter.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return (z >> 40).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit
def _survey_kernel(
    logits, peaks, totals, bests, stride, vocabulary, inverse_temperature, IS_TRUNCATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One part of a row: its peak, where that is, and its sum of exponentials, NaN where a logit is no number."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocabulary
    raw = tl.load(logits + row * stride + column, mask=inside, other=0.0)
    is_number = (raw == raw) & (raw < float("inf"))
    if not IS_TRUNCATED:
        is_number = is_number & (raw > float("-inf"))
    x = tl.where(inside & is_number, raw * inverse_temperature, float("-inf"))
    peak = tl.max(x, axis=0)
    # A part of -inf alone has a sum of 0, and must not make NaN of -inf - -inf.
    total = tl.sum(tl.exp(x - tl.where(peak == float("-inf"), 0.0, peak)), axis=0)
    is_odd = tl.max(tl.where(is_number, 0, 1), axis=0) > 0
    place = row * tl.num_programs(1) + part
    tl.store(peaks + place, peak)
    tl.store(totals + place, tl.where(is_odd, float("nan"), total))
    tl.store(bests + place, tl.min(tl.where(inside & (x == peak), column, vocabulary - 1), axis=0))


@triton.jit(do_not_specialize=["sequences", "ahead"])
def _sample_kernel(
    logits, peaks, totals, bests, row_of, seeds, counters, tokens, logprobs, finite, stride, vocabulary,
    inverse_temperature, parts, sequences, ahead,
    IS_OWN: tl.constexpr, IS_GREEDY: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence: the first token at which the running sum over its row passes the draw."""
    place = tl.program_id(0)
    row = (place if IS_OWN else tl.load(row_of + place)).to(tl.int64)
    part = tl.arange(0, PARTS)
    is_part = part < parts
    peak = tl.load(peaks + row * parts + part, mask=is_part, other=float("-inf"))
    total = tl.load(totals + row * parts + part, mask=is_part, other=0.0)
    top = tl.max(peak, axis=0)
    is_fine = (tl.max(tl.where(total == total, 0, 1), axis=0) == 0) & (top > float("-inf"))
    tl.store(finite + place, is_fine)
    if IS_GREEDY:
        best = tl.load(bests + row * parts + part, mask=is_part, other=0)
        tl.store(tokens + place, tl.min(tl.where(is_part & (peak == top), best, vocabulary - 1), axis=0).to(tl.int64))
        tl.store(logprobs + place, 0.0)
    else:
        level = tl.where(is_fine, top, 0.0)
        share = tl.where(peak > float("-inf"), total * tl.exp(peak - level), 0.0)
        mass = tl.sum(share, axis=0)
        sequence = place % sequences
        counter = tl.load(counters + sequence) + ahead + place // sequences
        draw = _uniform(tl.load(seeds + sequence), counter) * mass
        # A scan adds in an order of its own, and rounding can leave the draw above its last sum: only what has weight
        # may be where the draw falls, the last such part, and token, where none else is.
        until = tl.cumsum(share, axis=0)
        chosen = tl.min(tl.where((until > draw) & (share > 0), part, PARTS), axis=0)
        chosen = tl.where(chosen == PARTS, tl.max(tl.where(share > 0, part, 0), axis=0), chosen)
        before = tl.sum(tl.where(part < chosen, share, 0.0), axis=0)
        column = chosen * BLOCK + tl.arange(0, BLOCK)
        inside = column < vocabulary
        source = logits + row * stride
        x = tl.load(source + column, mask=inside, other=float("-inf")) * inverse_temperature
        weight = tl.where(inside, tl.exp(x - level), 0.0)
        is_possible = weight > 0
        cumulative = before + tl.cumsum(weight, axis=0)
        token = tl.min(tl.where((cumulative > draw) & is_possible, column, vocabulary), axis=0)
        token = tl.where(token == vocabulary, tl.max(tl.where(is_possible, column, 0), axis=0), token)
        tl.store(tokens + place, token.to(tl.int64))
        tl.store(logprobs + place, tl.load(source + token) * inverse_temperature - level - tl.log(mass))


def sample(
    logits_RV: Tensor,
    row_of_B: Tensor | None,
    seeds_B: Tensor,
    counters_B: Tensor,
    inverse_temperature: float,
    *,
    is_greedy: bool,
    is_truncated: bool,
    ahead: int = 0,
    into_B: Tensor | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Token [B] int64, its log-probability [B] fp32 in nats, and whether all logits were numbers [B] bool.

    Sequence b draws from the logits of row `row_of_B[b]` (None: b). Seeds are 64 bits held as int64. With
    `is_truncated`, logits of -inf are tokens that were ruled out; else they are a fault. A part has `block` logits.
    `ahead` and `into_B` are those of `rollouts.sampler.sample`, as are rows of several tokens of a sequence. Nothing
    waits for the GPU.
    """
    count, device = len(logits_RV) if row_of_B is None else len(row_of_B), logits_RV.device
    assert logits_RV.stride(-1) == 1
    assert into_B is None or into_B.is_contiguous()
    tokens_B = torch.empty(count, dtype=torch.int64, device=device) if into_B is None else into_B
    logprobs_B = torch.empty(count, dtype=torch.float32, device=device)
    finite_B = torch.empty(count, dtype=torch.bool, device=device)
    rows, vocabulary = logits_RV.shape
    block = min(block, triton.next_power_of_2(vocabulary))
    parts = triton.cdiv(vocabulary, block)
    peaks_RU, totals_RU = (torch.empty(rows, parts, dtype=torch.float32, device=device) for _ in range(2))
    bests_RU = torch.empty(rows, parts, dtype=torch.int32, device=device)
    _survey_kernel[(rows, parts)](
        logits_RV, peaks_RU, totals_RU, bests_RU, logits_RV.stride(0), vocabulary, inverse_temperature,
        IS_TRUNCATED=is_truncated, BLOCK=block,
    )  # fmt: skip
    _sample_kernel[(count,)](
        logits_RV, peaks_RU, totals_RU, bests_RU, seeds_B if row_of_B is None else row_of_B, seeds_B, counters_B,
        tokens_B, logprobs_B, finite_B, logits_RV.stride(0), vocabulary, inverse_temperature, parts, len(seeds_B),
        ahead,
        IS_OWN=row_of_B is None, IS_GREEDY=is_greedy, PARTS=triton.next_power_of_2(parts), BLOCK=block,
    )  # fmt: skip
    return tokens_B, logprobs_B, finite_B
