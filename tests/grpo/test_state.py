"""Answers through JSON and back: the same to the bit, but for seconds."""

import json
from dataclasses import replace

from grpo.state import answer_to_json, read_answer
from grpo.types import Question
from rewards import Problem
from tests.grpo.answers import make_answer


def test_an_answer_comes_back() -> None:
    answer = make_answer(9, [1.0, None, 1 / 3], place=2, version=5)
    problem = Problem(id="p2", prompt="question 2")

    def question(number: int, place: int) -> Question:
        assert place == 2
        return Question(number=number, place=place, problem=problem)

    again = read_answer(json.loads(json.dumps(answer_to_json(answer))), question)
    results = [replace(result, elapsed_s=0.0) for result in answer.group.results]
    assert again == replace(answer, group=replace(answer.group, results=results))
