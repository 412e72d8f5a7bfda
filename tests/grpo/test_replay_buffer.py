"""Rare successes: which are kept, when one is added, and when it goes."""

import json

from grpo.replay_buffer import ReplayBuffer, ReplayBufferConfig
from grpo.types import Answer
from tests.grpo.answers import make_answer

RARE, NONE, MANY = [0.0, 0.0, 1.0, 0.0], [0.0] * 4, [1.0, 1.0, 0.0, 0.0]


def make(**settings: object) -> ReplayBuffer:
    return ReplayBuffer(ReplayBufferConfig.model_validate(settings))


def visit(buffer: ReplayBuffer, rewards: list[float], place: int, step: int) -> Answer:
    answer = make_answer(step, rewards, place=place, version=step)
    return buffer.visit(answer, [reward == 1.0 for reward in rewards], step)


def counts(buffer: ReplayBuffer) -> dict[str, int]:
    return {name.removeprefix("replay/"): count for name, count in buffer.metrics().items() if count}


def test_a_rare_success_joins_the_next_group_that_fails() -> None:
    buffer = make()
    buffer.begin(0)
    first = visit(buffer, RARE, place=7, step=0)
    assert len(first.group.completions) == 4
    assert counts(buffer) == {"size": 1, "stored": 1}
    buffer.begin(3)
    second = visit(buffer, NONE, place=7, step=3)
    assert counts(buffer) == {"size": 1, "added": 1}
    assert second.question.number == 3
    assert second.group.completions[4] == first.group.completions[2]
    assert (second.group.texts[4], second.group.results[4]) == (first.group.texts[2], first.group.results[2])
    assert [c.policy_version for c in second.group.completions] == [3, 3, 3, 3, 0]
    assert second.group.completions[:4] == make_answer(3, NONE, place=7, version=3).group.completions


def test_other_problems_and_groups_with_a_success_are_left_alone() -> None:
    buffer = make()
    visit(buffer, RARE, place=7, step=0)
    assert len(visit(buffer, NONE, place=8, step=1).group.completions) == 4
    assert len(visit(buffer, MANY, place=7, step=1).group.completions) == 4


def test_frequent_successes_are_not_kept() -> None:
    buffer = make(max_pass_rate=0.3)
    visit(buffer, MANY, place=7, step=0)
    visit(buffer, NONE, place=8, step=0)
    assert not buffer.successes


def test_a_newer_success_takes_the_older_ones_place() -> None:
    buffer = make()
    buffer.begin(0)
    visit(buffer, RARE, place=7, step=0)
    visit(buffer, RARE, place=7, step=1)
    assert counts(buffer) == {"size": 1, "stored": 2, "replaced": 1}
    assert buffer.successes[7].step == 1


def test_it_is_used_so_often_kept_so_long_and_no_more_than_so_many() -> None:
    buffer = make(max_uses=2, max_age=5, capacity=2)
    buffer.begin(0)
    for place in (1, 2, 3):
        visit(buffer, RARE, place=place, step=0)
    assert list(buffer.successes) == [2, 3]
    assert counts(buffer) == {"size": 2, "stored": 3, "evicted": 1}
    buffer.begin(5)
    sizes = [len(visit(buffer, NONE, place=2, step=5).group.completions) for _ in range(3)]
    assert sizes == [5, 5, 4]
    assert counts(buffer) == {"size": 1, "added": 2, "used_up": 1}
    buffer.begin(6)
    assert counts(buffer) == {"expired": 1}


def test_what_is_restored_is_what_was_saved() -> None:
    one, two = make(), make()
    for place in (3, 1, 2):
        visit(one, RARE, place=place, step=place)
    visit(one, NONE, place=1, step=4)
    two.load_state(json.loads(json.dumps(one.state())))
    assert two.state() == one.state()
    assert list(two.successes) == [3, 1, 2]
    before, after = (visit(buffer, NONE, place=1, step=5).group.completions[4] for buffer in (one, two))
    assert before == after
