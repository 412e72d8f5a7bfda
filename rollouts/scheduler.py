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
from rollouts.prefix_cache import PrefixCache
from rollouts.sequence import Chunk, Prefill, Sequence


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
        self.is_stopped = np.zeros(capacity, dtype=bool)
        """Whether the last token completed a stop string."""
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

    def most_left(self, most: int) -> int:
        """Tokens still to come of the sequence that lacks most to `most` of them."""
        return most - int(self.count[: len(self.sequences)].min())

    def add(self, sequence: Sequence, length: int, blocks: np.ndarray) -> int:
        """A new last row; returns its index."""
        row = len(self.sequences)
        self.sequences.append(sequence)
        self.length[row], self.count[row], self.seed[row] = length, len(sequence.token_ids), sequence.seed
        self.is_stopped[row] = False
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

    def stop(self, row: int, count: int) -> int:
        """End a row at its token number `count`, which completed a stop string; gives how many come after it."""
        dropped = int(self.count[row]) - count
        self.count[row], self.last_token[row], self.is_stopped[row] = count, self.token_ids[row, count - 1], True
        return dropped

    def keep(self, mask: np.ndarray) -> None:
        """Drop the rows where `mask` is false; the others close up, in order."""
        kept = int(mask.sum())
        for array in (
            self.last_token, self.length, self.count, self.seed, self.is_stopped, self.num_blocks,
            self.block_table, self.token_ids, self.logprobs,
        ):  # fmt: skip
            array[:kept] = array[: len(mask)][mask]
        self.slot[: len(mask)] = np.concatenate((self.slot[: len(mask)][mask], self.slot[: len(mask)][~mask]))
        self.sequences = [sequence for sequence, stays in zip(self.sequences, mask, strict=True) if stays]


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What starts now."""

    to_prefill: list[Chunk]
    """Prompts, or parts of them, to be computed first, in one pass; their blocks are allocated."""
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
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.blocks, self.running, self.prefixes = blocks, running, prefixes
        self.max_num_seqs, self.max_prefill_tokens = max_num_seqs, max_prefill_tokens
        self.private_tail = private_tail
        """Last tokens of a prompt that every sequence writes again, in some layer: their blocks are not shared."""
        self.waiting: deque[Prefill] = deque()
        self.num_preemptions = 0

    def admit(self) -> Admission:
        """Start as many waiting sequences as rows and blocks allow, in order.

        A prompt of more than `max_prefill_tokens` takes several calls, while the others go on being decoded.
        """
        admission = Admission(to_prefill=[], starts=[], copies=[])
        budget = self.max_prefill_tokens
        while self.waiting and len(self.running) < self.max_num_seqs:
            prefill = self.waiting[0]
            if not prefill.is_computed:
                chunk = self._next_chunk(prefill, budget, is_first=not admission.to_prefill)
                if chunk is None:
                    break
                budget -= chunk.end - chunk.begin
                admission.to_prefill.append(chunk)
                if not chunk.is_last:
                    break
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
            if self._has(int(lacking.sum())):
                break
            if not self._drop_idle_prefills():
                assert size > 1
                self._preempt(size - 1)
        fresh, taken = self._allocate(int(lacking.sum())), 0
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

    def _next_chunk(self, prefill: Prefill, budget: int, *, is_first: bool) -> Chunk | None:
        """What of a prompt to compute now; None where it must wait. Only a prompt alone is cut at the budget."""
        if prefill.blocks is None and not self._begin(prefill, None if is_first else budget):
            return None
        assert prefill.blocks is not None
        begin, whole = prefill.num_computed, len(prefill.token_ids)
        if whole - begin > budget and not is_first:
            return None
        chunk = Chunk(prefill=prefill, begin=begin, end=min(begin + budget, whole))
        prefill.num_computed = chunk.end
        if self.prefixes is not None and prefill.keys is not None:
            size = self.blocks.block_size
            full = slice(begin // size, min(chunk.end // size, len(prefill.keys)))
            self.prefixes.keep(prefill.keys[full], prefill.blocks[full])
        return chunk

    def _begin(self, prefill: Prefill, most: int | None) -> bool:
        """Have blocks for a prompt, those that hold its beginning already among them; False where there are not enough,
        or more than `most` tokens are left to compute."""
        size, length = self.blocks.block_size, len(prefill.token_ids)
        found = np.zeros(0, dtype=np.int64)
        if self.prefixes is not None:
            if prefill.keys is None:
                prefill.keys = self.prefixes.keys_of(prefill.token_ids)
            # What is sampled from, or drafted from, must be computed here.
            found = self.prefixes.hold(prefill.keys[: max(length - max(self.private_tail, 1), 0) // size])
        needed = self.blocks.blocks_for(length) - len(found)
        if (most is not None and length - len(found) * size > most) or not self._fits(prefill, needed):
            self.blocks.release(found)
            return False
        prefill.blocks = np.concatenate((found, self._allocate(needed)))
        prefill.num_computed = prefill.num_found = len(found) * size
        return True

    def _fits(self, prefill: Prefill, needed: int) -> bool:
        # One block beyond the prompt for each running sequence and for this one, so that what starts does not step
        # right back.
        spare = max(1, self.blocks.blocks_for(len(prefill.token_ids)) - self._num_shared(prefill))
        if self._has(needed + spare + len(self.running)):
            return True
        if len(self.running):
            return False
        self._drop_idle_prefills()
        return self._has(needed)

    def _has(self, count: int) -> bool:
        """Whether so many blocks are free, or kept for nothing but what they hold."""
        if count <= self.blocks.num_free or self.prefixes is None:
            return count <= self.blocks.num_free
        return count <= self.blocks.num_free + self.prefixes.num_idle

    def _allocate(self, count: int) -> np.ndarray:
        if self.prefixes is not None and count > self.blocks.num_free:
            self.prefixes.give_back(count - self.blocks.num_free)
        return self.blocks.allocate(count)

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
            if not self._has(len(self.running) + len(to_copy)):
                return False
            targets = self._allocate(len(to_copy))
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
        """Give back the blocks of prompts that wait, computed in whole or in part; they are computed again later."""
        idle = [prefill for prefill in self.waiting if prefill.blocks is not None]
        for prefill in idle:
            assert prefill.blocks is not None
            self.blocks.release(prefill.blocks)
            prefill.put_aside()
        return bool(idle)
