"""The built-in engine: the policy itself, sampled with continuous batching over a paged cache.

Sampler and trainer hold the same module, so there is no second copy of the weights, nothing to send, and no mismatch.
A completion depends on its prompt, its seed and the weights; who shares the batch changes it only through the last bits
of a matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch

from policy import Policy
from rollouts.block_manager import BlockManager
from rollouts.engine import EngineConfig
from rollouts.model_runner import ModelRunner
from rollouts.sampler import mix, sample
from rollouts.scheduler import Admission, RunningBatch, Scheduler
from rollouts.sequence import Prefill, Sequence
from rollouts.types import Completion, FinishReason, SamplingError, SamplingParams


class BuiltinEngine:
    """An `Engine` over a policy in this process."""

    def __init__(self, policy: Policy, config: EngineConfig) -> None:
        self.config, self.policy = config, policy
        self.policy_version = 0
        self.num_preemptions = 0
        """Sequences that stepped back for want of blocks, over the engine's life."""
        self._runner: ModelRunner | None = None

    def load_weights(self, policy: Policy, version: int) -> None:
        """Only the version is taken: the weights are shared."""
        if policy is not self.policy:
            raise SamplingError("the built-in engine samples from the policy it was made with; make another engine")
        self.policy_version = version

    def close(self) -> None:
        """Free the cache."""
        self._runner = None

    @torch.inference_mode()
    def generate(
        self,
        prompts: SequenceOf[SequenceOf[int]],
        num_generations: int,
        params: SamplingParams,
        prompt_seeds: SequenceOf[int] | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`. Raises SamplingError for an empty or too long prompt, or a cache too small for one."""
        # Not as one array: numpy makes floats of whole numbers on both sides of 2^63.
        seeds = mix(params.seed, np.arange(len(prompts))).tolist() if prompt_seeds is None else prompt_seeds
        groups = [
            Prefill(
                token_ids=list(prompt),
                sequences=[
                    Sequence(place=place * num_generations + g, prompt=list(prompt), seed=int(mix(seed, g)))
                    for g in range(num_generations)
                ],
            )
            for place, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]
        if not groups or not num_generations:
            return [[] for _ in groups]
        scheduler, runner = self._prepare(groups, num_generations, params)
        done: dict[int, Completion] = {}
        while scheduler.waiting or len(scheduler.running):
            admission = scheduler.admit()
            if admission.starts:
                self._start(admission, scheduler, runner, params)
                self._retire(scheduler, params, done)
            if len(scheduler.running):
                scheduler.make_room()
                self._decode(scheduler, runner, params)
                self._retire(scheduler, params, done)
        self.num_preemptions += scheduler.num_preemptions
        return [[done[p * num_generations + g] for g in range(num_generations)] for p in range(len(groups))]

    def _prepare(
        self, groups: list[Prefill], num_generations: int, params: SamplingParams
    ) -> tuple[Scheduler, ModelRunner]:
        """Check the request, and have a cache that holds as much of it at once as the configuration allows."""
        config, shape = self.config, self.policy.config
        longest = 0
        for place, group in enumerate(groups):
            if not group.token_ids:
                raise SamplingError(f"prompt {place} is empty")
            longest = max(longest, len(group.token_ids) + params.max_completion_length)
            if longest > shape.max_position_embeddings:
                raise SamplingError(
                    f"prompt {place} has {len(group.token_ids)} tokens; with max_completion_length="
                    f"{params.max_completion_length} that exceeds the model's context of "
                    f"{shape.max_position_embeddings}"
                )
        per_sequence = -(-longest // config.block_size)
        block_bytes = shape.num_hidden_layers * config.block_size * shape.cache_width * self.policy.dtype.itemsize
        allowed = int(config.cache_gib * 2**30) // block_bytes
        if allowed < per_sequence + 1:
            raise SamplingError(
                f"one sequence of {longest} tokens needs {(per_sequence + 1) * block_bytes / 2**30:.3g} GiB of cache, "
                f"but engine.cache_gib is {config.cache_gib}; raise it or lower max_completion_length"
            )
        rows = min(config.max_num_seqs, len(groups) * num_generations)
        wanted = min(allowed, (rows + len(groups)) * (per_sequence + 1))
        runner = self._runner
        if runner is None or runner.cache.shape[1] < wanted or runner.cache.dtype != self.policy.dtype:
            runner = self._runner = None  # the old cache goes before the new one comes
            runner = self._runner = ModelRunner(self.policy, wanted, config.block_size)
        scheduler = Scheduler(
            BlockManager(runner.cache.shape[1], config.block_size),
            RunningBatch(rows, per_sequence, params.max_completion_length),
            max_num_seqs=rows,
            max_prefill_tokens=config.max_num_batched_tokens,
        )
        scheduler.waiting.extend(groups)
        return scheduler, runner

    def _start(self, admission: Admission, scheduler: Scheduler, runner: ModelRunner, params: SamplingParams) -> None:
        """Prefill what is new and sample the first token of every sequence that starts."""
        if admission.to_prefill:
            blocks = [prefill.blocks for prefill in admission.to_prefill if prefill.blocks is not None]
            logits = runner.prefill([prefill.token_ids for prefill in admission.to_prefill], blocks)
            for prefill, logits_V in zip(admission.to_prefill, logits, strict=True):
                prefill.logits_V = logits_V
        if admission.copies:
            sources, targets = np.array(admission.copies, dtype=np.int64).T
            runner.copy_blocks(sources, targets)
        rows = np.array([row for row, _ in admission.starts])
        logits_BV = torch.stack([prefill.logits_V for _, prefill in admission.starts if prefill.logits_V is not None])
        self._sample(scheduler.running, rows, logits_BV, params)

    def _decode(self, scheduler: Scheduler, runner: ModelRunner, params: SamplingParams) -> None:
        """One more token for every running sequence."""
        running, size = scheduler.running, len(scheduler.running)
        logits_BV = runner.decode(running.last_token[:size], running.length[:size], running.block_table[:size])
        running.length[:size] += 1
        self._sample(running, np.arange(size), logits_BV, params)

    def _sample(self, running: RunningBatch, rows: np.ndarray, logits_BV: torch.Tensor, params: SamplingParams) -> None:
        sampled = sample(logits_BV, running.seed[rows], running.count[rows], params)
        # A sequence whose logits are not numbers gets the impossible token -1, by which `_retire` aborts it.
        token_ids = torch.where(sampled.finite_B, sampled.token_ids_B, -1).cpu().numpy()
        running.push_tokens(rows, token_ids, sampled.logprobs_B.cpu().numpy())

    def _retire(self, scheduler: Scheduler, params: SamplingParams, done: dict[int, Completion]) -> None:
        """Take finished sequences out of the batch and make their completions."""
        running, size = scheduler.running, len(scheduler.running)
        last, count = running.last_token[:size], running.count[:size]
        stopped, aborted = np.isin(last, params.stop_token_ids), last < 0
        finished = stopped | aborted | (count >= params.max_completion_length)
        if not finished.any():
            return
        for row in np.flatnonzero(finished):
            reason: FinishReason = "abort" if aborted[row] else "stop" if stopped[row] else "length"
            length = int(count[row]) - bool(aborted[row])
            done[running.sequences[row].place] = Completion(
                token_ids=running.token_ids[row, :length].tolist(),
                logprobs=running.logprobs[row, :length].tolist(),
                finish_reason=reason,
                policy_version=self.policy_version,
            )
        scheduler.retire(finished)
