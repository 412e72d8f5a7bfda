import datetime
import math
import random
import threading
from decimal import Decimal
from pathlib import Path

import numpy
import pytest

from rewards import Grader, Problem, RewardResult
from rewards.grader import GraderError
from rewards.registry import RewardNotFoundError

PLUGINS = str(Path(__file__).with_name("plugins.py"))
TEXT = Problem(id="1", prompt="?", answer="good", source="data.jsonl:3", columns={"nums": [1, 2], "target": 3})
MODES = pytest.mark.parametrize("num_workers", [0, 2])


def name(function: str) -> str:
    return f"{PLUGINS}:{function}"


@MODES
def test_built_in_rewards_in_order(num_workers: int) -> None:
    problems = [Problem(id=str(n), prompt="?", columns={"nums": [n, 2, 3], "target": n + 5}) for n in range(40)]
    right = [n % 3 == 0 for n in range(40)]
    completions = [f"<think>a</think> <answer>2+{n}+{3 if right[n] else '(3)+1'}</answer>" for n in range(40)]
    completions[7] = "no idea"
    with Grader(["countdown", "format"], weights=[1.0, 0.5], num_workers=num_workers) as grader:
        results = grader.grade(problems, completions)
        assert (grader.timeouts, grader.errors, grader.restarts) == (0, 0, 0)
    assert [result.breakdown["countdown"] for result in results] == [float(is_right) for is_right in right]
    assert [result.breakdown["format"] for result in results] == [float(n != 7) for n in range(40)]
    assert [result.reward for result in results] == [right[n] + 0.5 * (n != 7) for n in range(40)]
    assert [result.status for result in results] == ["ok" if n != 7 else "unparsed" for n in range(40)]
    assert results[7].detail == (
        "countdown: no <answer>...</answer> after the reasoning; format: <think> occurs 0 times"
    )
    assert all(result.elapsed_s > 0 for result in results)


@MODES
def test_kinds_of_functions(num_workers: int) -> None:
    expected: dict[str, list[float | None]] = {
        "length": [4.0, 3.0, 0.0],
        "length_reversed": [4.0, 3.0, 0.0],
        "length_async": [4.0, 3.0, 0.0],
        "true_if_good": [1.0, 0.0, 0.0],
        "answer_length": [4.0, 4.0, 4.0],
        "batch_length": [4.0, 3.0, 0.0],
        "batch_length_async": [4.0, 3.0, 0.0],
        "batch_size": [3.0, 3.0, 3.0],
        "batch_array": [4.0, 3.0, 0.0],
        "batch_generator": [4.0, 3.0, 0.0],
        "skips_bad": [1.0, None, 1.0],
        "skips_all": [None, None, None],
    }
    with Grader([name(function) for function in expected], num_workers=num_workers) as grader:
        results = grader.grade([TEXT] * 3, ["good", "bad", ""])
    for i, result in enumerate(results):
        scores = {function: row[i] for function, row in expected.items() if row[i] is not None}
        assert result.breakdown == scores
        assert result.reward == sum(score for score in scores.values() if score is not None)
        assert (result.status, result.detail) == ("ok", "")


@MODES
def test_reward_is_none_where_no_function_applies(num_workers: int) -> None:
    with Grader([name("skips_bad"), name("skips_all")], num_workers=num_workers) as grader:
        results = grader.grade([TEXT] * 2, ["good", "bad"])
    assert [(result.reward, result.breakdown) for result in results] == [(1.0, {"skips_bad": 1.0}), (None, {})]


@MODES
def test_results_do_not_depend_on_the_workers(num_workers: int) -> None:
    generator = random.Random(1)
    problems = [TEXT if generator.random() < 0.5 else Problem(id="2", prompt="!", answer="x") for _ in range(97)]
    completions = ["".join(generator.choices("ab", k=generator.randint(0, 9))) for _ in problems]
    with Grader([name("length"), name("answer_length")], weights=[1, -2], num_workers=num_workers) as grader:
        rewards = [result.reward for result in grader.grade(problems, completions)]
    assert rewards == [len(c) - 2 * len(p.answer or "") for p, c in zip(problems, completions, strict=True)]


