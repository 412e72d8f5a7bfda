"""Self-speculation: the policy's MTP modules draft tokens, the trunk checks them all in one pass over the cache.

A token is always the one that the trunk's logits give with the sequence's own random number for that index
(`rollouts.sampler`). Drafts are drawn with the same numbers from the modules' logits, and one is accepted where it is
the trunk's token. So completions are those of plain decoding, to rounding, at any temperature and truncation; drafts
decide only how many of a round's rows count. Sharing the number makes the two agree more often than independent draws
would, and needs no ratio of probabilities as rejection sampling does (Leviathan et al., 2023).

With L tokens of a sequence cached and token L sampled but not yet fed, a round
1. runs the modules over the window, positions L - W to L - 1, with the tokens after them: rows that stood on drafts, or
   lay behind the newest tokens, are written anew; what is said at L - 1 is the first draft;
2. feeds token L and the K drafts to the trunk at positions L to L + K, and keeps the tokens up to the first that
   differs from its draft.

A cache row of module j at position i holds the token at i + j + 1; W = K + (modules in use) reaches every row that may
have been written with another token than the true one.

On a GPU a round is one CUDA graph, drafts, check and sampling, and some rounds run before the host looks at them.

Shapes: B sequences (A with the idle rows of a captured batch), P prompts, N packed prompt tokens, K drafts of a round,
S = K + 1 rows of a sequence in the trunk's pass, W positions of the window, T = W + S tokens known or drafted, C model
width, V vocabulary, M blocks of the longest sequence, R rows of a pass (one token of all sequences, then the next one),
I rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policy.paged_attention import Absorbed
from rollouts.graphs import Graphs, capture, rows_for
from rollouts.model_runner import ModelRunner, PromptPass
from rollouts.sampler import Sampled, sample
from rollouts.scheduler import RunningBatch
from rollouts.sequence import Chunk, Prefill
from rollouts.types import SamplingParams

PROBE = 1024
"""Rounds of single sequences after which drafts that do not pay are given up, for the rest of a call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drafted:
    """What some rounds give."""

    token_ids_TB: np.ndarray
    """The trunk's tokens, int64, a sequence's own first; -1 where its logits were not all numbers."""
    logprobs_TB: np.ndarray
    """Nats, fp32, under the distribution drawn from."""
    valid_B: np.ndarray
    """How many of the tokens are a sequence's own: of each round the accepted drafts and one more."""
    accepted_IB: np.ndarray
    """Of each round, the drafts up to the first that the trunk did not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """Where each sequence stands, int64 [A] each: what a round reads and, in place, moves on."""

    slot: Tensor
    """Of the window; the last one is nobody's."""
    seed: Tensor
    last: Tensor
    """Token sampled but not yet in the cache."""
    length: Tensor
    """Tokens in the cache."""
    count: Tensor
    """Tokens sampled."""

    @classmethod
    def of(cls, numbers: Tensor) -> _State:
        """From its fields as rows, [5, A]."""
        slot, seed, last, length, count = numbers
        return cls(slot=slot, seed=seed, last=last, length=length, count=count)


def window_of(num_drafts: int, num_modules: int) -> int:
    """W, last positions of a sequence whose module rows a round writes again."""
    return num_drafts + min(num_drafts, num_modules)


