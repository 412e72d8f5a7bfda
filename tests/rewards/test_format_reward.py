import time

import pytest

from rewards import Problem
from rewards.format_reward import format_open_reward, format_reward

PROBLEM = Problem(id="1", prompt="?")
GOOD = "<think>one\ntwo</think> <answer>3</answer>"


@pytest.mark.parametrize(
    "completion",
    [
        GOOD,
        "<think>a</think><answer>3</answer>",
        "\n <think>a</think>\n\n<answer>\n3\n</answer>\n",
        "<think></think> <answer>3</answer>",
        "<think>a < b <b> </b></think> <answer>1 < 2</answer>",
    ],
)
def test_well_formed(completion: str) -> None:
    result = format_reward(PROBLEM, completion)
    assert (result.reward, result.status) == (1.0, "ok")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("", "<think> occurs 0 times"),
        ("3", "<think> occurs 0 times"),
        ("<answer>3</answer>", "<think> occurs 0 times"),
        ("a</think> <answer>3</answer>", "<think> occurs 0 times"),
        ("<think>a <answer>3</answer>", "</think> occurs 0 times"),
        ("<think>a</think> <answer>3", "</answer> occurs 0 times"),
        (GOOD + GOOD, "<think> occurs 2 times"),
        ("<think>a</think> <answer>3</answer> <answer>4</answer>", "<answer> occurs 2 times"),
        ("<think>a <think> b</think> <answer>3</answer>", "<think> occurs 2 times"),
        ("<answer>3</answer> <think>a</think>", "out of order"),
        ("<think>a <answer>3</answer></think>", "out of order"),
        ("</think><think> <answer>3</answer>", "out of order"),
        ("<think>a</think> </answer>3<answer>", "out of order"),
        ("Sure: " + GOOD, "before <think>"),
        ("<think>a</think> so <answer>3</answer>", "between"),
        (GOOD + " done", "after </answer>"),
        (GOOD + "<|im_end|>", "after </answer>"),
        ("<think>a</think> <answer> \n</answer>", "empty"),
        ("<Think>a</Think> <Answer>3</Answer>", "<think> occurs 0 times"),
        ("<think >a</think> <answer>3</answer>", "<think> occurs 0 times"),
    ],
)
def test_malformed(completion: str, reason: str) -> None:
    result = format_reward(PROBLEM, completion)
    assert result.reward == 0.0
    assert reason in result.detail


def test_open_form_is_the_form_without_its_first_tag() -> None:
    assert format_open_reward(PROBLEM, GOOD.removeprefix("<think>")).reward == 1.0
    assert format_open_reward(PROBLEM, GOOD).reward == 0.0
    assert format_open_reward(PROBLEM, "<answer>3</answer>").reward == 0.0


@pytest.mark.parametrize(
    "completion",
    [
        "<think>" * 300_000,
        "<think>" + "</think> " * 300_000,
        "<think>" + "<answer></answer>" * 200_000,
        "<think>a</think>" + " " * 2_000_000 + "x<answer>3</answer>",
        "<" * 2_000_000,
    ],
)
def test_time_is_linear(completion: str) -> None:
    started = time.process_time()
    assert format_reward(PROBLEM, completion).reward == 0.0
    assert time.process_time() - started < 2.0
