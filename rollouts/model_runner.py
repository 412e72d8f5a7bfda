"""Runs the policy over the cache: prompts in packed rows, then some tokens of every sequence at a time.

On a GPU a decoding step is a CUDA graph, captured once for each of a few batch sizes; sampled tokens stay on the device
and feed the next step, and the host looks only every `run_ahead` steps.

Shapes: B sequences (or rows, where one has several), N packed prompt tokens, P prompts, R rows of a captured batch
(B rounded up), S steps, C model width, V vocabulary, M blocks of the longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy import PackedRows, Policy
from policy.attention import Expanded
from policy.paged_attention import Absorbed
from rollouts.sampler import sample
from rollouts.scheduler import RunningBatch
from rollouts.types import SamplingParams

CAPTURED_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Batch sizes that graphs are captured for, as they come up; between them a batch is filled up with idle rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptPass:
    """The trunk's pass over prompts, whose cache rows it wrote."""

    token_ids_N: Tensor
    """int64."""
    plan: Expanded
    """Rows, cache and slots."""
    hidden_NC: Tensor
    """After the final norm."""


class ModelRunner:
    """Owns the cache, [layers, blocks, block_size, width]; knows nothing of scheduling.

    The cache's last block belongs to nobody: idle rows, and steps run past a sequence's end, write there.
    """

    def __init__(
        self, policy: Policy, num_blocks: int, block_size: int, max_blocks: int, num_layers: int | None = None
    ) -> None:
        self.policy, self.num_blocks, self.block_size = policy, num_blocks, block_size
        self.max_blocks = max_blocks
        """M, widest block table of a batch."""
        config = policy.config
        # Zeros, not empty memory: a masked position's weight is 0, and 0 times a stray NaN would still be NaN.
        self.cache = torch.zeros(
            num_layers or config.num_hidden_layers,
            num_blocks + 1,
            block_size,
            config.cache_width,
            dtype=policy.dtype,
            device=policy.device,
        )
        self._graphs: dict[int, _DecodeGraph] = {}
        self.weights = _addresses(policy)
        """Where the weights lie, from which graphs read."""

    def suits(self, num_blocks: int, max_blocks: int) -> bool:
        """Whether it can serve a batch that wants so many blocks, in tables of so many."""
        is_wide_enough = self.num_blocks >= num_blocks and self.max_blocks >= max_blocks
        return is_wide_enough and self.cache.dtype == self.policy.dtype and self.cache.device == self.policy.device

    def follow_weights(self) -> None:
        """Graphs read from fixed addresses: where the policy's weights have moved, they are captured anew."""
        if (weights := _addresses(self.policy)) != self.weights:
            self._graphs.clear()
            self.weights = weights

    def prefill(self, rows: Sequence[Sequence[int]], blocks: Sequence[np.ndarray]) -> Tensor:
        """Write each row of tokens into its blocks; logits after each row's last token, [P, V]."""
        read = self.read(rows, blocks)
        return self.policy.project(read.hidden_NC.index_select(0, read.plan.rows.last_N))

    def read(self, rows: Sequence[Sequence[int]], blocks: Sequence[np.ndarray]) -> PromptPass:
        """Write each row of tokens into its blocks, in the trunk's layers."""
        packed = PackedRows.of([len(row) for row in rows], self.policy.device)
        token_ids_N = torch.tensor([token for row in rows for token in row], device=self.policy.device)
        slots = [self._slots(b, np.arange(len(row))) for row, b in zip(rows, blocks, strict=True)]
        slot_N = torch.from_numpy(np.concatenate(slots)).to(self.policy.device)
        plan = Expanded(rows=packed, cache=self.cache, slot_N=slot_N)
        hidden_NC = self.policy(token_ids_N, packed.position_ids_N, plan).hidden_NC
        return PromptPass(token_ids_N=token_ids_N, plan=plan, hidden_NC=hidden_NC)

    def decode(self, running: RunningBatch, params: SamplingParams, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Feed each sequence its last token and sample the next, `steps` times: tokens and log-probabilities [S, B].

        The sequences must hold blocks for as many tokens of these as they may keep. A token of -1 says that the logits
        there were not all numbers; what follows it means nothing.
        """
        size, device = len(running), self.policy.device
        token_B, position_B, counter_B = (
            torch.from_numpy(array[:size].copy()).to(device)
            for array in (running.last_token, running.length, running.count)
        )
        seed_B = torch.from_numpy(running.seed[:size].view(np.int64)).to(device)
        forward = self.forward_of(self.table(running, steps))
        tokens, logprobs = [], []
        for step in range(steps):
            logits_BV = forward(token_B, position_B + step)
            sampled = sample(logits_BV, seed_B, counter_B + step, params)
            token_B = sampled.token_ids_B
            tokens.append(sampled.said_B)
            logprobs.append(sampled.logprobs_B)
        return torch.stack(tokens).cpu().numpy(), torch.stack(logprobs).cpu().numpy()

    def copy_blocks(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy whole blocks, in every layer."""
        source = torch.from_numpy(sources).to(self.cache.device)
        self.cache[:, torch.from_numpy(targets).to(self.cache.device)] = self.cache[:, source]

    def _slots(self, blocks: np.ndarray, positions: np.ndarray) -> np.ndarray:
        slots: np.ndarray = blocks[positions // self.block_size] * self.block_size + positions % self.block_size
        return slots

    def table(self, running: RunningBatch, steps: int) -> Tensor:
        """Block ids [B, M] of the running sequences, wide enough for this many more tokens of each."""
        size, is_gpu = len(running), self.policy.device.type == "cuda"
        reach = (int(running.length[:size].max()) + steps - 1) // self.block_size + 1
        assert reach <= self.max_blocks
        width = self.max_blocks if is_gpu else reach
        is_own = np.arange(width) < running.num_blocks[:size, None]
        table_BM = torch.from_numpy(np.where(is_own, running.block_table[:size, :width], self.num_blocks))
        return table_BM.to(self.policy.device)

    def forward_of(self, table_BM: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """From tokens and their positions, [B] each, to the logits after them [B, V]."""
        if self.policy.device.type != "cuda":
            return lambda token_B, position_B: self.step(token_B, position_B, table_BM)[1]
        graph = self._graph(len(table_BM))
        graph.take(table_BM)
        return graph.run

    def step(self, token_R: Tensor, position_R: Tensor, table_RM: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over the cache, without a graph: hidden states [R, C] and logits [R, V].

        Several rows may be of one sequence: all are written to the cache before any looks at it.
        """
        plan = Absorbed.at(self.cache, table_RM, position_R)
        hidden_RC = self.policy(token_R, position_R, plan).hidden_NC
        return hidden_RC, self.policy.project(hidden_RC)

    def _graph(self, size: int) -> _DecodeGraph:
        """The graph of the next captured batch size."""
        rows = next((rows for rows in CAPTURED_ROWS if rows >= size), size)
        if rows not in self._graphs:
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            self._graphs[rows] = _DecodeGraph(self, rows, pool)
        return self._graphs[rows]


class _DecodeGraph:
    """One decoding step of R rows, from token, position and block table to logits, at fixed addresses."""

    def __init__(self, runner: ModelRunner, rows: int, pool: Any) -> None:
        self.idle_block = runner.num_blocks
        device = runner.policy.device
        self.token_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.table_RM = torch.full((rows, runner.max_blocks), self.idle_block, dtype=torch.int64, device=device)
        # Once outside, so that kernels are compiled and handles made before anything is captured.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            runner.step(self.token_R, self.position_R, self.table_RM)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            _, self.logits_RV = runner.step(self.token_R, self.position_R, self.table_RM)

    def take(self, table_BM: Tensor) -> None:
        """The block table for the steps to come; rows beyond it are idle."""
        size = len(table_BM)
        self.table_RM[:size].copy_(table_BM)
        self.table_RM[size:] = self.idle_block
        self.position_R[size:] = 0

    def run(self, token_B: Tensor, position_B: Tensor) -> Tensor:
        """Logits [B, V], valid until the next step of any graph."""
        size = len(token_B)
        self.token_R[:size].copy_(token_B)
        self.position_R[:size].copy_(position_B)
        self.graph.replay()
        return self.logits_RV[:size]


def _addresses(policy: Policy) -> tuple[int, ...]:
    return tuple(weight.data_ptr() for weight in policy.parameters())
