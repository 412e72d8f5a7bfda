"""Models of llama.cpp's GGUF files, dequantised through transformers. Only read; a policy is saved as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class GgufError(Exception):
    """A GGUF file that cannot be read as a policy; the message says why."""


def find_gguf(path: Path) -> Path | None:
    """`path` if it is a GGUF file; else the one in the folder, where that has no `config.json`."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise GgufError(f"{path} has {len(files)} GGUF files; name one of them: {', '.join(f.name for f in files)}")
    return files[0] if files else None


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The mapping for `config.json`, and fp32 tensors by their Hugging Face names."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise GgufError(f"{file} needs the package gguf; install it with: pip install 'grpo-reasoning[gguf]'") from None
    from transformers import AutoModelForCausalLM

    try:
        names = {tensor.name for tensor in GGUFReader(file).tensors}
        if "rope_freqs.weight" in names:
            raise GgufError(f"{file} scales RoPE by a table, which transformers leaves out; use safetensors instead")
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, local_files_only=True
        )
    except (ValueError, KeyError, OSError) as error:
        raise GgufError(f"transformers cannot read {file}: {str(error).splitlines()[0]}") from None
    values = model.config.to_dict()
    values.pop("quantization_config", None)  # what the file was; in memory it is fp32
    return values, _separate_experts(model.state_dict())


def _separate_experts(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts under the names of a checkpoint, where transformers' module holds them stacked."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        prefix, _, kind = name.rpartition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            tensors[name] = tensor
            continue
        parts = {"gate_proj": 0, "up_proj": 1} if kind == "gate_up_proj" else {"down_proj": 0}
        for expert, weight in enumerate(tensor):
            for part, index in parts.items():
                tensors[f"{prefix}.experts.{expert}.{part}.weight"] = weight.chunk(len(parts))[index]
    return tensors
