"""Policies to and from Hugging Face folders: `config.json`, `model.safetensors` (sharded or not); from GGUF too.

All families share the names, and the table of names is one function, `checkpoint_tensors`: our stacked experts are a
checkpoint's separate ones, and an MTP module's shared embedding and head stand in it a second time, as in DeepSeek-V3's
own files. Nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from policy.config import PolicyConfig, ShapeError
from policy.gguf import GgufError, find_gguf, read_gguf
from policy.lora import merged_parameters
from policy.model import Policy, cast_weights

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


class CheckpointError(Exception):
    """A checkpoint that cannot be read or does not fit; the message says which file and tensor."""


def save(policy: Policy, path: Path | str, *, dtype: torch.dtype | None = None) -> None:
    """Write `config.json` and `model.safetensors` into `path`, readable by transformers and vLLM as they are.

    `dtype` converts the weights (by default they stay as they are); correction biases are always fp32. Adapters are
    merged into the weights that they adapt.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in checkpoint_tensors(policy):
        keep = name.endswith("e_score_correction_bias")
        tensors[name] = tensor.detach().to("cpu", None if keep else dtype).contiguous().clone()
    values = policy.config.to_hf() | {"dtype": str(dtype or policy.dtype).removeprefix("torch.")}
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load(path_or_id: Path | str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Policy:
    """The policy in a Hugging Face folder, in a GGUF file (or a folder with nothing else), or of a hub id.

    `dtype` None keeps the checkpoint's own (fp32 for GGUF). MTP modules that `config.json` counts but the files lack
    are left out, since transformers drops them when it saves. Raises CheckpointError for a missing or damaged file, for
    a tensor that is missing, of another shape or has no place; ShapeError for an architecture that is not supported.
    """
    folder = resolve_folder(path_or_id)
    config, stored = _read_gguf(folder) or (load_config(folder), read_tensors(folder))
    with torch.device("meta"):
        policy = Policy(_without_absent_mtp(config, stored))
    policy.to_empty(device=device)
    policy.tie_weights()
    cast_weights(policy, dtype or stored["model.embed_tokens.weight"].dtype)
    restore(policy, stored, where=str(folder))
    return policy


def restore(policy: Policy, stored: Mapping[str, Tensor], *, where: str) -> None:
    """Copy a checkpoint's tensors into a policy of the same shape without adapters, in place."""
    places = dict(checkpoint_tensors(policy))
    if homeless := {name for name in stored.keys() - places.keys() if _is_of_the_trunk(name, policy.config)}:
        raise CheckpointError(
            f"{where}: {CONFIG} leaves no place for {len(homeless)} tensors, such as {min(homeless)!r}; without them "
            "this would be another model"
        )
    for name, ours in places.items():
        theirs = stored.get(name)
        if theirs is None and _is_second_copy(name, policy.config):
            continue
        if theirs is None:
            raise CheckpointError(f"{where} has no tensor {name!r}; is it a checkpoint of another model?")
        if theirs.shape != ours.shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(theirs.shape)}, but {CONFIG} asks for {list(ours.shape)}"
            )
        with torch.no_grad():
            ours.copy_(theirs)


