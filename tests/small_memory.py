"""A device with little memory, on a CPU: a policy that cannot see more than so many tokens at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from policy import Policy


@contextmanager
def room_for(policy: Policy, tokens: int, *, in_backward: bool = False) -> Iterator[list[int]]:
    """Larger passes through `policy` end as they would on a GPU, with torch's own error; gives their sizes.

    `in_backward` lets the forward pass through and fails half-way to the gradient, with some of it on the weights.
    """
    refused: list[int] = []

    def refuse(size: int) -> None:
        refused.append(size)
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} tokens.\nSee the manual.")

    def look(norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        size = len(output)
        if size <= tokens:
            return
        if not in_backward:
            refuse(size)
        if output.requires_grad:
            output.register_hook(lambda gradient: refuse(size))

    hook = policy.norm.register_forward_hook(look)
    try:
        yield refused
    finally:
        hook.remove()
