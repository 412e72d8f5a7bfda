"""Runs the policy over the cache: prompts in packed rows, then some tokens of every sequence at a time.

On a GPU a decoding step is a CUDA graph, captured once for each of a few batch sizes; sampled tokens stay on the device
and feed the next step, and the host looks only every `run_ahead` steps.

Shapes: B sequences (or rows, where one has several), N packed prompt tokens, P prompts, R rows of a captured batch
(B rounded up), S steps, C model width, V vocabulary, M blocks of the longest sequence, L layers with routed experts,
K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policy import PackedRows, Policy, PolicyConfig
from policy.attention import Expanded
from policy.model import PolicyOutput
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
        # Beside the cache and under its slots, so that whatever shares, copies or rewrites a block has its experts too.
        self.experts: Tensor | None = None
        """Experts that each cached token went to, [L, blocks, block_size, K]; None for a policy without experts."""
        if config.num_moe_layers:
            shape = (config.num_moe_layers, num_blocks + 1, block_size, config.num_experts_per_tok)
            self.experts = torch.zeros(shape, dtype=_expert_dtype(config), device=policy.device)
        self._graphs: dict[int, _DecodeGraph] = {}
        self._weights = _addresses(policy)

    def suits(self, num_blocks: int, max_blocks: int) -> bool:
        """Whether it can serve a batch that wants so many blocks, in tables of so many."""
        is_wide_enough = self.num_blocks >= num_blocks and self.max_blocks >= max_blocks
        return is_wide_enough and self.cache.dtype == self.policy.dtype and self.cache.device == self.policy.device

    def prefill(self, rows: Sequence[Sequence[int]], blocks: Sequence[np.ndarray]) -> Tensor:
        """Write each row of tokens into its blocks; logits after each row's last token, [P, V]."""
        read = self.read(rows, blocks)
        return self.policy.project(read.hidden_NC.index_select(0, read.plan.rows.last_N))

    def read(self, rows: Sequence[Sequence[int]], blocks: Sequence[np.ndarray]) -> PromptPass:
        """Write each row of tokens into its blocks, in the trunk's layers."""
        packed = PackedRows.of([len(row) for row in rows], self.policy.device)
        token_ids_N = torch.tensor([token for row in rows for token in row], device=self.policy.device)
        slots = [self.slots(b, np.arange(len(row))) for row, b in zip(rows, blocks, strict=True)]
        slot_N = torch.from_numpy(np.concatenate(slots)).to(self.policy.device)
        plan = Expanded(rows=packed, cache=self.cache, slot_N=slot_N)
        output = self.policy(token_ids_N, packed.position_ids_N, plan)
        self._keep_experts(output, slot_N)
        return PromptPass(token_ids_N=token_ids_N, plan=plan, hidden_NC=output.hidden_NC)

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
            _, logits_BV = forward(token_B, position_B + step)
            sampled = sample(logits_BV, seed_B, counter_B + step, params)
            token_B = sampled.token_ids_B
            tokens.append(sampled.said_B)
            logprobs.append(sampled.logprobs_B)
        return torch.stack(tokens).cpu().numpy(), torch.stack(logprobs).cpu().numpy()

    def copy_blocks(self, sources: np.ndarray, targets: np.ndarray) -> None:
        """Copy whole blocks, in every layer."""
        source, target = (torch.from_numpy(blocks).to(self.cache.device) for blocks in (sources, targets))
        self.cache[:, target] = self.cache[:, source]
        if self.experts is not None:
            self.experts[:, target] = self.experts[:, source]

    def experts_at(self, slots: np.ndarray) -> np.ndarray:
        """Experts of the tokens at flat cache positions, [L, slots, K]."""
        assert self.experts is not None
        chosen: Tensor = self.experts.flatten(1, 2).index_select(1, torch.from_numpy(slots).to(self.experts.device))
        return chosen.cpu().numpy()

    def _keep_experts(self, output: PolicyOutput, slot_N: Tensor) -> None:
        if self.experts is not None and output.experts_MNK is not None:
            self.experts.flatten(1, 2).index_copy_(1, slot_N, output.experts_MNK.to(self.experts.dtype))

    def slots(self, blocks: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Flat cache positions of a sequence's positions, in its blocks."""
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

    def forward_of(self, table_BM: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """From tokens and their positions, [B] each, to hidden states [B, C] and the logits after them [B, V].

        Several rows may be of one sequence: all are written to the cache before any looks at it.
        """
        if self.policy.device.type != "cuda":
            return lambda token_B, position_B: self._step(token_B, position_B, table_BM)
        graph = self._graph(len(table_BM))
        graph.take(table_BM)
        return graph.run

    def _step(self, token_B: Tensor, position_B: Tensor, table_BM: Tensor) -> tuple[Tensor, Tensor]:
        plan = Absorbed.at(self.cache, table_BM, position_B)
        output = self.policy(token_B, position_B, plan)
        self._keep_experts(output, plan.slot_B)
        return output.hidden_NC, self.policy.project(output.hidden_NC)

    def _graph(self, size: int) -> _DecodeGraph:
        """The graph of the next captured batch size; captured again when the policy's weights have moved."""
        if (weights := _addresses(self.policy)) != self._weights:
            self._graphs.clear()
            self._weights = weights
        rows = next((rows for rows in CAPTURED_ROWS if rows >= size), size)
        if rows not in self._graphs:
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            self._graphs[rows] = _DecodeGraph(self, rows, pool)
        return self._graphs[rows]


class _DecodeGraph:
    """One decoding step of R rows, from token, position and block table to hidden states and logits, at fixed
    addresses."""

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
            runner._step(self.token_R, self.position_R, self.table_RM)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.hidden_RC, self.logits_RV = runner._step(self.token_R, self.position_R, self.table_RM)

    def take(self, table_BM: Tensor) -> None:
        """The block table for the steps to come; rows beyond it are idle."""
        size = len(table_BM)
        self.table_RM[:size].copy_(table_BM)
        self.table_RM[size:] = self.idle_block
        self.position_R[size:] = 0

    def run(self, token_B: Tensor, position_B: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, C] and logits [B, V], valid until the next step of any graph."""
        size = len(token_B)
        self.token_R[:size].copy_(token_B)
        self.position_R[:size].copy_(position_B)
        self.graph.replay()
        return self.hidden_RC[:size], self.logits_RV[:size]


def _expert_dtype(config: PolicyConfig) -> torch.dtype:
    """The smallest that holds the number of any expert."""
    return torch.uint8 if config.n_routed_experts <= 256 else torch.int16


def _addresses(policy: Policy) -> tuple[int, ...]:
    """Where the weights lie; a graph reads these addresses."""
    return tuple(weight.data_ptr() for weight in policy.parameters())
