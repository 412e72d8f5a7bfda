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

Shapes: B sequences, P prompts, N packed prompt tokens, K drafts of a round, S = K + 1 rows of a sequence in the
trunk's pass, W positions of the window, T tokens known and drafted so far, C model width, V vocabulary, M blocks of the
longest sequence, R rows of a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from policy.paged_attention import Absorbed
from rollouts.model_runner import ModelRunner, PromptPass
from rollouts.sampler import sample
from rollouts.scheduler import RunningBatch
from rollouts.sequence import Chunk, Prefill
from rollouts.types import SamplingParams

PROBE = 1024
"""Rounds of single sequences after which drafts that do not pay are given up, for the rest of a call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """What a round gives."""

    token_ids_SB: np.ndarray
    """The trunk's tokens, int64; -1 where its logits were not all numbers."""
    logprobs_SB: np.ndarray
    """Nats, fp32, under the distribution drawn from."""
    accepted_B: np.ndarray
    """Drafts up to the first that the trunk did not say; the first accepted + 1 of the S tokens are the sequence's."""


def window_of(num_drafts: int, num_modules: int) -> int:
    """W, last positions of a sequence whose module rows a round writes again."""
    return num_drafts + min(num_drafts, num_modules)


class Speculator:
    """Drafts and checks for the running sequences of one call; keeps the window of each under its `slot`."""

    def __init__(
        self, runner: ModelRunner, num_drafts: int, max_batch: int, capacity: int, max_prefill_tokens: int
    ) -> None:
        policy, config = runner.policy, runner.policy.config
        self.runner, self.num_drafts, self.max_batch = runner, num_drafts, max_batch
        self.max_prefill_tokens = max_prefill_tokens
        self.num_modules = min(num_drafts, config.num_nextn_predict_layers)
        self.window = window_of(num_drafts, config.num_nextn_predict_layers)
        self.num_drafted = 0
        """Tokens drafted in this call."""
        self.num_accepted = 0
        """Of them, tokens that became part of a completion."""
        self._num_rounds = self._num_kept = 0
        head = policy.lm_head.weight.numel()
        drafting = num_drafts * (_size(policy.mtp) // len(policy.mtp) + head)
        self._break_even = 1 + drafting / (_size(policy.layers) + head)
        self._hidden = torch.zeros(capacity, self.window, config.hidden_size, dtype=policy.dtype, device=policy.device)
        """The trunk's hidden states at each window's positions, oldest first, by slot."""
        self._tokens = torch.zeros(capacity, self.window, dtype=torch.int64, device=policy.device)
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
        policy, read = self.runner.policy, self.runner.read(chunks)
        hidden_NC = read.hidden_NC
        for module in range(self.num_modules):
            ahead = [_ahead(chunk, module + 1) for chunk in chunks]
            ahead_N = torch.tensor([token for row in ahead for token in row], device=policy.device)
            hidden_NC = policy.draft(hidden_NC, ahead_N, read.position_ids_N, read.plan, module=module).hidden_NC
        ends = []
        for chunk, hidden_SC in zip(chunks, read.hidden_NC.split(list(read.plan.rows.lengths)), strict=True):
            before = chunk.prefill.tail_WC
            before = hidden_SC.new_zeros(self.window, hidden_SC.shape[1]) if before is None else before
            ends.append(torch.cat((before, hidden_SC))[-self.window :])
        return read, ends

    def begin(self, running: RunningBatch, starts: Iterable[tuple[int, Prefill]]) -> None:
        """Take the windows of sequences that start, each (row, what it continues)."""
        for row, prefill in starts:
            self._begin(int(running.slot[row]), prefill.token_ids, prefill.tail_WC)

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
            self._begin(int(running.slot[row]), token_ids, again.tail_WC)

    def decode(self, running: RunningBatch, params: SamplingParams) -> Round:
        """One round for every running sequence; they must hold blocks for as many of S tokens as they may keep."""
        size, steps, device = len(running), self.steps, self.runner.policy.device
        slot_B, last_B, length_B, count_B = (
            torch.from_numpy(array[:size].copy()).to(device)
            for array in (running.slot, running.last_token, running.length, running.count)
        )
        seed_B = torch.from_numpy(running.seed[:size].view(np.int64)).to(device)
        table_BM = self.runner.table(running, steps)
        hidden_BWC, token_BW = self._hidden[slot_B], self._tokens[slot_B]
        known_BT = torch.cat((token_BW, last_B[:, None]), dim=1)
        for step in range(self.num_drafts):
            if step < self.num_modules:
                hidden_BWC = self._over_window(step, hidden_BWC, known_BT[:, -self.window :], length_B, table_BM)
                hidden_BC = hidden_BWC[:, -1]
            else:
                hidden_BC = self._beyond(hidden_BC, known_BT[:, -1], length_B + step - self.num_modules, table_BM)
            logits_BV = self.runner.policy.project(hidden_BC)
            draft_B = sample(logits_BV, seed_B, count_B + step, params).token_ids_B
            known_BT = torch.cat((known_BT, draft_B[:, None]), dim=1)

        ahead_S = torch.arange(steps, device=device)
        fed_BS = known_BT[:, self.window :]
        forward = self.runner.forward_of(table_BM.repeat_interleave(steps, dim=0))
        hidden_RC, logits_RV = forward(fed_BS.flatten(), (length_B[:, None] + ahead_S).flatten())
        counter_R = (count_B[:, None] + ahead_S).flatten()
        sampled = sample(logits_RV, seed_B.repeat_interleave(steps), counter_R, params)
        said_BS = sampled.said_B.view(size, steps)
        accepted_B = (said_BS[:, :-1] == fed_BS[:, 1:]).int().cumprod(dim=1).sum(dim=1)

        # The window moves on by what was accepted and the token that was fed first.
        moved_BW = accepted_B[:, None] + 1 + torch.arange(self.window, device=device)
        self._tokens[slot_B] = known_BT.gather(1, moved_BW)
        both_BTC = torch.cat((self._hidden[slot_B], hidden_RC.view(size, steps, -1)), dim=1)
        self._hidden[slot_B] = both_BTC[torch.arange(size, device=device)[:, None], moved_BW]
        return Round(
            token_ids_SB=said_BS.T.cpu().numpy(),
            logprobs_SB=sampled.logprobs_B.view(size, steps).T.cpu().numpy(),
            accepted_B=accepted_B.cpu().numpy(),
        )

    def count(self, accepted_B: np.ndarray, kept_B: np.ndarray) -> None:
        """Take note of a round of which each sequence kept `kept_B` tokens."""
        self.num_drafted += self.num_drafts * len(kept_B)
        self.num_accepted += int(np.minimum(accepted_B, kept_B).sum())
        self._num_rounds += len(kept_B)
        self._num_kept += int(kept_B.sum())

    def _begin(self, slot: int, token_ids: Sequence[int], tail_WC: Tensor | None) -> None:
        self._is_stale[slot] = tail_WC is None
        if tail_WC is None:
            return
        last = token_ids[-self.window :]
        self._hidden[slot] = tail_WC
        self._tokens[slot] = torch.tensor([0] * (self.window - len(last)) + list(last))

    def _over_window(
        self, module: int, hidden_BWC: Tensor, ahead_BW: Tensor, length_B: Tensor, table_BM: Tensor
    ) -> Tensor:
        """A module over the window, [B, W, C]; positions before a sequence's first token are idle rows."""
        position_R = (length_B[:, None] + torch.arange(-self.window, 0, device=length_B.device)).flatten()
        table_RM = table_BM.repeat_interleave(self.window, dim=0)
        table_RM = table_RM.masked_fill(position_R[:, None] < 0, self.runner.num_blocks)
        position_R = position_R.clamp(min=0)
        plan = Absorbed.at(self.runner.cache, table_RM, position_R)
        hidden_RC = hidden_BWC.flatten(0, 1)
        drafted = self.runner.policy.draft(hidden_RC, ahead_BW.flatten(), position_R, plan, module=module)
        return drafted.hidden_NC.view_as(hidden_BWC)

    def _beyond(self, hidden_BC: Tensor, token_B: Tensor, position_B: Tensor, table_BM: Tensor) -> Tensor:
        """The last module once more, on its own hidden state of the position before, [B, C]."""
        plan = Absorbed.at(self.runner.cache, table_BM, position_B)
        module = self.num_modules - 1
        return self.runner.policy.draft(hidden_BC, token_B, position_B, plan, module=module).hidden_NC


def _ahead(chunk: Chunk, count: int) -> list[int]:
    """The token `count` places after each of a chunk's; 0 where the prompt does not reach so far."""
    ahead = chunk.prefill.token_ids[chunk.begin + count : chunk.end + count]
    return ahead + [0] * (chunk.end - chunk.begin - len(ahead))


def _size(module: nn.Module) -> int:
    """Weights."""
    return sum(weight.numel() for weight in module.parameters())
