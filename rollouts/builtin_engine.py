"""The built-in engine: the policy itself, sampled with continuous batching over a paged cache.

Sampler and trainer hold the same module, so there is no second copy of the weights, nothing to send, and no mismatch.
A completion depends on its prompt, its seed and the weights; who shares the batch changes it only through the last bits
of a matrix product.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from policy import Policy
from policy.tokenizer import Tokenizer
from rollouts.block_manager import BlockManager
from rollouts.engine import DEFAULT_CACHE_GIB, EngineConfig
from rollouts.expert_reader import NO_EXPERTS, ExpertReader
from rollouts.faults import first_fault
from rollouts.groups import Groups
from rollouts.model_runner import ModelRunner
from rollouts.prefix_cache import PrefixCache
from rollouts.sampler import mix, prompt_seeds_of, sample
from rollouts.scheduler import Admission, RunningBatch, Scheduler
from rollouts.sequence import Chunk, Prefill, Sequence
from rollouts.speculative import Speculator, window_of
from rollouts.stop_strings import StopStrings, stop_strings_of
from rollouts.types import (
    Completion,
    EngineError,
    EngineStats,
    FinishReason,
    OnGroup,
    SamplingError,
    SamplingParams,
    check_prompts,
)

_LOGGER = logging.getLogger(__name__)

FREE_SHARE = 0.4
"""Of a GPU's free memory, what the cache may take: the update needs the rest."""


