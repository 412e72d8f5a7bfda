"""From logits to tokens: temperature, truncation, and a random stream of each sequence's own.

Randomness is counter-based: the number used for a token is a hash of the sequence's seed and the token's index, so a
draw depends neither on the batch nor on what was drawn before.

Shapes: B sequences, R rows of logits (where sampling by runs: tokens of a run), U runs, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rollouts.types import SamplingParams

WIDE = 4096
"""Vocabularies wider than this are drawn from run by run."""
RUN = 256
"""Tokens of a run."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """One token for each sequence."""

    token_ids_B: Tensor
    """int64."""
    logprobs_B: Tensor
    """Nats, fp32, under the distribution drawn from; 0 where greedy, which draws from a point mass."""
    finite_B: Tensor
    """False where the logits were not all numbers; the token there means nothing."""

    @property
    def said_B(self) -> Tensor:
        """The tokens, and where there is none the impossible -1, by which an engine aborts the sequence."""
        return torch.where(self.finite_B, self.token_ids_B, -1)


def sample(
    logits_RV: Tensor,
    seeds_B: Tensor,
    counters_B: Tensor,
    params: SamplingParams,
    row_of_B: Tensor | None = None,
    *,
    ahead: int = 0,
    into: Tensor | None = None,
) -> Sampled:
    """Draw one token per sequence by inverting the cumulative distribution at its own uniform number.

    `seeds_B` (64 bits, held as int64) names each sequence's stream and `counters_B` + `ahead` the token's index in it.
    `row_of_B` says whose logits a sequence draws from, where it is not its own row. Without it there may be several
    rows a sequence, first one of all sequences, then another of all, for the tokens that follow each other. The tokens
    are written to `into`, where it is given. Nothing waits for a GPU.
    """
    if logits_RV.is_cuda:
        return _sample_on_gpu(logits_RV, seeds_B, counters_B, params, row_of_B, ahead, into)
    times = 1 if row_of_B is not None else len(logits_RV) // max(1, len(seeds_B))
    if times > 1 or ahead:
        steps_X1 = torch.arange(ahead, ahead + times, device=counters_B.device)[:, None]
        seeds_B, counters_B = seeds_B.repeat(times), (counters_B + steps_X1).flatten()
    sampled = _sample_on_cpu(logits_RV, seeds_B, counters_B, params, row_of_B)
    if into is not None:
        into.copy_(sampled.token_ids_B)
    return sampled


def _sample_on_cpu(
    logits_RV: Tensor, seeds_B: Tensor, counters_B: Tensor, params: SamplingParams, row_of_B: Tensor | None
) -> Sampled:
    if params.temperature > 0 and logits_RV.dtype == torch.float32 and logits_RV.shape[1] <= WIDE:
        return _sample_by_rows(logits_RV, seeds_B, counters_B, params, row_of_B)
    if row_of_B is None and _takes_wide_kernel(logits_RV, params):
        from rollouts import cpu_wide_sampling

        token_ids_B, logprobs_B, finite_B = cpu_wide_sampling.sample(logits_RV, seeds_B, counters_B, params.temperature)
        return Sampled(token_ids_B=token_ids_B, logprobs_B=logprobs_B, finite_B=finite_B)
    logits_BV = logits_RV if row_of_B is None else logits_RV.index_select(0, row_of_B)
    # 0 times a number is 0, times anything else it is not: a fifth of the time of `isfinite().all()`.
    finite_B = (logits_BV * 0).sum(dim=-1) == 0
    if params.temperature == 0:
        token_ids_B = logits_BV.argmax(dim=-1)
        return Sampled(token_ids_B=token_ids_B, logprobs_B=torch.zeros_like(logits_BV[:, 0]), finite_B=finite_B)
    if params.temperature != 1:
        logits_BV = logits_BV / params.temperature
    log_all_BV = truncate(logits_BV, params).log_softmax(dim=-1)
    uniform_B = torch.from_numpy(uniforms(seeds_B.numpy().view(np.uint64), counters_B.numpy()))
    draw = _draw if logits_BV.shape[-1] <= WIDE else _draw_by_runs
    token_ids_B = draw(log_all_BV, uniform_B)
    logprobs_B = log_all_BV.gather(1, token_ids_B[:, None]).squeeze(1)
    return Sampled(token_ids_B=token_ids_B, logprobs_B=logprobs_B, finite_B=finite_B)


def _takes_wide_kernel(logits_RV: Tensor, params: SamplingParams) -> bool:
    """Whether the logits of a token lie side by side, as decoding on a CPU leaves them, and all tokens may be drawn."""
    is_by_token = logits_RV.dtype == torch.float32 and logits_RV.stride(0) == 1
    return is_by_token and params.temperature > 0 and not _truncates(params, logits_RV.shape[1])


def _sample_by_rows(
    logits_RV: Tensor, seeds_B: Tensor, counters_B: Tensor, params: SamplingParams, row_of_B: Tensor | None
) -> Sampled:
    from rollouts import cpu_sampling_kernels

    temperature, fine_R = params.temperature, None
    if _truncates(params, logits_RV.shape[1]):
        fine_R = logits_RV.isfinite().all(dim=-1)
        logits_RV, temperature = truncate(logits_RV / temperature, params), 1.0
    token_ids_B, logprobs_B, finite_B = cpu_sampling_kernels.sample(
        logits_RV, seeds_B, counters_B, temperature, row_of_B
    )
    if fine_R is not None:
        finite_B = fine_R if row_of_B is None else fine_R.index_select(0, row_of_B)
    return Sampled(token_ids_B=token_ids_B, logprobs_B=logprobs_B, finite_B=finite_B)


def _draw(log_all_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first token at which the cumulative distribution passes each uniform number."""
    cumulative_BV = log_all_BV.double().exp().cumsum(dim=-1)
    # Scaled by the total, which rounding leaves a hair off 1, so that no draw falls beyond the last possible token.
    token_ids_B = torch.searchsorted(cumulative_BV, uniform_B[:, None] * cumulative_BV[:, -1:], right=True).squeeze(1)
    return token_ids_B.clamp_(max=log_all_BV.shape[-1] - 1)


