"""What the backward pass needs of a block: kept, partly made again, or all made again.

- `none` keeps everything that autograd asks for.
- `selective` keeps what matrix products and attention gave and makes again what is cheap: what RMSNorm and SwiGLU's
  activation gave, and MLA's keys and values from their latent (DeepSeek-V3, section 3.2.3). Each such place is marked
  `remade(function, ...)`; where autograd would keep such an output, it keeps how to make it.
- `full` keeps a block's input and runs the block again (Chen et al., 2016), with the experts that were chosen.

Shapes: N packed tokens, C model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Recomputation = Literal["none", "selective", "full"]
Made = TypeVar("Made", Tensor, tuple[Tensor, Tensor])


def remade(function: Callable[..., Made], *inputs: Tensor) -> Made:
    """`function(*inputs)`, made again in the backward pass where a `forgetting` block surrounds the call.

    The function must give the same for the same inputs, and nobody may change its output in place.
    """
    made = function(*inputs)
    memory = _memory.get()
    if memory is not None and torch.is_grad_enabled():
        memory.note(function, inputs, made)
    return made


class Routed(Protocol):
    """What a block tells of its router: here, the experts that it chose."""

    @property
    def experts_NK(self) -> Tensor:
        """Chosen experts, int64."""


RoutedKind = TypeVar("RoutedKind", bound=Routed)


def run_block(
    block: Callable[..., tuple[Tensor, RoutedKind | None]],
    x_NC: Tensor,
    given_experts_NK: Tensor | None,
    recomputation: Recomputation,
) -> tuple[Tensor, RoutedKind | None]:
    """`block(x_NC, given_experts_NK=...)`, keeping for the backward pass what `recomputation` says."""
    if recomputation == "none" or not torch.is_grad_enabled():
        return block(x_NC, given_experts_NK=given_experts_NK)
    if recomputation == "selective":
        with forgetting():
            return block(x_NC, given_experts_NK=given_experts_NK)
    chosen_NK = given_experts_NK

    def run(x_NC: Tensor) -> tuple[Tensor, RoutedKind | None]:
        # The second run replays the choice of the first: in bf16 a near tie could fall the other way.
        nonlocal chosen_NK
        out_NC, routed = block(x_NC, given_experts_NK=chosen_NK)
        if routed is not None:
            chosen_NK = routed.experts_NK
        return out_NC, routed

    out: tuple[Tensor, RoutedKind | None] = checkpoint(run, x_NC, use_reentrant=False, preserve_rng_state=False)
    return out


@contextmanager
def forgetting() -> Iterator[None]:
    """Within, autograd keeps recipes in the place of what `remade` gave."""
    memory = _Memory()
    token = _memory.set(memory)
    try:
        with saved_tensors_hooks(memory.pack, _unpack):
            yield
    finally:
        _memory.reset(token)
        memory.clear()


@dataclass(slots=True)
class _Recipe:
    """How to make the outputs of one call of `remade` again."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    """As packed: tensors, or portions of earlier recipes."""
    uses: int = 0
    """Portions that the backward pass has yet to ask for."""
    made: tuple[Tensor, ...] | None = None
    """The outputs, from the first use to the last."""

    def take(self, index: int) -> Tensor:
        if self.made is None:
            with torch.no_grad():
                made = self.function(*(_unpack(x) for x in self.inputs))
            self.made = made if isinstance(made, tuple) else (made,)
        taken = self.made[index]
        self.uses -= 1
        if self.uses <= 0:
            self.made = None
        return taken


@dataclass(frozen=True, slots=True)
class _Portion:
    """A view of one output of a recipe."""

    recipe: _Recipe
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Memory:
    """The recipes of one block's pass, by the memory that their outputs lie in."""

    def __init__(self) -> None:
        # The outputs are held here until the block is done, so that no address is used twice.
        self._by_address: dict[int, tuple[_Recipe, int, Tensor]] = {}

    def clear(self) -> None:
        """Let go of the outputs; autograd holds on to the pack hook, and with it to this object."""
        self._by_address.clear()

    def note(self, function: Callable[..., Any], inputs: tuple[Tensor, ...], made: Tensor | tuple[Tensor, ...]) -> None:
        recipe = _Recipe(function, tuple(self.pack(x.detach()) for x in inputs))
        for index, output in enumerate(made if isinstance(made, tuple) else (made,)):
            self._by_address[output.untyped_storage().data_ptr()] = (recipe, index, output)

    def pack(self, x: Tensor) -> Tensor | _Portion:
        found = self._by_address.get(x.untyped_storage().data_ptr()) if x.numel() else None
        if found is None:
            return x
        recipe, index, output = found
        if x.dtype != output.dtype:
            return x
        recipe.uses += 1
        return _Portion(recipe, index, x.size(), x.stride(), int(x.storage_offset()))


def _unpack(kept: Tensor | _Portion) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.recipe.take(kept.index).as_strided(kept.size, kept.stride, kept.offset)


_memory: ContextVar[_Memory | None] = ContextVar("memory", default=None)
