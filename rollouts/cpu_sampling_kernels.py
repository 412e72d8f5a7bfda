"""From logits to tokens on the CPU, one pass over each row's logits; the plain form is in `rollouts/sampler.py`.

As the last operation of a decoding step (`rollouts/cpu_steps.py`) it also feeds the next step with what was drawn.

Shapes: R rows of logits, B sequences, N rows of a step, S steps, V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from policy.cpu_compiler import floats, integers, kernel, operation
from policy.cpu_operations import LIVE, LOGITS, POSITIONS, ROWS, TABLE_WIDTH, TABLES, TOKENS, Operation, arguments_of
from policy.decode_layout import LEAST_ROWS
from rollouts.types import SamplingParams

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


@kernel
def _take_highest(logits, stride, out, logprobs, count, vocabulary):
    logits, out, logprobs = floats(logits), integers(out), floats(logprobs)
    for b in range(count):
        best, is_sound = 0, 1
        for v in range(vocabulary):
            logit = logits[v * stride + b]
            if not abs(logit) <= LARGEST:
                is_sound = 0
            if logit > logits[best * stride + b]:
                best = v
        out[b], out[count + b], logprobs[b] = best, is_sound, np.float32(0)


def _draw(arguments, state):
    a, s = integers(arguments), integers(state)  # type: ignore[var-annotated]
    seeds, counters, origins, drawn, drawn_logprobs, vocabulary, idle_block = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    temperature, stops, num_stops, most = floats(arguments + 56)[0], integers(a[8]), a[9], a[10]
    token_ids, logprobs, valid, columns = integers(a[11]), floats(a[12]), integers(a[13]), a[14]
    live, width = s[LIVE], s[TABLE_WIDTH]
    if temperature > 0:
        _sample(
            s[LOGITS], 1, s[ROWS], seeds, False, seeds, counters, temperature, drawn, drawn_logprobs, live, vocabulary
        )
    else:
        _take_highest(s[LOGITS], s[ROWS], drawn, drawn_logprobs, live, vocabulary)
    drawn, drawn_logprobs, origins = integers(drawn), floats(drawn_logprobs), integers(origins)
    seeds, counters, tables = integers(seeds), integers(counters), integers(s[TABLES])
    tokens, positions = integers(s[TOKENS]), integers(s[POSITIONS])
    left = live
    for n in range(live - 1, -1, -1):
        token, origin = drawn[n] if drawn[live + n] else -1, origins[n]
        place = valid[origin] * columns + origin
        token_ids[place], logprobs[place] = token, drawn_logprobs[n]
        valid[origin] += 1
        counters[n] += 1
        positions[n] += 1
        tokens[n] = token
        ends = token < 0 or counters[n] >= most
        for i in range(num_stops):
            ends = ends or token == stops[i]
        if ends:
            # The last row takes its place, and is idle where so few are left that rows are filled up.
            left -= 1
            tokens[n], positions[n], origins[n] = tokens[left], positions[left], origins[left]
            seeds[n], counters[n] = seeds[left], counters[left]
            tokens[left], positions[left] = 0, 0
            for m in range(width):
                tables[n * width + m] = tables[left * width + m]
                tables[left * width + m] = idle_block
    s[LIVE], s[ROWS] = left, max(left, LEAST_ROWS)


class Drawing:
    """The operation that ends a decoding step: draws a token of every row, records it, and feeds it to the next."""

    def __init__(self, rows: int, vocabulary: int, idle_block: int) -> None:
        self._seed_N, self._counter_N, self._origin_N = np.zeros((3, rows), dtype=np.int64)
        self._drawn_2N, self._logprob_N = np.zeros((2, rows), dtype=np.int64), np.zeros(rows, dtype=np.float32)
        self._stops = np.zeros(0, dtype=np.int64)
        arrays = (self._seed_N, self._counter_N, self._origin_N, self._drawn_2N, self._logprob_N)
        given = np.zeros(8, dtype=np.int64)
        self.operation = Operation(
            kernel=operation(_draw),
            arguments=arguments_of(*(array.ctypes.data for array in arrays), vocabulary, idle_block, *given.tolist()),
            room_of_row=0,
        )

    def take(
        self, seed_B: np.ndarray, counter_B: np.ndarray, params: SamplingParams, token_ids_SB: np.ndarray,
        logprobs_SB: np.ndarray, valid_B: np.ndarray,
    ) -> None:  # fmt: skip
        """Draw for these sequences from now on, and write to these arrays, which must outlive the steps."""
        size = len(seed_B)
        self._seed_N[:size], self._counter_N[:size], self._origin_N[:size] = seed_B, counter_B, np.arange(size)
        self._stops = np.array(params.stop_token_ids, dtype=np.int64)
        self.operation.arguments[7:] = arguments_of(
            float(params.temperature), self._stops.ctypes.data, len(self._stops), params.max_completion_length,
            token_ids_SB.ctypes.data, logprobs_SB.ctypes.data, valid_B.ctypes.data, size,
        )  # fmt: skip
