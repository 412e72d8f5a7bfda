"""Sampled and graded side by side: the same groups as one after the other, and nothing left of what was given up."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from grpo.collect import Collector, make_collector, sampling_params
from grpo.config import load_config
from grpo.countdown import CountdownConfig, vocabulary
from grpo.data import read_problems
from grpo.types import Group
from policy import Policy
from policy.tokenizer import build_word_tokenizer
from rewards import Grader, Problem
from rollouts import Completion, Engine, SamplingParams, make_engine
from rollouts.types import OnGroup
from tests.policies import tiny_policy
from tests.recipes import write_recipe
from tests.rewards.test_grader_workers import wait_until

REWARDS = """
from pathlib import Path

def words(problem, completion):
    return float(len(completion.split()))

def tells(completions, completion_ids, **columns):
    (Path(__file__).parent / f"group of {len(completions)}").touch()
    return [float(sum(ids)) for ids in completion_ids]
"""


@contextmanager
def collecting(tmp_path: Path, num_workers: int) -> Iterator[tuple[Collector, list[Problem]]]:
    (tmp_path / "mine.py").write_text(REWARDS)
    rewards = [f"{tmp_path / 'mine.py'}:{name}" for name in ("words", "tells")]
    config = load_config(write_recipe(tmp_path, rewards=rewards, engine={"max_num_seqs": 4}))
    tokenizer = build_word_tokenizer(vocabulary(CountdownConfig(max_value=30)), 64)
    policy = tiny_policy(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    problems = read_problems(config.dataset, seed=0, split="train", count=5)
    with Grader(config.rewards, num_workers=num_workers) as grader:
        yield make_collector(config, policy, tokenizer, grader, make_engine(policy, config.engine)), problems


def collect(collector: Collector, problems: Sequence[Problem]) -> list[Group]:
    collected = collector.collect(
        problems,
        collector.render(problems),
        num_generations=3,
        params=sampling_params(collector.config, collector.tokenizer),
        prompt_seeds=range(len(problems)),
    )
    assert collected.grade_busy_s > 0
    return [
        replace(group, results=[replace(result, elapsed_s=0.0) for result in group.results])
        for group in collected.groups
    ]


def graded_texts(groups: Sequence[Group]) -> list[object]:
    """What does not depend on who shares a batch, as the last bits of log-probabilities do."""
    return [(group.problem, group.texts, group.results) for group in groups]


class Waiting:
    """An engine that asks another, and leaves the last prompt until something has happened."""

    def __init__(self, engine: Engine, file: Path, *, fails: bool = False) -> None:
        self.engine, self.file, self.fails = engine, file, fails

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_generations: int,
        params: SamplingParams,
        prompt_seeds: Sequence[int] | None = None,
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        assert on_group is not None
        assert prompt_seeds is not None
        groups = list[list[Completion]]()
        for place, (prompt, seed) in enumerate(zip(prompts, prompt_seeds, strict=True)):
            if place == len(prompts) - 1:
                assert wait_until(self.file.exists), "nothing was graded while the last prompt was still to be sampled"
                if self.fails:
                    raise ZeroDivisionError
            groups += self.engine.generate([prompt], num_generations, params, [seed])
            on_group(place, groups[-1])
        return groups

    def load_weights(self, policy: Policy, version: int) -> None:
        self.engine.load_weights(policy, version)

    def close(self) -> None:
        self.engine.close()


def test_groups_are_those_of_grading_after_sampling(tmp_path: Path) -> None:
    """Without workers all is graded at the end; neither the workers nor what ends first change a result."""
    with collecting(tmp_path, 0) as (collector, problems):
        wanted = collect(collector, problems)
    with collecting(tmp_path, 2) as (collector, problems):
        assert collect(collector, problems) == wanted
        assert graded_texts(collect(collector, problems[:1])) == graded_texts(wanted[:1])
        collected = collector.collect(
            [], [], num_generations=3, params=SamplingParams(max_completion_length=4), prompt_seeds=[]
        )
        assert collected.groups == []
    assert {len(group.results) for group in wanted} == {3}
    assert len({result.reward for group in wanted for result in group.results}) > 3


def test_grading_begins_while_sampling_goes_on(tmp_path: Path) -> None:
    with collecting(tmp_path, 1) as (collector, problems):
        waiting = replace(collector, engine=Waiting(collector.engine, tmp_path / "group of 3"))
        groups = collect(waiting, problems)
        assert graded_texts(groups) == graded_texts(collect(collector, problems))


def test_what_ends_the_sampling_ends_the_grading(tmp_path: Path) -> None:
    with collecting(tmp_path, 1) as (collector, problems):
        failing = Waiting(collector.engine, tmp_path / "group of 3", fails=True)
        with pytest.raises(ZeroDivisionError):
            collect(replace(collector, engine=failing), problems)
        assert not [thread for thread in threading.enumerate() if thread.name == "grading"]
        assert len(collect(collector, problems)) == 5
