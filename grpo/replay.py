"""Updates that were not finite: kept on disk whole, and done again to find which row and token is at fault.

Shapes: N packed tokens, B rows.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from grpo.aggregation import Counts
from grpo.batch import Minibatch
from grpo.config import Config
from grpo.loss import batch_loss
from grpo.scoring import drawn_with, score
from grpo.support import Support
from grpo.types import Batch, Origin
from grpo.update import Step, backward
from policy import PackedRows, Policy, PolicyConfig

FORMAT = 1


class NonFiniteError(RuntimeError):
    """Too many updates were not finite; the message says where they are kept."""


class ReplayError(ValueError):
    """A file that cannot be replayed; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is not finite."""

    origin: Origin
    """The completion, as in the step's rollouts."""
    token: int | None
    """Index of the first token at fault within the completion; None where only the row as a whole is."""
    token_id: int | None
    what: str
    """What is not finite there."""


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
    """Write one update with the policy as it was before it. Raises OSError where the disk refuses."""
    content = {
        "format": FORMAT,
        "number": number,
        "config": config.to_yaml(),
        "shape": policy.config.model_dump(mode="json"),
        "dtype": str(policy.dtype).removeprefix("torch."),
        "weights": {name: weight.detach().cpu() for name, weight in policy.state_dict().items()},
        "counts": asdict(step.minibatch.counts),
        "num_kept": step.num_kept,
        "entropy_coef": step.entropy_coef,
        "batches": [_as_plain(batch) for batch in step.minibatch.batches],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    try:
        torch.save(content, partial)
    except RuntimeError as error:  # torch's word for a disk that is full
        partial.unlink(missing_ok=True)
        raise OSError(str(error)) from error
    os.replace(partial, file)


def load_fault(file: Path) -> tuple[int, Policy, Step, Config]:
    """Step number, policy, update and recipe of a file of `save_fault`. Raises ReplayError."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ReplayError(f"{file} cannot be read as a skipped update: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ReplayError(f"{file} is no skipped update of this version; they are under skipped/ in a run's folder")
    policy = Policy(PolicyConfig.model_validate(content["shape"])).to(getattr(torch, content["dtype"]))
    policy.load_state_dict(content["weights"])
    step = Step(
        minibatch=Minibatch(
            batches=[_from_plain(batch) for batch in content["batches"]], counts=Counts(**content["counts"])
        ),
        num_kept=content["num_kept"],
        entropy_coef=content["entropy_coef"],
    )
    return content["number"], policy, step, Config.model_validate(yaml.safe_load(content["config"]))


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
    """Row by row, the first stage at which something is not finite: inputs, log-probabilities, loss, gradient."""
    row_N = torch.arange(len(batch.origins)).repeat_interleave(torch.tensor(batch.rows.lengths))
    for row, origin in enumerate(batch.origins):
        only = replace(
            batch,
            completion_mask_N=batch.completion_mask_N & (row_N == row),
            support=None,  # its positions are those of the whole batch
        )
        first = int(only.completion_mask_N.nonzero()[0])
        for what, value_N in _stages(policy, only, step, config):
            wrong = (~value_N.isfinite() & only.completion_mask_N).nonzero().flatten()
            if len(wrong):
                token = int(wrong[0])
                yield Fault(origin=origin, token=token - first, token_id=int(batch.token_ids_N[token]), what=what)
                break
        else:
            if not _is_gradient_finite(policy, only, step, config):
                yield Fault(origin=origin, token=None, token_id=None, what="gradient of the weights")


def _stages(policy: Policy, batch: Batch, step: Step, config: Config) -> Iterator[tuple[str, Tensor]]:
    for field in fields(batch):
        if field.name.endswith("_N") and isinstance(value := getattr(batch, field.name), Tensor):
            yield f"input {field.name.removesuffix('_N')}", value
    batch, values = score(policy, batch, drawn_with(config))
    yield "log-probability under the policy", values.logprobs_N.detach()
    yield "entropy", values.entropy_N.detach()
    logprobs_N = values.logprobs_N.detach().requires_grad_()
    terms = batch_loss(
        logprobs_N,
        values.entropy_N.detach(),
        batch,
        config,
        step.minibatch.counts,
        max_completion_length=config.max_completion_length,
    )
    yield "loss", terms.per_token_N
    (slope_N,) = torch.autograd.grad(terms.loss, logprobs_N)
    yield "gradient of the loss by the log-probability", slope_N


def _is_gradient_finite(policy: Policy, batch: Batch, step: Step, config: Config) -> bool:
    policy.zero_grad()
    backward(policy, batch, step, config)
    return all(bool(weight.grad.isfinite().all()) for weight in policy.parameters() if weight.grad is not None)


def _as_plain(batch: Batch) -> dict[str, Any]:
    """Tensors, numbers and text only, which `torch.load` reads without unpickling anything else."""
    plain: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        plain[field.name] = value.cpu() if isinstance(value, Tensor) else value
    plain["rows"] = list(batch.rows.lengths)
    plain["origins"] = [[origin.problem, origin.completion] for origin in batch.origins]
    if batch.support is not None:
        plain["support"] = [batch.support.token_ids_K.cpu(), batch.support.counts_W.cpu()]
    return plain


def _from_plain(plain: dict[str, Any]) -> Batch:
    support = plain["support"]
    return Batch(
        **{name: value for name, value in plain.items() if name not in ("rows", "origins", "support")},
        rows=PackedRows.of(plain["rows"]),
        origins=tuple(Origin(problem=problem, completion=completion) for problem, completion in plain["origins"]),
        support=None if support is None else Support(token_ids_K=support[0], counts_W=support[1]),
    )
