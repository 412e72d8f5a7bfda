"""Checkpoints of a run: whole or absent, checked when read.

A checkpoint is a folder `step_000050` that transformers and vLLM load as it is (weights in the Hugging Face layout,
tokenizer) plus `trainer.safetensors` (master weights, moments), `reference.safetensors` where the reference moves,
`sampler.safetensors` where older weights sample, `state.json`, `data.json` (questions asked, pass rates, groups not
trained on yet, old successes) and `manifest.json` (SHA-256 of every file). It is written beside its place, synced and
renamed, so that a kill at any moment leaves the last good one.

Everything else that the future depends on (seeds, learning rate) follows from the step number and the recipe.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import policy as policies
from grpo.version import versions
from grpo.weights import Weights
from policy import CheckpointError, Policy
from policy.checkpoint import load_config, read_tensors, restore
from policy.lora import LoraConfig, LoraError, adapters, load_adapters, save_adapters
from policy.tokenizer import Tokenizer

MANIFEST, STATE, TRAINER, DATA = "manifest.json", "state.json", "trainer.safetensors", "data.json"
REFERENCE, SAMPLER, ADAPTER = "reference.safetensors", "sampler.safetensors", "adapter"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The newest checkpoint that is whole."""

    path: Path
    step: int
    """Optimizer steps that were done when it was written."""
    damaged: tuple[str, ...]
    """What was wrong with newer ones, one line each."""
    state: Mapping[str, float | None] = field(default_factory=dict)
    """Numbers of the trainer, as given to `save_checkpoint`."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of what wrote it (`grpo.version.versions`); empty in one that does not say."""


def save_checkpoint(
    folder: Path,
    step: int,
    policy: Policy,
    tokenizer: Tokenizer,
    trained: Mapping[str, Tensor],
    keep: int,
    *,
    state: Mapping[str, float | None] | None = None,
    data: Mapping[str, Any] | None = None,
    reference: Mapping[str, Tensor] | None = None,
    sampler: Mapping[str, Tensor] | None = None,
    lora: LoraConfig | None = None,
    base_model: str | None = None,
) -> Path:
    """Write `folder/step_{step}` and remove all but the newest `keep`. Raises OSError where the disk refuses.

    `policy` has its weights whole, `trained` is `Optimizer.state_tensors`. `state` are numbers of the trainer that do
    not follow from the step, `data` is what the next questions depend on, as JSON; `reference` are the reference's
    weights by name, given where it moves, `sampler` those that sample where they are not the policy's. With `lora`, the
    weights are merged and the adapters to `base_model` stand by themselves in `adapter/`.
    """
    target = folder / f"step_{step:06d}"
    with written_whole(target) as temporary:
        policies.save(policy, temporary)
        if lora is not None:
            save_adapters(policy, temporary / ADAPTER, lora, base_model)
        tokenizer.save(temporary)
        save_file(dict(trained), temporary / TRAINER)
        if reference is not None:
            save_file(dict(reference), temporary / REFERENCE)
        if sampler is not None:
            save_file({name: weight.contiguous() for name, weight in sampler.items()}, temporary / SAMPLER)
        (temporary / STATE).write_text(json.dumps({"step": step, "versions": versions(), **(state or {})}) + "\n")
        (temporary / DATA).write_text(json.dumps(data) + "\n")
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        digests = {file.relative_to(temporary).as_posix(): _digest(file) for file in files}
        (temporary / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n")
    for old in _by_step(folder)[:-keep]:
        shutil.rmtree(old)
    return target


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its place, synced, once the block ends without an error.

    A write that the disk refuses leaves `target` as it was and raises OSError, whichever library made it.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # safetensors has an error of its own for it, tokenizers a bare Exception that ends in "(os error 28)".
        if isinstance(error, SafetensorError) or (type(error) is Exception and "os error" in str(error)):
            raise OSError(str(error)) from error
        raise
    _sync(target.parent)


def find_checkpoint(folder: Path) -> Found | None:
    """The newest whole checkpoint below `folder`, or None. Raises CheckpointError where all are damaged."""
    damaged: list[str] = []
    for path in reversed(_by_step(folder)):
        if fault := _fault_of(path):
            damaged.append(f"{path} is damaged ({fault}); the one before is taken")
            continue
        state = json.loads((path / STATE).read_text())
        step, wrote = int(state.pop("step")), state.pop("versions", {})
        return Found(path=path, step=step, damaged=tuple(damaged), state=state, versions=wrote)
    if damaged:
        raise CheckpointError(f"{damaged[0].split(';')[0]}, and there is no other; remove it to start anew")
    return None


def forget_checkpoints_after(folder: Path, step: int) -> None:
    """Remove what a kill left half-written and checkpoints of later steps: those are damaged, and stand in the place of
    the whole ones that are to come.
    """
    for path in [*(path for path in _by_step(folder) if _step_of(path) > step), *folder.glob(".step_*.partial")]:
        shutil.rmtree(path)


def load_checkpoint(path: Path, weights: Weights, reference: Policy | None = None) -> None:
    """Put weights, routers' biases, masters and moments back, in place; a reference too, where it had moved. Any number
    of ranks may have written it, and keep their weights otherwise.

    Raises CheckpointError for a checkpoint of another shape, before anything is changed.
    """
    policy, optimizer = weights.sampler, weights.optimizer
    theirs, ours = load_config(path).model_dump(), policy.config.model_dump()
    if differing := [f"{key} is {theirs[key]} there and {ours[key]} here" for key in ours if theirs[key] != ours[key]]:
        raise CheckpointError(
            f"{path} is of another shape ({'; '.join(differing)}); continue the run with the model that it began with, "
            "or choose another name (name=...)"
        )
    state = load_file(path / TRAINER)
    trained = {name.removeprefix("master.") for name in state if name.startswith("master.")}
    if trained != optimizer.trained:
        raise CheckpointError(
            f"{path} trained other weights, such as {min(trained ^ optimizer.trained)}; continue the run with "
            "the `lora` section that it began with, or choose another name (name=...)"
        )
    if adapters(policy):
        try:
            load_adapters(policy, path / ADAPTER)
        except LoraError as error:
            raise CheckpointError(str(error)) from None
    else:
        restore(policy, read_tensors(path), where=str(path))
    for there, here in zip(weights.policy.buffers(), policy.buffers(), strict=True):
        there.copy_(here)  # the routers' biases, which no optimizer moves
    optimizer.load_state_tensors(state)
    if reference is not None and (path / REFERENCE).is_file():
        weights.restore(reference, load_file(path / REFERENCE))


def read_sampler(path: Path) -> dict[str, Tensor]:
    """What was given to `save_checkpoint` as `sampler`."""
    return load_file(path / SAMPLER)


def read_data_state(path: Path) -> dict[str, Any]:
    """What was given to `save_checkpoint` as `data`. Raises CheckpointError for a checkpoint without it."""
    if not (path / DATA).is_file():
        raise CheckpointError(
            f"{path} has no {DATA}: an older version wrote it; begin anew under another name (name=...)"
        )
    state: dict[str, Any] = json.loads((path / DATA).read_text())
    return state


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _fault_of(path: Path) -> str | None:
    try:
        manifest: dict[str, str] = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"no readable {MANIFEST}"
    for name, digest in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        try:
            if _digest(path / name) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
