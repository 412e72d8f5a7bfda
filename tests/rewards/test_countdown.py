import random
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Problem
from rewards.countdown import (
    MAX_DEPTH,
    MAX_LENGTH,
    ExpressionError,
    countdown_reward,
    evaluate,
    extract,
    literals,
    parse,
)


def make_problem(nums: object, target: object) -> Problem:
    return Problem(id="1", prompt="?", source="data.jsonl:7", columns={"nums": nums, "target": target})


def grade(answer: str, nums: object = (3, 4, 6), target: object = 18) -> tuple[float | None, str, str]:
    result = countdown_reward(make_problem(list(nums), target), f"<think>hm</think> <answer>{answer}</answer>")
    return result.reward, result.status, result.detail


@pytest.mark.parametrize(
    ("answer", "nums", "target"),
    [
        ("6*4-3*2", (6, 4, 3, 2), 18),
        (" 6 * ( 4 - 1 ) ", (6, 4, 1), 18),
        ("\n6*\n(4-1)\n", (6, 4, 1), 18),
        ("8/(3-8/3)", (3, 3, 8, 8), 24),
        ("1/3*3", (1, 3, 3), 1),
        ("((((5))))+(7)", (5, 7), 12),
        ("3-10", (3, 10), -7),
        ("0*5+2", (0, 2, 5), 2),
        ("100-1-1-1", (1, 1, 1, 100), 97),
        ("24/4/3", (24, 4, 3), 2),
        ("7", (7,), 7),
    ],
)
def test_right_answers(answer: str, nums: tuple[int, ...], target: int) -> None:
    assert grade(answer, nums, target)[:2] == (1.0, "ok")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("3+4+6", "equals 13, target 18"),
        ("3/4/6", "equals 1/8, target 18"),
        ("6*3", "uses the numbers 3, 6; given 3, 4, 6"),
        ("18", "uses the numbers 18; given 3, 4, 6"),
        ("6*3*4/4", "uses the numbers 3, 4, 4, 6"),
        ("6/(3+4-7)", "uses the numbers 3, 4, 6, 7"),
        ("46-3", "uses the numbers 3, 46"),
    ],
)
def test_wrong_answers_are_read(answer: str, reason: str) -> None:
    reward, status, detail = grade(answer)
    assert (reward, status) == (0.0, "ok")
    assert reason in detail


def test_division_by_zero_is_no_exception() -> None:
    assert grade("6/(4-4)", (4, 4, 6), 6) == (0.0, "ok", "division by zero")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "6*3=18",
        "6*(4-1) = 18",
        "= 6*3",
        "the answer is 6*3",
        "6**3",
        "6//3",
        "6%3",
        "6^3",
        "-3+6",
        "+3+6",
        "6*-3",
        "6--3",
        "3*+6",
        "(-3)+6",
        "6(3)",
        "(6)(3)",
        "6 3",
        "1 2",
        "06*3",
        "00",
        "6_0",
        "6.0*3",
        "6.",
        "6e1",
        "0x6",
        "6j",
        "６*３",
        "٣+٤",
        "²+³",
        "6×3",
        "6÷3",
        "6−3",
        "6\u00a0*3",
        "(6*3",
        "6*3)",
        ")6*3(",
        "()",
        "6*()",
        "6*",
        "*6",
        "6,3",
        "[6]*3",
        "6*3;4",
        "6*3 # 4",
        "$6*3$",
        "\\boxed{6*3}",
        "sum([6,4])",
        "__import__('os').system('true')",
        "lambda: 1",
        "True+6",
        "6\x00*3",
        "\ud8006*3",
    ],
)
def test_other_text_is_unparsed(answer: str) -> None:
    reward, status, detail = grade(answer)
    assert (reward, status) == (0.0, "unparsed")
    assert detail.startswith("not an expression")


@pytest.mark.parametrize(
    "answer",
    [
        "9" * 1_000_000,
        "9" * 19,
        "1+" * 100_000 + "1",
        "(" * 500_000 + "1" + ")" * 500_000,
        "(" * (MAX_LENGTH - 1),
        "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
        "1" + "-1" * (MAX_DEPTH + 1),
        "1" + "-(1" * 300,
        " " * 5_000_000,
        "9" * 17 + ("*" + "9" * 17) * 50_000,
    ],
)
def test_huge_answers_cost_nothing(answer: str) -> None:
    started = time.process_time()
    assert grade(answer)[:2] == (0.0, "unparsed")
    assert time.process_time() - started < 1.0


