"""How one tensor lies over ranks: whole on each, or a piece on each (grpo/fsdp.py). What an optimizer needs to know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from grpo.distributed import Ranks


class Layout(Protocol):
    """Where the parts of weights, gradients, masters and moments are; all lie alike."""

    def own(self, tensor: Tensor) -> Tensor:
        """What this rank holds of a parameter or its gradient, a plain tensor that shares its memory."""
        ...

    def join(self, parameter: Tensor, part: Tensor) -> Tensor:
        """The whole, of each rank's part of a tensor that lies as `parameter` does; all ranks call it."""
        ...

    def cut(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """This rank's part of a whole that is to lie as `parameter` does."""
        ...

    def sum_up(self, gradients: Sequence[Tensor], loss: Tensor, ranks: Ranks) -> None:
        """Add gradients of micro-batches and the loss up over ranks, in place, where the backward pass has not."""
        ...

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Of all gradients together, given this rank's parts; the same on all ranks."""
        ...


class Whole:
    """Every rank holds everything."""

    def own(self, tensor: Tensor) -> Tensor:
        """The tensor itself."""
        return tensor

    def join(self, parameter: Tensor, part: Tensor) -> Tensor:
        """The part is the whole."""
        return part

    def cut(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """The whole is the part."""
        return whole

    def sum_up(self, gradients: Sequence[Tensor], loss: Tensor, ranks: Ranks) -> None:
        """One message for all: the loss is divided by the tokens of all ranks already."""
        ranks.sum_([*gradients, loss])

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """See `Layout.norm`."""
        return torch.nn.utils.get_total_norm(gradients, foreach=True)
