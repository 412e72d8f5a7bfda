"""Which full blocks hold the beginnings of which prompts, so that another prompt that begins so need not compute them.

A block is known by the hash of all tokens from the prompt's first to the block's last, made as a chain of the blocks'
own; two different beginnings have the same 128-bit hash as good as never. Every block that is kept is held once on the
cache's own account; the least recently used of those held by nobody else go when blocks run short.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from rollouts.block_manager import BlockManager


class PrefixCache:
    """Blocks kept for what they hold, under one version of the weights."""

    def __init__(self, blocks: BlockManager, lookahead: int = 0) -> None:
        self.blocks, self.lookahead = blocks, lookahead
        """Tokens after a block that what it holds depends on, too: MTP modules look ahead."""
        self.has_drafts = np.zeros(blocks.num_blocks, dtype=bool)
        """Whether the MTP modules' layers of a block were written, too."""
        self._block_of: dict[bytes, int] = {}  # the least recently used first
        self._key_of: dict[int, bytes] = {}

    def keys_of(self, token_ids: Sequence[int]) -> list[bytes]:
        """Keys of a prompt's full blocks, in order: those whose tokens and lookahead it holds."""
        size, keys, key = self.blocks.block_size, list[bytes](), b""
        array = np.asarray(token_ids, dtype=np.int64)
        for end in range(size, len(token_ids) - self.lookahead + 1, size):
            tokens = array[end - size : end + self.lookahead]
            key = blake2b(key + tokens.tobytes(), digest_size=16).digest()
            keys.append(key)
        return keys

    def hold(self, keys: Sequence[bytes]) -> np.ndarray:
        """Blocks of the longest kept beginning, which the caller must release: int64, one for each key found."""
        found = []
        for key in keys:
            if (block := self._block_of.get(key)) is None:
                break
            found.append(block)
        held = np.array(found, dtype=np.int64)
        self.blocks.share(held)
        self._touch(keys[: len(found)])
        return held

    def keep(self, keys: Sequence[bytes], blocks: np.ndarray) -> None:
        """Keep these blocks under these keys; of two that hold the same, the first stays the one that is found."""
        for key, block in zip(keys, blocks.tolist(), strict=True):
            if key not in self._block_of:
                self._block_of[key], self._key_of[block] = block, key
                self.blocks.share(np.array([block]))
        self._touch(keys)

    def forget(self, blocks: Sequence[int]) -> None:
        """Keep these no longer, whoever else holds them."""
        kept = [block for block in blocks if block in self._key_of]
        for block in kept:
            del self._block_of[self._key_of.pop(block)]
        if kept:
            self.blocks.release(np.array(kept))

    @property
    def num_idle(self) -> int:
        """Blocks that only this cache holds."""
        return int((self.blocks.holders(self._ids) == 1).sum())

    def give_back(self, count: int) -> None:
        """Free so many idle blocks, the least recently used first."""
        ids = self._ids
        self.forget(ids[self.blocks.holders(ids) == 1][:count].tolist())

    @property
    def _ids(self) -> np.ndarray:
        return np.fromiter(self._block_of.values(), dtype=np.int64, count=len(self._block_of))

    def _touch(self, keys: Sequence[bytes]) -> None:
        # The last first: of a beginning, the end goes before what everything after it needs.
        for key in reversed(keys):
            self._block_of[key] = self._block_of.pop(key)
