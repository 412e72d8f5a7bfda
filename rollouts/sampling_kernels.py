"""One Triton kernel from logits to tokens, two passes over the logits. Imported only where a GPU is used.

The plain twin is `rollouts.sampler.sample`, which defines it: the uniform number is the same hash of a sequence's seed
and the token's index, so that the same logits give the same token but where rounding moves a boundary past it.

Shapes: B sequences, R rows of logits, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
"""Logits that a program holds at once."""


@triton.jit
def _uniform(seed, counter):
    """SplitMix64's output function at (seed, counter), its upper 24 bits as a number in [0, 1)."""
    z = seed.to(tl.uint64, bitcast=True) + (counter.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return (z >> 40).to(tl.int32).to(tl.float32) * (1.0 / 16777216.0)


@triton.jit(do_not_specialize=["sequences", "ahead"])
def _sample_kernel(
    logits, row_of, seeds, counters, tokens, logprobs, finite, stride, vocabulary, inverse_temperature, sequences,
    ahead, IS_OWN: tl.constexpr, IS_GREEDY: tl.constexpr, IS_TRUNCATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence: peak and sum of exponentials, then the first token at which the running sum passes the draw."""
    place = tl.program_id(0)
    row = place if IS_OWN else tl.load(row_of + place)
    source = logits + row.to(tl.int64) * stride
    lane = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    best = tl.zeros([BLOCK], tl.int32)
    odd = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        column = start + lane
        inside = column < vocabulary
        raw = tl.load(source + column, mask=inside, other=0.0)
        is_number = (raw == raw) & (raw < float("inf"))
        if not IS_TRUNCATED:
            is_number = is_number & (raw > float("-inf"))
        odd = odd | tl.where(is_number, 0, 1)
        x = tl.where(inside & is_number, raw * inverse_temperature, float("-inf"))
        higher = tl.maximum(peak, x)
        # A lane that has seen only -inf keeps a sum of 0, and must not make NaN of -inf - -inf.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - base) + tl.exp(x - base)
        best = tl.where(x > peak, column, best)
        peak = higher
    top = tl.max(peak, axis=0)
    is_fine = (tl.max(odd, axis=0) == 0) & (top > float("-inf"))
    level = tl.where(is_fine, top, 0.0)
    tl.store(finite + place, is_fine)
    if IS_GREEDY:
        tl.store(tokens + place, tl.min(tl.where(peak == top, best, vocabulary), axis=0).to(tl.int64))
        tl.store(logprobs + place, 0.0)
    else:
        mass = tl.sum(tl.where(peak > float("-inf"), total * tl.exp(peak - level), 0.0), axis=0)
        sequence = place % sequences
        counter = tl.load(counters + sequence) + ahead + place // sequences
        draw = _uniform(tl.load(seeds + sequence), counter) * mass
        running = 0.0
        token = vocabulary
        fallback = 0
        for start in range(0, vocabulary, BLOCK):
            if token == vocabulary:
                column = start + lane
                inside = column < vocabulary
                x = tl.load(source + column, mask=inside, other=float("-inf")) * inverse_temperature
                weight = tl.where(inside, tl.exp(x - level), 0.0)
                cumulative = running + tl.cumsum(weight, axis=0)
                is_possible = weight > 0
                # A scan adds in an order of its own: only a token that has weight may be where the draw falls.
                token = tl.min(tl.where((cumulative > draw) & is_possible, column, vocabulary), axis=0)
                fallback = tl.maximum(fallback, tl.max(tl.where(is_possible, column, 0), axis=0))
                running = tl.max(cumulative, axis=0)
        # Rounding can leave the draw above the last sum.
        token = tl.where(token == vocabulary, fallback, token)
        tl.store(tokens + place, token.to(tl.int64))
        x = tl.load(source + token) * inverse_temperature
        tl.store(logprobs + place, x - level - tl.log(mass))


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
    `is_truncated`, logits of -inf are tokens that were ruled out; else they are a fault. A program holds `block` logits
    at once. `ahead` and `into_B` are those of `rollouts.sampler.sample`, as are rows of several tokens of a sequence.
    Nothing waits for the GPU.
    """
    count, device = len(logits_RV) if row_of_B is None else len(row_of_B), logits_RV.device
    assert logits_RV.stride(-1) == 1
    assert into_B is None or into_B.is_contiguous()
    tokens_B = torch.empty(count, dtype=torch.int64, device=device) if into_B is None else into_B
    logprobs_B = torch.empty(count, dtype=torch.float32, device=device)
    finite_B = torch.empty(count, dtype=torch.bool, device=device)
    vocabulary = logits_RV.shape[1]
    _sample_kernel[(count,)](
        logits_RV, seeds_B if row_of_B is None else row_of_B, seeds_B, counters_B, tokens_B, logprobs_B, finite_B,
        logits_RV.stride(0), vocabulary, inverse_temperature, len(seeds_B), ahead,
        IS_OWN=row_of_B is None, IS_GREEDY=is_greedy, IS_TRUNCATED=is_truncated,
        BLOCK=min(block, triton.next_power_of_2(vocabulary)), num_warps=8,
    )  # fmt: skip
    return tokens_B, logprobs_B, finite_B