def test_none_leaves_the_sum() -> None:
    with Grader([name("skips_bad"), name("length")], weights=[10, 1]) as grader:
        good, bad = grader.grade([TEXT] * 2, ["good", "bad"])
    assert (good.reward, good.breakdown) == (14.0, {"skips_bad": 1.0, "length": 4.0})
    assert (bad.reward, bad.breakdown) == (3.0, {"length": 3.0})


def test_status_and_detail_of_a_result_are_kept() -> None:
    with Grader([name("result")]) as grader:
        (result,) = grader.grade([TEXT], ["a"])
    assert (result.reward, result.status, result.detail) == (0.25, "unparsed", "looked odd")


@MODES
def test_odd_results_are_made_plain(num_workers: int) -> None:
    with Grader([name("odd_results")], num_workers=num_workers) as grader:
        results = grader.grade([TEXT] * 5, ["status", "numpy", "bool", "detail", "none"])
        assert grader.restarts == 0
    assert [(result.reward, result.status, result.detail) for result in results] == [
        (0.0, "error", "returned a RewardResult of status 'fine', not one of ok, unparsed, timeout, error"),
        (0.5, "ok", "two lines"),
        (1.0, "ok", ""),
        (1.0, "ok", "7"),
        (None, "ok", ""),
    ]
    assert all(type(result.reward) in (float, type(None)) for result in results)


@MODES
def test_batch_functions_are_called_as_trl_does(num_workers: int) -> None:
    """Per group, with lists of one length: prompts, completions, token ids, and the columns of the row."""
    other = Problem(id="2", prompt="?", answer="x", columns={"nums": [5], "prompt": "not this"})
    problems = [TEXT, TEXT, TEXT, other, TEXT]
    with Grader([name("call_of_batch")], num_workers=num_workers) as grader:
        results = grader.grade(problems, ["a"] * 5, [[1], [2, 3], [], [4], [5]])
    assert [result.reward for result in results] == [301.0, 305.0, 300.0, 104.0, 105.0]


def test_equal_problems_are_one_group_even_if_they_are_not_one_object() -> None:
    twin = Problem(id="1", prompt="?", answer="good", source="data.jsonl:3", columns={"nums": [1, 2], "target": 3})
    with Grader([name("batch_size")]) as grader:
        assert [result.reward for result in grader.grade([TEXT, twin], ["a", "b"])] == [2.0, 2.0]


def test_batch_functions_get_messages_where_the_prompt_is_messages() -> None:
    problem = Problem(id="1", prompt=({"role": "user", "content": "?"},))
    with Grader([name("batch_of_messages")]) as grader:
        assert [result.reward for result in grader.grade([problem] * 2, ["abc", ""])] == [3.0, 0.0]


@MODES
def test_own_reward_replaces_the_first(num_workers: int) -> None:
    own = Problem(id="2", prompt="?", reward=name("length"), columns=TEXT.columns)
    with Grader(["countdown", "format"], weights=[2, 1], num_workers=num_workers) as grader:
        plain, replaced = grader.grade([TEXT, own], ["<answer>1+2</answer>", "abc"])
    assert (plain.reward, plain.breakdown) == (2.0, {"countdown": 1.0, "format": 0.0})
    assert (replaced.reward, replaced.breakdown) == (6.0, {"length": 3.0, "format": 0.0})


def test_own_reward_that_is_not_there_names_the_problem_and_breaks_nothing() -> None:
    own = Problem(id="2", prompt="?", reward="countdwn", source="data.jsonl:9")
    with Grader(["countdown"]) as grader:
        with pytest.raises(RewardNotFoundError, match=r"^data\.jsonl:9: no reward is called 'countdwn'; did you mean"):
            grader.grade([TEXT, own], ["a", "b"])
        assert grader.grade([TEXT], ["<answer>1+2</answer>"])[0].reward == 1.0
        assert grader.restarts == 0