def _draw_by_runs(log_all_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The same in two stages, first a run of tokens, then one of it: one pass over the vocabulary, in fp32.

    Rounding moves the bounds between runs by parts in 10^7; a token of probability 0 is never drawn.
    """
    width = log_all_BV.shape[-1]
    mass_BUR = F.pad(log_all_BV.exp(), (0, -width % RUN)).unflatten(-1, (-1, RUN))
    ends_BU = mass_BUR.sum(dim=-1).double().cumsum(dim=-1)
    aim_B1 = _below(uniform_B[:, None] * ends_BU[:, -1:], ends_BU[:, -1:])
    run_B1 = torch.searchsorted(ends_BU, aim_B1, right=True)
    chosen_BR = mass_BUR.take_along_dim(run_B1[..., None], dim=1).squeeze(1).double()
    inner_BR = chosen_BR.cumsum(dim=-1)
    start_B1 = F.pad(ends_BU, (1, 0)).gather(1, run_B1)
    place_B1 = torch.searchsorted(inner_BR, _below(aim_B1 - start_B1, inner_BR[:, -1:]), right=True)
    return (run_B1 * RUN + place_B1).squeeze(1).clamp_(max=width - 1)


def _below(aim: Tensor, total: Tensor) -> Tensor:
    """`aim`, at most the number before `total`, so that some cumulative sum passes it."""
    return torch.minimum(aim, total.nextafter(torch.zeros_like(total)))


def _sample_on_gpu(
    logits_RV: Tensor,
    seeds_B: Tensor,
    counters_B: Tensor,
    params: SamplingParams,
    row_of_B: Tensor | None,
    ahead: int,
    into: Tensor | None,
) -> Sampled:
    from rollouts import sampling_kernels

    inverse_temperature, is_greedy = 1.0, params.temperature == 0
    fine_R = None
    if is_greedy or not _truncates(params, logits_RV.shape[-1]):
        inverse_temperature = 1.0 if is_greedy else 1.0 / params.temperature
    else:
        fine_R = logits_RV.isfinite().all(dim=-1)
        logits_RV = truncate(logits_RV / params.temperature, params)
    token_ids_B, logprobs_B, finite_B = sampling_kernels.sample(
        logits_RV,
        row_of_B,
        seeds_B,
        counters_B,
        inverse_temperature,
        is_greedy=is_greedy,
        is_truncated=fine_R is not None,
        ahead=ahead,
        into_B=into,
    )
    if fine_R is not None:
        finite_B = finite_B & (fine_R if row_of_B is None else fine_R.index_select(0, row_of_B))
    return Sampled(token_ids_B=token_ids_B, logprobs_B=logprobs_B, finite_B=finite_B)


def draws_plainly(params: SamplingParams, vocabulary: int) -> bool:
    """Whether a decoding step on the CPU can draw by itself: from all tokens, of not too many."""
    return vocabulary <= WIDE and (params.temperature == 0 or not _truncates(params, vocabulary))


def _truncates(params: SamplingParams, vocabulary: int) -> bool:
    return 0 < params.top_k < vocabulary or params.min_p > 0 or params.top_p < 1


def truncate(logits_BV: Tensor, params: SamplingParams) -> Tensor:
    """Logits with -inf outside top-k, then min-p, then top-p of what is left; at least the likeliest token stays."""
    if 0 < params.top_k < logits_BV.shape[-1]:
        kth = logits_BV.topk(params.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, float("-inf"))
    if params.min_p > 0:
        least = logits_BV.max(dim=-1, keepdim=True).values + float(np.log(params.min_p))
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    if params.top_p < 1:
        ordered, order = logits_BV.sort(dim=-1, descending=True)
        probability = ordered.softmax(dim=-1)
        beyond = probability.cumsum(dim=-1) - probability >= params.top_p
        logits_BV = logits_BV.masked_fill(beyond.scatter(1, order, beyond), float("-inf"))
    return logits_BV


def uniforms(seeds_B: np.ndarray, counters_B: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), float64: SplitMix64's output function at (seed, counter) (Steele et al., 2014)."""
    mixed = mix(seeds_B, counters_B)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def prompt_seeds_of(params: SamplingParams, count: int) -> list[int]:
    """The seed of each prompt of a call that names none, [count]."""
    # Not as an array: numpy makes floats of whole numbers on both sides of 2^63.
    seeds: list[int] = mix(params.seed, np.arange(count)).tolist()
    return seeds


def mix(seed: np.ndarray | int, index: np.ndarray | int) -> np.ndarray:
    """A 64-bit hash of two numbers, uint64: also how the seeds of prompts and completions are derived."""
    with np.errstate(over="ignore"):
        z = np.asarray(seed).astype(np.uint64) + (np.asarray(index).astype(np.uint64) + np.uint64(1)) * _GOLDEN
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        return np.asarray(z ^ (z >> np.uint64(31)))
