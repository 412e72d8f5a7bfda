"""What a step learns from: questions from the stream, answers from all ranks, refills, old successes, memory.

Everything here is the same on every rank: each samples and grades its share of a round's questions, and then all hold
all answers. So ranks agree on what to ask next without a word more, whoever's groups had a signal, and one rank's
checkpoint is that of all.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from grpo.collect import Collected, Collector, sampling_params
from grpo.data import Dataset
from grpo.distributed import Ranks
from grpo.dynamic_sampling import Filled, fill_step
from grpo.evaluate import is_correct
from grpo.exchange import gather_groups
from grpo.replay_buffer import ReplayBuffer
from grpo.state import answer_to_json, read_answer
from grpo.stream import Stream
from grpo.types import Answer, Group, Question
from policy import Policy
from rewards.registry import reward_name
from rollouts import SamplingParams
from rollouts.sampler import mix


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a step asked, over all ranks."""

    filled: Filled
    """The groups to learn from, and those that are left."""
    fresh: list[Group]
    """Everything sampled in this step, without old successes: what rewards and lengths are measured on."""
    sample_s: float
    """Seconds of sampling, on this rank."""
    grade_s: float
    """Seconds that the step waited for grading after that, on this rank."""
    grade_busy_s: float
    """Seconds of grading, most of them while sampling went on, on this rank."""
    metrics: Mapping[str, float]
    """Accounts of what is switched on: refills, curriculum, replay, length schedule."""


class Asking(Protocol):
    """What the trainer asks for the groups of a step: `Asker`, or one that is a step ahead (`grpo/pipeline.py`)."""

    @property
    def sampler(self) -> Policy | None:
        """The weights that sample, where they are not the policy's own: a checkpoint has to keep them."""
        ...

    def ask(self, step: int) -> Asked:
        """The groups of this step, 0 the first; given up half-way, it changes nothing that `state` had given."""
        ...

    def ask_ahead(self, step: int) -> None:
        """This step's groups are taken: begin with the next one's, where these are sampled ahead."""
        ...

    def follow(self, policy: Policy, version: int) -> None:
        """The policy has made a step and is of this version now."""
        ...

    def settle(self, policy: Policy, version: int) -> None:
        """Have the engine hold this version, and do nothing else, for an evaluation."""
        ...

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON: all that the next step's questions depend on, `sampler` aside."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave, under the same recipe. Raises DatasetError where the dataset has changed."""
        ...

    def close(self) -> None:
        """Drop the questions that are out; nothing can be asked afterwards."""
        ...


@dataclass(kw_only=True, slots=True)
class Asker:
    """Asks the problems of one step after another; its `state` is all that the next step's questions depend on."""

    collector: Collector
    ranks: Ranks
    stream: Stream
    replay: ReplayBuffer | None
    pending: list[Answer] = field(default_factory=list)
    """Groups with signal that the last step had no place for."""

    @property
    def sampler(self) -> None:
        """None: the policy itself samples, or an engine that always has its newest weights."""

    def ask(self, step: int) -> Asked:
        """The groups of this step, 0 the first."""
        config, rounds = self.collector.config, list[Collected]()
        if self.replay is not None:
            self.replay.begin(step)

        def ask_more(count: int) -> list[Answer]:
            questions = self.stream.take(count, step)
            rounds.append(self._collect(questions, step))
            return [
                self._remember(Answer(question=question, group=group), step)
                for question, group in zip(questions, rounds[-1].groups, strict=True)
            ]

        if config.dynamic_sampling is None:
            filled = Filled(trained=ask_more(config.prompts_per_step))
        else:
            filled = fill_step(config.prompts_per_step, config.dynamic_sampling, self.pending, ask_more)
        self.pending = filled.pending
        return Asked(
            filled=filled,
            fresh=[group for collected in rounds for group in collected.groups],
            sample_s=sum(collected.sample_s for collected in rounds),
            grade_s=sum(collected.grade_s for collected in rounds),
            grade_busy_s=sum(collected.grade_busy_s for collected in rounds),
            metrics=self._metrics(filled, step),
        )

    def ask_ahead(self, step: int) -> None:
        """Nothing: the next step is sampled by the weights that this one leads to."""

    def follow(self, policy: Policy, version: int) -> None:
        """The engine takes the weights; free where it shares them."""
        self.collector.engine.load_weights(policy, version)

    def settle(self, policy: Policy, version: int) -> None:
        """Nothing: the engine holds them."""

    def state(self) -> dict[str, Any]:
        """For a checkpoint, as JSON."""
        return {
            "stream": self.stream.state(),
            "pending": [answer_to_json(answer) for answer in self.pending],
            "replay": None if self.replay is None else self.replay.state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave, under the same recipe. Raises DatasetError where the dataset has changed."""
        self.stream.load_state(state["stream"])
        self.pending = [read_answer(row, self.stream.question) for row in state["pending"]]
        if self.replay is not None:
            self.replay.load_state(state["replay"])

    def close(self) -> None:
        """Nothing: no question is out."""

    def _collect(self, questions: Sequence[Question], step: int) -> Collected:
        """Every rank samples and grades its share; all get all groups, in order, with seconds of their own."""
        config = self.collector.config
        _, mine = self.ranks.share(questions)
        problems = [question.problem for question in mine]
        with self.ranks.alone():
            collected = self.collector.collect(
                problems,
                self.collector.render(problems),
                num_generations=config.num_generations,
                params=self._params(step),
                prompt_seeds=[int(mix(config.seed, question.number)) for question in mine],
            )
        groups = gather_groups(collected.groups, [question.problem for question in questions], self.ranks)
        if config.shuffle_rewards:
            groups = _shuffle_rewards(groups, config.seed, questions[0].number)
        return replace(collected, groups=groups)

    def _remember(self, answer: Answer, step: int) -> Answer:
        """Note how the problem went; the answer comes back with an old success in it where that helps."""
        metric = reward_name(answer.question.problem.reward or self.collector.config.rewards[0])
        passed = [is_correct(result, metric) for result in answer.group.results]
        self.stream.remember(answer.question.place, sum(passed) / len(passed), step)
        return answer if self.replay is None else self.replay.visit(answer, passed, step)

    def _params(self, step: int) -> SamplingParams:
        return sampling_params(self.collector.config, self.collector.tokenizer, step=step)

    def _metrics(self, filled: Filled, step: int) -> dict[str, float]:
        config, metrics = self.collector.config, dict[str, float]()
        if config.length_schedule is not None:
            metrics["completions/max_allowed_length"] = self._params(step).max_completion_length
        if config.dynamic_sampling is not None:
            metrics |= filled.metrics()
        if self.stream.curriculum is not None:
            metrics |= self.stream.curriculum.metrics(step)
        if self.replay is not None:
            metrics |= self.replay.metrics()
        return metrics


def make_asker(collector: Collector, ranks: Ranks, dataset: Dataset) -> Asker:
    """What asks the problems of the collector's recipe, from the first on."""
    config = collector.config
    return Asker(
        collector=collector,
        ranks=ranks,
        stream=Stream(dataset, config.curriculum),
        replay=None if config.replay_buffer is None else ReplayBuffer(config.replay_buffer),
    )


def _shuffle_rewards(groups: Sequence[Group], seed: int, number: int) -> list[Group]:
    """Deal the results out anew among all completions: the control in which reward says nothing about a completion."""
    results = [result for group in groups for result in group.results]
    random.Random(f"shuffle {seed} {number}").shuffle(results)
    dealt = iter(results)
    return [replace(group, results=[next(dealt) for _ in group.results]) for group in groups]
