"""Refilling a step: worked by hand, and accounts that balance whatever comes back."""

import random
from collections.abc import Callable, Sequence

import pytest

from grpo.dynamic_sampling import DynamicSamplingConfig, Filled, fill_step, has_signal
from grpo.types import Answer
from tests.grpo.answers import make_answer


class Source:
    """Questions 0, 1, ...; those whose number `teaches` get answers that differ."""

    def __init__(self, teaches: Callable[[int], bool], version: int = 0) -> None:
        self.teaches, self.version = teaches, version
        self.number = 0
        self.rounds: list[int] = []

    def ask(self, count: int) -> list[Answer]:
        rewards = {True: [1.0, 0.0], False: [1.0, 1.0]}
        self.number += count
        self.rounds.append(count)
        numbers = range(self.number - count, self.number)
        return [make_answer(n, rewards[self.teaches(n)], version=self.version) for n in numbers]

    def fill(self, count: int, pending: Sequence[Answer] = (), **settings: object) -> Filled:
        self.rounds = []
        config = DynamicSamplingConfig.model_validate(settings)
        return fill_step(count, config, pending, self.ask)


def numbers(answers: Sequence[Answer]) -> list[int]:
    return [answer.question.number for answer in answers]


def test_groups_without_signal_are_replaced_until_the_step_is_full() -> None:
    source = Source(lambda n: n % 3 == 0)
    filled = source.fill(4, max_rounds=9)
    assert source.rounds == [4, 2, 2, 1, 1]
    assert numbers(filled.trained) == [0, 3, 6, 9]
    assert numbers(filled.dropped) == [1, 2, 4, 5, 7, 8]
    assert filled.metrics() == {
        "dynamic/asked": 10, "dynamic/kept": 4, "dynamic/filled": 0, "dynamic/dropped": 6,
        "dynamic/pending": 0, "dynamic/carried": 0, "dynamic/rounds": 5,
    }  # fmt: skip


def test_a_step_whose_groups_all_teach_is_one_round_of_what_was_asked() -> None:
    source = Source(lambda n: True)
    filled = source.fill(3)
    assert (numbers(filled.trained), filled.dropped, filled.pending, source.rounds) == ([0, 1, 2], [], [], [3])


def test_at_the_cap_the_newest_groups_without_signal_fill_the_step_up() -> None:
    filled = Source(lambda n: n == 1).fill(3, max_rounds=2)
    assert numbers(filled.trained) == [1, 3, 4]
    assert numbers(filled.dropped) == [0, 2]
    assert (filled.num_filled, filled.num_rounds) == (2, 2)


def test_what_an_oversampled_round_leaves_opens_the_next_step() -> None:
    source = Source(lambda n: True)
    first = source.fill(4, oversample=1.75)
    assert (numbers(first.trained), numbers(first.pending)) == ([0, 1, 2, 3], [4, 5, 6])
    second = source.fill(4, first.pending, oversample=1.75)
    assert source.rounds == [1], "one was missing, and 1.75 of it is one"
    assert (numbers(second.trained), second.pending) == ([4, 5, 6, 7], [])
    assert second.metrics()["dynamic/carried"] == 3
    assert second.metrics()["dynamic/kept"] == 1


@pytest.mark.parametrize("seed", range(20))
def test_every_question_is_accounted_for_once_and_none_waits_for_two_steps(seed: int) -> None:
    draw = random.Random(seed)
    chance, count = draw.random(), draw.randint(1, 9)
    settings = {"max_rounds": draw.randint(1, 5), "oversample": draw.uniform(1, 1.999)}
    flags = [draw.random() < chance for _ in range(4000)]
    source, pending, seen = Source(flags.__getitem__), list[Answer](), list[int]()
    for step in range(30):
        before, source.version = source.number, step
        filled = source.fill(count, pending, **settings)
        metrics = filled.metrics()
        assert len(filled.trained) == count
        fates = sum(metrics[f"dynamic/{name}"] for name in ("kept", "filled", "dropped", "pending"))
        assert metrics["dynamic/asked"] == fates == source.number - before > 0
        assert count == sum(metrics[f"dynamic/{k}"] for k in ("carried", "kept", "filled"))
        assert sum(has_signal(answer.group) for answer in filled.trained) == count - filled.num_filled
        assert not any(has_signal(answer.group) for answer in filled.dropped)
        assert filled.num_filled == 0 or filled.num_rounds == settings["max_rounds"]
        versions = [answer.group.completions[0].policy_version for answer in filled.trained]
        assert set(versions) <= {step, step - 1}
        assert versions.count(step - 1) == len(pending)
        seen += numbers([*filled.trained, *filled.dropped])
        pending = filled.pending
    assert sorted(seen + numbers(pending)) == list(range(source.number))


def test_signal_is_a_difference_in_the_chosen_score_above_rounding() -> None:
    assert has_signal(make_answer(0, [1.0, 0.0]).group)
    assert not has_signal(make_answer(0, [0.3, 0.1 + 0.2]).group)
    assert not has_signal(make_answer(0, [None, None]).group)
    assert not has_signal(make_answer(0, [None, 1.0]).group)
    assert has_signal(make_answer(0, [None, 1.0, 0.5]).group)
    assert has_signal(make_answer(0, [1.0, 0.0]).group, "right")
    assert not has_signal(make_answer(0, [1.0, 0.0]).group, "form")
    assert not has_signal(make_answer(0, [1.0, 0.0]).group, "no such reward")
