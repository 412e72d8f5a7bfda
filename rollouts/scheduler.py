"""Which sequences run next: prompts wait, sequences start as blocks allow, leave when finished, step back when blocks
run out.

The running batch is kept as arrays, one row a sequence, so that a decoding step costs no Python work per sequence.

Shapes: B running sequences, S steps, X tokens kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from rollouts.block_manager import BlockManager
from rollouts.sequence import Prefill, Sequence


class RunningBatch:
    """State of the sequences being decoded; rows are compact, newest last."""

    def __init__(self, capacity: int, max_blocks: int, max_new: int) -> None:
        self.sequences: list[Sequence] = []
        self.last_token = np.zeros(capacity, dtype=np.int64)
        """Sampled but not yet in the cache."""
        self.length = np.zeros(capacity, dtype=np.int64)
        """Tokens in the cache, which is the position of `last_token`."""
        self.count = np.zeros(capacity, dtype=np.int64)
        """Tokens sampled so far."""
        self.seed = np.zeros(capacity, dtype=np.uint64)
        self.slot = np.arange(capacity)
        """A number below the capacity that stays with a sequence while rows close up: where others keep its state."""
        self.num_blocks = np.zeros(capacity, dtype=np.int64)
        self.block_table = np.zeros((capacity, max_blocks), dtype=np.int64)
        self.token_ids = np.zeros((capacity, max_new), dtype=np.int64)
        self.logprobs = np.zeros((capacity, max_new), dtype=np.float32)

    def __len__(self) -> int:
        return len(self.sequences)

    def blocks_of(self, row: int) -> np.ndarray:
        """Block ids that a row holds."""
        held: np.ndarray = self.block_table[row, : self.num_blocks[row]]
        return held

    def add(self, sequence: Sequence, length: int, blocks: np.ndarray) -> int:
        """A new last row; returns its index."""
        row = len(self.sequences)
        self.sequences.append(sequence)
        self.length[row], self.count[row], self.seed[row] = length, len(sequence.token_ids), sequence.seed
        self.num_blocks[row] = len(blocks)
        self.block_table[row, : len(blocks)] = blocks
        self.token_ids[row, : len(sequence.token_ids)] = sequence.token_ids
        self.logprobs[row, : len(sequence.token_ids)] = sequence.logprobs
        return row

    def push_tokens(
        self,
        rows: np.ndarray,
        token_ids_SB: np.ndarray,
        logprobs_SB: np.ndarray,
        stop_token_ids: SequenceOf[int],
        most: int,
        valid_B: np.ndarray | None = None,
    ) -> np.ndarray:
        """Record the tokens sampled for these rows in S steps, up to each one's end; gives how many it kept, [B].

        An end is a stop token, a fault (a token below 0), or having `most` tokens. Of a row's S tokens the first
        `valid_B` (at least 1; without it all) are its own.
        """
        steps = len(token_ids_SB)
        is_end_SB = np.isin(token_ids_SB, stop_token_ids) | (token_ids_SB < 0)
        until_end_B = np.where(is_end_SB.any(axis=0), is_end_SB.argmax(axis=0) + 1, steps)
        kept_B: np.ndarray = np.minimum(until_end_B, most - self.count[rows])
        if valid_B is not None:
            kept_B = np.minimum(kept_B, valid_B)
        step_X, place_X = np.nonzero(np.arange(steps)[:, None] < kept_B)
        at = rows[place_X], self.count[rows[place_X]] + step_X
        self.token_ids[at] = token_ids_SB[step_X, place_X]
        self.logprobs[at] = logprobs_SB[step_X, place_X]
        self.last_token[rows] = token_ids_SB[kept_B - 1, np.arange(len(rows))]
        self.count[rows] += kept_B
        return kept_B

    def keep(self, mask: np.ndarray) -> None:
        """Drop the rows where `mask` is false; the others close up, in order."""
        kept = int(mask.sum())
        for array in (
            self.last_token, self.length, self.count, self.seed, self.num_blocks,
            self.block_table, self.token_ids, self.logprobs,
        ):  # fmt: skip
            array[:kept] = array[: len(mask)][mask]
        self.slot[: len(mask)] = np.concatenate((self.slot[: len(mask)][mask], self.slot[: len(mask)][~mask]))
        self.sequences = [sequence for sequence, stays in zip(self.sequences, mask, strict=True) if stays]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What starts now."""

    to_prefill: list[Prefill]
    """Prompts to be computed first; their blocks are allocated."""
    starts: list[tuple[int, Prefill]]
    """Rows that were added, each with the prompt it continues."""
    copies: list[tuple[int, int]]
    """(source, target) blocks to copy once the prompts are computed: each sequence gets its own of those it will write
    in, mostly the last, partly filled one."""


