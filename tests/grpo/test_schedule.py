"""The length of completions over the steps, worked out by hand."""

from grpo.schedule import LengthScheduleConfig, completion_length_at


def test_it_rises_evenly_and_stays() -> None:
    schedule = LengthScheduleConfig(start=10, steps=4)
    assert [completion_length_at(step, 50, schedule) for step in range(7)] == [10, 20, 30, 40, 50, 50, 50]


def test_rises_are_as_many_as_asked_for_and_equal() -> None:
    schedule = LengthScheduleConfig(start=16, steps=6, rises=2)
    assert [completion_length_at(step, 64, schedule) for step in range(8)] == [16, 16, 16, 40, 40, 40, 64, 64]


def test_more_rises_than_steps_are_made_several_at_a_time() -> None:
    schedule = LengthScheduleConfig(start=1, steps=2, rises=100)
    assert [completion_length_at(step, 101, schedule) for step in range(3)] == [1, 51, 101]


def test_without_a_schedule_every_step_has_the_full_length() -> None:
    assert {completion_length_at(step, 50, None) for step in (0, 1, 10**6)} == {50}