def test_own_reward_that_ends_the_process_breaks_nothing(tmp_path: Path) -> None:
    (tmp_path / "leaves.py").write_text("import os\nos._exit(5)\n")
    own = Problem(id="2", prompt="?", reward=f"{tmp_path / 'leaves.py'}:f", source="data.jsonl:9")
    with Grader(["countdown"]) as grader:
        with pytest.raises(GraderError, match=r"data\.jsonl:9: .*exited with status 5"):
            grader.grade([TEXT, own], ["a", "b"])
        assert grader.grade([TEXT], ["<answer>1+2</answer>"])[0].reward == 1.0


def test_rewards_of_one_short_name_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text("def length(problem, completion):\n    return -1.0\n")
    with Grader([name("length"), f"{path}:length"]) as grader:
        (result,) = grader.grade([TEXT], ["abc"])
    assert result.breakdown == {name("length"): 3.0, f"{path}:length": -1.0}


def test_names_in_the_breakdown_stay_when_more_rewards_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "other.py"
    path.write_text("def length(problem, completion):\n    return -1.0\n")
    own = Problem(id="2", prompt="?", reward=f"{path}:length")
    with Grader([name("length")]) as grader:
        assert grader.grade([TEXT], ["abc"])[0].breakdown == {"length": 3.0}
        results = grader.grade([TEXT, own], ["abc", "abc"])
    assert [result.breakdown for result in results] == [{"length": 3.0}, {f"{path}:length": -1.0}]


def test_columns_of_the_datasets_library_arrive_as_plain_values(tmp_path: Path) -> None:
    columns = {
        "when": datetime.datetime(2025, 1, 2, 3),
        "price": Decimal("1.50"),
        "array": numpy.arange(3),
        "number": numpy.int64(7),
        "labels": {"b", "a"},
        "nothing": None,
        "not_a_number": math.nan,
    }
    path = tmp_path / "dump.py"
    path.write_text(
        "import json\nfrom rewards import RewardResult\n"
        "def dump(problem, completion):\n    return RewardResult(reward=1.0, detail=json.dumps(problem.columns))\n"
    )
    with Grader([f"{path}:dump"]) as grader:
        (result,) = grader.grade([Problem(id="1", prompt="?", columns=columns)], ["a"])
    assert result.detail == (
        '{"when": "2025-01-02T03:00:00", "price": "1.50", "array": [0, 1, 2], "number": 7, '
        '"labels": ["a", "b"], "nothing": null, "not_a_number": NaN}'
    )


@MODES
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": b"\x89PNG"}, "'image' cannot be sent to a grading worker: a value of type 'bytes'"),
        ({"fine": 1, "deep": {"x": [object()]}}, "'deep' cannot be sent to a grading worker: a value of type 'object'"),
        ({"digits": 10**5000}, "'digits' cannot be sent"),
        ({(1, 2): 3}, "column names are text"),
    ],
)
def test_columns_that_cannot_travel_are_named(columns: dict[str, object], message: str, num_workers: int) -> None:
    problem = Problem(id="1", prompt="?", source="data.jsonl:4", columns=columns)
    with Grader([name("length")], num_workers=num_workers) as grader:
        with pytest.raises(ValueError, match=r"^data\.jsonl:4: ") as caught:
            grader.grade([problem], ["a"])
        assert message in str(caught.value)
        assert grader.grade([TEXT], ["abc"])[0].reward == 3.0


@MODES
def test_any_text_survives_the_way(num_workers: int) -> None:
    completions = ["", "\x00", "\ud800 lone", "é漢\U0001f600", "\u2028\n\r", '"\\', "x" * 3_000_000]
    with Grader([name("length"), name("batch_length")], num_workers=num_workers) as grader:
        results = grader.grade([TEXT] * len(completions), completions)
    assert [result.reward for result in results] == [2 * len(completion) for completion in completions]


def test_nothing_to_grade() -> None:
    with Grader(["countdown"]) as grader:
        assert grader.grade([], []) == []


def test_calls_from_threads_take_turns() -> None:
    found: dict[int, list[RewardResult]] = {}
    with Grader([name("length")], num_workers=2) as grader:
        threads = [
            threading.Thread(target=lambda n=n: found.update({n: grader.grade([TEXT] * 20, ["x" * n] * 20)}))
            for n in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [[result.reward for result in found[n]] for n in range(8)] == [[float(n)] * 20 for n in range(8)]
