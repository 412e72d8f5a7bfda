"""What one of several ranks holds of a policy, its gradients and its optimizer's state: the part of a plan that depends
on how weights are kept over ranks (grpo/weights.py).

Counted tensor by tensor as FSDP2 and DeepSpeed cut them, for the first rank: no other holds more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

from grpo.config import Config, ConfigError
from grpo.optimizer_8bit import BYTES_PER_MOMENT
from grpo.optimizers import check_in_pieces
from grpo.weights import sampler_device
from policy import PolicyConfig
from policy.parameter_count import ParameterShape, parameter_shapes

Way = Literal["whole", "fsdp2", "zero2", "zero3"]
"""`Ranks.sharding`, and `whole` where that is None."""
FULL = 4
"""Bytes of a number in fp32."""
BUCKET = 5 * 10**8
"""Numbers of DeepSpeed's buffer for gradients (`reduce_bucket_size`), made whole however small the policy is."""
LIVE = 10**9
"""Numbers that ZeRO-3 keeps put together at most (`stage3_max_live_parameters`); what the backward pass will ask for
within as many it does not take apart (`stage3_max_reuse_distance`).
"""
WHOLE_BELOW = 10**5
"""Numbers of a tensor below which ZeRO-3 leaves it together (`stage3_param_persistence_threshold`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """How a policy lies over ranks."""

    way: Way = "whole"
    num_processes: int = 1
    reshard_after_forward: bool = True
    """Whether FSDP2 takes a block apart between its forward and its backward pass."""


ALONE = Spread()
"""One rank, which holds everything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What the first rank holds, in bytes."""

    weights: int
    """Of the policy that is trained, in the policy's dtype; under FSDP2 fp32 pieces, which are their own masters."""
    masters: int
    """fp32 copies of trained weights."""
    moments: int
    """Of AdamW, both."""
    gradients: int
    """Summed up over micro-batches, in fp32."""
    reference: int
    """Of the KL penalty, where the recipe has one that stays on the device."""
    sampler: int
    """Copies that are there to be sampled from, on the device."""
    host: int
    """Masters, moments and copies that lie in the host's memory instead."""
    gathered: int
    """Put together of weights in pieces during a pass, at most."""
    block: int
    """Of it, the largest block."""
    buffers: int
    """Gradients on their way between ranks, at most; 0 where they travel after the last micro-batch."""
    beside_trial: int
    """What a pass over pieces takes that one over the sampler's whole weights does not (grpo/trial.py): of `gathered`,
    `buffers` and `gradients` all that is not there between steps."""


def share_of(config: Config, shape: PolicyConfig, spread: Spread, *, is_gpu: bool) -> Share:
    """What a recipe has the first rank hold.

    Raises ConfigError for keys that do not go with weights in pieces, LoraError for adapters of what is not there.
    """
    tensors = parameter_shapes(shape, config.lora)
    itemsize = FULL if config.dtype == "float32" else 2
    total, trained = (sum(t.numel for t in some) for some in (tensors, _trained(tensors)))
    is_copied = config.beta > 0 and config.lora is None
    device = sampler_device(config, torch.device("cuda" if is_gpu else "cpu"))
    copies = itemsize * (total if spread.way in ("fsdp2", "zero3") else 0)
    copies += itemsize * trained if config.rollout_lag else 0
    on_host = copies if is_gpu and device.type == "cpu" else 0
    reference = itemsize * total if is_copied and not (config.offload_ref_model and is_gpu) else 0
    if spread.way == "whole":
        masters = FULL * trained if itemsize < FULL else 0
        is_8bit = config.optimizer == "adamw_8bit"
        moments = int(2 * trained * (BYTES_PER_MOMENT if is_8bit else FULL))
        offloaded = masters + moments if config.offload_optimizer and is_gpu else 0
        return Share(
            weights=itemsize * total,
            masters=0 if offloaded else masters,
            moments=0 if offloaded else moments,
            gradients=FULL * trained,
            reference=reference,
            sampler=copies - on_host,
            host=on_host + offloaded,
            gathered=0,
            block=0,
            buffers=0,
            beside_trial=0,
        )
    _check(config, spread)
    if spread.way == "fsdp2" and is_copied:
        reference = itemsize * sum(_rows_cut(t, spread) for t in tensors)
    pieces = _piece(tensors, spread)
    gathered, block = _gathered(config, tensors, spread, itemsize)
    gradients, buffers = FULL * _gradients(tensors, spread, itemsize), _buffers(tensors, spread, itemsize)
    beside = gathered + buffers + gradients
    if spread.way == "zero3":  # DeepSpeed makes room for gradients at the start; embedding and head stay together
        beside -= gradients + itemsize * (BUCKET + sum(tensor.numel for tensor in tensors if not tensor.block))
    return Share(
        weights=_weights(tensors, spread, itemsize),
        masters=0 if spread.way == "fsdp2" else FULL * pieces,
        moments=2 * FULL * pieces,
        gradients=gradients,
        reference=reference,
        sampler=copies - on_host,
        host=on_host,
        gathered=gathered,
        block=block,
        buffers=buffers,
        beside_trial=beside,
    )


