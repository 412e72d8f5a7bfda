"""Blocks against a dictionary of counts."""

import numpy as np
import pytest

from rollouts.block_manager import BlockManager


@pytest.mark.parametrize("seed", range(5))
def test_random_use_equals_a_dictionary_of_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    manager, held = BlockManager(num_blocks=12, block_size=4), dict.fromkeys(range(12), 0)
    for _ in range(400):
        used = [block for block, count in held.items() if count]
        action = rng.integers(3)
        if action == 0:
            taken = manager.allocate(int(rng.integers(manager.num_free + 1)))
            assert len(set(taken.tolist())) == len(taken)
            assert all(held[block] == 0 for block in taken.tolist())
            held.update(dict.fromkeys(taken.tolist(), 1))
        elif action == 1 and used:
            shared = rng.choice(used, size=rng.integers(1, len(used) + 1), replace=False)
            manager.share(shared)
            for block in shared.tolist():
                held[block] += 1
        elif used:
            handles = [block for block, count in held.items() for _ in range(count)]  # a block once for each holder
            released = rng.permutation(handles)[: rng.integers(1, len(handles) + 1)]
            manager.release(released)
            for block in released.tolist():
                held[block] -= 1
        assert manager.num_free == sum(count == 0 for count in held.values())
    manager.release(np.array([block for block, count in held.items() for _ in range(count)], dtype=np.int64))
    assert sorted(manager.allocate(12).tolist()) == list(range(12))


def test_what_was_handed_out_stays_when_others_are_freed() -> None:
    manager = BlockManager(num_blocks=4, block_size=1)
    first, second = manager.allocate(2), manager.allocate(2)
    before = first.tolist()
    manager.release(second)
    manager.allocate(2)
    assert first.tolist() == before


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_blocks_for(block_size: int) -> None:
    manager = BlockManager(num_blocks=1, block_size=block_size)
    for tokens in range(50):
        assert manager.blocks_for(tokens) == len({position // block_size for position in range(tokens)})


def test_taking_too_many_and_releasing_twice_are_our_own_mistakes() -> None:
    manager = BlockManager(num_blocks=3, block_size=1)
    taken = manager.allocate(2)
    with pytest.raises(AssertionError):
        manager.allocate(2)
    manager.release(taken)
    with pytest.raises(AssertionError):
        manager.release(taken)