class Scheduler:
    """First come, first served; the last to start is the first to step back."""

    def __init__(
        self,
        blocks: BlockManager,
        running: RunningBatch,
        *,
        max_num_seqs: int,
        max_prefill_tokens: int,
        private_tail: int = 0,
    ) -> None:
        self.blocks, self.running = blocks, running
        self.max_num_seqs, self.max_prefill_tokens = max_num_seqs, max_prefill_tokens
        self.private_tail = private_tail
        """Last tokens of a prompt that every sequence writes again, in some layer: their blocks are not shared."""
        self.waiting: deque[Prefill] = deque()
        self.num_preemptions = 0

    def admit(self) -> Admission:
        """Start as many waiting sequences as rows and blocks allow, in order."""
        admission = Admission(to_prefill=[], starts=[], copies=[])
        budget = self.max_prefill_tokens
        while self.waiting and len(self.running) < self.max_num_seqs:
            prefill = self.waiting[0]
            if prefill.blocks is None:
                first = not admission.to_prefill
                if (len(prefill.token_ids) > budget and not first) or not self._fits(prefill):
                    break
                budget -= len(prefill.token_ids)
                prefill.blocks = self.blocks.allocate(self.blocks.blocks_for(len(prefill.token_ids)))
                admission.to_prefill.append(prefill)
            while prefill.sequences and len(self.running) < self.max_num_seqs and self._start(prefill, admission):
                pass
            if prefill.sequences:
                break
            self.waiting.popleft()
        return admission

    def make_room(self, steps: int = 1, most: int | None = None) -> None:
        """Give every running sequence blocks for its next `steps` tokens; where none is left, the newest steps back.

        A sequence that will end for having `most` tokens gets none for what lies beyond.
        """
        running = self.running
        while True:
            size = len(running)
            ahead = steps if most is None else np.minimum(steps, most - running.count[:size])
            lacking = -(-(running.length[:size] + ahead) // self.blocks.block_size) - running.num_blocks[:size]
            lacking = np.maximum(lacking, 0)
            if lacking.sum() <= self.blocks.num_free:
                break
            if not self._drop_idle_prefills():
                assert size > 1
                self._preempt(size - 1)
        fresh, taken = self.blocks.allocate(int(lacking.sum())), 0
        for extra in range(int(lacking.max(initial=0))):
            needy = np.flatnonzero(lacking > extra)
            running.block_table[needy, running.num_blocks[needy]] = fresh[taken : taken + len(needy)]
            running.num_blocks[needy] += 1
            taken += len(needy)

    def retire(self, finished: np.ndarray) -> None:
        """Free the blocks of the rows where `finished` is true, and close up."""
        held = [self.running.blocks_of(row) for row in np.flatnonzero(finished).tolist()]
        self.blocks.release(np.concatenate(held))
        self.running.keep(~finished)

    def _fits(self, prefill: Prefill) -> bool:
        # One block beyond the prompt for each running sequence and for this one, so that what starts does not step
        # right back.
        needed = self.blocks.blocks_for(len(prefill.token_ids))
        spare = max(1, needed - self._num_shared(prefill))
        if needed + spare + len(self.running) <= self.blocks.num_free:
            return True
        if len(self.running):
            return False
        self._drop_idle_prefills()
        return needed <= self.blocks.num_free

    def _num_shared(self, prefill: Prefill) -> int:
        """Blocks of a prompt, from its start, that its sequences only read."""
        return max(len(prefill.token_ids) - self.private_tail, 0) // self.blocks.block_size

    def _start(self, prefill: Prefill, admission: Admission) -> bool:
        """One sequence of a prompt becomes a row; False where there is no block for it."""
        assert prefill.blocks is not None
        shared, to_copy = np.split(prefill.blocks, [self._num_shared(prefill)])
        if len(prefill.sequences) == 1:
            own = prefill.blocks
        elif not len(to_copy):
            own = prefill.blocks
            self.blocks.share(own)
        else:
            if self.blocks.num_free < len(self.running) + len(to_copy):
                return False
            targets = self.blocks.allocate(len(to_copy))
            self.blocks.share(shared)
            own = np.concatenate((shared, targets))
            admission.copies.extend(zip(to_copy.tolist(), targets.tolist(), strict=True))
        row = self.running.add(prefill.sequences.pop(0), len(prefill.token_ids), own)
        admission.starts.append((row, prefill))
        return True

    def _preempt(self, row: int) -> None:
        sequence, count = self.running.sequences[row], int(self.running.count[row])
        sequence.token_ids = self.running.token_ids[row, :count].tolist()
        sequence.logprobs = self.running.logprobs[row, :count].tolist()
        mask = np.ones(len(self.running), dtype=bool)
        mask[row] = False
        self.retire(~mask)
        self.waiting.appendleft(Prefill(token_ids=sequence.prompt + sequence.token_ids, sequences=[sequence]))
        self.num_preemptions += 1

    def _drop_idle_prefills(self) -> bool:
        """Give back the blocks of computed prompts that wait to be continued; they are computed again later."""
        idle = [prefill for prefill in self.waiting if prefill.blocks is not None]
        for prefill in idle:
            assert prefill.blocks is not None
            self.blocks.release(prefill.blocks)
            prefill.blocks, prefill.logits_V, prefill.tail_WC = None, None, None
        return bool(idle)