class Speculator:
    """Drafts and checks for running sequences; keeps the window of each under its `slot`."""

    def __init__(
        self, runner: ModelRunner, num_drafts: int, max_batch: int, capacity: int, max_prefill_tokens: int
    ) -> None:
        policy, config = runner.policy, runner.policy.config
        self.runner, self.num_drafts, self.max_batch = runner, num_drafts, max_batch
        self.max_prefill_tokens = max_prefill_tokens
        self.num_modules = min(num_drafts, config.num_nextn_predict_layers)
        self.window = window_of(num_drafts, config.num_nextn_predict_layers)
        self.capacity = capacity
        """Sequences whose windows it can keep."""
        self._num_rounds = self._num_kept = 0
        self._graphs: Graphs[_RoundGraph] = Graphs()
        self._captured: object = None
        head = policy.lm_head.weight.numel()
        drafting = num_drafts * (_size(policy.mtp) // len(policy.mtp) + head)
        self._break_even = 1 + drafting / (_size(policy.layers) + head)
        shape = (capacity + 1, self.window)
        self._hidden = torch.zeros(*shape, config.hidden_size, dtype=policy.dtype, device=policy.device)
        """The trunk's hidden states at each window's positions, oldest first, by slot; the last is for idle rows."""
        self._tokens = torch.zeros(shape, dtype=torch.int64, device=policy.device)
        """The tokens there."""
        self._is_stale = np.zeros(capacity, dtype=bool)
        """Whether a slot's window and module rows lag behind, because it was decoded plainly."""

    @property
    def steps(self) -> int:
        """S, most tokens that a round adds to a sequence."""
        return self.num_drafts + 1

    @property
    def pays(self) -> bool:
        """Whether a round gives more tokens than it costs plain steps.

        Cost is counted in weights read, which is what decoding a small batch waits for; no clock decides, so that runs
        repeat.
        """
        return self._num_rounds < PROBE or self._num_kept > self._break_even * self._num_rounds

    def rounds_for(self, num_tokens: int) -> int:
        """About how many rounds give a sequence so many tokens, at least 1: by what rounds of this call have given."""
        per_round = self._num_kept / self._num_rounds if self._num_rounds else 1.0
        return max(1, math.ceil(num_tokens / per_round))

    def begin_call(self) -> None:
        """Nothing is known of what comes: drafts may pay again."""
        self._num_rounds = self._num_kept = 0

    def takes(self, size: int) -> bool:
        """Whether a batch of this size is drafted for."""
        return size <= self.max_batch and self.pays

    def has_stale(self, running: RunningBatch) -> bool:
        """Whether a sequence would have to be read again first."""
        return bool(self._is_stale[running.slot[: len(running)]].any())

    def read(self, chunks: Sequence[Chunk]) -> tuple[PromptPass, list[Tensor]]:
        """`ModelRunner.read` that fills the modules' cache too; also the hidden states [W, C] up to each chunk's end.

        They go on from those that the chunk's prompt has; what lies before its first token is zeros. At a prompt's end
        the modules' last rows lack tokens still to come; the first round writes them.
        """
        read = self.runner.read(chunks, self.num_modules)
        tails = [chunk.prefill.tail_WC for chunk in chunks]
        kept = [tail_WC for tail_WC in tails if tail_WC is not None]
        nothing_1C = read.hidden_NC.new_zeros(1, read.hidden_NC.shape[1])
        # Where each state lies among: nothing, the tails that there are, the hidden states of this pass.
        index_PW, end, before = np.zeros((len(chunks), self.window), dtype=np.int64), 1 + len(kept) * self.window, 1
        for place, length in enumerate(read.lengths):
            known = np.zeros(self.window, dtype=np.int64)
            if tails[place] is not None:
                known, before = np.arange(before, before + self.window), before + self.window
            index_PW[place] = np.concatenate((known, np.arange(end, end + length)))[-self.window :]
            end += length
        all_XC = torch.cat((nothing_1C, *kept, read.hidden_NC))
        index = torch.from_numpy(index_PW.ravel()).to(all_XC.device)
        return read, list(all_XC.index_select(0, index).view(len(chunks), self.window, -1))

    def begin(self, running: RunningBatch, starts: Iterable[tuple[int, Prefill]]) -> None:
        """Take the windows of sequences that start, each (row, what it continues)."""
        self._begin([(int(running.slot[row]), prefill) for row, prefill in starts])

    def leave(self, running: RunningBatch) -> None:
        """The running sequences are decoded plainly: what is kept of them lags behind."""
        self._is_stale[running.slot[: len(running)]] = True

    def refresh(self, running: RunningBatch) -> None:
        """Read sequences that lag behind again, as after a preemption."""
        for row in np.flatnonzero(self._is_stale[running.slot[: len(running)]]).tolist():
            count, length = int(running.count[row]), int(running.length[row])
            token_ids = (running.sequences[row].prompt + running.token_ids[row, :count].tolist())[:length]
            again = Prefill(token_ids=token_ids, sequences=[], blocks=running.blocks_of(row))
            for begin in range(0, length, self.max_prefill_tokens):
                chunk = Chunk(prefill=again, begin=begin, end=min(begin + self.max_prefill_tokens, length))
                _, [again.tail_WC] = self.read([chunk])
            self._begin([(int(running.slot[row]), again)])

    def decode(self, running: RunningBatch, params: SamplingParams, num_rounds: int = 1) -> Drafted:
        """Rounds for every running sequence; they must hold blocks for as many tokens of these as they may keep."""
        size, device = len(running), self.runner.policy.device
        given = (running.slot, running.seed.view(np.int64), running.last_token, running.length, running.count)
        numbers_5B = torch.from_numpy(np.stack([array[:size] for array in given])).to(device)
        table_BM = self.runner.table(running, num_rounds * self.steps)
        if device.type == "cuda":
            graph = self._graph(size, params)
            graph.take(numbers_5B, table_BM)
            drafted = [graph.run(size) for _ in range(num_rounds)]
        else:
            state = _State.of(numbers_5B)
            drafted = [self._round(state, table_BM, params) for _ in range(num_rounds)]
        report_IXB = torch.stack(drafted).cpu().numpy()
        said_ISB, bits_ISB, accepted_IB = np.split(report_IXB, [self.steps, 2 * self.steps], axis=1)
        accepted_IB = accepted_IB[:, 0].astype(np.int64)
        is_own_TB = _in_order(np.arange(self.steps)[:, None] <= accepted_IB[:, None])
        order_TB = np.argsort(~is_own_TB, axis=0, kind="stable")
        return Drafted(
            token_ids_TB=np.take_along_axis(_in_order(said_ISB).astype(np.int64), order_TB, axis=0),
            logprobs_TB=np.take_along_axis(_in_order(bits_ISB).view(np.float32), order_TB, axis=0),
            valid_B=is_own_TB.sum(axis=0),
            accepted_IB=accepted_IB,
        )

    def _round(self, state: _State, table_AM: Tensor, params: SamplingParams) -> Tensor:
        """What `leave` reports; state and windows move on."""
        runner, window = self.runner, self.window
        hidden_WAC, known_TA = enter(self._hidden, self._tokens, state, self.num_drafts)
        drafted_XAC = hidden_WAC
        for step in range(self.num_drafts):
            if step < self.num_modules:
                taken, first = (step, drafted_XAC, known_TA[step + 1 : step + 1 + window]), -window
            else:  # the last module once more, on its own hidden state of the position before
                taken = self.num_modules - 1, drafted_XAC[-1:], known_TA[window + step : window + step + 1]
                first = step - self.num_modules
            drafted_XAC = self._draft(*taken, state.length, first, table_AM)
            logits_AV = runner.policy.project(drafted_XAC[-1])
            sample(logits_AV, state.seed, state.count, params, ahead=step, into=known_TA[window + 1 + step])
        fed_R = known_TA[window:].flatten()
        position_R, plan = Absorbed.at_several(runner.cache, table_AM, state.length, 0, self.steps, runner.num_blocks)
        hidden_RC, logits_RV = runner.step(fed_R, position_R, plan)
        sampled = sample(logits_RV, state.seed, state.count, params)
        return leave(self._hidden, self._tokens, state, hidden_WAC, known_TA, hidden_RC, sampled)

    def _draft(
        self, module: int, hidden_XAC: Tensor, ahead_XA: Tensor, length_A: Tensor, first: int, table_AM: Tensor
    ) -> Tensor:
        """A module over some positions of each sequence, from its length + first on, [X, A, C]; positions before its
        first token are idle rows."""
        runner = self.runner
        position_R, plan = Absorbed.at_several(
            runner.cache, table_AM, length_A, first, len(hidden_XAC), runner.num_blocks
        )
        hidden_RC, ahead_R = hidden_XAC.flatten(0, 1), ahead_XA.flatten()
        return runner.policy.draft(hidden_RC, ahead_R, position_R, plan, module=module).hidden_NC.view_as(hidden_XAC)

    def _graph(self, size: int, params: SamplingParams) -> _RoundGraph:
        """The graph of the next captured batch size, for one way of drawing."""
        drawing = (params.temperature, params.top_k, params.top_p, params.min_p)
        now = (drawing, self.runner.captured)
        if self._captured != now:
            self._graphs.clear()
            self._captured = now
        rows = rows_for(size)
        return self._graphs.get(rows, lambda pool: _RoundGraph(self, rows, params, pool))

    def count(self, accepted_IB: np.ndarray, kept_B: np.ndarray) -> tuple[int, int]:
        """Take note of rounds of which each sequence kept `kept_B` tokens, in order; gives how many tokens were drafted
        in them, and how many of these became part of a completion.
        """
        given_IB = accepted_IB + 1
        kept_IB = np.clip(kept_B - (given_IB.cumsum(axis=0) - given_IB), 0, given_IB)
        num_rounds = int((kept_IB > 0).sum())
        self._num_rounds += num_rounds
        self._num_kept += int(kept_B.sum())
        return self.num_drafts * num_rounds, int(np.minimum(accepted_IB, kept_IB).sum())

    def _begin(self, starts: Sequence[tuple[int, Prefill]]) -> None:
        """Take the windows that there are, each (slot, what its sequence continues)."""
        for slot, prefill in starts:
            self._is_stale[slot] = prefill.tail_WC is None
        known = [(slot, prefill) for slot, prefill in starts if prefill.tail_WC is not None]
        if not known:
            return
        place_of = {prefill: place for place, prefill in enumerate(dict.fromkeys(prefill for _, prefill in known))}
        numbers = np.zeros((len(known), 2 + self.window), dtype=np.int64)
        for at, (slot, prefill) in enumerate(known):
            last = prefill.token_ids[-self.window :]
            numbers[at, :2] = slot, place_of[prefill]
            numbers[at, 2 + self.window - len(last) :] = last
        on_device = torch.from_numpy(numbers).to(self._tokens.device)
        slot_B = on_device[:, 0]
        tail_PWC = torch.stack([prefill.tail_WC for prefill in place_of if prefill.tail_WC is not None])
        self._hidden[slot_B] = tail_PWC[on_device[:, 1]]
        self._tokens[slot_B] = on_device[:, 2:]


def enter(kept_hidden: Tensor, kept_tokens: Tensor, state: _State, num_drafts: int) -> tuple[Tensor, Tensor]:
    """The windows' hidden states [W, A, C], and the tokens [T, A] there and after them: the last of a sequence, which
    is not fed yet, and room for the drafts."""
    if kept_hidden.is_cuda:
        from rollouts import round_kernels

        return round_kernels.enter(kept_hidden, kept_tokens, state.slot, state.last, num_drafts)
    hidden_WAC = kept_hidden[state.slot].transpose(0, 1).contiguous()
    drafts_KA = kept_tokens.new_zeros(num_drafts, len(state.slot))
    return hidden_WAC, torch.cat((kept_tokens[state.slot].t(), state.last[None], drafts_KA))


def leave(
    kept_hidden: Tensor,
    kept_tokens: Tensor,
    state: _State,
    hidden_WAC: Tensor,
    known_TA: Tensor,
    hidden_RC: Tensor,
    sampled: Sampled,
) -> Tensor:
    """Move windows and state on, in place, by the drafts that the trunk says too and one token more.

    The report is int32 [2S + 1, A]: what the trunk says, -1 where its logits were not all numbers; the bits of its
    log-probabilities, fp32; how many drafts were accepted.
    """
    if kept_hidden.is_cuda:
        from rollouts import round_kernels

        numbers = state.slot, state.last, state.length, state.count
        given = sampled.token_ids_B, sampled.finite_B, sampled.logprobs_B
        return round_kernels.leave(kept_hidden, kept_tokens, numbers, hidden_WAC, known_TA, hidden_RC, given)
    window, size = len(hidden_WAC), len(state.slot)
    said_SA, bits_SA = sampled.said_B.view(-1, size), sampled.logprobs_B.view(torch.int32).view(-1, size)
    accepted_A = (said_SA[:-1] == known_TA[window + 1 :]).long().cumprod(dim=0).sum(dim=0)
    moved_WA = accepted_A + 1 + torch.arange(window, device=accepted_A.device)[:, None]
    all_TAC = torch.cat((hidden_WAC, hidden_RC.view(-1, *hidden_WAC.shape[1:])))
    kept_tokens[state.slot] = known_TA.gather(0, moved_WA).t()
    kept_hidden[state.slot] = all_TAC[moved_WA, torch.arange(size, device=accepted_A.device)].transpose(0, 1)
    # A row of NaN goes on from any token: the host takes nothing of it from here on.
    state.last.copy_(said_SA.gather(0, accepted_A[None])[0].clamp(min=0))
    state.length.add_(accepted_A + 1)
    state.count.add_(accepted_A + 1)
    return torch.cat((said_SA.int(), bits_SA, accepted_A[None].int()))


class _RoundGraph:
    """One round of A sequences at fixed addresses; replayed, it goes on from where the last one ended."""

    def __init__(self, speculator: Speculator, rows: int, params: SamplingParams, pool: Any) -> None:
        runner, device = speculator.runner, speculator.runner.policy.device
        self.idle_slot, self.idle_block = speculator.capacity, runner.num_blocks
        self.numbers_5A = torch.zeros(5, rows, dtype=torch.int64, device=device)
        self.state = _State.of(self.numbers_5A)
        self.table_AM = torch.zeros(rows, runner.max_blocks, dtype=torch.int64, device=device)
        nobody = torch.zeros(0, dtype=torch.int64, device=device)
        self.take(nobody.view(5, 0), nobody.view(0, runner.max_blocks))
        self.graph, self.report_XA = capture(lambda: speculator._round(self.state, self.table_AM, params), pool)

    def take(self, numbers_5B: Tensor, table_BM: Tensor) -> None:
        """Where the sequences stand; rows beyond them are idle."""
        size = len(table_BM)
        self.numbers_5A[:, :size].copy_(numbers_5B)
        self.numbers_5A[:, size:] = 0
        self.state.slot[size:] = self.idle_slot
        self.table_AM[:size].copy_(table_BM)
        self.table_AM[size:] = self.idle_block

    def run(self, size: int) -> Tensor:
        """What the next round reports of the first `size` rows."""
        self.graph.replay()
        return self.report_XA[:, :size].clone()


def _in_order(x_ISB: np.ndarray) -> np.ndarray:
    """Each sequence's tokens of all rounds, one after another, [I * S, B]."""
    return np.ascontiguousarray(x_ISB).reshape(-1, x_ISB.shape[-1])


def _size(module: nn.Module) -> int:
    """Weights."""
    return sum(weight.numel() for weight in module.parameters())
