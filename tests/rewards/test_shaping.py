"""Rewards for form and length, against numbers worked by hand."""

import math

import pytest

from rewards.registry import BUILT_IN, resolve_reward, takes_one_completion
from rewards.shaping import (
    boxed_reward,
    completion_text,
    make_cosine_length_reward,
    make_overlong_reward,
    make_repetition_reward,
    tag_count_reward,
)
from rewards.types import Problem

PROBLEM = Problem(id="1", prompt="?", answer="5")


def test_tags():
    assert tag_count_reward(PROBLEM, "<think>\na\n</think>\n<answer>\n5\n</answer>") == 1.0
    assert tag_count_reward(PROBLEM, "<think>\na\n</think>\n<answer>5</answer>") == 0.5
    assert tag_count_reward(PROBLEM, "<think>\na\n</think>\n\n</think>\n\n<answer>\n5\n</answer>") == 0.75
    assert tag_count_reward(PROBLEM, "5") == 0.0


def test_boxed():
    assert boxed_reward(PROBLEM, r"\boxed{5}") == 1.0
    assert boxed_reward(PROBLEM, r"\boxed{}") == 0.0
    assert boxed_reward(PROBLEM, r"\boxed{5") == 0.0
    assert boxed_reward(PROBLEM, r"<think>\boxed{5}</think> 5") == 0.0


def test_overlong():
    reward = make_overlong_reward(max_completion_length=100, soft_punish_cache=20)
    lengths = [0, 80, 90, 100, 101, 500]
    assert reward([None] * 6, [""] * 6, [[0] * n for n in lengths]) == [0.0, 0.0, -0.5, -1.0, -1.0, -1.0]
    with pytest.raises(ValueError, match="soft_punish_cache must be from 1 to"):
        make_overlong_reward(max_completion_length=10, soft_punish_cache=11)


def test_cosine_length():
    reward = make_cosine_length_reward(max_len=100)
    ids = [[0] * n for n in (0, 50, 100, 200)]
    right = reward([None] * 4, ["5"] * 4, ids, answer=["5"] * 4)
    wrong = reward([None] * 4, [[{"role": "assistant", "content": "6"}]] * 4, ids, solution=["5"] * 4)
    assert right == pytest.approx([1.0, 0.75, 0.5, 0.5])
    assert wrong == pytest.approx([-1.0, -0.75, -0.5, -0.5])
    assert reward([None], ["5"], [[0]], answer=[None]) == [None]
    quarter = reward([None], ["5"], [[0] * 25], answer=["5"])[0]
    assert quarter == pytest.approx(0.5 + 0.25 * (1 + math.cos(math.pi / 4)))
    with pytest.raises(ValueError, match="needs a column 'answer'"):
        reward([None], ["5"], [[0]])


def test_repetition():
    reward = make_repetition_reward(ngram_size=2, max_penalty=-1.0)
    assert reward(PROBLEM, "a b c d") == 0.0
    assert reward(PROBLEM, "a b a b a") == pytest.approx(-0.5)
    assert reward(PROBLEM, "A a a a a") == pytest.approx(-0.75)
    assert reward(PROBLEM, "a") == 0.0
    with pytest.raises(ValueError, match="max_penalty"):
        make_repetition_reward(max_penalty=1.0)


def test_the_registry_knows_them():
    for name in ("math", "accuracy", "tag_count", "boxed", "repetition"):
        assert takes_one_completion(resolve_reward(name))
    for name in ("overlong", "cosine_length"):
        assert not takes_one_completion(resolve_reward(name))
    assert BUILT_IN["math"] == BUILT_IN["accuracy"]
    assert completion_text([{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]) == "ab"
