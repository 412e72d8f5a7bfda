"""Who owns which block of the cache. Blocks are shared by reference count; nothing here touches their contents."""

from __future__ import annotations

import numpy as np


class BlockManager:
    """A pool of equal blocks; ids are handed out and taken back as arrays, without work per block."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int64)
        self._num_free = num_blocks
        self._references = np.zeros(num_blocks, dtype=np.int64)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self._num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> np.ndarray:
        """`count` free block ids, int64, each held once."""
        assert count <= self._num_free
        self._num_free -= count
        taken = self._free[self._num_free : self._num_free + count].copy()
        self._references[taken] = 1
        return taken

    def holders(self, blocks: np.ndarray) -> np.ndarray:
        """How often each of these is held."""
        held: np.ndarray = self._references[blocks]
        return held

    def share(self, blocks: np.ndarray) -> None:
        """Hold each of these once more."""
        self._references[blocks] += 1

    def release(self, blocks: np.ndarray) -> None:
        """Let go of each of these once (a block may stand in it several times); those held by nobody become free."""
        np.subtract.at(self._references, blocks, 1)
        assert (self._references[blocks] >= 0).all()
        freed = np.unique(blocks[self._references[blocks] == 0])
        self._free[self._num_free : self._num_free + len(freed)] = freed
        self._num_free += len(freed)
