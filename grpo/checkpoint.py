"""Checkpoints of a run: whole or absent, checked when read.

A checkpoint is a folder `step_000050` that transformers and vLLM load as it is (weights in the Hugging Face layout,
tokenizer) plus `trainer.safetensors` (master weights, moments), `state.json` and `manifest.json` (SHA-256 of every
file). It is written beside its place, synced and renamed, so that a kill at any moment leaves the last good one.

Everything else that the future depends on (data order, seeds, learning rate) follows from the step number.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import policy as policies
from grpo.optimizer import MasterAdamW
from policy import CheckpointError, Policy
from policy.checkpoint import read_tensors, restore
from policy.tokenizer import Tokenizer

MANIFEST, STATE, TRAINER = "manifest.json", "state.json", "trainer.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The newest checkpoint that is whole."""

    path: Path
    step: int
    """Optimizer steps that were done when it was written."""
    damaged: tuple[str, ...]
    """What was wrong with newer ones, one line each."""


def save_checkpoint(
    folder: Path, step: int, policy: Policy, tokenizer: Tokenizer, optimizer: MasterAdamW, keep: int
) -> Path:
    """Write `folder/step_{step}` and remove all but the newest `keep`. Raises OSError where the disk refuses."""
    folder.mkdir(parents=True, exist_ok=True)
    target, temporary = folder / f"step_{step:06d}", folder / f".step_{step:06d}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        policies.save(policy, temporary)
        tokenizer.save(temporary)
        save_file(optimizer.state_tensors(), temporary / TRAINER)
        (temporary / STATE).write_text(json.dumps({"step": step}) + "\n")
        files = sorted(file for file in temporary.iterdir() if file.is_file())
        (temporary / MANIFEST).write_text(json.dumps({file.name: _digest(file) for file in files}, indent=2) + "\n")
        for file in [*files, temporary / MANIFEST, temporary]:
            _sync(file)
    except SafetensorError as error:  # safetensors' own word for a write that failed
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(str(error)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    _sync(folder)
    for old in _by_step(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def find_checkpoint(folder: Path) -> Found | None:
    """The newest whole checkpoint below `folder`, or None."""
    damaged: list[str] = []
    for path in reversed(_by_step(folder)):
        if fault := _fault_of(path):
            damaged.append(f"{path} is damaged ({fault}); the one before is taken")
            continue
        step = int(json.loads((path / STATE).read_text())["step"])
        return Found(path=path, step=step, damaged=tuple(damaged))
    if damaged:
        raise CheckpointError(f"{damaged[0].split(';')[0]}, and there is no other; remove it to start anew")
    return None


def load_checkpoint(path: Path, policy: Policy, optimizer: MasterAdamW) -> None:
    """Put weights, routers' biases, masters and moments back, in place."""
    restore(policy, read_tensors(path), where=str(path))
    optimizer.load_state_tensors(load_file(path / TRAINER))


def _by_step(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def _fault_of(path: Path) -> str | None:
    try:
        manifest: dict[str, str] = json.loads((path / MANIFEST).read_text())
    except (OSError, json.JSONDecodeError):
        return f"no readable {MANIFEST}"
    for name, digest in manifest.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} is not what was written"
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
