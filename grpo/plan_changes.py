"""What to change in a recipe that needs more memory than a device has, what costs least time first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo.config import Config
from grpo.plan import GIB, Device, Estimate, MicroBatches, estimate
from policy import PolicyConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Suggestion:
    """Something to change in a recipe that needs too much."""

    change: dict[str, Any]
    """Keys and their new values."""
    alone: Estimate
    """With this change and no other."""
    together: Estimate
    """With those before it too."""


def suggest(current: Estimate, shape: PolicyConfig, device: Device, *, prompt_tokens: int) -> list[Suggestion]:
    """What to change, what costs least first, until it fits; each change that helps, with what it leads to."""
    suggestions, config = list[Suggestion](), current.config
    spread = current.spread
    together = current
    for change in _changes(current):
        if device.fits(together.peak):
            break
        alone = estimate(_changed(config, change), shape, device, prompt_tokens=prompt_tokens, spread=spread)
        both = estimate(_changed(together.config, change), shape, device, prompt_tokens=prompt_tokens, spread=spread)
        if both.peak < together.peak:
            suggestions.append(Suggestion(change=change, alone=alone, together=both))
            together = both
    return suggestions


def largest_micro_batch(
    current: Estimate, shape: PolicyConfig, device: Device, *, prompt_tokens: int
) -> MicroBatches | None:
    """The most rows in one micro-batch with which the recipe fits, all else as it is; None where one is too many."""

    def with_rows(rows: int) -> Estimate:
        tokens = rows * current.micro_batches.row_tokens
        config = _changed(current.config, {"max_tokens_per_micro_batch": tokens})
        return estimate(config, shape, device, prompt_tokens=prompt_tokens, spread=current.spread)

    low, high = 0, current.micro_batches.rows * current.micro_batches.count
    while low < high:
        middle = (low + high + 1) // 2
        if device.fits(with_rows(middle).peak):
            low = middle
        else:
            high = middle - 1
    return with_rows(low).micro_batches if low else None


def _changes(current: Estimate) -> Iterator[dict[str, Any]]:
    """What saves memory, in the order of what it costs in time."""
    config, batches, way = current.config, current.micro_batches, current.spread.way
    budget = batches.tokens
    while budget > 8192 and budget > batches.row_tokens:  # above, a GPU gains next to nothing by more tokens at once
        budget = max(batches.row_tokens, budget // 2)
        yield {"max_tokens_per_micro_batch": budget}
    if config.beta > 0 and config.lora is None and not config.offload_ref_model and way != "fsdp2":
        yield {"offload_ref_model": True}
    if config.activation_recomputation == "none" and way != "zero3":
        yield {"activation_recomputation": "selective"}
    while budget > max(4096, batches.row_tokens):
        budget = max(batches.row_tokens, budget // 2)
        yield {"max_tokens_per_micro_batch": budget}
    if config.activation_recomputation != "full":
        yield {"activation_recomputation": "full"}
    if config.optimizer == "adamw" and not config.offload_optimizer and way == "whole":
        yield {"optimizer": "adamw_8bit"}
        yield {"optimizer": "adamw", "offload_optimizer": True}
    if current.cache > GIB:
        yield {"engine.cache_gib": max(1, math.floor(current.cache / 2 / GIB))}
    if budget > batches.row_tokens:
        yield {"max_tokens_per_micro_batch": batches.row_tokens}
    if config.dtype == "float32":
        yield {"dtype": "bfloat16"}
    if config.lora is None:
        # What does not go with adapters is switched off.
        beside = {"bias_update_rate": 0, "mtp_weight": 0, "sync_ref_model": False}
        yield {"lora": {}} | {key: value for key, value in beside.items() if getattr(config, key)}


def _changed(config: Config, change: dict[str, Any]) -> Config:
    values = config.model_dump()
    for key, value in change.items():
        *parents, last = key.split(".")
        section = values
        for parent in parents:
            section = section[parent]
        section[last] = value
    return Config.model_validate(values)
