"""Whether a micro-batch fits a rank's memory, found out without the other ranks, where weights lie in pieces.

Each pass over such weights is made of messages, in which all ranks wait for each other: one that runs out of memory
within can neither go on nor go back. So a micro-batch larger than any before is tried on the rank's whole weights
first, those that sample, forward and backward, without a message; there it can be halved as ever. Ranks then agree on
how often.

The trial's backward pass goes down to the first trained weight and leaves no gradient. What the true pass holds beside,
blocks put together, gradients and buffers (`Share.beside_trial`), is set aside meanwhile: an estimate, so memory may
still run out in the true pass. That ends the run on all ranks (`do_in_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from grpo.batch import Minibatch
from grpo.distributed import Ranks
from grpo.memory import do_in_memory, halve
from grpo.types import Batch
from grpo.weights import Weights
from policy import Policy


class Trial:
    """Tries micro-batches that are larger than any that fitted."""

    def __init__(self, weights: Weights, *, set_aside: int = 0) -> None:
        """`set_aside`: bytes of a GPU that the true pass takes beside what the trial does."""
        self._set_aside = set_aside
        self._policy, self._trained = weights.sampler, weights.optimizer.trained
        self._tokens = self._longest = 0
        """Of what fitted: tokens of a micro-batch, and of a row."""

    def fit(
        self, minibatches: Sequence[Minibatch], loss_of: Callable[[Policy, Batch], Tensor], ranks: Ranks
    ) -> tuple[list[Minibatch], int]:
        """The same rows in micro-batches that fit, and how often these were halved, on all ranks alike.

        `loss_of` is a pass that needs what an update's does; it must not wait for other ranks. Raises DeviceMemoryError
        where one row alone does not fit.
        """

        def attempt(batches: Sequence[Batch]) -> None:
            for batch in sorted(batches, key=lambda batch: len(batch.token_ids_N), reverse=True):
                self._try(batch, loss_of)

        own = 0
        for part in minibatches:
            given = [half for batch in part.batches for half in halved(batch, own)]
            own += do_in_memory(attempt, given)[2]
        most = int(ranks.max_number(own))
        if not most:
            return list(minibatches), 0
        return [
            replace(part, batches=[half for batch in part.batches for half in halved(batch, most)])
            for part in minibatches
        ], most

    def _try(self, batch: Batch, loss_of: Callable[[Policy, Batch], Tensor]) -> None:
        """Raises torch.OutOfMemoryError for a micro-batch that does not fit."""
        tokens, longest = len(batch.token_ids_N), batch.rows.longest
        if tokens <= self._tokens and longest <= self._longest:
            return
        is_gpu = self._policy.device.type == "cuda"
        with self._trainable() as first:
            aside = torch.empty(self._set_aside if is_gpu else 0, dtype=torch.uint8, device=self._policy.device)
            torch.autograd.grad(loss_of(self._policy, batch), first, allow_unused=True)
            del aside
        self._tokens, self._longest = max(tokens, self._tokens), max(longest, self._longest)

    @contextmanager
    def _trainable(self) -> Iterator[Tensor]:
        """The weights as a pass that trains sees them; gives the first that is trained."""
        before = {name: weight.requires_grad for name, weight in self._policy.named_parameters()}
        weights = dict(self._policy.named_parameters())
        try:
            for name, weight in weights.items():
                weight.requires_grad_(name in self._trained)
            yield next(weight for weight in weights.values() if weight.requires_grad)
        finally:
            for name, weight in weights.items():
                weight.requires_grad_(before[name])


def halved(batch: Batch, times: int) -> list[Batch]:
    """A micro-batch halved so many times; a single row stays."""
    batches = [batch]
    for _ in range(times):
        batches = [half for whole in batches for half in halve(whole)]
    return batches
