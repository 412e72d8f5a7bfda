"""Rows of every layout become problems that a right program passes and a wrong one does not."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from rewards import score_program
from rewards.code_datasets import LAYOUTS, read_code_problem
from rewards.sandbox.sandbox import Sandbox, SandboxUnavailableError

ADD = "def add(a, b):\n    return a + b\n"
SUBTRACT = "def add(a, b):\n    return a - b\n"
PRINT_SUM = "print(sum(int(input()) for _ in range(2)))"
PRINT_WRONG = "print(int(input()) - int(input()))"


def pickled(text: str) -> bytes:
    """What `pickle.dumps(text)` writes in protocol 4, by hand: nothing here may import it."""
    data = text.encode()
    body = b"X" + len(data).to_bytes(4, "little") + data + b"\x94."
    return b"\x80\x04\x95" + len(body).to_bytes(8, "little") + body


def packed(cases: list[dict[str, str]]) -> str:
    return base64.b64encode(zlib.compress(pickled(json.dumps(cases)))).decode()


HUMANEVAL = {
    "prompt": "import math\n\ndef twice(x):\n    return 2 * x\n\ndef add(a, b):\n    '''Add.'''\n",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert twice(candidate(math.floor(1.5), 2)) == 6\n",
}
IN_OUT = {"inputs": ["1\n2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]}
CALLS = {"fn_name": "add", "inputs": [[1, 2], [[1], [2]]], "outputs": [[3], [1, 2]]}
STDIN_CASES = [{"input": "1\n2\n", "output": "3", "testtype": "stdin"}]
FUNCTIONAL = [{"input": "1\n2", "output": "3", "testtype": "functional"}]

ROWS: list[tuple[str, dict[str, Any], str, str]] = [
    ("humaneval", HUMANEVAL, ADD, SUBTRACT),
    ("humaneval", HUMANEVAL, ADD + "def twice(x): return 6", SUBTRACT + "def twice(x): return 6"),
    ("mbpp", {"code": ADD, "test_list": ["assert add(1, 2) == 3", "assert set([add(2, 2)]) == {4}"]}, ADD, SUBTRACT),
    ("mbpp", {"test_imports": ["import math"], "test_list": ["assert math.floor(add(1, 2)) == 3"]}, ADD, SUBTRACT),
    ("mbpp", {"test_setup_code": "two = 2", "test_list": ["assert set([add(1, two)]) == {3}"]}, ADD, SUBTRACT),
    ("apps", {"input_output": json.dumps(IN_OUT)}, PRINT_SUM, PRINT_WRONG),
    ("apps", {"input_output": CALLS}, ADD, SUBTRACT),
    ("prime", {"reward_model": {"ground_truth": json.dumps(IN_OUT)}}, PRINT_SUM, PRINT_WRONG),
    (
        "prime",
        {"reward_model": {"ground_truth": {"fn_name": "add", "inputs": ["1\n2"], "outputs": ["3"]}}},
        ADD,
        SUBTRACT,
    ),
    (
        "livecodebench",
        {"public_test_cases": json.dumps(STDIN_CASES), "private_test_cases": packed(STDIN_CASES * 3)},
        PRINT_SUM,
        PRINT_WRONG,
    ),
    (
        "livecodebench",
        {
            "public_test_cases": json.dumps(FUNCTIONAL),
            "private_test_cases": json.dumps(FUNCTIONAL),
            "metadata": '{"func_name": "add"}',
        },
        "class Solution:\n    def add(self, a, b):\n        return a + b",
        SUBTRACT,
    ),
    (
        "open_r1",
        {"verification_info": {"language": "python", "test_cases": [{"input": "1\n2\n", "output": "3\n"}]}},
        PRINT_SUM,
        PRINT_WRONG,
    ),
    (
        "open_r1",
        {"verification_info": json.dumps({"test_cases": [{"input": [1, 2], "output": 3, "fn_name": "add"}]})},
        ADD,
        SUBTRACT,
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as made:
        try:
            assert made.level
        except SandboxUnavailableError as error:
            pytest.skip(str(error))
        yield made


@pytest.mark.parametrize(("layout", "row", "right", "wrong"), ROWS)
def test_rows_become_problems(sandbox: Sandbox, layout: str, row: dict[str, Any], right: str, wrong: str) -> None:
    problem = read_code_problem(row, layout)
    scored = score_program(right, problem, sandbox=sandbox)
    assert scored.reward == 1.0, scored.detail
    failed = score_program(wrong, problem, sandbox=sandbox)
    assert failed.reward is not None
    assert failed.reward < 1


def test_every_layout_is_tried() -> None:
    assert {layout for layout, *_ in ROWS} == set(LAYOUTS)


def test_private_cases_are_all_read() -> None:
    row = {"public_test_cases": "[]", "private_test_cases": packed(STDIN_CASES * 5)}
    assert len(read_code_problem(row, "livecodebench")["cases"]) == 5


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04cos\nsystem\n\x94.",
        b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00\x8c\x02[]\x94\x8c\x02os\x93.",
        b"]",
    ],
)
def test_a_pickle_of_anything_but_a_string_is_refused(data: bytes) -> None:
    row = {"public_test_cases": "[]", "private_test_cases": base64.b64encode(zlib.compress(data)).decode()}
    with pytest.raises(ValueError, match="private_test_cases holds a pickle of"):
        read_code_problem(row, "livecodebench")


@pytest.mark.parametrize(
    ("layout", "row", "message"),
    [
        ("bigcode", {}, "layout must be one of humaneval, mbpp, apps"),
        ("mbpp", {"text": "x"}, "a row of layout mbpp needs 'test_list'; this one has text"),
        ("mbpp", {"test_list": []}, "empty test_list"),
        ("mbpp", {"test_list": ["assert True"]}, "no function is called"),
        ("apps", {"input_output": {"inputs": [], "outputs": []}}, "0 inputs and 0 outputs"),
        ("apps", {"input_output": {"inputs": ["1"], "outputs": []}}, "1 inputs and 0 outputs"),
        ("open_r1", {"verification_info": {"test_cases": []}}, "no test case"),
    ],
)
def test_an_unreadable_row_is_named(layout: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_code_problem(row, layout)
