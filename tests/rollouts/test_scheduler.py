"""The scheduler under random work, with a cache of token ids in place of keys and values.

Whoever writes where another still reads, or loses a block, leaves a wrong token behind.
"""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from rollouts.block_manager import BlockManager
from rollouts.scheduler import Admission, RunningBatch, Scheduler
from rollouts.sequence import Prefill, Sequence

EMPTY = -7


def token_of(place: int, index: int) -> int:
    """What a sequence 'samples': fixed, so that one that stepped back must go on where it was."""
    return 1000 + 100 * place + index


class Simulation:
    """The engine's loop with exact bookkeeping instead of a model."""

    def __init__(
        self, prompts: list[list[int]], wanted: list[int], *, group: int, num_blocks: int, block_size: int,
        max_seqs: int, max_prefill: int, steps: int = 1,
    ) -> None:  # fmt: skip
        self.prompts, self.wanted, self.group, self.steps = prompts, wanted, group, steps
        self.ends = [token_of(place, count - 1) for place, count in enumerate(wanted)]
        longest = max(map(len, prompts)) + max(wanted)
        per_sequence = -(-longest // block_size)
        assert num_blocks > per_sequence
        self.block_size = block_size
        self.manager = BlockManager(num_blocks, block_size)
        self.running = RunningBatch(max_seqs, per_sequence, max(wanted))
        self.scheduler = Scheduler(self.manager, self.running, max_num_seqs=max_seqs, max_prefill_tokens=max_prefill)
        self.cache = np.full((num_blocks, block_size), EMPTY)
        self.computed: dict[int, list[int]] = {}
        self.done: dict[int, list[int]] = {}
        self.first_starts: list[int] = []
        self.stepped_back: list[list[int]] = []
        """Places that stepped back at each `make_room` that had to, newest first."""
        for p, prompt in enumerate(prompts):
            sequences = [Sequence(place=p * group + g, prompt=prompt, seed=p * group + g) for g in range(group)]
            self.scheduler.waiting.append(Prefill(token_ids=list(prompt), sequences=sequences))

    def run(self) -> None:
        for _ in range(100 * len(self.wanted)):
            if not self.scheduler.waiting and not len(self.running):
                return
            self.start(self.scheduler.admit())
            self.retire()
            if len(self.running):
                self.make_room()
                self.decode()
                self.retire()
            self.check_blocks()
        raise AssertionError("sequences are left that never finish")

    def start(self, admission: Admission) -> None:
        budget = self.scheduler.max_prefill_tokens
        assert len(admission.to_prefill) <= 1 or sum(len(p.token_ids) for p in admission.to_prefill) <= budget
        for prefill in admission.to_prefill:
            assert prefill.blocks is not None
            self.computed[id(prefill)] = prefill.blocks.tolist()
            for position, token in enumerate(prefill.token_ids):
                self.cache[prefill.blocks[position // self.block_size], position % self.block_size] = token
        for source, target in admission.copies:
            self.cache[target] = self.cache[source]
        for row, prefill in admission.starts:
            assert id(prefill) in self.computed, "a sequence started from a prompt that was never computed"
            sequence = self.running.sequences[row]
            assert prefill.token_ids == sequence.prompt + sequence.token_ids
            if not sequence.token_ids:
                self.first_starts.append(sequence.place)
        self.sample(np.array([row for row, _ in admission.starts], dtype=np.int64), 1)
        self.check_contents()

    def make_room(self) -> None:
        before = [sequence.place for sequence in self.running.sequences]
        self.scheduler.make_room(self.steps, max(self.wanted))
        after = [sequence.place for sequence in self.running.sequences]
        assert after == before[: len(after)], "others than the newest stepped back"
        if len(after) < len(before):
            self.stepped_back.append(before[: len(after) - 1 : -1])
            queue = [prefill.sequences[0].place for prefill in self.scheduler.waiting]
            assert queue[: len(before) - len(after)] == before[len(after) :], "the oldest must be the first to return"

    def decode(self) -> None:
        """Some steps ahead of what the scheduler sees: what lies beyond a sequence's end has no place to go."""
        size = len(self.running)
        for row in range(size):
            place, length = self.running.sequences[row].place, int(self.running.length[row])
            for step in range(self.steps):
                if length + step >= self.running.num_blocks[row] * self.block_size:
                    assert self.running.count[row] + step >= max(self.wanted), "no block for a token that may be kept"
                    break
                block = self.running.block_table[row, (length + step) // self.block_size]
                token = token_of(place, int(self.running.count[row]) - 1 + step)
                self.cache[block, (length + step) % self.block_size] = token
        self.running.length[:size] += self.sample(np.arange(size), self.steps)
        self.check_contents()

    def sample(self, rows: np.ndarray, steps: int) -> np.ndarray:
        places = [self.running.sequences[row].place for row in rows]
        counts = self.running.count[rows]
        tokens = np.array(
            [[token_of(p, int(c) + step) for p, c in zip(places, counts, strict=True)] for step in range(steps)],
            dtype=np.int64,
        ).reshape(steps, len(rows))
        return self.running.push_tokens(rows, tokens, -tokens.astype(np.float32), self.ends, max(self.wanted))

    def retire(self) -> None:
        size = len(self.running)
        finished = np.array(
            [self.running.count[row] >= self.wanted[self.running.sequences[row].place] for row in range(size)],
            dtype=bool,
        )
        for row in np.flatnonzero(finished):
            count = self.running.count[row]
            assert np.array_equal(self.running.logprobs[row, :count], -self.running.token_ids[row, :count])
            self.done[self.running.sequences[row].place] = self.running.token_ids[row, :count].tolist()
        if finished.any():
            self.scheduler.retire(finished)

    def check_contents(self) -> None:
        """Every running sequence finds its own tokens in its blocks."""
        for row, sequence in enumerate(self.running.sequences):
            length = int(self.running.length[row])
            found = self.cache[self.running.blocks_of(row)].flatten()[:length].tolist()
            sampled = [token_of(sequence.place, i) for i in range(length - len(sequence.prompt))]
            assert found == sequence.prompt + sampled
            assert self.running.seed[row] == sequence.seed

    def check_blocks(self) -> None:
        """Free are exactly the blocks that neither a running sequence nor a waiting prompt holds."""
        holders: Counter[int] = Counter()
        for row in range(len(self.running)):
            holders.update(self.running.blocks_of(row).tolist())
        for prefill in self.scheduler.waiting:
            if prefill.blocks is not None:
                holders.update(prefill.blocks.tolist())
        assert self.manager.num_free == self.manager.num_blocks - len(holders)
        assert len(self.running) <= self.scheduler.max_num_seqs

    def check_end(self) -> None:
        assert self.done == {p: [token_of(p, i) for i in range(n)] for p, n in enumerate(self.wanted)}
        assert self.manager.num_free == self.manager.num_blocks
        assert self.first_starts == list(range(len(self.wanted))), "first come, first served"


def draw_simulation(seed: int, *, spare: int, steps: int) -> Simulation:
    """`spare` blocks more than the longest sequence needs."""
    rng = np.random.default_rng(seed)
    block_size, group, num_prompts = int(rng.integers(1, 6)), int(rng.integers(1, 6)), int(rng.integers(1, 6))
    prompts = [rng.integers(1, 99, rng.integers(1, 14)).tolist() for _ in range(num_prompts)]
    wanted = rng.integers(1, 18, num_prompts * group).tolist()
    needed = -(-(max(map(len, prompts)) + max(wanted)) // block_size)
    return Simulation(
        prompts, wanted, group=group, block_size=block_size, num_blocks=needed + spare,
        max_seqs=int(rng.integers(1, 9)), max_prefill=int(rng.integers(1, 40)), steps=steps,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("spare", [1, 3, 10, 300])
def test_every_sequence_finishes_with_its_own_tokens_and_no_block_is_lost(spare: int, steps: int) -> None:
    stepped_back = 0
    for seed in range(60):
        simulation = draw_simulation(seed, spare=spare, steps=steps)
        simulation.run()
        simulation.check_end()
        assert simulation.scheduler.num_preemptions == sum(map(len, simulation.stepped_back))
        stepped_back += simulation.scheduler.num_preemptions
    assert (stepped_back > 0) == (spare < 300), "the workload must be tight where it is meant to be"


def test_the_newest_steps_back_first_and_returns_in_order() -> None:
    simulation = Simulation(
        [[1], [2], [3], [4]], [9, 9, 9, 9], group=1, num_blocks=11, block_size=1, max_seqs=4, max_prefill=99
    )
    simulation.run()
    simulation.check_end()
    # Of 11 blocks four sequences can hold 2 each but not 3, three can hold 3 but not 4, and two 5 but not 6.
    assert simulation.stepped_back[:3] == [[3], [2], [1]]
    assert all(newer > older for places in simulation.stepped_back for newer, older in pairwise(places))
    assert all(0 not in places for places in simulation.stepped_back)


def test_a_prompt_is_computed_once_and_its_whole_blocks_are_shared() -> None:
    simulation = Simulation(
        [[5] * 10], [4] * 6, group=6, num_blocks=100, block_size=4, max_seqs=6, max_prefill=99
    )  # fmt: skip
    admission = simulation.scheduler.admit()
    assert [prefill.token_ids for prefill in admission.to_prefill] == [[5] * 10]
    tables = [simulation.running.blocks_of(row).tolist() for row in range(6)]
    assert len({tuple(table[:2]) for table in tables}) == 1, "two whole blocks hold 8 of 10 tokens"
    assert len({table[2] for table in tables}) == 6
    assert len(admission.copies) == 5, "the last one to start keeps the prompt's own block"
    assert simulation.manager.num_free == 100 - 2 - 6


def test_prompts_beyond_the_token_budget_wait_but_one_alone_may_exceed_it() -> None:
    prompts = [[1] * 6, [2] * 6, [3] * 30, [4] * 2]
    simulation = Simulation(prompts, [3] * 4, group=1, num_blocks=200, block_size=4, max_seqs=8, max_prefill=12)
    computed = [[p.token_ids[0] for p in simulation.scheduler.admit().to_prefill] for _ in range(3)]
    assert computed == [[1, 2], [3], [4]]
