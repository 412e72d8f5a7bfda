"""Pools, turns, memory and retirement, by hand; and a restored curriculum that goes on as the one that was saved."""

import json
from collections import Counter

import pytest
from pydantic import ValidationError

from grpo.curriculum import Curriculum, CurriculumConfig
from grpo.data import Dataset
from rewards import Problem


def make(count: int, seed: int = 0, **settings: object) -> Curriculum:
    return Curriculum(count, CurriculumConfig.model_validate(settings), seed)


def asked(curriculum: Curriculum, count: int, number: int, step: int, rate: dict[int, float]) -> list[int]:
    """One round: choose, and remember each problem's own pass rate."""
    places = curriculum.choose(count, number, step)
    for place in places:
        curriculum.remember(place, rate[place], step)
    return places


def test_unseen_problems_come_in_the_order_of_the_dataset() -> None:
    dataset = Dataset([Problem(id=str(n), prompt="?") for n in range(12)], seed=5)
    assert make(12, seed=5).choose(12, 0, 0) == dataset.places(0, 12)


def test_the_memory_is_an_exponential_mean_that_starts_at_the_first_rate() -> None:
    curriculum = make(1, memory=0.75)
    rates = []
    for step, rate in enumerate((0.5, 1.0, 0.0)):
        curriculum.remember(0, rate, step)
        rates.append(float(curriculum.rate_P[0]))
    assert rates == [0.5, 0.625, 0.46875]


def test_pools_take_turns_by_their_shares() -> None:
    shares = {"unseen": 1, "hard": 1, "target": 5, "easy": 1}
    curriculum = make(400, memory=0, shares=shares, retire_at=1.0, retire_after=9)
    rate = {place: (0.0, 0.5, 0.9)[place % 3] for place in range(400)}
    number = 0
    for step in range(60):  # enough in every pool
        asked(curriculum, 3, number, step, rate)
        number += 3
    turns = Counter()
    for step in range(60, 160):
        pool_P = curriculum._pools(step)
        for place in asked(curriculum, 2, number, step, rate):
            turns[("unseen", "hard", "target", "easy")[pool_P[place]]] += 1
        number += 2
    assert turns["target"] == pytest.approx(125, abs=3)
    assert all(turns[name] == pytest.approx(25, abs=3) for name in ("unseen", "hard", "easy"))


def test_within_a_pool_the_longest_wait_comes_first() -> None:
    curriculum = make(6, memory=0)
    rate = dict.fromkeys(range(6), 0.5)
    first = asked(curriculum, 6, 0, 0, rate)
    assert asked(curriculum, 4, 6, 1, rate) == first[:4]
    assert asked(curriculum, 4, 10, 2, rate) == [*first[4:], *first[:2]]


def test_a_problem_that_keeps_passing_retires_and_is_revisited() -> None:
    curriculum = make(3, memory=0, retire_after=2, revisit_steps=5)
    rate = {0: 1.0, 1: 0.5, 2: 0.5}
    when = [step for step in range(30) if 0 in asked(curriculum, 2, 2 * step, step, rate)]
    retired_at = when[1]
    assert len(when) >= 3
    assert all(later - earlier >= 5 for earlier, later in zip(when[1:], when[2:], strict=False)), when
    assert when[2] - retired_at == pytest.approx(5, abs=10), "its pool has a turn soon after it is due"
    assert curriculum.metrics(when[-1])["curriculum/retired"] == 1
    rate[0] = 0.0
    for step in range(30, 50):
        asked(curriculum, 2, 2 * step, step, rate)
    assert curriculum.metrics(50)["curriculum/hard"] == 1, "it came back, failed, and is not retired any more"


def test_a_problem_whose_answer_is_out_is_not_asked_again_while_there_are_others() -> None:
    curriculum = make(5, memory=0)
    assert sorted([*curriculum.choose(2, 0, 0), *curriculum.choose(3, 2, 0)]) == [0, 1, 2, 3, 4]
    assert len(set(curriculum.choose(5, 5, 0))) == 5, "nothing else is left: each once more"


def test_a_dataset_smaller_than_a_step_is_asked_evenly() -> None:
    assert Counter(make(3).choose(7, 0, 0)).most_common()[0][1] == 3
    assert sorted(Counter(make(3).choose(7, 0, 0)).values()) == [2, 2, 3]


def test_all_retired_falls_back_on_the_longest_wait() -> None:
    curriculum = make(2, memory=0, retire_after=1, revisit_steps=1000)
    order = [asked(curriculum, 1, step, step, {0: 1.0, 1: 1.0})[0] for step in range(4)]
    assert order == [order[0], 1 - order[0]] * 2


def test_what_is_restored_goes_on_as_what_was_saved() -> None:
    one = make(50, seed=3, revisit_steps=4)
    rate = {place: (place * 7 % 11) / 10 for place in range(50)}
    for step in range(20):
        asked(one, 6, 6 * step, step, rate)
    two = make(50, seed=3, revisit_steps=4)
    two.load_state(json.loads(json.dumps(one.state())))
    for step in range(20, 60):
        assert asked(one, 6, 6 * step, step, rate) == asked(two, 6, 6 * step, step, rate)
        assert one.metrics(step) == two.metrics(step)
    assert one.state() == two.state()


def test_metrics_count_every_problem_once() -> None:
    curriculum = make(10, memory=0, retire_after=1)
    rates = {0: 0.0, 1: 0.1, 2: 0.5, 3: 0.9, 4: 1.0}
    for place, rate in rates.items():
        curriculum.remember(place, rate, step=1)
    assert curriculum.metrics(2) == {
        "curriculum/unseen": 5, "curriculum/hard": 2, "curriculum/target": 1, "curriculum/easy": 1,
        "curriculum/retired": 1, "curriculum/pass_rate": pytest.approx(0.5),
    }  # fmt: skip
    assert make(10).metrics(0)["curriculum/pass_rate"] == 0.0


def test_ranges_that_cross_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"target_low <= target_high <= retire_at, got target_low=0.9"):
        CurriculumConfig(target_low=0.9)


def test_a_saved_state_stays_as_it_was_while_the_curriculum_goes_on() -> None:
    """A step that is given up is saved as it was before it had asked."""
    curriculum = make(6)
    rate = dict.fromkeys(range(6), 0.5)
    asked(curriculum, 3, 0, 0, rate)
    saved = curriculum.state()
    written = json.dumps(saved)
    asked(curriculum, 1, 3, 1, rate)
    assert json.dumps(saved) == written
    assert json.dumps(curriculum.state()) != written
