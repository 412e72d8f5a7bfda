"""Runs the policy over the cache: prompts in one pass, then some tokens of every sequence at a time.

On a GPU a decoding step is a CUDA graph, captured once for each of a few batch sizes; sampled tokens stay on the device
and feed the next step, and the host looks only every `run_ahead` steps. Few prompt tokens are read by such a graph too,
each token as a row of its own: a pass over packed rows is started kernel by kernel, which takes tens of milliseconds
however few tokens it has.

Shapes: B sequences (or rows, where one has several), N prompt tokens, P prompts, R rows of a captured batch (B or N
rounded up), S steps, C model width, V vocabulary, M blocks of the longest sequence, L layers with routed experts,
K experts per token, D MTP modules in use, F = 2 + D numbers of a prompt token: itself, its position, the tokens ahead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from policy import PackedRows, Policy, PolicyConfig
from policy.attention import AttentionPlan, Expanded
from policy.bf16_decoding import reason_for_torch
from policy.block import Block
from policy.continued_attention import Continued
from policy.model import PolicyOutput
from policy.paged_attention import Absorbed
from rollouts.crew import Crew
from rollouts.graphs import Graphs, capture, rows_for
from rollouts.sampler import draws_plainly, sample
from rollouts.scheduler import RunningBatch
from rollouts.sequence import Chunk
from rollouts.types import SamplingParams

if TYPE_CHECKING:
    from rollouts.cpu_steps import DecodingSteps

_LOGGER = logging.getLogger(__name__)

PROMPT_ROWS = (16, 32, 64, 128, 256, 512, 1024)
"""Numbers of prompt tokens that graphs are captured for, as they come up; a pass over more is started kernel by kernel.

At 1,024 the work is as long as starting it takes: a decoding step of so many sequences."""
MOST_READ = 8 << 30
"""Bytes of the cache that such a graph may read: each row reads all before it, which a pass over whole rows shares.

