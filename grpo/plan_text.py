"""`grpo plan`: a recipe's needs as a person reads them, and what to change where a device is too small."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from grpo.config import Config, ConfigError, load_config
from grpo.countdown import generate_problems
from grpo.data import to_problem
from grpo.plan import GIB, Device, Estimate, MicroBatches, Suggestion, estimate, largest_micro_batch, suggest
from grpo.pretrain import base_shape
from grpo.prompts import render_prompt
from policy import PolicyConfig
from policy.checkpoint import resolve_shape
from policy.lora import LoraError

DEFAULT_PROMPT_TOKENS = 256
"""Tokens of a prompt where nobody says."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What `grpo plan` answers."""

    text: str
    fits: bool
    """Whether the recipe fits as it stands."""


def plan_recipe(
    recipe: Path,
    overrides: Sequence[str],
    *,
    memory_gib: float | None = None,
    device_name: str | None = None,
    prompt_tokens: int | None = None,
    num_processes: int = 1,
) -> Told:
    """Read a recipe and the shape of its model, and nothing else of it, and say what that needs.

    The device is a GPU where one is here or `memory_gib` is given, unless the recipe says `device: cpu`. Raises
    ConfigError, CheckpointError and ShapeError.
    """
    config = load_config(recipe, overrides)
    is_gpu = config.device != "cpu" and (torch.cuda.is_available() or memory_gib is not None)
    device = Device.detect(is_gpu=is_gpu, memory_gib=memory_gib, name=device_name)
    shape, longest = _shape_of(config)
    given = prompt_tokens or longest or DEFAULT_PROMPT_TOKENS
    # A prompt that leaves no room for a completion is refused when it is asked.
    given = max(1, min(given, shape.max_position_embeddings - config.max_completion_length))
    sizes = {"prompt_tokens": given, "num_processes": num_processes}
    try:
        current = estimate(config, shape, device, **sizes)
    except LoraError as error:
        raise ConfigError(str(error)) from None
    suggestions = suggest(current, shape, device, **sizes)
    text = describe(current, device, suggestions, largest_micro_batch(current, shape, device, **sizes))
    return Told(text=text, fits=device.fits(current.peak))


def _shape_of(config: Config) -> tuple[PolicyConfig, int | None]:
    """The policy's shape, and of a base model the tokens of a prompt, the longest of some."""
    if config.model is not None:
        return resolve_shape(config.model), None
    base, task = config.base, config.dataset.countdown
    assert base is not None
    assert task is not None
    shape, tokenizer = base_shape(config, base, task)
    rows = itertools.islice(generate_problems(task, config.seed, "train"), 64)
    problems = [to_problem(row, config.dataset, "dataset.countdown") for row in rows]
    return shape, max(len(render_prompt(problem, config.prompt_template, tokenizer)) for problem in problems)


def describe(current: Estimate, device: Device, suggestions: Sequence[Suggestion], most: MicroBatches | None) -> str:
    """The plan as a person reads it."""
    config, counts, batches = current.config, current.parameters, current.micro_batches
    lines = [
        f"{device.name}, {device.memory / GIB:.1f} GiB" + ("" if device.is_gpu else " (on a CPU: rough)"),
        f"parameters: {_millions(counts.total)}; a token meets {_millions(counts.active)}; "
        f"trained {_millions(counts.trained)}{' (adapters)' if config.lora else ''}",
        f"micro-batches: {batches.count} of at most {batches.rows} rows x {batches.row_tokens} tokens = "
        f"{batches.tokens} tokens; activation_recomputation: {config.activation_recomputation}",
        "",
        *_table(current),
        "",
        f"{'most while sampling':<44}{_gib(current.sampling_peak)}",
        f"{'most in the update':<44}{_gib(current.update_peak)}",
        f"{'with what lies unused, and the context':<44}{_gib(device.footprint(current.peak))}",
        "",
    ]
    if device.fits(current.peak):
        lines.append(f"fits: {(device.memory - device.footprint(current.peak)) / GIB:.1f} GiB to spare")
    else:
        lines.append(f"does not fit: {(device.footprint(current.peak) - device.memory) / GIB:.1f} GiB too much")
    if most is None:
        lines.append("not even one row a micro-batch fits as the recipe stands")
    else:
        lines.append(f"largest micro-batch that fits: {most.rows} rows, max_tokens_per_micro_batch: {most.tokens}")
    if suggestions:
        lines += ["", f"{'change, what costs least time first':<56}{'alone':>10}{'so far':>10}"]
        for one in suggestions:
            figures = [_gib(device.footprint(which.peak)) for which in (one.alone, one.together)]
            mark = "  fits" if device.fits(one.together.peak) else ""
            lines.append(f"{_as_overrides(one.change):<56}{figures[0]:>10}{figures[1]:>10}{mark}")
        if not device.fits(suggestions[-1].together.peak):
            lines.append("that is still too much: a larger device, a smaller model or shorter completions")
    return "\n".join(lines)


def _table(current: Estimate) -> Iterator[str]:
    peak = current.pass_peak
    for name, size in (
        ("weights", current.weights),
        ("master weights, fp32", current.masters),
        ("moments of AdamW", current.moments),
        ("reference", current.reference),
        ("cache of the sampler", current.cache),
        ("captured decoding steps", current.graphs),
        ("pass over prompts, logits (sampling)", current.prefill),
        ("gradients, fp32 (update)", current.gradients),
        ("activations kept (update)", peak.activations),
        ("logits and their gradients (update)", peak.head),
        ("at work in a layer (update)", peak.working),
        ("gradients on their way (update)", peak.gradients),
        ("in the host's memory instead", current.host),
    ):
        if size:
            yield f"{name:<44}{_gib(size)}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / 2**20:.2f} MiB"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _as_overrides(change: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in change.items()
    )
