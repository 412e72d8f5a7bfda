"""What to do when a device has no memory left: the same work in smaller pieces.

Which rows share a micro-batch changes a gradient only by rounding, so a step that did not fit is done again on halves.

Shapes: N packed tokens, B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from grpo.distributed import Ranks
from grpo.support import Support
from grpo.types import Batch
from policy.packing import Wanted

T = TypeVar("T")


class DeviceMemoryError(RuntimeError):
    """One row alone does not fit; the message says which keys to change."""


def do_in_memory(
    attempt: Callable[[Sequence[Batch]], T], batches: Sequence[Batch], ranks: Ranks | None = None
) -> tuple[T, list[Batch], int]:
    """What `attempt` gives, on batches cut in halves until it fits; with these batches and how often they were halved.

    `attempt` is called from the start each time, so it has to undo what a call before may have left. It is this rank's
    own affair: it must not wait for other ranks. Raises DeviceMemoryError where each batch is one row already, and at
    once where `ranks` hold the weights in pieces: the others are in the middle of a pass with this one.
    """
    given, num_halvings = list(batches), 0
    while True:
        try:
            return attempt(given), given, num_halvings
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
        if ranks is not None and ranks.sharding is not None:
            tokens = max(len(batch.token_ids_N) for batch in given)
            raise DeviceMemoryError(
                f"rank {ranks.rank}: out of memory ({reason}) on {tokens} tokens, in a pass that other ranks are in "
                f"too and that cannot be done again; set max_tokens_per_micro_batch: {max(1, tokens // 2)} or "
                "activation_recomputation: full, and --resume"
            )
        # After the handler: until then the error's frames hold what the attempt had computed.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halves = [half for batch in given for half in halve(batch)]
        if len(halves) == len(given):
            longest = max(batch.rows.longest for batch in given)
            raise DeviceMemoryError(
                f"out of memory on one row of at most {longest} tokens ({reason}); set activation_recomputation: full, "
                "lower max_completion_length or engine.cache_gib, or train adapters only (lora)"
            )
        given, num_halvings = halves, num_halvings + 1


def halve(batch: Batch) -> list[Batch]:
    """The batch as two with about half of the rows each; one of a single row as it is."""
    num_rows = len(batch.rows.lengths)
    return [batch] if num_rows < 2 else [_take(batch, 0, num_rows // 2), _take(batch, num_rows // 2, num_rows)]


def is_by_token(name: str) -> bool:
    """Whether a field of this name has a row for each packed token, not for each row."""
    return name.rpartition("_")[2].startswith("N")


def _take(batch: Batch, first: int, last: int) -> Batch:
    """Rows `first` to `last`, the last not included."""
    starts = [*batch.rows.starts, len(batch.token_ids_N)]
    place = slice(starts[first], starts[last])
    taken: dict[str, Tensor] = {}
    for field in fields(batch):
        if isinstance(value := getattr(batch, field.name), Tensor):
            taken[field.name] = value[place] if is_by_token(field.name) else value[first:last]
    support = batch.support
    if support is not None:
        before, own = (int(batch.completion_mask_N[part].sum()) for part in (slice(place.start), place))
        edges = [int(support.counts_W[:count].sum()) for count in (before, before + own)]
        support = Support(
            token_ids_K=support.token_ids_K[slice(*edges)], counts_W=support.counts_W[before : before + own]
        )
    rows = batch.rows.take(first, last)
    return replace(
        batch,
        **taken,
        rows=rows,
        learned=Wanted.of(batch.completion_mask_N[place], rows),
        origins=batch.origins[first:last],
        support=support,
    )
