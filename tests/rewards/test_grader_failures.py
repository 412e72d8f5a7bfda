"""Rewards that fail cost only the completion in hand its score; rewards that cannot be used are refused."""

import logging
import math
import time
from pathlib import Path

import pytest

from rewards import Grader, Problem
from rewards.grader import GraderError, RewardError
from rewards.registry import RewardNotFoundError, RewardSignatureError

PLUGINS = str(Path(__file__).with_name("plugins.py"))
TEXT = Problem(id="1", prompt="?", answer="good", source="data.jsonl:3", columns={"nums": [1, 2], "target": 3})
MODES = pytest.mark.parametrize("num_workers", [0, 2])


def name(function: str) -> str:
    return f"{PLUGINS}:{function}"


@pytest.mark.parametrize(
    ("function", "status", "detail", "restarts"),
    [
        ("hang", "timeout", "no answer within 2 s (timeout_s)", 1),
        ("hang_in_c", "timeout", "no answer within 2 s (timeout_s)", 1),
        ("batch_hang", "timeout", "no answer within 2 s (timeout_s)", 2),
        ("exits", "error", "the worker exited with status 7; it printed last: about to leave", 1),
        ("batch_exits", "error", "the worker exited with status 7", 2),
        ("segfault", "error", "the worker was ended by SIGSEGV", 1),
        ("eats_memory", "error", "MemoryError: out of memory", 1),
        ("exits_politely", "error", "SystemExit: 3", 0),
        ("raises", "error", f"ValueError: no good: bad ({PLUGINS}:", 0),
        ("raises_unprintable", "error", "Unprintable: <exception str() failed> (", 0),
        ("batch_raises", "error", f"KeyError: 'bad' ({PLUGINS}:", 0),
        ("returns_nan", "error", "returned nan, not a finite number", 0),
        ("batch_nan", "error", "returned nan, not a finite number", 0),
        ("returns_text", "error", "returned an object of type 'str', not a number", 0),
        ("returns_list", "error", "returned an object of type 'list', not a number", 0),
    ],
)
def test_only_the_culprit_loses(function: str, status: str, detail: str, restarts: int) -> None:
    completions = ["good", "good", "bad", "good", "good", "good"]
    problems = [TEXT] * 4 + [Problem(id="2", prompt="?")] * 2
    timeout_s = 2.0 if status == "timeout" else 60.0
    with Grader([name(function), name("length")], weights=[1, 0.5], timeout_s=timeout_s, memory_mb=256) as grader:
        results = grader.grade(problems, completions)
        assert [result.breakdown[function] for result in results] == [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
        assert [result.breakdown["length"] for result in results] == [4.0, 4.0, 3.0, 4.0, 4.0, 4.0]
        assert [result.status for result in results] == ["ok", "ok", status, "ok", "ok", "ok"]
        assert results[2].reward == 1.5
        assert results[2].detail.startswith(f"{function}: ")
        assert detail in results[2].detail
        assert "\n" not in results[2].detail
        assert (grader.timeouts, grader.errors) == ((1, 0) if status == "timeout" else (0, 1))
        assert grader.restarts == restarts
        again = grader.grade(problems[:2], completions[:2])
        assert [result.reward for result in again] == [3.0, 3.0]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_many_culprits(num_workers: int) -> None:
    completions = ["bad" if i % 4 == 1 else "good" for i in range(20)]
    with Grader([name("batch_exits"), name("exits")], num_workers=num_workers) as grader:
        results = grader.grade([TEXT] * 20, completions)
        assert grader.errors == 10
    assert [result.reward for result in results] == [0.0 if i % 4 == 1 else 2.0 for i in range(20)]
    assert [result.status for result in results] == ["error" if i % 4 == 1 else "ok" for i in range(20)]


def test_hanging_completions_wait_side_by_side() -> None:
    with Grader([name("sleep_always")], num_workers=4, timeout_s=2.0) as grader:
        started = time.monotonic()
        results = grader.grade([TEXT] * 4, ["a"] * 4)
        assert time.monotonic() - started < 7.0  # one after the other would take 8
    assert [(result.status, result.reward) for result in results] == [("timeout", 0.0)] * 4
    assert all(result.elapsed_s == 2.0 for result in results)


@pytest.mark.parametrize(
    ("function", "detail"),
    [
        ("batch_short", "returned 1 values for 3 completions"),
        ("batch_scalar", "returned a number, not a list of 3 numbers"),
        ("batch_none", "returned an object of type 'NoneType', not a list of 3 numbers"),
        (
            "batch_needs_gold",
            "asks for 'gold', which problem data.jsonl:3 does not have (its columns: nums, target, answer)",
        ),
        ("returns_nan_always", "returned nan"),
        ("raises_always", "KeyError: 'gold'"),
    ],
)
@MODES
def test_function_that_only_fails_is_an_error(function: str, detail: str, num_workers: int) -> None:
    with (
        Grader([name("length"), name(function)], num_workers=num_workers) as grader,
        pytest.raises(RewardError) as caught,
    ):
        grader.grade([TEXT] * 3, ["a", "b", "c"])
    message = str(caught.value)
    assert message.startswith(f"reward {name(function)!r} failed on each of the 3 completions of its first batch: ")
    assert detail in message
    assert "correct the function" in message
    assert "\n" not in message


def test_function_that_only_fails_is_a_status_where_that_is_wanted(caplog: pytest.LogCaptureFixture) -> None:
    with Grader([name("batch_short")], strict=False) as grader, caplog.at_level(logging.WARNING):
        results = grader.grade([TEXT] * 3, ["a", "b", "c"])
        assert grader.errors == 3
    assert [(result.status, result.reward) for result in results] == [("error", 0.0)] * 3
    assert "batch_short" in caplog.text


def test_a_list_function_is_not_known_before_it_saw_a_group_of_several() -> None:
    with Grader([name("batch_short")], num_workers=0) as grader:
        assert [result.status for result in grader.grade([TEXT], ["a"])] == ["ok"]
        with pytest.raises(RewardError, match="returned 1 values for 3 completions"):
            grader.grade([TEXT] * 3, ["a", "b", "c"])


def test_function_that_worked_before_may_fail_everywhere_later() -> None:
    with Grader([name("raises")]) as grader:
        grader.grade([TEXT], ["good"])
        assert grader.grade([TEXT], ["bad"])[0].status == "error"


def test_worker_that_only_dies_is_a_status_and_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with Grader([name("exits_always")]) as grader, caplog.at_level(logging.WARNING):
        results = grader.grade([TEXT] * 3, ["a", "b", "c"])
        assert (grader.errors, grader.restarts) == (3, 3)
    assert [(result.status, result.reward) for result in results] == [("error", 0.0)] * 3
    assert "exits_always" in caplog.text


def test_sum_that_overflows_is_an_error() -> None:
    with Grader([name("length")], weights=[1.7e308], num_workers=0) as grader:
        assert [result.status for result in grader.grade([TEXT] * 2, ["a", "ab"])] == ["ok", "error"]


@pytest.mark.parametrize(
    ("rewards", "error", "message"),
    [
        (["countdwn"], RewardNotFoundError, "did you mean 'countdown'"),
        ([name("misnamed")], RewardSignatureError, "this one takes (prompt, text)"),
        ([name("Judge")], RewardSignatureError, "is a class"),
        ([name("extra_argument")], RewardSignatureError, "asks for 'tokenizer' too"),
        ([name("compute_score")], RewardSignatureError, "name it 'verl:module:function'"),
        ([name("nothing")], RewardNotFoundError, "has no function 'nothing'"),
        ([], ValueError, "one name or more"),
        ("countdown", ValueError, "is a list"),
        (["format", "format"], ValueError, "listed twice"),
    ],
)
@MODES
def test_rewards_that_cannot_be_had(rewards: list[str], error: type[Exception], message: str, num_workers: int) -> None:
    with pytest.raises(error) as caught:
        Grader(rewards, num_workers=num_workers)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_dependency", "ModuleNotFoundError: No module named 'no_such_dependency' ("),
        ("x = {}['key']", "KeyError: 'key' ("),
        ("def f(:", "SyntaxError: invalid syntax ("),
        ("raise SystemExit('config missing')", "SystemExit: config missing ("),
    ],
)
@MODES
def test_file_that_cannot_be_imported(source: str, message: str, num_workers: int, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("\n" + source)
    with pytest.raises(GraderError) as caught:
        Grader([f"{path}:f"], num_workers=num_workers)
    assert f"reward '{path}:f' cannot be imported: {message}" in str(caught.value)
    assert str(caught.value).endswith(f" ({path}:2)")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message", "startup_timeout_s"),
    [
        ("import os\nprint('bye')\nos._exit(9)", "exited with status 9; it printed last: bye", 120.0),
        ("while True:\n    pass", "took more than 1 s to import", 1.0),
        ("from rewards import Grader\nGrader(['countdown'])", 'if __name__ == "__main__"', 120.0),
    ],
)
def test_file_that_breaks_its_worker(source: str, message: str, startup_timeout_s: float, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(GraderError) as caught:
        Grader([f"{path}:f"], num_workers=2, startup_timeout_s=startup_timeout_s)
    assert message in str(caught.value)


def test_worker_that_cannot_be_replaced_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "fading.py"
    path.write_text("import os\ndef f(problem, completion):\n    os._exit(1)\n")
    with Grader([f"{path}:f"]) as grader:
        path.unlink()
        with pytest.raises(GraderError, match="could not be replaced: .*no file"):
            grader.grade([TEXT] * 3, ["a", "b", "c"])


@pytest.mark.parametrize(
    "arguments",
    [
        {"weights": [1.0]},
        {"weights": [1.0, math.nan]},
        {"num_workers": -1},
        {"timeout_s": 0},
        {"timeout_s": math.nan},
        {"memory_mb": 0},
        {"startup_timeout_s": -1.0},
    ],
)
def test_arguments_out_of_range(arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Grader(["countdown", "format"], **arguments)  # type: ignore[arg-type]


def test_lists_of_unequal_length() -> None:
    with Grader(["countdown"], num_workers=0) as grader:
        with pytest.raises(ValueError, match="2 problems, 1 completions"):
            grader.grade([TEXT] * 2, ["a"])
        with pytest.raises(ValueError, match="1 completion_ids"):
            grader.grade([TEXT] * 2, ["a"] * 2, [[1]])
        with pytest.raises(TypeError, match="a completion is text, got list"):
            grader.grade([TEXT], [["a"]])  # type: ignore[list-item]
