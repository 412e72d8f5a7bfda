"""`grpo plan`: a recipe's needs as a person reads them, and what to change where a device is too small."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from grpo.config import Config, ConfigError, load_config
from grpo.countdown import generate_problems
from grpo.data import to_problem
from grpo.plan import GIB, Device, Estimate, MicroBatches, estimate
from grpo.plan_changes import Suggestion, largest_micro_batch, suggest
from grpo.pretrain import base_shape
from grpo.prompts import render_prompt
from grpo.shares import Spread, Way, read_launcher_file
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
    num_processes: int | None = None,
    weights: str | None = None,
    launcher_file: Path | None = None,
) -> Told:
    """Read a recipe and the shape of its model, and nothing else of it, and say what that needs.

    `weights` is a `Way`, or `launcher_file` says it, and the number of processes unless that is given. The device is a
    GPU where one is here or `memory_gib` is given, unless the recipe says `device: cpu`. Raises ConfigError,
    CheckpointError and ShapeError.
    """
    config = load_config(recipe, overrides)
    is_gpu = config.device != "cpu" and (torch.cuda.is_available() or memory_gib is not None)
    device = Device.detect(is_gpu=is_gpu, memory_gib=memory_gib, name=device_name)
    shape, longest = _shape_of(config)
    given = prompt_tokens or longest or DEFAULT_PROMPT_TOKENS
    # A prompt that leaves no room for a completion is refused when it is asked.
    given = max(1, min(given, shape.max_position_embeddings - config.max_completion_length))
    spread = _spread(num_processes, weights, launcher_file)
    try:
        current = estimate(config, shape, device, prompt_tokens=given, spread=spread)
    except LoraError as error:
        raise ConfigError(str(error)) from None
    suggestions = suggest(current, shape, device, prompt_tokens=given)
    text = describe(current, device, suggestions, largest_micro_batch(current, shape, device, prompt_tokens=given))
    if not device.fits(current.peak) and spread.num_processes > 1:
        text = "\n".join([text, *_other_ways(current, shape, device, prompt_tokens=given)])
    return Told(text=text, fits=device.fits(current.peak))


def _other_ways(current: Estimate, shape: PolicyConfig, device: Device, *, prompt_tokens: int) -> Iterator[str]:
    """What the same recipe takes with weights kept otherwise, where it goes with that."""
    yield f"\n{'with weights kept otherwise':<56}{'alone':>10}"
    for way in get_args(Way):
        if way == current.spread.way:
            continue
        spread = replace(current.spread, way=way)
        try:
            other = estimate(current.config, shape, device, prompt_tokens=prompt_tokens, spread=spread)
        except ConfigError as error:
            yield f"--weights {way}: {error}"
            continue
        mark = "  fits" if device.fits(other.peak) else ""
        yield f"{f'--weights {way}':<56}{_gib(device.footprint(other.peak)):>10}{mark}"


def _spread(num_processes: int | None, weights: str | None, launcher_file: Path | None) -> Spread:
    """Raises ConfigError for a way that there is not, or one said twice."""
    if launcher_file is not None:
        if weights is not None:
            raise ConfigError(
                f"--weights {weights} and --accelerate {launcher_file} both say how weights are kept; give one"
            )
        spread = read_launcher_file(launcher_file)
        return spread if num_processes is None else replace(spread, num_processes=num_processes)
    for way in get_args(Way):
        if way == (weights or "whole"):
            return Spread(way=way, num_processes=num_processes or 1)
    raise ConfigError(f"--weights must be one of {', '.join(get_args(Way))}, got {weights!r}")


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
        *_spread_lines(current),
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


def _spread_lines(current: Estimate) -> Iterator[str]:
    """How the policy lies over ranks, and what prompts that are shared save."""
    spread, sharing, batches = current.spread, current.sharing, current.micro_batches
    if spread.num_processes > 1 or spread.way != "whole":
        kept = "all of the policy" if spread.way == "whole" else f"its part of the policy ({spread.way})"
        lines = f"processes: {spread.num_processes}, each with {kept}"
        if current.share.block:
            lines += f"; the largest block put together takes {_gib(current.share.block)}"
        yield lines
    if sharing is not None:
        yield (
            f"share_prompts: {sharing.tokens} tokens in {sharing.count} micro-batches, where each row by itself has "
            f"{sharing.alone} in {batches.count};"
        )
        yield (
            f"  {1 - sharing.tokens / sharing.alone:.0%} fewer, activations kept at most "
            f"{_gib(sharing.activations)}; planned below as if each row went by itself"
        )


def _table(current: Estimate) -> Iterator[str]:
    peak, share = current.pass_peak, current.share
    is_fp32 = current.config.dtype == "float32" or current.spread.way == "fsdp2"
    for name, size in (
        ("weights" + (", fp32" if is_fp32 else ""), share.weights),
        ("master weights, fp32", share.masters),
        ("moments of AdamW", share.moments),
        ("copy of the weights to sample from", share.sampler),
        ("reference", share.reference),
        ("cache of the sampler", current.cache),
        ("captured decoding steps", current.graphs),
        ("pass over prompts, logits (sampling)", current.prefill),
        ("gradients, fp32 (update)", share.gradients),
        ("weights put together (update)", share.gathered),
        ("gradients between ranks (update)", share.buffers),
        ("activations kept (update)", peak.activations),
        ("logits and their gradients (update)", peak.head),
        ("at work in a layer (update)", peak.working),
        ("gradients on their way (update)", peak.gradients),
        ("in the host's memory instead", share.host),
    ):
        if size:
            yield f"{name:<44}{_gib(size)}"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _as_overrides(change: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in change.items()
    )
