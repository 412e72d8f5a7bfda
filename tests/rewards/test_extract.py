"""Where the answer of a completion is found."""

import time

import pytest

from rewards.extract import after_thoughts, closed_boxes, extract_answer


@pytest.mark.parametrize(
    ("completion", "text", "source"),
    [
        (r"so \boxed{42}.", "42", "box"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", "box"),
        (r"\fbox{7}", "7", "box"),
        (r"\boxed 7", "7", "box"),
        (r"\boxed{1} then \boxed{2}", "2", "box"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2", "boxes"),
        (r"$x=\boxed{1}$ or $x=\boxed{2}$", "1, 2", "boxes"),
        (r"\boxed{1}, again \boxed{1}", "1", "box"),
        (r"\boxed{3}\n and put it in \boxed{}", "3", "box"),
        (r"\boxed{28} \%", r"28\%", "box"),
        ("<answer> 5 </answer>", "5", "answer tag"),
        ("<answer>\\boxed{5}</answer>", "5", "box"),
        ("reasoning\n#### 1,234\n", "1,234", "####"),
        ("The answer is 42.", "42", "answer phrase"),
        ("**Final Answer:** $x = 3$", "$x = 3$", "answer phrase"),
        ("**Final Answer**\n\n$7$", "$7$", "answer phrase"),
        (r"\boxed{1}. Sorry, the answer is 2.", "2", "answer phrase"),
        ("The answer is 5. No: the answer is 6.", "6", "answer phrase"),
        ("The answer is 42 or 43.", "42 or 43", "answer phrase"),
        ("So he has 30 dollars left.", "30 dollars", "last expression"),
        ("They need 5 million dollars.", "5 million", "last expression"),
        ("It must be $3$ or $4$", "3, 4", "last expression"),
        (r"\frac{1}{2}", r"\frac{1}{2}", "whole text"),
    ],
)
def test_the_last_statement_counts(completion, text, source):
    found = extract_answer(completion)
    assert found is not None
    assert (found.text, found.source) == (text, source)


@pytest.mark.parametrize(
    "completion", ["", "  \n", r"\boxed{", r"<think>\boxed{5}", r"<think>\boxed{5}</think>", r"\boxed{4} \boxed{5"]
)
def test_no_statement(completion):
    assert extract_answer(completion) is None


def test_only_what_follows_the_thoughts():
    assert after_thoughts("<think>a</think>b") == "b"
    assert after_thoughts("a</think>b") == "b"
    assert after_thoughts("<think>a</think>b<think>c") == "b"
    assert after_thoughts("b<think>c") == "b"
    assert closed_boxes(r"<think>\boxed{1}</think>\boxed{2} \boxed{3}") == ["3", "2"]


@pytest.mark.parametrize(
    "unit",
    ["\\boxed{", "{", "\n", "answer is ", "<answer>", "#### ", "$", "\\[", "1, ", "<think>", "or ", "\\boxed{1} "],
)
def test_a_megabyte_takes_milliseconds(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.perf_counter()
    extract_answer(text)
    extract_answer(text + " \\boxed{5}")
    # About 0.1 s alone; the bound leaves room for a busy machine and none for quadratic time.
    assert time.perf_counter() - start < 3.0
