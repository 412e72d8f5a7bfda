"""Decoding steps of a policy on the CPU in fp32, several in one call outside of the interpreter's lock.

The operations of `policy/cpu_operations.py`, from token to logits, and one more that samples: the tokens it draws feed
the next step, and a sequence that ends makes room for the last one. So nothing of a step is left to Python, and threads
that each decode some of the rows do not meet before the host wants to look.

A policy whose parts are not all such operations (adapters, biases, weights in pieces, other dtypes) is decoded by its
modules instead.

Shapes: B sequences, N rows (B, filled up with idle ones), S steps, M blocks of the longest sequence, V vocabulary, K
experts per token, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from policy import Policy
from policy import cpu_operations as operations
from policy.block import Block
from policy.cpu_operations import Operation
from policy.decode_layout import LEAST_ROWS
from policy.linear import is_plain_matrix
from policy.moe import MixtureOfExperts
from policy.norm import RMSNorm
from policy.paged_attention import LEAST_BLOCK
from policy.rope import rotation_of
from rollouts.cpu_sampling_kernels import Drawing
from rollouts.types import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledSteps:
    """What some steps gave; of a sequence that ended, only what came up to its end."""

    token_ids_SB: np.ndarray
    """int64; -1 where the logits were not all numbers."""
    logprobs_SB: np.ndarray
    """Nats, fp32."""
    valid_B: np.ndarray
    """How many of its S tokens are a sequence's own, int64, at least 1."""


def is_made_of_operations(policy: Policy, cache: Tensor) -> bool:
    """Whether a step of this policy over this cache can be decoded here."""
    weights = [weight for weight in (*policy.parameters(), *policy.buffers()) if weight.ndim]
    is_plain = all(map(is_plain_matrix, (*weights, cache))) and cache.shape[2] >= LEAST_BLOCK
    # A hook wants to see a module's numbers, or brings its weights.
    is_watched = any(module._forward_hooks or module._forward_pre_hooks for module in policy.modules())
    return is_plain and not is_watched and DecodingSteps.layers_of(policy, cache, None, torch.empty(0)) is not None


class DecodingSteps:
    """Steps of up to so many rows with up to M blocks each; used by one thread at a time."""

    def __init__(self, policy: Policy, cache: Tensor, experts: Tensor | None, rows: int, max_blocks: int) -> None:
        config, size = policy.config, cache.shape[2]
        self.rows, self.max_blocks = max(rows, LEAST_ROWS), max_blocks
        self._idle_block = cache.shape[1] - 1
        rotation = rotation_of(torch.arange(max_blocks * size), config)
        half, vocabulary = rotation.cos.shape[1], config.vocab_size
        chosen_NK = torch.empty(self.rows, max(config.num_experts_per_tok, 1), dtype=torch.int64)
        layers = self.layers_of(policy, cache, experts, chosen_NK)
        assert layers is not None
        assert isinstance(policy.norm, RMSNorm)
        whole = [
            operations.beginning(policy.embed_tokens.weight, rotation.cos, rotation.sin, size),
            *layers,
            operations.head(policy.norm.weight, policy.norm.epsilon, policy.lm_head.weight),
        ]
        self._token_N, self._position_N, self._slot_N, self._length_N = np.zeros((4, self.rows), dtype=np.int64)
        self._table_NM = np.zeros((self.rows, max_blocks), dtype=np.int64)
        self._x = torch.empty(config.hidden_size * self.rows)
        self._angles = torch.empty(2, self.rows * half)
        self._logits = torch.empty(vocabulary * self.rows)
        self._room = torch.empty(max(each.room(self.rows, max_blocks * size) for each in whole))
        self._state = np.zeros(operations.FIELDS, dtype=np.int64)
        for field, numbers in (
            (operations.X, self._x), (operations.ROOM, self._room), (operations.COS, self._angles[0]),
            (operations.SIN, self._angles[1]), (operations.LOGITS, self._logits),
        ):  # fmt: skip
            self._state[field] = numbers.data_ptr()
        for field, array in (
            (operations.TOKENS, self._token_N), (operations.POSITIONS, self._position_N),
            (operations.SLOTS, self._slot_N), (operations.LENGTHS, self._length_N), (operations.TABLES, self._table_NM),
        ):  # fmt: skip
            self._state[field] = array.ctypes.data
        self._state[operations.TABLE_WIDTH] = max_blocks
        self._drawing = Drawing(self.rows, vocabulary, self._idle_block)
        self._whole = whole
        self._forward = operations.list_of(whole)
        self._with_drawing = operations.list_of([*whole, self._drawing.operation])

    @staticmethod
    def layers_of(policy: Policy, cache: Tensor, experts: Tensor | None, chosen_NK: Tensor) -> list[Operation] | None:
        """The two halves of every layer in turn; None where one is no operation."""
        config, found, num_routed = policy.config, list[Operation | None](), 0
        half, is_interleaved = config.rope_width // 2, config.family.has_interleaved_rope
        for layer in cast(list[Block], policy.layers):
            found.append(layer.self_attn.operation_on_cpu(layer.input_layernorm, cache, half, is_interleaved))
            norm = layer.post_attention_layernorm
            if isinstance(layer.mlp, MixtureOfExperts):
                record = None if experts is None else experts[num_routed]
                found.append(layer.mlp.operation_on_cpu(norm, chosen_NK, record))
                num_routed += 1
            else:
                found.append(layer.mlp.operation_on_cpu(norm))
        layers = [each for each in found if each is not None]
        return layers if len(layers) == len(found) else None

    def suits(self, rows: int, max_blocks: int) -> bool:
        """Whether it has room for so many rows of so many blocks."""
        return rows <= self.rows and max_blocks <= self.max_blocks

    def sample(
        self, token_B: np.ndarray, position_B: np.ndarray, seed_B: np.ndarray, counter_B: np.ndarray,
        table_BM: np.ndarray, params: SamplingParams, steps: int,
    ) -> SampledSteps:  # fmt: skip
        """Feed each sequence its last token and sample the next, so many times or until it ends: at a stop token, at
        `max_completion_length`, or where its logits are not all numbers. Nothing is truncated."""
        self._take(token_B, position_B, table_BM)
        sampled = SampledSteps(
            token_ids_SB=np.zeros((steps, len(token_B)), dtype=np.int64),
            logprobs_SB=np.zeros((steps, len(token_B)), dtype=np.float32),
            valid_B=np.zeros(len(token_B), dtype=np.int64),
        )
        self._drawing.take(seed_B, counter_B, params, sampled.token_ids_SB, sampled.logprobs_SB, sampled.valid_B)
        operations.run(self._with_drawing, self._state, steps)
        return sampled

    def logits(self, token_B: np.ndarray, position_B: np.ndarray, table_BM: np.ndarray) -> Tensor:
        """One step without sampling: logits [B, V], valid until the next."""
        self._take(token_B, position_B, table_BM)
        operations.run(self._forward, self._state)
        rows = int(self._state[operations.ROWS])
        return self._logits[: self._logits.numel() // self.rows * rows].view(-1, rows).t()[: len(token_B)]

    def _take(self, token_B: np.ndarray, position_B: np.ndarray, table_BM: np.ndarray) -> None:
        (size, width), rows = table_BM.shape, max(len(token_B), LEAST_ROWS)
        self._token_N[:size], self._position_N[:size] = token_B, position_B
        self._token_N[size:rows], self._position_N[size:rows] = 0, 0
        self._table_NM[:size, :width], self._table_NM[size:rows] = table_BM, self._idle_block
        self._state[[operations.ROWS, operations.LIVE]] = rows, size