def read_launcher_file(file: Path) -> Spread:
    """What an accelerate file has its processes do. Raises ConfigError for one that cannot be read, or asks for what is
    not done here.
    """
    try:
        values = yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no launcher's file {str(file)!r}; see recipes/accelerate") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{file} cannot be read as accelerate's YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or "distributed_type" not in values:
        raise ConfigError(f"{file} is no file of accelerate's (it has no distributed_type); see recipes/accelerate")
    fsdp, deepspeed = (_section(values, key) for key in ("fsdp_config", "deepspeed_config"))
    way: Way = "whole"
    match values["distributed_type"]:
        case "FSDP" if fsdp.get("fsdp_version") == 2:
            way = "fsdp2"
        case "DEEPSPEED" if deepspeed.get("zero_stage") in (2, 3):
            way = "zero2" if deepspeed["zero_stage"] == 2 else "zero3"
        case "FSDP" | "DEEPSPEED" as kind:
            raise ConfigError(
                f"{file}: distributed_type {kind} needs fsdp_config.fsdp_version: 2, or deepspeed_config.zero_stage: 2 "
                "or 3; without it, say --weights and --processes"
            )
    return Spread(
        way=way,
        num_processes=int(values.get("num_processes") or 1),
        reshard_after_forward=bool(fsdp.get("fsdp_reshard_after_forward", True)),
    )


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = values.get(key)
    return section if isinstance(section, dict) else {}


def _check(config: Config, spread: Spread) -> None:
    """As those refuse it who keep weights so."""
    check_in_pieces(config)
    if spread.way == "fsdp2" and config.offload_ref_model:
        raise ConfigError("with weights in pieces the reference is in pieces too: offload_ref_model must be false")
    if spread.way == "zero3" and config.activation_recomputation == "selective":
        raise ConfigError(
            "ZeRO-3 cannot make single outputs again: set activation_recomputation to none or full, got selective"
        )


def _trained(tensors: Iterable[ParameterShape]) -> list[ParameterShape]:
    return [tensor for tensor in tensors if tensor.is_trained]


