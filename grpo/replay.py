"""Updates that were not finite: kept on disk whole, and done again to find which row and token is at fault.

Shapes: N packed tokens, B rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from grpo.aggregation import Counts
from grpo.batch import Minibatch
from grpo.config import Config
from grpo.memory import is_by_token
from grpo.scoring import drawn_with, score
from grpo.support import Support
from grpo.types import Batch, Origin
from grpo.update import Step, backward
from policy import PackedRows, Policy, PolicyConfig
from policy.packing import Wanted

FORMAT = "grpo update 2"


class NonFiniteError(RuntimeError):
    """Too many updates were not finite; the message says where they are kept."""


class ReplayError(ValueError):
    """A file that cannot be replayed; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is not finite."""

    origin: Origin
    """The completion, as in the step's rollouts."""
    token: int
    """Index within the completion: up to here it is not finite, without this token it is."""
    token_id: int
    what: str
    """The first quantity of the completion that is not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """A skipped update, done again."""

    number: int
    """Step of the run."""
    loss: float
    grad_norm: float
    """Of this rank's gradient, before clipping."""
    num_rows: int
    faults: list[Fault]


def save_fault(file: Path, *, policy: Policy, step: Step, config: Config, number: int) -> None:
    """Write one update with the policy as it was before it: as safetensors, what is no tensor as JSON in the header.

    Raises OSError where the disk refuses.
    """
    tensors = {f"weights.{name}": weight.detach() for name, weight in policy.state_dict().items()}
    batches = []
    for index, batch in enumerate(step.minibatch.batches):
        tensors |= {f"batches.{index}.{name}": tensor for name, tensor in _tensors_of(batch).items()}
        origins = [[origin.problem, origin.completion] for origin in batch.origins]
        batches.append({"rows": list(batch.rows.lengths), "origins": origins})
        if (shared := batch.rows.shared) is not None:
            batches[-1] |= {"prefixes": list(shared.prefix_rows.lengths), "prefix_of_row": list(shared.prefix_of_row)}
    content = {
        "number": number,
        "config": config.to_yaml(),
        "shape": policy.config.model_dump(mode="json"),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "counts": asdict(step.minibatch.counts),
        "num_kept": step.num_kept,
        "entropy_coef": step.entropy_coef,
        "batches": batches,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    try:
        # Cloned: tied weights share memory, which the format refuses.
        save_file(
            {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
            partial,
            metadata={"format": FORMAT, "update": json.dumps(content)},
        )
    except SafetensorError as error:  # its word for a disk that is full
        partial.unlink(missing_ok=True)
        raise OSError(str(error)) from error
    os.replace(partial, file)


def load_fault(file: Path) -> tuple[int, Policy, Step, Config]:
    """Step number, policy, update and recipe of a file of `save_fault`. Raises ReplayError."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ReplayError(
            f"{file} cannot be read as a skipped update ({' '.join(str(error).split())[:200]}); "
            "they are under skipped/ in a run's folder"
        ) from None
    if metadata.get("format") != FORMAT:
        raise ReplayError(f"{file} is no skipped update of this version; they are under skipped/ in a run's folder")
    content = json.loads(metadata["update"])
    policy = Policy(PolicyConfig.model_validate(content["shape"])).to(getattr(torch, content["dtype"]))
    policy.load_state_dict(_below("weights.", tensors))
    config = Config.model_validate(yaml.safe_load(content["config"]))
    policy.residual_in_fp32 = config.residual_in_fp32
    batches = [_to_batch(plain, _below(f"batches.{index}.", tensors)) for index, plain in enumerate(content["batches"])]
    step = Step(
        minibatch=Minibatch(batches=batches, counts=Counts(**content["counts"])),
        num_kept=content["num_kept"],
        entropy_coef=content["entropy_coef"],
    )
    return content["number"], policy, step, config


def replay(file: Path) -> Replay:
    """Do a skipped update again, without taking the step, and look for what is not finite. Raises ReplayError."""
    number, policy, step, config = load_fault(file)
    loss, faults = 0.0, list[Fault]()
    for batch in step.minibatch.batches:
        loss += float(backward(policy, batch, step, config).loss.detach())
    gradients = [weight.grad for weight in policy.parameters() if weight.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
    for batch in step.minibatch.batches:
        faults += _faults(policy, batch, step, config)
    rows = sum(len(batch.origins) for batch in step.minibatch.batches)
    return Replay(number=number, loss=loss, grad_norm=norm, num_rows=rows, faults=faults)


def _faults(policy: Policy, batch: Batch, step: Step, config: Config) -> Iterator[Fault]:
    """Each row by itself, since rows of one pass spoil each other: nan times a weight of 0 is nan."""
    for row, origin in enumerate(batch.origins):
        length = batch.rows.lengths[row]
        alone = _cut(batch, row, length)
        what = _fault_of(policy, alone, step, config)
        if what is None:
            continue
        prompt = int(alone.completion_mask_N.nonzero()[0])
        # The shortest beginning that is at fault: within a row a token spoils those before it, too.
        fine, wrong = prompt, length
        while wrong - fine > 1:
            middle = (fine + wrong) // 2
            if _fault_of(policy, _cut(batch, row, middle), step, config) == what:
                wrong = middle
            else:
                fine = middle
        token_id = int(alone.token_ids_N[wrong - 1])
        yield Fault(origin=origin, token=wrong - 1 - prompt, token_id=token_id, what=what)


def _cut(batch: Batch, row: int, length: int) -> Batch:
    """The first `length` tokens of one row as a batch of its own."""
    start, wanted_N = batch.rows.starts[row], batch.completion_mask_N
    place = slice(start, start + length)
    cut: dict[str, Any] = {field.name: getattr(batch, field.name) for field in fields(batch)}
    for name, value in cut.items():
        if isinstance(value, Tensor):
            cut[name] = value[place] if is_by_token(name) else value[row : row + 1]
    if batch.support is not None:
        before, own = int(wanted_N[:start].sum()), int(wanted_N[place].sum())
        counts_W = batch.support.counts_W
        first, last = int(counts_W[:before].sum()), int(counts_W[: before + own].sum())
        cut["support"] = Support(
            token_ids_K=batch.support.token_ids_K[first:last], counts_W=counts_W[before : before + own]
        )
    rows = PackedRows.of([length])
    learned = Wanted.of(cut["completion_mask_N"], rows)
    return Batch(**(cut | {"rows": rows, "learned": learned, "origins": (batch.origins[row],)}))


def _fault_of(policy: Policy, batch: Batch, step: Step, config: Config) -> str | None:
    """The first quantity on the way to the gradient that is not finite; None where all are."""
    for name, value in _quantities(policy, batch, step, config):
        if not value.isfinite().all():
            return name
    return None


def _quantities(policy: Policy, batch: Batch, step: Step, config: Config) -> Iterator[tuple[str, Tensor]]:
    found, values = score(policy, batch, drawn_with(config))
    yield "log-probability under the policy", values.logprobs_N
    yield "entropy", values.entropy_N
    for field in fields(batch):  # some of which came from the same policy
        if isinstance(value := getattr(batch, field.name), Tensor):
            yield f"given {field.name.rpartition('_')[0]}", value
    policy.zero_grad()
    yield "loss", backward(policy, found, step, config).loss
    for name, weight in policy.named_parameters():
        if weight.grad is not None:
            yield f"gradient of {name}", weight.grad


def _tensors_of(batch: Batch) -> dict[str, Tensor]:
    """By field; those of the support under its own fields' names."""
    found = {field.name: getattr(batch, field.name) for field in fields(batch)}
    if batch.support is not None:
        found |= {field.name: getattr(batch.support, field.name) for field in fields(batch.support)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _to_batch(plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Batch:
    support = {field.name: tensors[field.name] for field in fields(Support) if field.name in tensors}
    rows = PackedRows.of(
        plain["rows"], prefixes=plain.get("prefixes", ()), prefix_of_row=plain.get("prefix_of_row", ())
    )
    return Batch(
        **{name: tensor for name, tensor in tensors.items() if name not in support},
        rows=rows,
        learned=Wanted.of(tensors["completion_mask_N"], rows),
        origins=tuple(Origin(problem=problem, completion=completion) for problem, completion in plain["origins"]),
        support=Support(**support) if support else None,
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