class BuiltinEngine:
    """An `Engine` over a policy in this process."""

    def __init__(self, policy: Policy, config: EngineConfig, tokenizer: Tokenizer | None = None) -> None:
        """Raises EngineError where it shall speculate and the policy has nothing to draft with."""
        num_modules, num_drafts = policy.config.num_nextn_predict_layers, config.speculative.num_speculative_tokens
        if num_drafts and not num_modules:
            raise EngineError(
                f"engine.speculative.num_speculative_tokens is {num_drafts}, but the policy has no MTP modules to "
                "draft with (its num_nextn_predict_layers is 0); set it to 0 or take a model with such modules"
            )
        self._num_drafts, self._window = num_drafts, window_of(num_drafts, num_modules)
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.policy_version = 0
        self.num_preemptions = 0
        """Sequences that stepped back for want of blocks, over the engine's life."""
        self.num_drafted = 0
        """Tokens that MTP modules drafted, over the engine's life."""
        self.num_accepted = 0
        """Of them, tokens that became part of a completion."""
        self.num_cached_tokens = 0
        """Prompt tokens that another prompt had left in the cache, over the engine's life."""
        self.max_num_seqs = config.max_num_seqs
        """Sequences decoded at once; fewer than the configuration says once memory has run out."""
        self._runner: ModelRunner | None = None
        self._speculator: Speculator | None = None
        self._prefixes: PrefixCache | None = None  # None also while a call runs: one that is interrupted leaves nothing
        self._weights: tuple[tuple[int, int], ...] = ()
        self._stop_strings: StopStrings | None = None

    @property
    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return EngineStats(
            num_drafted=self.num_drafted,
            num_accepted=self.num_accepted,
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
        )

    def load_weights(self, policy: Policy, version: int) -> None:
        """Only the version is taken: the weights are shared."""
        if policy is not self.policy:
            raise SamplingError("the built-in engine samples from the policy it was made with; make another engine")
        if version != self.policy_version:
            self.reset_prefix_cache()
        self.policy_version = version

    def reset_prefix_cache(self) -> None:
        """See `Engine.reset_prefix_cache`."""
        self._prefixes = None

    def close(self) -> None:
        """Free the cache."""
        self._runner = self._speculator = self._prefixes = None

    @torch.inference_mode()
    def generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        num_generations: int,
        params: SamplingParams,
        prompt_seeds: SequenceOf[int] | None = None,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`. Raises SamplingError for an empty or too long prompt, or a cache too small for one, or
        stop strings that cannot be found.

        Where memory runs out, what had not ended is done again with half as many sequences at once: a completion does
        not depend on who shares its batch.
        """
        most = min(self.max_num_seqs, max(1, len(prompts) * num_generations))
        done = Groups(len(prompts), num_generations, on_group)
        while True:
            try:
                self._generate(prompts, num_generations, params, prompt_seeds, done)
                self._report_aborts(prompts, done.all())
                return done.all()
            except torch.OutOfMemoryError as error:
                reason = str(error).partition("\n")[0]
            # After the handler: until then the error's frames hold what the attempt had computed.
            if most == 1:
                raise SamplingError(
                    f"out of memory with one sequence ({reason}); lower max_completion_length or engine.cache_gib"
                )
            self._runner = self._speculator = None
            if self._is_gpu:
                torch.cuda.empty_cache()
            most = self.max_num_seqs = most // 2
            _LOGGER.warning("out of memory while sampling; engine.max_num_seqs is %d from now on", most)

    def _generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        num_generations: int,
        params: SamplingParams,
        prompt_seeds: SequenceOf[int] | None,
        done: Groups,
    ) -> None:
        """Sample what is not `done` yet."""
        seeds = prompt_seeds_of(params, len(prompts)) if prompt_seeds is None else prompt_seeds
        groups = [
            Prefill(
                token_ids=list(prompt),
                sequences=[
                    Sequence(place=place * num_generations + g, prompt=list(prompt), seed=int(mix(seed, g)))
                    for g in range(num_generations)
                    if not done.has(place * num_generations + g)
                ],
            )
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        groups = [group for group in groups if group.sequences]
        if not groups:
            return
        self._stop_strings = stop_strings_of(params, self.tokenizer, self._stop_strings)
        scheduler, runner = self._prepare(groups, num_generations, params)
        speculator = self._speculator
        if speculator is not None:
            speculator.begin_call()
        reader = None
        if params.record_experts and runner.experts is not None:
            reader = ExpertReader(runner, num_generations)
        while scheduler.waiting or len(scheduler.running):
            admission = scheduler.admit()
            if admission.to_prefill:
                self._prefill(admission.to_prefill, scheduler, runner, speculator)
            if admission.starts:
                self._start(admission, scheduler, runner, speculator, params)
                self._retire(scheduler, params, done, reader)
            if len(scheduler.running):
                if speculator is not None and self._drafts_now(speculator, scheduler):
                    self._speculate(scheduler, speculator, params)
                else:
                    self._decode(scheduler, runner, params)
                    if speculator is not None:
                        speculator.leave(scheduler.running)
                self._retire(scheduler, params, done, reader)
        self.num_preemptions += scheduler.num_preemptions
        self._prefixes = scheduler.prefixes

    def _prepare(
        self, groups: list[Prefill], num_generations: int, params: SamplingParams
    ) -> tuple[Scheduler, ModelRunner]:
        """Check the request, and have a cache that holds as much of it at once as the configuration allows."""
        config, shape = self.config, self.policy.config
        prompts = [group.token_ids for group in groups]
        check_prompts(prompts, params, shape.max_position_embeddings)
        longest = max(map(len, prompts)) + params.max_completion_length
        per_sequence = -(-longest // config.block_size)
        num_layers = shape.num_cache_layers if self._num_drafts else shape.num_hidden_layers
        # The experts beside the cache are not counted: half a percent of it where a token has 11 layers of 6.
        block_bytes = num_layers * config.block_size * shape.cache_width * self.policy.dtype.itemsize
        # While a prompt waits with sequences that have not started, the first has copies of the blocks it writes in.
        least = per_sequence + 1 + max(self._window + config.block_size - 2, 0) // config.block_size
        rows = min(self.max_num_seqs, len(groups) * num_generations)
        wanted = max(least, (rows + len(groups)) * (per_sequence + 1))
        ahead = max(config.run_ahead, self._steps * (self._num_drafts + 1))
        max_blocks = -(-(longest + ahead - 1) // config.block_size)
        runner = self._runner
        if runner is None or not runner.suits(wanted, max_blocks):
            allowed = self._allowed_blocks(longest, least, block_bytes)
            wanted = min(allowed, wanted)
        if runner is None or not runner.suits(wanted, max_blocks):
            if self._is_gpu:  # some room to spare: another cache would mean other addresses, and graphs captured again
                wanted, max_blocks = min(allowed, wanted * 5 // 4), 1 << (max_blocks - 1).bit_length()
            runner = self._runner = self._speculator = self._prefixes = (
                None  # the old cache goes before a new one comes
            )
            runner = self._runner = ModelRunner(self.policy, wanted, config.block_size, max_blocks, num_layers)
        runner.follow_weights()
        if self._num_drafts and (self._speculator is None or self._speculator.capacity < rows):
            most_drafted, most_prefilled = config.speculative.max_batch, config.max_num_batched_tokens
            self._speculator = Speculator(runner, self._num_drafts, most_drafted, rows, most_prefilled)
        prefixes = self._take_prefixes(runner)
        scheduler = Scheduler(
            prefixes.blocks,
            RunningBatch(rows, runner.max_blocks, params.max_completion_length),
            max_num_seqs=rows,
            max_prefill_tokens=config.max_num_batched_tokens,
            private_tail=self._window,
            prefixes=prefixes,
        )
        scheduler.waiting.extend(groups)
        return scheduler, runner

    def _allowed_blocks(self, longest: int, least: int, block_bytes: int) -> int:
        """Most blocks that the cache may have. A GPU takes long to say how much memory is free."""
        cache_gib = self._cache_gib()
        allowed = int(cache_gib * 2**30) // block_bytes
        if allowed < least:
            raise SamplingError(
                f"one sequence of {longest} tokens needs {least * block_bytes / 2**30:.3g} GiB of cache, "
                f"but engine.cache_gib is {cache_gib:.3g}; raise it or lower max_completion_length"
            )
        return allowed

    def _take_prefixes(self, runner: ModelRunner) -> PrefixCache:
        """What earlier calls left in the cache, where the weights are the same; the call gives it back at its end."""
        kept, self._prefixes = self._prefixes, None
        weights = runner.weights()
        if kept is None or weights != self._weights:
            kept = PrefixCache(BlockManager(runner.num_blocks, self.config.block_size), self._window)
        self._weights = weights
        return kept

    @property
    def _is_gpu(self) -> bool:
        return self.policy.device.type == "cuda"

    @property
    def _steps(self) -> int:
        """Rounds of drafts before the host looks at them; a CPU gains nothing by more than one."""
        return self.config.run_ahead if self._is_gpu else 1

    def _cache_gib(self) -> float:
        """Most memory that the cache may take, GiB."""
        if self.config.cache_gib is not None:
            return self.config.cache_gib
        if not self._is_gpu:
            return DEFAULT_CACHE_GIB
        held = 0 if self._runner is None else self._runner.cache.nbytes
        return FREE_SHARE * (torch.cuda.mem_get_info(self.policy.device)[0] + held) / 2**30

    def _prefill(
        self, chunks: SequenceOf[Chunk], scheduler: Scheduler, runner: ModelRunner, speculator: Speculator | None
    ) -> None:
        """One pass over prompts, or parts of them, which get what follows from it."""
        tails: SequenceOf[torch.Tensor | None] = [None] * len(chunks)
        if speculator is not None and speculator.takes(len(scheduler.running)):
            read, tails = speculator.read(chunks)
        else:
            read = runner.read(chunks)
        faulty: set[int] = set()
        rows = zip(chunks, runner.logits_after(read), tails, read.sound_lengths(), strict=True)
        for chunk, logits_V, tail_WC, sound_length in rows:
            prefill, size = chunk.prefill, self.config.block_size
            assert prefill.blocks is not None
            assert scheduler.prefixes is not None
            is_first, has_drafts = chunk.begin == prefill.num_found, scheduler.prefixes.has_drafts
            before, written = prefill.blocks[: chunk.begin // size], slice(chunk.begin // size, -(-chunk.end // size))
            if not (has_drafts[before].all() if is_first else prefill.tail_WC is not None):
                tail_WC = None  # the modules saw rows that they had never written
            has_drafts[prefill.blocks[written]] = tail_WC is not None
            prefill.logits_V, prefill.tail_WC = logits_V, tail_WC
            if is_first:
                self.num_cached_tokens += prefill.num_found
            if not faulty.isdisjoint(before.tolist()):
                sound_length = 0
            if chunk.begin + sound_length < chunk.end:
                # In the cache a fault is zeros, and whoever reads on from there must not pass for sound.
                spoiled = prefill.blocks[(chunk.begin + sound_length) // size : written.stop].tolist()
                faulty.update(spoiled)
                scheduler.prefixes.forget(spoiled)
                prefill.logits_V = torch.full_like(logits_V, float("nan"))
                prefill.num_computed = len(prefill.token_ids)

    def _start(
        self,
        admission: Admission,
        scheduler: Scheduler,
        runner: ModelRunner,
        speculator: Speculator | None,
        params: SamplingParams,
    ) -> None:
        """Sample the first token of every sequence that starts."""
        if speculator is not None:
            speculator.begin(scheduler.running, admission.starts)
        if admission.copies:
            sources, targets = np.array(admission.copies, dtype=np.int64).T
            runner.copy_blocks(sources, targets)
        rows = np.array([row for row, _ in admission.starts])
        place_of = {prefill: place for place, prefill in enumerate(dict.fromkeys(p for _, p in admission.starts))}
        logits_RV = torch.stack([prefill.logits_V for prefill in place_of if prefill.logits_V is not None])
        row_of_B = torch.tensor([place_of[prefill] for _, prefill in admission.starts], device=logits_RV.device)
        running = scheduler.running
        seeds_B, counters_B = (
            torch.from_numpy(array).to(logits_RV.device)
            for array in (running.seed[rows].view(np.int64), running.count[rows])
        )
        sampled = sample(logits_RV, seeds_B, counters_B, params, row_of_B)
        token_ids_B = sampled.said_B.cpu().numpy()
        logprobs_B = sampled.logprobs_B.cpu().numpy()
        most = params.max_completion_length
        kept_B = running.push_tokens(rows, token_ids_B[None], logprobs_B[None], params.stop_token_ids, most)
        self._end_at_strings(running, rows, token_ids_B[None], kept_B)

    def _decode(self, scheduler: Scheduler, runner: ModelRunner, params: SamplingParams) -> None:
        """Some more tokens for every running sequence."""
        running, most = scheduler.running, params.max_completion_length
        steps = min(runner.steps_at_once(self.config.run_ahead, params), running.most_left(most))
        scheduler.make_room(steps, most)
        size = len(running)
        token_ids_SB, logprobs_SB, valid_B = runner.decode(running, params, steps)
        kept_B = running.push_tokens(np.arange(size), token_ids_SB, logprobs_SB, params.stop_token_ids, most, valid_B)
        self._end_at_strings(running, np.arange(size), token_ids_SB, kept_B)
        running.length[:size] += kept_B

    def _end_at_strings(
        self, running: RunningBatch, rows: np.ndarray, token_ids_SB: np.ndarray, kept_B: np.ndarray
    ) -> None:
        """End the rows in whose newest tokens, `kept_B` of each, a stop string ends; nothing after it is kept."""
        if self._stop_strings is None:
            return
        for at in np.flatnonzero(self._stop_strings.may_end(token_ids_SB).any(axis=0)).tolist():
            row, count = int(rows[at]), int(running.count[rows[at]])
            end = self._stop_strings.first_end(running.token_ids[row, :count], count - int(kept_B[at]))
            if end is not None:
                kept_B[at] -= running.stop(row, end)

    def _drafts_now(self, speculator: Speculator, scheduler: Scheduler) -> bool:
        """Sequences that lag behind are read again only once none waits, lest a batch go back and forth."""
        running = scheduler.running
        return speculator.takes(len(running)) and not (scheduler.waiting and speculator.has_stale(running))

    def _speculate(self, scheduler: Scheduler, speculator: Speculator, params: SamplingParams) -> None:
        """One or more tokens for every running sequence."""
        running = scheduler.running
        num_rounds = min(self._steps, speculator.rounds_for(running.most_left(params.max_completion_length)))
        scheduler.make_room(num_rounds * speculator.steps, params.max_completion_length)
        size = len(running)
        speculator.refresh(running)
        drafted = speculator.decode(running, params, num_rounds)
        kept_B = running.push_tokens(
            np.arange(size),
            drafted.token_ids_TB,
            drafted.logprobs_TB,
            params.stop_token_ids,
            params.max_completion_length,
            drafted.valid_B,
        )
        self._end_at_strings(running, np.arange(size), drafted.token_ids_TB, kept_B)
        running.length[:size] += kept_B
        num_drafted, num_accepted = speculator.count(drafted.accepted_IB, kept_B)
        self.num_drafted += num_drafted
        self.num_accepted += num_accepted

    def _retire(self, scheduler: Scheduler, params: SamplingParams, done: Groups, reader: ExpertReader | None) -> None:
        """Take finished sequences out of the batch and make their completions."""
        running, size = scheduler.running, len(scheduler.running)
        last, count = running.last_token[:size], running.count[:size]
        stopped, aborted = np.isin(last, params.stop_token_ids) | running.is_stopped[:size], last < 0
        finished = stopped | aborted | (count >= params.max_completion_length)
        if not finished.any():
            return
        lengths = count - aborted
        rows = np.flatnonzero(finished).tolist()
        records = [NO_EXPERTS] * len(rows) if reader is None else reader.read(running, rows, lengths[rows].tolist())
        for row, record in zip(rows, records, strict=True):
            reason: FinishReason = "abort" if aborted[row] else "stop" if stopped[row] else "length"
            length = int(lengths[row])
            completion = Completion(
                token_ids=running.token_ids[row, :length].tolist(),
                logprobs=running.logprobs[row, :length].tolist(),
                finish_reason=reason,
                policy_version=self.policy_version,
                experts_MTK=record.own_MTK,
                prompt_experts_MSK=record.prompt_MSK,
            )
            done.add(running.sequences[row].place, completion)
        scheduler.retire(finished)

    def _report_aborts(self, prompts: SequenceOf[SequenceOf[int]], groups: SequenceOf[SequenceOf[Completion]]) -> None:
        """Where the first sequence that was given up met what is no number."""
        done = [(p, g, completion) for p, group in enumerate(groups) for g, completion in enumerate(group)]
        aborted = [each for each in done if each[2].finish_reason == "abort"]
        if not aborted:
            return
        p, g, completion = aborted[0]
        token_ids = [*prompts[p], *completion.token_ids]
        try:
            fault = first_fault(self.policy, token_ids)
            where = "in none, when the row was run again"
            if fault is not None:
                where = f"{fault.layer}, from token {fault.place} of the row on (id {token_ids[fault.place]})"
        except torch.OutOfMemoryError:
            where = "not known, as there is no memory to run the row again"
        _LOGGER.warning(
            "%d of %d completions were given up at policy version %d, since their logits were not all numbers; the "
            "first is completion %d of prompt %d, at its token %d. The first layer with such an output: %s",
            len(aborted), len(done), self.policy_version, g, p, len(completion.token_ids), where,
        )  # fmt: skip