def test_limits_let_ordinary_depth_through() -> None:
    assert grade("(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH, (7,), 7)[0] == 1.0
    assert grade("1" + "+1" * MAX_DEPTH, (1,) * (MAX_DEPTH + 1), MAX_DEPTH + 1)[0] == 1.0


def test_deepest_answer_fits_a_nearly_full_stack() -> None:
    def descend(depth: int) -> float | None:
        return descend(depth - 1) if depth else grade("(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH, (7,), 7)[0]

    frames = 0
    frame = sys._getframe()
    while frame.f_back is not None:
        frame, frames = frame.f_back, frames + 1
    assert descend(sys.getrecursionlimit() - frames - 4 * MAX_DEPTH) == 1.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>a</think> <answer>1</answer>", "1"),
        ("<answer>1</answer>", "1"),
        ("a</think><answer>1</answer>", "1"),
        ("<think><answer>1</answer></think><answer>2</answer>", "2"),
        ("<think><answer>1</answer></think>", None),
        ("<think><answer>1</answer>", None),
        ("<think>a</think><answer>1</answer><answer>2</answer>", "2"),
        ("<think>a</think><answer>1</answer></think><answer>2</answer>", "2"),
        ("<think>a</think><answer>1</answer></think>", None),
        ("<answer>1<answer>2</answer>", "2"),
        ("<answer>1</answer>2</answer>", "1"),
        ("<answer>1</answer><answer>2", "1"),
        ("<answer>1", None),
        ("1</answer>", None),
        ("</answer><answer>", None),
        ("<answer></answer>", ""),
        ("1+2", None),
        ("", None),
    ],
)
def test_last_answer_after_the_reasoning_counts(completion: str, expected: str | None) -> None:
    assert extract(completion) == expected


def test_no_answer_is_unparsed() -> None:
    result = countdown_reward(make_problem([1, 2], 3), "<think>1+2</think>")
    assert (result.reward, result.status) == (0.0, "unparsed")


@pytest.mark.parametrize("completion", ["<answer>" * 200_000, "</answer>" * 200_000, "<answer></answer>" * 200_000])
def test_extraction_is_linear(completion: str) -> None:
    started = time.process_time()
    extract(completion)
    assert time.process_time() - started < 1.0


@pytest.mark.parametrize(
    ("nums", "target"),
    [(None, 3), ([1, 2], None), ("12", 3), ([1, "2"], 3), ([1.0, 2.0], 3), ([1, True], 2), ([], 3), ([1, 2], 3.0)],
)
def test_bad_rows_are_named(nums: object, target: object) -> None:
    with pytest.raises(ValueError, match=r"data\.jsonl:7: the countdown reward needs the columns 'nums'"):
        countdown_reward(make_problem(nums, target), "<answer>1+2</answer>")


def test_answers_found_by_search_are_right_and_their_neighbours_wrong() -> None:
    generator = random.Random(0)
    for _ in range(200):
        nums = [generator.randint(1, 99) for _ in range(generator.choice([3, 4]))]
        signs = [generator.choice("+-*/") for _ in nums[1:]]
        answer = str(nums[0]) + "".join(f"{sign}{num}" for sign, num in zip(signs, nums[1:], strict=True))
        value = evaluate(parse(answer))
        if value.denominator == 1:
            assert grade(answer, nums, int(value))[0] == 1.0
            assert grade(answer, nums, int(value) + 1)[0] == 0.0
            assert grade(answer, [*nums, 1], int(value))[0] == 0.0


Tree = tuple[str, Fraction | None, list[int]]
"""Text of an expression, its value (None: it has none), and its numbers from left to right."""


def combine(parts: tuple[Tree, str, Tree]) -> Tree:
    (left_text, left, left_numbers), sign, (right_text, right, right_numbers) = parts
    value = None
    if left is not None and right is not None and not (sign == "/" and right == 0):
        value = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}[sign](
            left, right
        )
    return f"({left_text} {sign}{right_text})", value, left_numbers + right_numbers


TREES = st.recursive(
    st.integers(0, 50).map(lambda number: (str(number), Fraction(number), [number])),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(combine),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(TREES)
def test_values_are_those_of_exact_arithmetic(tree: Tree) -> None:
    text, expected, numbers = tree
    expression = parse(text)
    assert list(literals(expression)) == numbers
    if expected is None:
        with pytest.raises(ZeroDivisionError):
            evaluate(expression)
    else:
        assert evaluate(expression) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2+3*4", 14),
        ("2*3+4", 10),
        ("10-4-3", 3),
        ("10-(4-3)", 9),
        ("24/4/3", 2),
        ("24/4*3", 18),
        ("1-2/4", Fraction(1, 2)),
        ("1/3+1/3+1/3", 1),
    ],
)
def test_precedence_and_order(text: str, value: Fraction) -> None:
    assert evaluate(parse(text)) == value


@settings(max_examples=500, deadline=None)
@given(st.text(alphabet="0123456789+-*/() =.\u0664x", max_size=40))
def test_parse_answers_or_refuses(text: str) -> None:
    try:
        expression = parse(text)
    except ExpressionError:
        return
    assert set(text) <= set("0123456789+-*/() ")
    assert list(literals(expression))
