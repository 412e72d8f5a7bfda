"""Weights of a policy, counted from its shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch

from policy.config import PolicyConfig
from policy.lora import LoraConfig, add_adapters
from policy.model import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterShape:
    """One tensor of weights."""

    name: str
    shape: tuple[int, ...]
    is_trained: bool
    """Whether it gets a gradient."""

    @property
    def numel(self) -> int:
        """Its numbers."""
        return prod(self.shape)

    @property
    def block(self) -> str:
        """The block or MTP module that it belongs to, as `layers.3`; empty for embedding, final norm and head."""
        kind, _, rest = self.name.partition(".")
        return f"{kind}.{rest.partition('.')[0]}" if kind in ("layers", "mtp") else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterCount:
    """Weights of a policy, in numbers."""

    total: int
    active: int
    """That one token meets, MTP modules included: of a layer's routed experts the K that it goes to."""
    met: int
    """Of these, what the trunk and the head multiply a token with; an embedding is looked up."""
    met_trained: int
    """Of these, what gets a gradient."""
    trained: int
    """Of all, what gets a gradient."""
    largest: int
    """Of the largest tensor that gets a gradient."""
    layers: tuple[int, ...]
    """Trained ones of each layer of the trunk; with those of MTP modules, embedding and head this is all `trained`."""
    embedding: int
    """Trained ones of the embedding, V x C or none; the head has as many, unless it is the same tensor."""


@lru_cache(maxsize=16)
def parameter_shapes(config: PolicyConfig, lora: LoraConfig | None = None) -> tuple[ParameterShape, ...]:
    """Each tensor once, of a policy of this shape made without memory. Raises LoraError where `lora` names no layer."""
    with torch.device("meta"):
        policy = Policy(config)
    if lora is not None:
        add_adapters(policy, lora, seed=0)
    return tuple(
        ParameterShape(name=name, shape=tuple(weight.shape), is_trained=weight.requires_grad)
        for name, weight in policy.named_parameters()
    )


@lru_cache(maxsize=16)
def count_parameters(config: PolicyConfig, lora: LoraConfig | None = None) -> ParameterCount:
    """Raises LoraError where `lora` names no layer of the shape."""
    tensors = parameter_shapes(config, lora)
    share = config.num_experts_per_tok / config.n_routed_experts if config.n_routed_experts else 0.0
    own = {tensor.name: tensor.numel * (share if ".experts." in tensor.name else 1.0) for tensor in tensors}
    trained = [tensor for tensor in tensors if tensor.is_trained]
    looked_up = () if config.tie_word_embeddings else ("embed_tokens.weight",)
    met = {name for name in own if name not in looked_up and not name.startswith("mtp.")}
    per_block = {f"layers.{layer}": 0 for layer in range(config.num_hidden_layers)}
    for tensor in trained:
        if tensor.block in per_block:
            per_block[tensor.block] += tensor.numel
    return ParameterCount(
        total=sum(tensor.numel for tensor in tensors),
        active=round(sum(own.values())),
        met=round(sum(own[name] for name in met)),
        met_trained=round(sum(own[tensor.name] for tensor in trained if tensor.name in met)),
        trained=sum(tensor.numel for tensor in trained),
        largest=max((tensor.numel for tensor in trained), default=0),
        layers=tuple(per_block.values()),
        embedding=0 if lora is not None else config.vocab_size * config.hidden_size,
    )
