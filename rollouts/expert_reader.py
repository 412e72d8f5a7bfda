"""Reads back from the cache which experts finished sequences went through.

Shapes: M layers with routed experts, S prompt tokens, T tokens of a completion but the last, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np

from rollouts.model_runner import ModelRunner
from rollouts.scheduler import RunningBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedExperts:
    """Of one sequence."""

    own_MTK: np.ndarray | None
    """Of its own tokens; None where nothing is recorded."""
    prompt_MSK: np.ndarray | None
    """Of its prompt's, one array for all sequences of a group; None where nothing is recorded."""


NO_EXPERTS = RecordedExperts(own_MTK=None, prompt_MSK=None)


class ExpertReader:
    """Reads for one call of `generate`, whose sequences are numbered group by group; each group's prompt once."""

    def __init__(self, runner: ModelRunner, num_generations: int) -> None:
        self._runner, self._num_generations = runner, num_generations
        self._prompts: dict[int, np.ndarray] = {}

    def read(self, running: RunningBatch, rows: SequenceOf[int], lengths: SequenceOf[int]) -> list[RecordedExperts]:
        """Of these rows of the batch, in order, whose completions have so many tokens; one copy from the device."""
        groups = [running.sequences[row].place // self._num_generations for row in rows]
        prompts = [len(running.sequences[row].prompt) for row in rows]
        firsts, known = [], set(self._prompts)
        for group, prompt in zip(groups, prompts, strict=True):
            firsts.append(prompt if group in known else 0)
            known.add(group)
        ends = [prompt + max(length - 1, 0) for prompt, length in zip(prompts, lengths, strict=True)]
        slots = [
            self._runner.slots(running.blocks_of(row), np.arange(first, end))
            for row, first, end in zip(rows, firsts, ends, strict=True)
        ]
        found = self._runner.experts_at(np.concatenate(slots))
        records, edges = [], np.cumsum([len(each) for each in slots])[:-1]
        for group, prompt, first, part in zip(groups, prompts, firsts, np.split(found, edges, axis=1), strict=True):
            if first == 0:
                self._prompts[group] = part[:, :prompt].copy()
            # Copies, so that no completion holds on to the record of all that finished beside it.
            own = part[:, prompt - first :].copy()
            records.append(RecordedExperts(own_MTK=own, prompt_MSK=self._prompts[group]))
        return records