Some 3 ms at an H100's bandwidth. One prompt of 1,024 tokens reads this much of 12 layers of DeepSeek-V3's latents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptPass:
    """The trunk's pass over prompts, or parts of them, whose cache rows it wrote."""

    lengths: tuple[int, ...]
    """Tokens of each, [P]."""
    hidden_NC: Tensor
    """After the final norm, valid until another pass."""

    def sound_lengths(self) -> list[int]:
        """Of each, how many tokens come before the first whose hidden states are not all numbers, [P]."""
        is_sound_N = self.hidden_NC.isfinite().all(dim=-1).cpu()
        return [
            len(is_sound) if is_sound.all() else int(is_sound.int().argmin())
            for is_sound in is_sound_N.split(self.lengths)
        ]


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
        self.most_prompt_rows = PROMPT_ROWS[-1] if policy.device.type == "cuda" else 0
        """Prompt tokens up to which a pass takes each as a row of its own; on a CPU packed rows are faster."""
        self._graphs: Graphs[_DecodeGraph] = Graphs()
        self._prompt_graphs: Graphs[_PromptGraph] = Graphs()
        # Modules in pieces over ranks gather them as they run: in one order, so on one thread.
        is_alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        self._crew = Crew() if is_alone and self._has_cpu_kernels() else None
        self._cpu_steps: list[DecodingSteps] | None = None
        """Those that no thread uses; None where the policy's steps are not made of operations."""
        self.captured = _addresses(policy)
        """Where the weights lie that graphs read."""

    def _has_cpu_kernels(self) -> bool:
        """Whether kernels decode whole layers on the CPU, outside of the interpreter's lock."""
        if not self.cache.is_cpu or self.cache.dtype != torch.bfloat16:
            return self.cache.is_cpu and self.cache.dtype == torch.float32
        reasons = [reason_for_torch(layer, self.cache) for layer in cast(Iterable[Block], self.policy.layers)]
        reason = next(filter(None, reasons), None)
        if not self.policy.residual_in_fp32:
            reason = "residual_in_fp32 is false"
        if reason is not None:
            _LOGGER.info("decoding in bf16 is left to torch: %s", reason)
        return reason is None

    def suits(self, num_blocks: int, max_blocks: int) -> bool:
        """Whether it can serve a batch that wants so many blocks, in tables of so many."""
        is_wide_enough = self.num_blocks >= num_blocks and self.max_blocks >= max_blocks
        return is_wide_enough and self.cache.dtype == self.policy.dtype and self.cache.device == self.policy.device

    def follow_weights(self) -> None:
        """Graphs read from fixed addresses: where the policy's weights have moved, they are captured anew."""
        if (now := _addresses(self.policy)) != self.captured:
            self._graphs.clear()
            self._prompt_graphs.clear()
            self._cpu_steps = None
            self.captured = now
        if self.cache.is_cpu and self.cache.dtype == torch.float32:
            from rollouts.cpu_steps import is_made_of_operations

            if not is_made_of_operations(self.policy, self.cache):
                self._cpu_steps = None
            elif self._cpu_steps is None:
                self._cpu_steps = []

    def weights(self) -> tuple[tuple[int, int], ...]:
        """Where each of the policy's tensors lies and how often it was written in place, so far as torch counts that:
        another answer means other weights."""
        tensors = (*self.policy.parameters(), *self.policy.buffers())
        return tuple((tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in tensors)

    def read(self, chunks: Sequence[Chunk], num_modules: int = 0) -> PromptPass:
        """Write parts of prompts into their blocks, in the trunk's layers and in those of the first MTP modules.

        A part attends over what comes before it, which is in the prompt's blocks already or is written by another
        chunk of this pass.
        """
        read = self._read_rows if self.reads_rows(chunks) else self._read_packed
        lengths = tuple(chunk.end - chunk.begin for chunk in chunks)
        return PromptPass(lengths=lengths, hidden_NC=read(chunks, num_modules))

    def reads_rows(self, chunks: Sequence[Chunk]) -> bool:
        """Whether each token of these is a row of its own, as in decoding."""
        num_tokens = sum(chunk.end - chunk.begin for chunk in chunks)
        seen = sum((chunk.end * (chunk.end + 1) - chunk.begin * (chunk.begin + 1)) // 2 for chunk in chunks)
        entry_bytes = self.cache.shape[0] * self.cache.shape[-1] * self.cache.element_size()
        return num_tokens <= self.most_prompt_rows and seen * entry_bytes <= MOST_READ

    def _read_packed(self, chunks: Sequence[Chunk], num_modules: int) -> Tensor:
        """Hidden states [N, C] of a pass over packed rows, whose keys and values are made once for all of a row."""
        device, lengths = self.policy.device, [chunk.end for chunk in chunks]
        packed = PackedRows.of([chunk.end - chunk.begin for chunk in chunks], device)
        token_ids_N = torch.tensor([token for chunk in chunks for token in chunk.token_ids], device=device)
        slots = [self._chunk_slots(chunk, chunk.begin) for chunk in chunks]
        slot_N = torch.from_numpy(np.concatenate(slots)).to(device)
        plan: Expanded | Continued = Expanded(rows=packed, cache=self.cache, slot_N=slot_N)
        position_ids_N = packed.position_ids_N
        if any(chunk.begin for chunk in chunks):
            slot_L = torch.from_numpy(np.concatenate([self._chunk_slots(chunk, 0) for chunk in chunks])).to(device)
            plan = Continued.of(packed, self.cache, slot_N, lengths, slot_L)
            positions = [np.arange(chunk.begin, chunk.end) for chunk in chunks]
            position_ids_N = torch.from_numpy(np.concatenate(positions)).to(device)
        aheads = [[token for chunk in chunks for token in chunk.ahead(k + 1)] for k in range(num_modules)]
        ahead_DN = torch.tensor(aheads, dtype=torch.int64, device=device)
        return self._read(token_ids_N, position_ids_N, plan, slot_N, ahead_DN)

    def _read_rows(self, chunks: Sequence[Chunk], num_modules: int) -> Tensor:
        """The same of a pass that has a row for each token, on a GPU as a graph."""
        device, count = self.policy.device, sum(chunk.end - chunk.begin for chunk in chunks)
        is_gpu = device.type == "cuda"
        rows = rows_for(count, PROMPT_ROWS) if is_gpu else count
        width = self.max_blocks if is_gpu else -(-max(chunk.end for chunk in chunks) // self.block_size)
        numbers_FR = np.zeros((2 + num_modules, rows), dtype=np.int64)
        owner_R = np.full(rows, len(chunks), dtype=np.int64)
        table_PM = np.full((len(chunks) + 1, width), self.num_blocks, dtype=np.int64)  # the last is the idle rows'
        end = 0
        for place, chunk in enumerate(chunks):
            assert chunk.prefill.blocks is not None
            begin, end = end, end + chunk.end - chunk.begin
            aheads = [chunk.ahead(k + 1) for k in range(num_modules)]
            numbers_FR[:, begin:end] = [chunk.token_ids, range(chunk.begin, chunk.end), *aheads]
            owner_R[begin:end] = place
            held = chunk.prefill.blocks[:width]
            table_PM[place, : len(held)] = held
        # In one copy: the host waits for each.
        flat = torch.from_numpy(np.concatenate((numbers_FR.ravel(), owner_R, table_PM.ravel()))).to(device)
        numbers, owner, table = flat.split([numbers_FR.size, rows, table_PM.size])
        given = numbers.view(numbers_FR.shape), table.view(table_PM.shape).index_select(0, owner)
        if not is_gpu:
            return self.read_rows(*given)
        graph = self._prompt_graphs.get((rows, num_modules), lambda pool: _PromptGraph(self, rows, num_modules, pool))
        return graph.run(*given)[:count]

    def read_rows(self, numbers_FR: Tensor, table_RM: Tensor) -> Tensor:
        """Hidden states [R, C] of tokens that are a row each, without a graph: all rows of a layer are written to the
        cache before any is read, so that a token sees those before it whichever rows they are."""
        plan = Absorbed.at(self.cache, table_RM, numbers_FR[1])
        return self._read(numbers_FR[0], numbers_FR[1], plan, plan.slot_B, numbers_FR[2:])

    def _read(
        self, token_ids_N: Tensor, position_ids_N: Tensor, plan: AttentionPlan, slot_N: Tensor, ahead_DN: Tensor
    ) -> Tensor:
        output: PolicyOutput = self.policy(token_ids_N, position_ids_N, plan)
        self._keep_experts(output, slot_N)
        hidden_NC = output.hidden_NC
        for module, ahead_N in enumerate(ahead_DN):
            hidden_NC = self.policy.draft(hidden_NC, ahead_N, position_ids_N, plan, module=module).hidden_NC
        return output.hidden_NC

    def logits_after(self, read: PromptPass) -> Tensor:
        """Logits after each prompt's last token, [P, V]."""
        last_P = torch.from_numpy(np.cumsum(read.lengths) - 1).to(self.policy.device)
        return self.policy.project(read.hidden_NC.index_select(0, last_P))

    def decode(
        self, running: RunningBatch, params: SamplingParams, steps: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Feed each sequence its last token and sample the next, `steps` times: tokens and log-probabilities [S, B],
        and how many of these are a sequence's own, [B], where one that ended was not sampled any further.

        The sequences must hold blocks for as many tokens of these as they may keep. A token of -1 says that the logits
        there were not all numbers; what follows it means nothing.
        """
        size = len(running)
        table_BM = self.table(running, steps)
        if self._cpu_steps is not None:
            return self._decode_on_cpu(self._cpu_steps, running, table_BM.numpy(), params, steps)
        token_B, position_B, counter_B = (
            torch.from_numpy(array[:size].copy()).to(self.policy.device)
            for array in (running.last_token, running.length, running.count)
        )
        seed_B = torch.from_numpy(running.seed[:size].view(np.int64)).to(self.policy.device)

        def decode_some(rows: slice) -> tuple[Tensor, Tensor]:
            forward, token = self.forward_of(table_BM[rows]), token_B[rows]
            tokens, logprobs = [], []
            for step in range(steps):
                logits = forward(token, position_B[rows] + step)
                sampled = sample(logits, seed_B[rows], counter_B[rows] + step, params)
                token = sampled.token_ids_B
                tokens.append(sampled.said_B)
                logprobs.append(sampled.logprobs_B)
            return torch.stack(tokens), torch.stack(logprobs)

        parts = self._crew.run(decode_some, size) if self._crew is not None else [decode_some(slice(size))]
        tokens_SB, logprobs_SB = (torch.cat(part, dim=1).cpu().numpy() for part in zip(*parts, strict=True))
        return tokens_SB, logprobs_SB, None

    def steps_at_once(self, run_ahead: int, params: SamplingParams) -> int:
        """How many tokens `decode` should be asked for: more than one where what lies behind a sequence's end costs
        nothing, or a GPU need not wait."""
        draws_ahead = self._cpu_steps is not None and draws_plainly(params, self.policy.config.vocab_size)
        return run_ahead if draws_ahead or self.policy.device.type == "cuda" else 1

    def _decode_on_cpu(
        self, idle: list[DecodingSteps], running: RunningBatch, table_BM: np.ndarray, params: SamplingParams, steps: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        from rollouts.cpu_steps import DecodingSteps

        draws_here = draws_plainly(params, self.policy.config.vocab_size)
        assert steps == 1 or draws_here

        def decode_some(rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            tables = table_BM[rows]
            mine = idle.pop() if idle else None
            if mine is None or not mine.suits(*tables.shape):
                mine = DecodingSteps(self.policy, self.cache, self.experts, len(tables), self.max_blocks)
            token_B, position_B = running.last_token[rows], running.length[rows]
            seed_B, counter_B = running.seed[rows].view(np.int64), running.count[rows]
            if draws_here:
                done = mine.sample(token_B, position_B, seed_B, counter_B, tables, params, steps)
                idle.append(mine)
                return done.token_ids_SB, done.logprobs_SB, done.valid_B
            logits_BV = mine.logits(token_B, position_B, tables)
            sampled = sample(logits_BV, torch.from_numpy(seed_B), torch.from_numpy(counter_B), params)
            idle.append(mine)
            return sampled.said_B.numpy()[None], sampled.logprobs_B.numpy()[None], np.ones(len(tables), dtype=np.int64)

        size = len(running)
        parts = self._crew.run(decode_some, size) if self._crew is not None else [decode_some(slice(size))]
        tokens_SB, logprobs_SB, valid_B = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
        return tokens_SB, logprobs_SB, valid_B

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

    def _chunk_slots(self, chunk: Chunk, begin: int) -> np.ndarray:
        """Where in the cache the tokens lie from `begin` to the chunk's end."""
        assert chunk.prefill.blocks is not None
        return self.slots(chunk.prefill.blocks, np.arange(begin, chunk.end))

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

    def forward_of(self, table_BM: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """From tokens and their positions, [B] each, to the logits after them [B, V]."""
        if self.policy.device.type != "cuda":
            return lambda token_B, position_B: self.step(
                token_B, position_B, Absorbed.at(self.cache, table_BM, position_B)
            )[1]
        graph = self._graph(len(table_BM))
        graph.take(table_BM)
        return graph.run

    def step(self, token_R: Tensor, position_R: Tensor, plan: Absorbed) -> tuple[Tensor, Tensor]:
        """One pass over the cache, without a graph: hidden states [R, C] and logits [R, V].

        Several rows may be of one sequence: all are written to the cache before any looks at it.
        """
        output = self.policy(token_R, position_R, plan)
        self._keep_experts(output, plan.slot_B)
        return output.hidden_NC, self.policy.project(output.hidden_NC)

    def _graph(self, size: int) -> _DecodeGraph:
        """The graph of the next captured batch size."""
        rows = rows_for(size)
        return self._graphs.get(rows, lambda pool: _DecodeGraph(self, rows, pool))


class _DecodeGraph:
    """One decoding step of R rows, from token, position and block table to logits, at fixed addresses."""

    def __init__(self, runner: ModelRunner, rows: int, pool: Any) -> None:
        self.idle_block = runner.num_blocks
        device = runner.policy.device
        self.token_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self.table_RM = torch.full((rows, runner.max_blocks), self.idle_block, dtype=torch.int64, device=device)

        def step() -> Tensor:
            plan = Absorbed.at(runner.cache, self.table_RM, self.position_R)
            return runner.step(self.token_R, self.position_R, plan)[1]

        self.graph, self.logits_RV = capture(step, pool)

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


class _PromptGraph:
    """One pass over R prompt tokens, each a row of its own, at fixed addresses."""

    def __init__(self, runner: ModelRunner, rows: int, num_modules: int, pool: Any) -> None:
        device, idle_block = runner.policy.device, runner.num_blocks
        self.numbers_FR = torch.zeros(2 + num_modules, rows, dtype=torch.int64, device=device)
        self.table_RM = torch.full((rows, runner.max_blocks), idle_block, dtype=torch.int64, device=device)
        self.graph, self.hidden_RC = capture(lambda: runner.read_rows(self.numbers_FR, self.table_RM), pool)

    def run(self, numbers_FR: Tensor, table_RM: Tensor) -> Tensor:
        """Hidden states [R, C], valid until the next pass of any graph."""
        self.numbers_FR.copy_(numbers_FR)
        self.table_RM.copy_(table_RM)
        self.graph.replay()
        return self.hidden_RC


def _expert_dtype(config: PolicyConfig) -> torch.dtype:
    """The smallest that holds the number of any expert."""
    return torch.uint8 if config.n_routed_experts <= 256 else torch.int16


def _addresses(policy: Policy) -> tuple[int, ...]:
    return tuple(weight.data_ptr() for weight in (*policy.parameters(), *policy.buffers()))
