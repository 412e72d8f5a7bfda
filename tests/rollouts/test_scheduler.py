"""The scheduler under random work, with a cache of token ids in place of keys and values.

Whoever writes where another still reads, or loses a block, leaves a wrong token behind.
"""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from rollouts.block_manager import BlockManager
from rollouts.prefix_cache import PrefixCache
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
        max_seqs: int, max_prefill: int, steps: int = 1, shares: bool = False,
    ) -> None:  # fmt: skip
        self.prompts, self.wanted, self.group, self.steps = prompts, wanted, group, steps
        self.ends = [token_of(place, count - 1) for place, count in enumerate(wanted)]
        longest = max(map(len, prompts)) + max(wanted)
        per_sequence = -(-longest // block_size)
        assert num_blocks > per_sequence
        self.block_size = block_size
        self.manager = BlockManager(num_blocks, block_size)
        self.running = RunningBatch(max_seqs, per_sequence, max(wanted))
        self.prefixes = PrefixCache(self.manager) if shares else None
        self.scheduler = Scheduler(
            self.manager, self.running, max_num_seqs=max_seqs, max_prefill_tokens=max_prefill, prefixes=self.prefixes
        )
        self.num_found = 0
        """Prompt tokens that were not computed."""
        self.cache = np.full((num_blocks, block_size), EMPTY)
        self.computed: set[int] = set()
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
        assert sum(len(chunk.token_ids) for chunk in admission.to_prefill) <= budget
        for chunk in admission.to_prefill:
            assert chunk.prefill.blocks is not None
            self.num_found += chunk.begin if chunk.begin == chunk.prefill.num_found else 0
            for position, token in enumerate(chunk.token_ids, chunk.begin):
                self.cache[chunk.prefill.blocks[position // self.block_size], position % self.block_size] = token
        for chunk in admission.to_prefill:
            assert self.contents(chunk.prefill.blocks, chunk.end) == chunk.prefill.token_ids[: chunk.end]
            if chunk.is_last:
                self.computed.add(id(chunk.prefill))
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

    def contents(self, blocks: np.ndarray | None, length: int) -> list[int]:
        assert blocks is not None
        found: list[int] = self.cache[blocks].flatten()[:length].tolist()
        return found

    def check_contents(self) -> None:
        """Every running sequence finds its own tokens in its blocks."""
        for row, sequence in enumerate(self.running.sequences):
            length = int(self.running.length[row])
            sampled = [token_of(sequence.place, i) for i in range(length - len(sequence.prompt))]
            assert self.contents(self.running.blocks_of(row), length) == sequence.prompt + sampled
            assert self.running.seed[row] == sequence.seed

    def check_blocks(self) -> None:
        """Free, or kept for what they hold alone, are exactly the blocks that neither a running sequence nor a waiting
        prompt holds."""
        holders: Counter[int] = Counter()
        for row in range(len(self.running)):
            holders.update(self.running.blocks_of(row).tolist())
        for prefill in self.scheduler.waiting:
            if prefill.blocks is not None:
                holders.update(prefill.blocks.tolist())
        assert self.num_free == self.manager.num_blocks - len(holders)
        assert len(self.running) <= self.scheduler.max_num_seqs

    @property
    def num_free(self) -> int:
        return self.manager.num_free + (0 if self.prefixes is None else self.prefixes.num_idle)

    def check_end(self) -> None:
        assert self.done == {p: [token_of(p, i) for i in range(n)] for p, n in enumerate(self.wanted)}
        assert self.num_free == self.manager.num_blocks
        assert self.first_starts == list(range(len(self.wanted))), "first come, first served"


def draw_simulation(seed: int, *, spare: int, steps: int, shares: bool = False) -> Simulation:
    """`spare` blocks more than the longest sequence needs; where it shares, prompts begin alike for a while."""
    rng = np.random.default_rng(seed)
    block_size, group, num_prompts = int(rng.integers(1, 6)), int(rng.integers(1, 6)), int(rng.integers(1, 6))
    prompts = [rng.integers(1, 99, rng.integers(1, 14)).tolist() for _ in range(num_prompts)]
    if shares:
        begin = rng.integers(1, 99, 12).tolist()
        prompts = [begin[: rng.integers(0, 13)] + prompt for prompt in prompts]
    wanted = rng.integers(1, 18, num_prompts * group).tolist()
    needed = -(-(max(map(len, prompts)) + max(wanted)) // block_size)
    return Simulation(
        prompts, wanted, group=group, block_size=block_size, num_blocks=needed + spare,
        max_seqs=int(rng.integers(1, 9)), max_prefill=int(rng.integers(1, 40)), steps=steps, shares=shares,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("spare", [1, 3, 10, 300])
@pytest.mark.parametrize("shares", [False, True])
def test_every_sequence_finishes_with_its_own_tokens_and_no_block_is_lost(spare: int, steps: int, shares: bool) -> None:
    stepped_back = found = 0
    for seed in range(60 if not shares or steps == 2 else 20):
        simulation = draw_simulation(seed, spare=spare, steps=steps, shares=shares)
        simulation.run()
        simulation.check_end()
        assert simulation.scheduler.num_preemptions == sum(map(len, simulation.stepped_back))
        stepped_back += simulation.scheduler.num_preemptions
        found += simulation.num_found
    assert (found > 0) == shares
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
    assert [chunk.token_ids for chunk in admission.to_prefill] == [[5] * 10]
    tables = [simulation.running.blocks_of(row).tolist() for row in range(6)]
    assert len({tuple(table[:2]) for table in tables}) == 1, "two whole blocks hold 8 of 10 tokens"
    assert len({table[2] for table in tables}) == 6
    assert len(admission.copies) == 5, "the last one to start keeps the prompt's own block"
    assert simulation.manager.num_free == 100 - 2 - 6


def test_prompts_beyond_the_token_budget_wait_and_one_alone_is_cut_at_it() -> None:
    prompts = [[1] * 6, [2] * 6, [3] * 30, [4] * 2, [5] * 6]
    simulation = Simulation(prompts, [3] * 5, group=1, num_blocks=200, block_size=4, max_seqs=8, max_prefill=12)
    admissions = [simulation.scheduler.admit() for _ in range(5)]
    parts = [[(chunk.token_ids[0], chunk.begin, chunk.end) for chunk in each.to_prefill] for each in admissions]
    assert parts == [[(1, 0, 6), (2, 0, 6)], [(3, 0, 12)], [(3, 12, 24)], [(3, 24, 30), (4, 0, 2)], [(5, 0, 6)]]
    assert [len(each.starts) for each in admissions] == [2, 0, 0, 2, 1]


def test_a_beginning_is_computed_once_also_within_one_pass() -> None:
    begin = list(range(1, 10))
    prompts = [[*begin, 50], [*begin, 60, 61, 62], begin[:8], [99, *begin]]
    simulation = Simulation(
        prompts, [3] * 4, group=1, num_blocks=200, block_size=4, max_seqs=8, max_prefill=99, shares=True
    )
    admission = simulation.scheduler.admit()
    # The third ends with a shared block; what follows its last token is still to be computed.
    assert [chunk.begin for chunk in admission.to_prefill] == [0, 8, 4, 0]
    tables = [simulation.running.blocks_of(row)[:2].tolist() for row in range(4)]
    assert tables[0] == tables[1]
    assert tables[0][0] == tables[2][0]
    assert len({table[1] for table in tables}) == len({table[0] for table in tables}) + 1 == 3
    simulation.start(admission)


def test_what_is_kept_makes_room_the_least_recently_used_first() -> None:
    manager = BlockManager(6, 2)
    prefixes = PrefixCache(manager)
    old, new = [1, 2, 3, 4], [5, 6, 7, 8]
    for tokens in (old, new):
        blocks = manager.allocate(2)
        prefixes.keep(prefixes.keys_of(tokens), blocks)
        manager.release(blocks)
    held = prefixes.hold(prefixes.keys_of(old))
    manager.release(held)
    assert (manager.num_free, prefixes.num_idle) == (2, 4)
    prefixes.give_back(1)
    assert len(prefixes.hold(prefixes.keys_of(new))) == 1, "the end of what was used before goes first"
    prefixes.give_back(2)
    assert len(prefixes.hold(prefixes.keys_of(old))) == 0, "what is held does not go"
    assert (manager.num_free, prefixes.num_idle) == (5, 0)


def test_a_block_is_found_only_where_all_that_it_depends_on_is_the_same() -> None:
    manager = BlockManager(8, 2)
    prefixes = PrefixCache(manager, lookahead=1)
    keys = prefixes.keys_of([1, 2, 3, 4, 5])
    prefixes.keep(keys, manager.allocate(2))
    assert [len(prefixes.hold(prefixes.keys_of(tokens))) for tokens in ([1, 2, 3, 4, 5, 9], [1, 2, 3, 9], [1, 2])] == [
        2, 1, 0,
    ]  # fmt: skip
    assert len(prefixes.hold(prefixes.keys_of([1, 2, 3, 4, 6]))) == 1, "the token after the second block is another"
    assert len(prefixes.hold(prefixes.keys_of([9, 2, 3, 4, 5]))) == 0
    prefixes.forget(prefixes.hold(keys).tolist())
    assert len(prefixes.hold(keys)) == 0
