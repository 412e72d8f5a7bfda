"""The questions of a step and their answers: accounts, memory, replay and resumption with a real policy and grader."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from grpo.asking import Asked, Asker, make_asker
from grpo.collect import make_collector
from grpo.config import load_config
from grpo.countdown import CountdownConfig, vocabulary
from grpo.data import Dataset, read_problems
from grpo.distributed import Ranks
from grpo.dynamic_sampling import has_signal
from grpo.evaluate import is_correct
from policy.tokenizer import build_word_tokenizer
from rewards import Grader
from rollouts import make_engine
from tests.policies import tiny_policy
from tests.recipes import write_recipe

REWARD = """
def odd(problem, completion):
    return float(len(completion.split()) % 4 == 3)
"""


@contextmanager
def asker(tmp_path: Path, **changes: Any) -> Iterator[Asker]:
    """Of a policy that is right about once in four completions."""
    (tmp_path / "lengths.py").write_text(REWARD)
    rewards = [f"{tmp_path / 'lengths.py'}:odd"]
    config = load_config(write_recipe(tmp_path, **({"rewards": rewards, "prompts_per_step": 3} | changes)))
    tokenizer = build_word_tokenizer(vocabulary(CountdownConfig(max_value=30)), 64)
    policy = tiny_policy(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    problems = read_problems(config.dataset, seed=0, split="train", count=8)
    with Grader(config.rewards, num_workers=0) as grader:
        yield make_asker(
            make_collector(config, policy, tokenizer, grader, make_engine(policy, config.engine)),
            Ranks(cpu=True),
            Dataset(problems, 0),
        )


def ask(asker: Asker, step: int) -> Asked:
    asker.collector.engine.load_weights(asker.collector.engine.policy, step)  # type: ignore[attr-defined]
    return asker.ask(step)


def told(asked: Asked) -> list[Any]:
    """All that a run keeps of a step, seconds aside."""
    everything = [*asked.filled.trained, *asked.filled.dropped, *asked.filled.pending]
    rows = [
        (a.question.number, a.question.place, a.group.texts, [r.reward for r in a.group.results]) for a in everything
    ]
    return [rows, dict(asked.metrics)]


SECTIONS = {
    "plain": {},
    "dynamic": {"dynamic_sampling": {"oversample": 1.7}},
    "all": {
        "dynamic_sampling": {"oversample": 1.7, "metric": "odd"},
        "curriculum": {"revisit_steps": 3},
        "replay_buffer": {"max_pass_rate": 0.5},
        "length_schedule": {"start": 4, "steps": 5},
    },
}


def test_plain_steps_ask_the_dataset_in_order_and_train_on_everything(tmp_path: Path) -> None:
    with asker(tmp_path) as plain:
        reference = plain.stream.dataset
        for step in range(4):
            asked = ask(plain, step)
            assert [a.group.problem for a in asked.filled.trained] == reference.take(3 * step, 3)
            assert [a.group for a in asked.filled.trained] == asked.fresh
            assert asked.metrics == {}


@pytest.mark.parametrize("sections", SECTIONS.values(), ids=SECTIONS)
def test_what_is_restored_goes_on_as_what_was_saved(sections: dict[str, Any], tmp_path: Path) -> None:
    with asker(tmp_path, **sections) as one, asker(tmp_path, **sections) as two:
        for step in range(5):
            ask(one, step)
        two.load_state(json.loads(json.dumps(one.state())))
        for step in range(5, 9):
            assert told(ask(one, step)) == told(ask(two, step))
        assert one.state() == two.state()


def test_every_question_meets_one_fate(tmp_path: Path) -> None:
    with asker(tmp_path, **SECTIONS["all"]) as full:
        met, carried = list[int](), 0
        for step in range(12):
            asked = ask(full, step)
            met += [a.question.number for a in (*asked.filled.trained, *asked.filled.dropped)]
            carried += asked.filled.num_carried
            limit = min(4 + 12 * step // 5, 16)
            assert asked.metrics["completions/max_allowed_length"] == limit
            assert max(len(c.token_ids) for group in asked.fresh for c in group.completions) <= limit
        met += [a.question.number for a in full.pending]
        assert sorted(met) == list(range(full.stream.number))
        assert carried > 0


def test_an_old_success_gives_a_failed_group_its_signal(tmp_path: Path) -> None:
    with asker(tmp_path, curriculum={}, replay_buffer={"max_pass_rate": 0.5}) as replaying:
        helped = []
        for step in range(20):
            asked = ask(replaying, step)
            assert all(len(group.completions) == 4 for group in asked.fresh), "what is measured is what was sampled"
            helped += [(step, a) for a in asked.filled.trained if len(a.group.completions) == 5]
        assert helped
        for step, answer in helped:
            assert not any(is_correct(result, "odd") for result in answer.group.results[:4])
            assert is_correct(answer.group.results[4], "odd")
            assert has_signal(answer.group)
            assert answer.group.completions[4].policy_version < step


def test_the_curriculum_remembers_what_was_sampled(tmp_path: Path) -> None:
    with asker(tmp_path, curriculum={"memory": 0.0}) as remembering:
        asked = ask(remembering, 0)
        curriculum = remembering.stream.curriculum
        assert curriculum is not None
        for answer in asked.filled.trained:
            share = sum(is_correct(result, "odd") for result in answer.group.results) / 4
            assert curriculum.rate_P[answer.question.place] == share
        assert asked.metrics["curriculum/unseen"] == 5
