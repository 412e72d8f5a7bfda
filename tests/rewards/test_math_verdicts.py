"""verify_math itself: statuses, details, policies, the batch, and looking into verdicts."""

import json

import pytest

from rewards import MathPolicy, Problem, verify_math, verify_math_many
from rewards.check import check_file, explain_verdict
from rewards.math_algebraic import is_proven_zero
from rewards.math_answer import read_answer
from rewards.math_normal import are_same, normal_form
from rewards.math_numeric import compare_numerically, new_context
from rewards.math_reward import math_reward


def test_a_verdict_says_what_was_compared_and_which_stage_decided():
    result = verify_math(r"Thus \boxed{(x+1)^2}", "x^2+2x+1")
    assert (result.reward, result.status, result.breakdown) == (1.0, "ok", {"math": 1.0})
    assert result.detail == r"correct (normal form): box '(x+1)^2' = (x + 1)^2 | gold 'x^2+2x+1' = (x^2 + 2*x + 1)"
    assert result.elapsed_s > 0
    assert verify_math("5", "6").detail.startswith("wrong (exact): whole text '5'")


@pytest.mark.parametrize(
    ("completion", "gold", "status"),
    [
        ("", "5", "unparsed"),
        (r"\boxed{5 6}", "5", "unparsed"),
        ("5", "", "error"),
        ("6", "5", "ok"),
        ("red", "5", "ok"),
    ],
)
def test_statuses(completion, gold, status):
    result = verify_math(completion, gold)
    assert (result.reward, result.status) == (0.0, status)


def test_policies():
    strict = MathPolicy(percent_may_drop_sign=False, unit_may_be_missing=False)
    assert verify_math("45", "45%").reward == 1.0
    assert verify_math("45", "45%", policy=strict).reward == 0.0
    assert verify_math("0.45", "45%", policy=strict).reward == 1.0
    assert verify_math("5", "5 cm").reward == 1.0
    assert verify_math("5", "5 cm", policy=strict).reward == 0.0
    assert verify_math("5 cm", "5", policy=strict).reward == 1.0
    with pytest.raises(ValueError, match="deadline_s must be positive"):
        MathPolicy(deadline_s=0)
    with pytest.raises(ValueError, match="memory_mb must be at least"):
        MathPolicy(memory_mb=10)


def test_a_batch_is_its_pairs_in_order():
    results = verify_math_many(["1", "2", "3"], ["1", "3", "3"])
    assert [r.reward for r in results] == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="2 completions and 1 golds"):
        verify_math_many(["1", "2"], ["1"])


def test_the_registry_reward():
    problem = Problem(id="7", prompt="?", answer="5")
    assert math_reward(problem, r"\boxed{5}").reward == 1.0
    assert math_reward(Problem(id="7", prompt="?"), "5").reward is None


def form(text):
    return normal_form(read_answer(text).node)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\frac{1}{1+\sqrt2}", r"\sqrt2-1"), (r"\tan^2 x+1", r"\sec^2 x"), ("4^n", "2^{2n}"), (r"\binom{n}{2}",
        r"\frac{n(n-1)}{2}"),
        (r"e^{i\pi}", "-1"), (r"\ln 12", r"2\ln 2+\ln 3"), (r"\frac{2024!}{2023!}", "2024"), (r"\cos(\pi - x)",
        r"-\cos x"),
        (r"\frac{\sqrt{x+1}}{x+1}", "(x+1)^{-1/2}"), (r"\sum_{k=1}^n k^2", r"\sum_{i=1}^n i^2"), (r"\sqrt[3]{-8}",
        "-2"),
    ],
)  # fmt: skip
def test_equal_normal_forms(left, right):
    one, two = form(left), form(right)
    assert one is not None
    assert two is not None
    assert are_same(one, two)


def test_what_has_no_normal_form():
    for text in ("1/0", "10^{10^{10}}", "(x+y)^{5000}", "(-1)!", "[1,2)", r"\infty"):
        assert form(text) is None


def test_zero_is_proven_by_a_separation_bound():
    def zero(text):
        return is_proven_zero(read_answer(text).node, new_context)

    assert zero(r"\sqrt{5-2\sqrt6} - \sqrt3 + \sqrt2") is True
    assert zero(r"\cos\frac{2\pi}{7}+\cos\frac{4\pi}{7}+\cos\frac{6\pi}{7}+\frac12") is True
    assert zero(r"\sqrt{2}+\sqrt{3}-\sqrt{5+2\sqrt{6}}+10^{-90}") is False
    assert zero(r"\sqrt2 - x") is None
    assert zero(r"\pi - 3") is None


def test_numbers_only_reject():
    def compare(left, right, **kwargs):
        return compare_numerically(read_answer(left).node, read_answer(right).node, **kwargs)

    assert compare("x^2", "x^3") == "differ"
    assert compare(r"\sin 2x", r"2\sin x\cos x") == "agree"
    assert compare(r"\sqrt{x^2}", "x") == "agree"
    assert compare(r"\sqrt{x^2}", "x", negative_points=True) == "differ"
    assert compare(r"\ln(xy)", r"\ln x+\ln y", negative_points=True) != "differ"
    assert compare("10^{10^{10}}", "5") == "unknown"
    # Twelve digits after the point agree: a near miss of one part in 10^30.
    assert compare(r"e^{\pi\sqrt{163}}", "262537412640768744") == "differ"


def test_a_verdict_is_explained_stage_by_stage():
    stages = explain_verdict(r"so \boxed{2x}", "x+x")
    assert [name for name, _ in stages] == [
        "gold", "extract", "parse", "normal form of the answer", "normal form of the gold", "decide", "verdict",
    ]  # fmt: skip
    assert stages[-1][1] == "reward 1.0, status ok"
    assert explain_verdict("", "5")[1] == ("extract", "the completion states no answer")


def test_a_file_is_graded(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [
        {"completion": "5", "gold": "5", "expected": 1},
        {"response": "6", "answer": "5", "expected": True},
        {"answer": "", "gold": "5"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    report = check_file(path)
    assert [row.result.reward for row in report.rows] == [1.0, 0.0, 0.0]
    assert report.statuses == {"ok": 2, "unparsed": 1}
    assert report.mean_reward == pytest.approx(1 / 3)
    assert [row.line for row in report.disagreements] == [2]
    path.write_text('{"gold": "5"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 has no completion"):
        check_file(path)
    with pytest.raises(ValueError, match="grades batches"):
        check_file(path, reward="overlong")
