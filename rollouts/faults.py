"""Where numbers stop being numbers: a row run once more, looked at between the layers.

Shapes: N tokens of the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from policy import PackedRows, Policy
from policy.attention import Expanded


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """The first layer whose output is not all numbers."""

    layer: str
    """Its name within the policy, such as `layers.3.mlp`; `lm_head` for logits."""
    place: int
    """Index of the first token in the row at which that is so."""


@torch.inference_mode()
def first_fault(policy: Policy, token_ids: Sequence[int]) -> Fault | None:
    """Where a row's hidden states, or the logits after it, first are not all numbers; None where all are."""
    found: list[Fault] = []

    def look(layer: str, output: Tensor) -> None:
        is_sound_N = output.isfinite().flatten(1).all(dim=1)
        if not found and not is_sound_N.all():
            found.append(Fault(layer=layer, place=int(is_sound_N.int().argmin())))

    with ExitStack() as hooks:
        for name, module in _layers(policy):

            def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                look(name, output[0] if isinstance(output, tuple) else output)

            hooks.callback(module.register_forward_hook(hook).remove)
        rows = PackedRows.of([len(token_ids)], policy.device)
        token_ids_N = torch.tensor(token_ids, device=policy.device)
        hidden_NC = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows)).hidden_NC
    if not found and not policy.project(hidden_NC[-1:]).isfinite().all():
        return Fault(layer="lm_head", place=len(token_ids) - 1)
    return found[0] if found else None


def _layers(policy: Policy) -> list[tuple[str, nn.Module]]:
    """In the order in which they end: the two halves of a block, then the block."""
    layers: list[tuple[str, nn.Module]] = [("embed_tokens", policy.embed_tokens)]
    for name, block in policy.layers.named_children():
        halves = [(f"layers.{name}.{half}", getattr(block, half)) for half in ("self_attn", "mlp")]
        layers += [*halves, (f"layers.{name}", block)]
    return [*layers, ("norm", policy.norm)]
