"""What vLLM is asked and what it answers, in its names and in ours; the same for both engines that use it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rollouts.sampler import mix
from rollouts.stop_strings import StopStrings
from rollouts.types import Completion, FinishReason, SamplingError, SamplingParams, check_prompts

LEAST_TEMPERATURE = 0.01
"""vLLM raises any temperature between 0 and this to it (`_MAX_TEMP` in vllm/sampling_params.py)."""
NO_LOGPROB = -9999.0
"""What vLLM's servers send for a log-probability that is no number."""


def check_request(prompts: Sequence[Sequence[int]], params: SamplingParams, context: int) -> None:
    """Raise SamplingError for what vLLM would refuse late or change silently; `context` is in tokens."""
    if 0 < params.temperature < LEAST_TEMPERATURE:
        raise SamplingError(
            f"vLLM samples at a temperature of 0 (greedy) or from {LEAST_TEMPERATURE} on, got {params.temperature}"
        )
    if params.record_experts:
        raise SamplingError(
            "vLLM does not say which experts a token went to; set record_experts to False (in a recipe: "
            "routing_replay: off or old_policy) or sample with the built-in engine (engine.kind: builtin)"
        )
    check_prompts(prompts, params, context, limit="the context")  # a server's may be shorter than the model's


def request_params(params: SamplingParams, num_generations: int, prompt_seed: int) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams for all completions of one prompt.

    vLLM gives completion g the seed `seed + g`; seeds are hashed once more, so that those of two prompts do not meet.
    Only `stop_token_ids` and `stop_strings` end a completion: an end-of-text token of the server's own choosing does
    not. Text is made for stop strings alone, of all tokens, as rewards see it. Greedy completions are all the same:
    vLLM refuses to make more than one, and `group_of` repeats it.
    """
    return {
        "n": num_generations if params.temperature else 1,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "seed": int(mix(prompt_seed, 0)) >> 2,  # below 2^62, so that g more still fits 63 bits
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": True,
        "max_tokens": params.max_completion_length,
        "logprobs": 0,  # of the sampled token alone
        "detokenize": bool(params.stop_strings),
        "skip_special_tokens": False,
        "stop": list(params.stop_strings),
        "include_stop_str_in_output": True,
    }


def group_of(completions: list[Completion], num_generations: int) -> list[Completion]:
    """As many as were asked for, [G], of those that vLLM made by `request_params`."""
    return completions if len(completions) == num_generations else completions * num_generations


def completion_of(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    finish_reason: str | None,
    *,
    params: SamplingParams,
    version: int,
    stop_strings: StopStrings | None = None,
) -> Completion:
    """One completion of ours from vLLM's tokens, log-probabilities (of the distribution sampled) and reason.

    Logits that are not numbers abort the completion where they were met. Greedy draws have log-probability 0, as they
    come from a point mass, where vLLM gives that of temperature 1. Tokens after the one that completes a stop string
    are dropped: a server that runs ahead may have let them through, and texts across padding vLLM does not see.
    """
    end = None if stop_strings is None else stop_strings.first_end(np.asarray(token_ids, dtype=np.int64))
    if end is not None:
        token_ids, logprobs, finish_reason = token_ids[:end], logprobs[:end], "stop"
    bad = next((i for i, x in enumerate(logprobs) if not math.isfinite(x) or x <= NO_LOGPROB), None)
    kept = len(token_ids) if bad is None else bad
    reason: FinishReason = "abort"
    if bad is None and finish_reason in ("stop", "length"):
        reason = "stop" if finish_reason == "stop" else "length"
    return Completion(
        token_ids=list(token_ids[:kept]),
        logprobs=[0.0] * kept if params.temperature == 0 else list(logprobs[:kept]),
        finish_reason=reason,
        policy_version=version,
    )
