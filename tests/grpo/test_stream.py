"""The numbered questions of a run: order, memory, and a dataset that must not have changed."""

import json

import pytest

from grpo.curriculum import CurriculumConfig
from grpo.data import Dataset, DatasetError
from grpo.stream import Stream
from rewards import Problem


def dataset(count: int = 9, **changes: str) -> Dataset:
    problems = [Problem(id=str(n), prompt=f"question {n}", answer="1") for n in range(count)]
    problems[4] = Problem(**{"id": "4", "prompt": "question 4", "answer": "1"} | changes)
    return Dataset(problems, seed=2)


def test_without_a_curriculum_questions_follow_the_dataset_and_are_numbered() -> None:
    stream, reference = Stream(dataset()), dataset()
    questions = [question for count in (4, 1, 9) for question in stream.take(count, step=0)]
    assert [question.number for question in questions] == list(range(14))
    assert [question.problem for question in questions] == reference.take(0, 14)
    assert all(reference.problems[question.place] == question.problem for question in questions)


@pytest.mark.parametrize("curriculum", [None, CurriculumConfig()])
def test_what_is_restored_asks_on(curriculum: CurriculumConfig | None) -> None:
    one, two = Stream(dataset(), curriculum), Stream(dataset(), curriculum)
    for step in range(3):
        for question in one.take(4, step):
            one.remember(question.place, question.place / 9, step)
    two.load_state(json.loads(json.dumps(one.state())))
    assert one.take(7, 3) == two.take(7, 3)


@pytest.mark.parametrize("change", [{"prompt": "another"}, {"answer": "2"}, {"id": "x"}])
def test_another_dataset_is_refused(change: dict[str, str]) -> None:
    state = Stream(dataset()).state()
    with pytest.raises(DatasetError, match="the dataset is not the one that the run began with"):
        Stream(dataset(**change)).load_state(state)
    with pytest.raises(DatasetError):
        Stream(dataset(count=10)).load_state(state)
