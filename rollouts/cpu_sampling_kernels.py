"""From logits to tokens on the CPU, one pass over each row's logits; the plain form is in `rollouts/sampler.py`.

Shapes: R rows of logits, B sequences, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from policy.cpu_compiler import floats, integers, kernel

GOLDEN, FIRST, SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
LARGEST = np.finfo(np.float32).max


@njit(error_model="numpy")
def uniform(seed, counter):
    """`rollouts.sampler.uniforms` of one seed and counter."""
    z = np.uint64(seed) + (np.uint64(counter) + np.uint64(1)) * GOLDEN
    z = (z ^ (z >> np.uint64(30))) * FIRST
    z = (z ^ (z >> np.uint64(27))) * SECOND
    z ^= z >> np.uint64(31)
    return np.float64(z >> np.uint64(11)) * 2.0**-53


@kernel
def _sample(logits, row_stride, stride, rows, has_rows, seeds, counters, temperature, out, logprobs, count, vocabulary):
    logits, rows, seeds, counters = floats(logits), integers(rows), integers(seeds), integers(counters)
    out, logprobs = integers(out), floats(logprobs)
    scaled, cumulative = np.empty(vocabulary, dtype=np.float32), np.empty(vocabulary, dtype=np.float64)
    for b in range(count):
        base = (rows[b] if has_rows else b) * row_stride
        highest, is_sound = np.float32(-np.inf), 1
        for v in range(vocabulary):
            logit = logits[base + v * stride]
            if not abs(logit) <= LARGEST:
                is_sound = 0
            scaled[v] = logit / np.float32(temperature)
            highest = max(highest, scaled[v])
        total = 0.0
        for v in range(vocabulary):
            total += math.exp(np.float64(scaled[v] - highest))
            cumulative[v] = total
        aim, token = uniform(seeds[b], counters[b]) * total, 0
        while token < vocabulary - 1 and not cumulative[token] > aim:
            token += 1
        out[b], out[count + b] = token, is_sound
        logprobs[b] = np.float32(np.float64(scaled[token] - highest) - math.log(total))


def sample(
    logits_RV: Tensor, seeds_B: Tensor, counters_B: Tensor, temperature: float, row_of_B: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A token of each sequence, int64 [B], its log-probability at this temperature, nats [B], and whether its logits
    were all finite, bool [B]; -inf is a token that cannot be."""
    count, seeds_B, counters_B = seeds_B.shape[0], seeds_B.contiguous(), counters_B.contiguous()
    out_2B, logprobs_B = torch.empty(2, count, dtype=torch.int64), torch.empty(count)
    rows = seeds_B if row_of_B is None else row_of_B.contiguous()
    _sample(
        logits_RV.data_ptr(), logits_RV.stride(0), logits_RV.stride(1), rows.data_ptr(), row_of_B is not None,
        seeds_B.data_ptr(), counters_B.data_ptr(), temperature, out_2B.data_ptr(), logprobs_B.data_ptr(), count,
        logits_RV.shape[1],
    )  # fmt: skip
    token_ids_B, is_sound_B = out_2B
    return token_ids_B, logprobs_B, is_sound_B.bool()
