"""Rows of every layout ask what they ask, and the form that the reward reads."""

from typing import Any

import pytest

from rewards.code_datasets import LAYOUTS
from rewards.code_questions import FORM, INPUT_AND_OUTPUT, QUESTIONS, read_question
from rewards.code_reward import extract_program

ROWS: list[tuple[str, dict[str, Any], str]] = [
    ("humaneval", {"prompt": "def add(a, b):\n"}, "Complete this function.\n\n```python\ndef add(a, b):\n```"),
    ("mbpp", {"text": "Add two.", "test_list": ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]}, "assert add(1, 2)"),
    ("mbpp", {"prompt": "Add two.", "test_list": ["assert add(1, 2) == 3"]}, "Add two.\n"),
    ("apps", {"question": "Add them.", "starter_code": ""}, f"Add them.\n\n{INPUT_AND_OUTPUT}"),
    ("apps", {"question": "Add them.", "starter_code": "class Solution:"}, "```python\nclass Solution:\n```"),
    ("livecodebench", {"question_content": "Add them."}, f"Add them.\n\n{INPUT_AND_OUTPUT}"),
    ("open_r1", {"problem_statement": "Add.", "prompt": "?"}, f"Add.\n\n{INPUT_AND_OUTPUT}"),
    ("open_r1", {"prompt": "Add."}, f"Add.\n\n{INPUT_AND_OUTPUT}"),
    ("prime", {"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "Add."}]}, f"Add.\n\n{FORM}"),
]


@pytest.mark.parametrize(("layout", "row", "part"), ROWS)
def test_a_question_holds_the_task_and_ends_with_the_form(layout: str, row: dict[str, Any], part: str) -> None:
    question = read_question(row, layout)
    assert part in question
    assert question.endswith(FORM)
    assert "add(2, 2)" not in question, "what is tested beside the first test stays hidden"


def test_what_the_form_asks_for_is_what_the_reward_reads() -> None:
    assert QUESTIONS.keys() == LAYOUTS.keys()
    fence = FORM[FORM.index("```") : FORM.index("```") + len("```python")]
    assert extract_program(f"Sure.\n\n{fence}\nprint(1)\n```\n") == "print(1)\n"


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("mpbb", {}, "layout must be one of humaneval, mbpp"),
        ("apps", {"input_output": "{}"}, "layout apps needs 'question'; this one has input_output"),
        ("apps", {"question": " "}, "layout apps asks nothing"),
        ("prime", {"prompt": []}, "layout prime asks nothing"),
        ("mbpp", {"text": "Add.", "test_list": []}, "empty test_list"),
    ],
)
def test_rows_that_ask_nothing_are_refused(layout: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_question(row, layout)
