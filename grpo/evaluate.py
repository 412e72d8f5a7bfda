"""Accuracy on held-out problems: greedy; of k samples the mean, with a 95% interval over problems, and any."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from grpo.collect import Collector, sampling_params
from grpo.distributed import Ranks
from grpo.types import Group
from rewards import Problem, RewardResult
from rewards.registry import reward_name
from rollouts import SamplingParams
from rollouts.sampler import mix

EVALUATION_STREAM = 1 << 40
"""Offset of evaluation's seeds, far from those of training steps; the same at every stage: stages compare paired."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluator:
    """Everything an evaluation needs but the stage."""

    collector: Collector
    ranks: Ranks
    problems: Sequence[Problem]
    prompts: Sequence[Sequence[int]]
    """Token ids, [problems]."""
    task: str
    """What to call the problems in evaluation.json."""
    metric: str
    """Name of the reward whose value 1 means correct."""
    k: int
    sampled: SamplingParams
    greedy: SamplingParams
    seed: int
    batch_size: int

    def run(self, stage: str | int, progress: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
        """One entry of evaluation.json: `greedy`, `avg@k` and `pass@k` are shares of 1, `ci95` the interval of avg@k.

        pass@k is the share of problems that any of the k samples solves (Chen et al., 2021, with n = k).

        `progress` is told of every batch how many of this rank's problems it held.
        """
        first, problems = self.ranks.share(self.problems)
        with self.ranks.alone():
            rows = list(self._rows(first, problems, progress))
        rows = self.ranks.gather(rows)
        means = [fmean(sampled) for _, sampled, _ in rows]
        average = fmean(means)
        margin = 1.96 * stdev(means) / len(means) ** 0.5 if len(means) > 1 else 1.0
        return {
            "stage": stage,
            "task": self.task,
            "num_problems": len(rows),
            "k": self.k,
            "greedy": fmean(greedy for greedy, _, _ in rows),
            "avg@k": average,
            "ci95": [max(0.0, average - margin), min(1.0, average + margin)],
            "pass@k": fmean(any(sampled) for _, sampled, _ in rows),
            "mean_length": fmean(length for _, _, length in rows),
        }

    def _rows(
        self, first: int, problems: Sequence[Problem], progress: Callable[[int], None]
    ) -> Iterator[tuple[float, list[bool], float]]:
        """Of each problem of this rank, the first of which is number `first`: whether the greedy completion is right,
        and each sampled one, and their mean length."""
        prompts = self.prompts[first : first + len(problems)]
        for start in range(0, len(problems), self.batch_size):
            part = slice(start, start + self.batch_size)
            seeds = [int(mix(self.seed, EVALUATION_STREAM + first + start + i)) for i in range(len(problems[part]))]
            # Groups of k first: a reward that returns lists of a wrong length would pass for right on groups of one.
            sampled = self._ask(problems[part], prompts[part], self.k, self.sampled, seeds)
            greedy = self._ask(problems[part], prompts[part], 1, self.greedy, seeds)
            for g, s in zip(greedy, sampled, strict=True):
                lengths = [len(completion.token_ids) for completion in s.completions]
                yield fmean(self._is_correct(g)), self._is_correct(s), fmean(lengths)
            progress(len(greedy))

    def _ask(
        self,
        problems: Sequence[Problem],
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        seeds: Sequence[int],
    ) -> list[Group]:
        return self.collector.collect(
            problems, prompts, num_generations=num_generations, params=params, prompt_seeds=seeds
        ).groups

    def _is_correct(self, group: Group) -> list[bool]:
        return [is_correct(result, self.metric) for result in group.results]


def is_correct(result: RewardResult, metric: str) -> bool:
    """Whether the reward called `metric` gave its full score of 1."""
    return result.breakdown.get(metric, 0.0) == 1.0


def make_evaluator(collector: Collector, ranks: Ranks, problems: Sequence[Problem]) -> Evaluator:
    """The evaluation that the collector's recipe asks for, on these problems."""
    config, tokenizer = collector.config, collector.tokenizer
    return Evaluator(
        collector=collector,
        ranks=ranks,
        problems=problems,
        prompts=collector.render(problems),
        task=config.evaluation.path or config.dataset.path or "countdown",
        metric=reward_name(config.rewards[0]),
        k=config.evaluation.k,
        sampled=sampling_params(config, tokenizer),
        greedy=sampling_params(config, tokenizer, greedy=True),
        seed=config.seed,
        batch_size=config.evaluation.batch_size,
    )