def checkpoint_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint by its Hugging Face name; each is a view of the policy's own memory, unless it is
    merged with an adapter.
    """
    config = policy.config
    yield "model.embed_tokens.weight", policy.embed_tokens.weight
    yield "model.norm.weight", policy.norm.weight
    if not config.tie_word_embeddings:
        yield "lm_head.weight", policy.lm_head.weight
    for index, layer in enumerate(policy.layers):
        yield from _block_tensors(f"model.layers.{index}.", layer)
    for index, module in enumerate(policy.mtp, start=config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for name, tensor in module.named_parameters():
            if not name.startswith(("block.", "norm.")):
                yield prefix + name, tensor
        yield prefix + "embed_tokens.weight", policy.embed_tokens.weight
        yield prefix + "shared_head.norm.weight", module.norm.weight
        yield prefix + "shared_head.head.weight", policy.lm_head.weight
        yield from _block_tensors(prefix, module.block)


def load_config(folder: Path) -> PolicyConfig:
    """The shape in a folder's `config.json`."""
    try:
        values: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG}; a Hugging Face model folder is needed") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / CONFIG} is not valid JSON: {error}") from None
    return _shape_of(values, where=folder / CONFIG)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors file or shards."""
    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    stored: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for file in files:
            if not file.is_file():
                raise CheckpointError(f"{file} is missing; the checkpoint is incomplete (only safetensors are read)")
            try:
                reader = stack.enter_context(safe_open(file, framework="pt"))
                stored.update({name: reader.get_tensor(name) for name in reader.keys()})  # noqa: SIM118
            except SafetensorError as error:
                raise CheckpointError(f"{file} is damaged or half-written: {error}") from None
    return stored


def resolve_folder(path_or_id: Path | str) -> Path:
    """A local folder or GGUF file as it is; a hub id through the Hugging Face cache (downloaded where that can be)."""
    folder = Path(path_or_id)
    if folder.is_dir() or find_gguf(folder):
        return folder
    text = os.fspath(path_or_id)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise CheckpointError(f"no folder {text!r}; give a folder with a {CONFIG}, or a hub id such as 'owner/name'")
    return _download(text, ["*.json", "*.safetensors", "*.jinja", "tokenizer*"])


def resolve_shape(path_or_id: Path | str) -> PolicyConfig:
    """The shape of a local folder's or a hub id's model, from its `config.json` alone (a GGUF file is read whole).

    Raises CheckpointError and ShapeError as `load` does.
    """
    folder = Path(path_or_id)
    if folder.is_dir() or find_gguf(folder):
        read = _read_gguf(folder)
        return read[0] if read is not None else load_config(folder)
    text = os.fspath(path_or_id)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        return load_config(resolve_folder(text))  # which says what is allowed
    return load_config(_download(text, [CONFIG]))


def _download(text: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"no folder {text!r} here, and the hub did not give a model of that id: {error}"
        ) from None


def _block_tensors(prefix: str, block: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*merged_parameters(block), *block.named_buffers()):
        if name == "mlp.experts.gate_up_proj":
            for expert, gate_up in enumerate(tensor.detach()):
                gate, up = gate_up.chunk(2, dim=0)
                yield f"{prefix}mlp.experts.{expert}.gate_proj.weight", gate
                yield f"{prefix}mlp.experts.{expert}.up_proj.weight", up
        elif name == "mlp.experts.down_proj":
            for expert, down in enumerate(tensor.detach()):
                yield f"{prefix}mlp.experts.{expert}.down_proj.weight", down
        else:
            yield prefix + name, tensor


def _read_gguf(path: Path) -> tuple[PolicyConfig, dict[str, Tensor]] | None:
    """Shape and tensors where `path` is or holds a GGUF file."""
    try:
        file = find_gguf(path)
        if file is None:
            return None
        values, stored = read_gguf(file)
    except GgufError as error:
        raise CheckpointError(str(error)) from None
    return _shape_of(values, where=file), stored


def _shape_of(values: dict[str, Any], where: Path) -> PolicyConfig:
    try:
        return PolicyConfig.from_hf(values)
    except ShapeError:
        raise
    except ValueError as error:
        raise ShapeError(f"{where}: {error}") from None


def _without_absent_mtp(config: PolicyConfig, stored: Mapping[str, Tensor]) -> PolicyConfig:
    first = f"model.layers.{config.num_hidden_layers}.eh_proj.weight"
    return config if first in stored else config.model_copy(update={"num_nextn_predict_layers": 0})


def _is_of_the_trunk(name: str, config: PolicyConfig) -> bool:
    """Whether a tensor belongs to one of the policy's layers and is no table that follows from the shape."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return found is not None and int(found[1]) < config.num_hidden_layers and not name.endswith("rotary_emb.inv_freq")


def _is_second_copy(name: str, config: PolicyConfig) -> bool:
    """Whether a tensor only repeats the trunk's embedding or head inside an MTP module."""
    mtp = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return name in {f"model.layers.{k}.{tail}.weight" for k in mtp for tail in ("embed_tokens", "shared_head.head")}