def _rows_cut(tensor: ParameterShape, spread: Spread) -> int:
    """Numbers of FSDP2's piece: rows of the first dimension."""
    return -(-tensor.shape[0] // spread.num_processes) * prod(tensor.shape[1:])


def _flat_cut(tensor: ParameterShape, spread: Spread) -> int:
    """Numbers of ZeRO-3's piece."""
    return -(-tensor.numel // spread.num_processes)


def _flattened(tensors: Iterable[ParameterShape], spread: Spread) -> int:
    """Numbers of ZeRO-2's flat tensors of what is trained: of matrices and of vectors, each filled up for its cuts."""
    unit = 2 * spread.num_processes
    groups = Counter[bool]()
    for tensor in _trained(tensors):
        groups[len(tensor.shape) > 1] += tensor.numel
    return sum(-(-numel // unit) * unit for numel in groups.values())


def _piece(tensors: Iterable[ParameterShape], spread: Spread) -> int:
    """Trained numbers of this rank's piece."""
    match spread.way:
        case "fsdp2":
            return sum(_rows_cut(tensor, spread) for tensor in _trained(tensors))
        case "zero2":
            return _flattened(tensors, spread) // spread.num_processes
        case _:
            return sum(_flat_cut(tensor, spread) for tensor in _trained(tensors))


def _gradients(tensors: Iterable[ParameterShape], spread: Spread, itemsize: int) -> int:
    """Numbers of gradients summed up; in fp32 ZeRO-2 cuts a tensor that two ranks share at the step only."""
    if spread.way != "zero2" or itemsize < FULL:
        return _piece(tensors, spread)
    numbers, groups = 0, Counter[bool]()
    trained = _trained(tensors)
    for tensor in trained:
        groups[len(tensor.shape) > 1] += tensor.numel
    unit = 2 * spread.num_processes
    ends = {is_matrix: -(-numel // unit) * 2 for is_matrix, numel in groups.items()}
    starts = Counter[bool]()
    for tensor in trained:
        is_matrix = len(tensor.shape) > 1
        numbers += tensor.numel if starts[is_matrix] < ends[is_matrix] else 0
        starts[is_matrix] += tensor.numel
    return numbers


def _weights(tensors: Iterable[ParameterShape], spread: Spread, itemsize: int) -> int:
    """Bytes between passes; ZeRO-3's tensors that stay together are among what is gathered."""
    frozen = [tensor for tensor in tensors if not tensor.is_trained]
    match spread.way:
        case "fsdp2":
            return FULL * _piece(tensors, spread) + itemsize * sum(_rows_cut(tensor, spread) for tensor in frozen)
        case "zero2":
            return itemsize * (_flattened(tensors, spread) + sum(tensor.numel for tensor in frozen))
        case _:
            return itemsize * sum(_flat_cut(tensor, spread) for tensor in tensors)


def _gathered(config: Config, tensors: Iterable[ParameterShape], spread: Spread, itemsize: int) -> tuple[int, int]:
    """Bytes put together in a pass: embedding, final norm and head throughout, a block and the next one that is
    fetched ahead; and of the largest block.
    """
    if spread.way == "zero2":
        return 0, 0
    blocks = Counter[str]()
    for tensor in tensors:
        blocks[tensor.block] += tensor.numel
    roots = blocks.pop("", 0)
    largest = max(blocks.values(), default=0)
    if spread.way == "fsdp2":
        at_once = 2 * largest if spread.reshard_after_forward else sum(blocks.values())
    else:
        small = sum(t.numel for t in tensors if t.block and t.numel < WHOLE_BELOW)
        experts = sum(t.numel for t in tensors if ".experts." in t.name)
        stays = experts if config.activation_recomputation != "full" else 0
        at_once = min(sum(blocks.values()), max(LIVE, 2 * largest, small) + stays)
    return itemsize * (roots + min(at_once, sum(blocks.values()))), itemsize * largest


def _buffers(tensors: Iterable[ParameterShape], spread: Spread, itemsize: int) -> int:
    """FSDP2 sums a block's gradients in fp32 while those of the next come; DeepSpeed's buffers have one size, ZeRO-2's
    beside the largest gradient that goes in.
    """
    if spread.way == "zero2":
        return itemsize * (BUCKET + max((tensor.numel for tensor in _trained(tensors)), default=0))
    blocks = Counter[str]()
    for tensor in _trained(tensors):
        blocks[tensor.block] += tensor.numel
    largest = max(blocks.values(), default=0)
    return (itemsize + FULL) * largest + itemsize * (largest if spread.way == "fsdp2" else BUCKET)
