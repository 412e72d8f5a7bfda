"""Low-rank adapters (Hu et al., 2021): W x + alpha/r B A x on the trunk's linear layers, with W frozen.

A small layer of our own instead of peft's, since decoding reads MLA's up-projection as a matrix and not through a
module's call: `LoraLinear.weight` is the adapted matrix there. Files are peft's, so that peft loads what is saved here.
There is no dropout: the policy that samples and the one that is trained would no longer be the same.

Beside experts only attention is adapted: peft takes the name of a dense feed-forward's layer there for the experts'
stacked weights, so that files with such adapters would mean something else to it.

Shapes: N tokens, I and O widths in and out, R rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from policy.model import Policy

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model.model."
"""What peft puts before the name of a module of a causal language model's trunk."""


class LoraError(ValueError):
    """Adapters that do not fit the policy; the message names the key or file."""


class LoraConfig(BaseModel):
    """The `lora` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r: int = Field(default=16, ge=1, description="rank of the adapters")
    alpha: float = Field(default=32, gt=0, description="the adapters' output is multiplied by alpha / r")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        default="all-linear", description="last names of the linear layers to adapt, such as q_proj"
    )


class LoraLinear(nn.Module):
    """A linear layer that is frozen, and its adapter; at first the adapter adds 0."""

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, config.alpha / config.r
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        bound = 1 / math.sqrt(base.in_features)  # as peft draws it
        drawn_RI = torch.empty(config.r, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(drawn_RI.to(**like))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.r, **like))

    def forward(self, x_NI: Tensor) -> Tensor:
        """[N, I] to [N, O]."""
        # A view of its own: the two gradients that the input gets from here are added up before those from layers
        # beside. ZeRO-3's hooks around modules have it so, and the order of a sum is its rounding.
        x_NI = x_NI.view_as(x_NI)
        out: Tensor = self.base(x_NI) + self.scale * F.linear(F.linear(x_NI, self.lora_A), self.lora_B)
        return out

    @property
    def weight(self) -> Tensor:
        """The adapted matrix [O, I]; the sum is made in fp32."""
        weight_OI = self.base.weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float())
        return weight_OI.to(self.base.weight.dtype)


def add_adapters(policy: Policy, config: LoraConfig, seed: int) -> None:
    """Adapt the linear layers that `config` names, in place, and freeze all else. Raises LoraError for a wrong name."""
    found = [
        (name, module)
        for name, module in policy.layers.named_modules()
        if isinstance(module, nn.Linear) and (".self_attn." in name or not policy.moe_layers)
    ]
    last_names = sorted({_last(name) for name, _ in found})
    targets = last_names if config.target_modules == "all-linear" else config.target_modules
    if unknown := [target for target in targets if target not in last_names]:
        raise LoraError(f"lora.target_modules names {', '.join(unknown)}; this model takes {', '.join(last_names)}")
    policy.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in found:
        if _last(name) in targets:
            parent = policy.layers.get_submodule(name.rpartition(".")[0])
            setattr(parent, _last(name), LoraLinear(module, config, generator))


def adapters(policy: Policy) -> dict[str, LoraLinear]:
    """The adapted layers by their Hugging Face names within the trunk, such as `layers.0.self_attn.q_proj`."""
    return {
        f"layers.{name}": module for name, module in policy.layers.named_modules() if isinstance(module, LoraLinear)
    }


def merged_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and weights as if no layer had an adapter: adapted layers give their adapted matrix."""
    adapted = {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)}
    for name, weight in module.named_parameters():
        owner, _, own = name.rpartition(".")
        if owner.removesuffix(".base") in adapted and own in ("weight", "bias"):
            layer = adapted[owner.removesuffix(".base")]
            yield f"{owner.removesuffix('.base')}.{own}", layer.weight if own == "weight" else weight
        elif owner not in adapted:
            yield name, weight


def save_adapters(policy: Policy, folder: Path, config: LoraConfig, base_model: str | None) -> None:
    """Write the adapters as peft does; `base_model` is the folder or hub id that they belong to."""
    folder.mkdir(parents=True, exist_ok=True)
    found = adapters(policy)
    tensors = {
        f"{PEFT_PREFIX}{name}.{matrix}.weight": getattr(layer, matrix).detach().cpu().contiguous().clone()
        for name, layer in found.items()
        for matrix in ("lora_A", "lora_B")
    }
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"model.{name}" for name in found],
        "inference_mode": True,
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def load_adapters(policy: Policy, folder: Path) -> None:
    """Copy saved adapters into those of a policy, in place. Raises LoraError where they are not the same layers."""
    stored = load_file(folder / ADAPTER_WEIGHTS)
    ours = {
        f"{PEFT_PREFIX}{name}.{matrix}.weight": getattr(layer, matrix)
        for name, layer in adapters(policy).items()
        for matrix in ("lora_A", "lora_B")
    }
    if differing := sorted(ours.keys() ^ stored.keys()):
        raise LoraError(f"{folder / ADAPTER_WEIGHTS} adapts other layers than the policy, such as {differing[0]}")
    for name, weight in ours.items():
        if weight.shape != stored[name].shape:
            raise LoraError(
                f"{folder / ADAPTER_WEIGHTS}: {name} is {list(stored[name].shape)} there and {list(weight.shape)} here"
            )
        with torch.no_grad():
            weight.copy_(stored[name])


def _last(name: str) -> str:
    return name.rpartition(".")[2]
