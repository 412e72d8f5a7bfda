"""From logits over a large vocabulary to tokens on the CPU, where they lie token by token and a row in a lane.

The plain form is `rollouts/sampler.py`, which draws by runs of tokens too, but makes a copy of all logits for every
step on the way; here they are read twice.

Shapes: B sequences, V vocabulary, U runs of tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from policy.cpu_compiler import ZERO, exp, floats, integers, kernel
from rollouts.cpu_sampling_kernels import uniform

RUN = 256
"""Tokens of a run."""


@kernel
def _weigh(logits, stride, vocabulary, scale, peaks, faults, masses, rows):
    """Highest logits, numbers that are 0 where all logits are finite, and each run's mass, [U, rows]."""
    logits, peaks, faults, masses = floats(logits), floats(peaks), floats(faults), floats(masses)
    for n in range(rows):
        peaks[n], faults[n] = logits[n], ZERO
    for v in range(vocabulary):
        for n in range(rows):
            logit = logits[v * stride + n]
            peaks[n] = max(peaks[n], logit)
            faults[n] += logit * ZERO
    for v in range(vocabulary):
        run = v // RUN * rows
        if v % RUN == 0:
            for n in range(rows):
                masses[run + n] = ZERO
        for n in range(rows):
            masses[run + n] += exp((logits[v * stride + n] - peaks[n]) * np.float32(scale))


@kernel
def _draw(logits, stride, vocabulary, scale, peaks, masses, seeds, counters, out, logprobs, rows):
    """The first token at which the mass of a row passes its uniform number: first the run, then in it."""
    logits, peaks, masses, seeds, counters = (
        floats(logits), floats(peaks), floats(masses), integers(seeds), integers(counters)
    )  # fmt: skip
    out, logprobs = integers(out), floats(logprobs)
    runs = (vocabulary + RUN - 1) // RUN
    for n in range(rows):
        total = 0.0
        for run in range(runs):
            total += np.float64(masses[run * rows + n])
        aim = uniform(seeds[n], counters[n]) * total
        run, passed = 0, np.float64(masses[n])
        while run < runs - 1 and not passed > aim:
            run += 1
            passed += np.float64(masses[run * rows + n])
        passed -= np.float64(masses[run * rows + n])
        token, last = run * RUN, min(vocabulary, (run + 1) * RUN) - 1
        while token < last:
            passed += np.float64(exp((logits[token * stride + n] - peaks[n]) * np.float32(scale)))
            if passed > aim:
                break
            token += 1
        out[n] = token
        logprobs[n] = np.float32((logits[token * stride + n] - peaks[n]) * np.float32(scale) - np.log(total))


def sample(logits_BV: Tensor, seeds_B: Tensor, counters_B: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """A token of each sequence, int64 [B], its log-probability at this temperature, nats [B], and whether its logits
    were all finite, bool [B]. The logits are fp32, those of a token side by side."""
    (rows, vocabulary), stride, scale = logits_BV.shape, logits_BV.stride(1), 1.0 / temperature
    (peaks_B, faults_B, logprobs_B), masses_UB = torch.empty(3, rows), torch.empty(-(-vocabulary // RUN), rows)
    seeds_B, counters_B = seeds_B.contiguous(), counters_B.contiguous()
    token_ids_B = torch.empty(rows, dtype=torch.int64)
    _weigh(
        logits_BV.data_ptr(), stride, vocabulary, scale, peaks_B.data_ptr(), faults_B.data_ptr(), masses_UB.data_ptr(),
        rows,
    )  # fmt: skip
    _draw(
        logits_BV.data_ptr(), stride, vocabulary, scale, peaks_B.data_ptr(), masses_UB.data_ptr(), seeds_B.data_ptr(),
        counters_B.data_ptr(), token_ids_B.data_ptr(), logprobs_B.data_ptr(), rows,
    )  # fmt: skip
    return token_ids_B, logprobs_B, faults_B == 0
