import datetime
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy
import pytest

from rewards import Grader, Problem, RewardResult
from rewards.grader import GraderError, RewardError
from rewards.registry import RewardNotFoundError, RewardSignatureError

PLUGINS = str(Path(__file__).with_name("plugins.py"))
TEXT = Problem(id="1", prompt="?", answer="good", source="data.jsonl:3", columns={"nums": [1, 2], "target": 3})
MODES = pytest.mark.parametrize("num_workers", [0, 2])


def name(function: str) -> str:
    return f"{PLUGINS}:{function}"


def is_alive(pid: int) -> bool:
    """False for a zombie too, which is dead and only waits to be noticed."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], within_s: float = 20.0) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# Ordinary grading


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


# Rewards that fail: only the completion in hand loses its score


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


# Workers


def test_what_a_reward_prints_disturbs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with Grader([name("prints")], num_workers=2) as grader:
        assert [result.reward for result in grader.grade([TEXT] * 4, ["a"] * 4)] == [1.0] * 4
        assert (grader.errors, grader.restarts) == (0, 0)
    assert capfd.readouterr() == ("", "")


def test_child_that_comes_back_is_no_second_worker() -> None:
    with Grader([name("forks")]) as grader:
        assert [result.reward for result in grader.grade([TEXT] * 3, ["good", "bad", "good"])] == [1.0] * 3
        assert [result.reward for result in grader.grade([TEXT] * 3, ["good", "bad", "good"])] == [1.0] * 3


def test_late_worker_takes_its_children_along(tmp_path: Path) -> None:
    with Grader([name("leaves_children")], timeout_s=2.0) as grader:
        (result,) = grader.grade([TEXT], [str(tmp_path / "pids")])
        assert result.status == "timeout"
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert wait_until(lambda: not any(map(is_alive, pids)))


def test_closing_ends_the_workers() -> None:
    with Grader([name("pid")], num_workers=2) as grader:
        pids = {int(result.reward or 0) for result in grader.grade([TEXT] * 64, ["a"] * 64)}
        assert pids
        assert all(map(is_alive, pids))
        assert os.getpid() not in pids
    assert not any(map(is_alive, pids))
    grader.close()
    with pytest.raises(GraderError, match="closed"):
        grader.grade([TEXT], ["a"])


def test_worker_that_died_between_batches_costs_nothing() -> None:
    with Grader([name("pid")]) as grader:
        (first,) = grader.grade([TEXT], ["a"])
        os.kill(int(first.reward or 0), signal.SIGKILL)
        assert wait_until(lambda: not is_alive(int(first.reward or 0)))
        (second,) = grader.grade([TEXT], ["a"])
        assert (second.status, grader.errors, grader.restarts) == ("ok", 0, 1)
        assert second.reward != first.reward
        os.kill(int(second.reward or 0), signal.SIGKILL)
        assert wait_until(lambda: not is_alive(int(second.reward or 0)))
        grader.load(["countdown"])
        assert grader.restarts == 2


def test_workers_are_in_a_session_of_their_own() -> None:
    """Ctrl-C in the terminal is for the parent, which saves its work first."""
    with Grader([name("pid")]) as grader:
        pid = int(grader.grade([TEXT], ["a"])[0].reward or 0)
        assert os.getsid(pid) == pid != os.getsid(0)


@pytest.mark.parametrize("function", ["length", "hang_in_c"])
def test_workers_end_when_the_parent_is_killed(function: str, tmp_path: Path) -> None:
    """Idle, and in the middle of a call that holds the interpreter's lock."""
    script = f"""
import sys, threading
from rewards import Grader, Problem
if __name__ == "__main__":
    grader = Grader([{name(function)!r}, {name("pid")!r}], num_workers=1, timeout_s=600)
    (result,) = grader.grade([Problem(id="1", prompt="?")], ["good"])
    print(int(result.breakdown["pid"]), flush=True)
    grader.grade([Problem(id="1", prompt="?")], ["bad"])
    sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()
    )
    assert parent.stdout is not None
    assert parent.stdin is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.3)
    assert is_alive(worker)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    parent.stdin.close()
    assert wait_until(lambda: not is_alive(worker))


def test_interrupted_batch_leaves_nothing_to_the_next() -> None:
    timer = threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT))
    with Grader([name("hang"), name("length")], timeout_s=60) as grader:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            grader.grade([TEXT] * 3, ["good", "bad", "good"])
        assert [result.reward for result in grader.grade([TEXT] * 2, ["abcde", ""])] == [6.0, 1.0]


def test_worker_imports_no_more_than_the_reward() -> None:
    with Grader([name("has_torch_or_sympy"), "countdown", "format"]) as grader:
        assert grader.grade([TEXT], ["a"])[0].breakdown["has_torch_or_sympy"] == 0.0


def test_imports_do_not_count_against_the_memory_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.py"
    path.write_text("import mmap\nKEPT = mmap.mmap(-1, 1 << 30)\ndef f(problem, completion):\n    return 1.0\n")
    with Grader([f"{path}:f", name("eats_memory")], memory_mb=128, timeout_s=60) as grader:
        assert [result.reward for result in grader.grade([TEXT] * 2, ["good", "bad"])] == [2.0, 1.0]


def test_threads_of_a_reward_fit_into_the_memory_limit() -> None:
    with Grader([name("asks_32_threads")], memory_mb=512) as grader:
        assert grader.grade([TEXT], ["a"])[0].reward == 64.0


def test_workers_see_the_modules_that_the_parent_sees(tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text("def one(problem, completion):\n    return 1.0\n")
    (tmp_path / "random.py").write_text("raise ImportError('a file of the folder shadows the standard library')")
    script = f"""
import sys
from rewards import Grader, Problem
sys.path.append({str(tmp_path)!r})
with Grader(["my_rewards:one"]) as grader:
    print(grader.grade([Problem(id="1", prompt="?")], ["a"])[0].reward)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert (done.stdout, done.stderr) == ("1.0\n", "")


# Bad input


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


def test_grading_costs_little() -> None:
    """256 completions under two cheap rewards; the bar of 50 ms is for an idle machine, this one catches a slip."""
    problems = [Problem(id=str(n), prompt="?", columns={"nums": [n, 2], "target": n + 2}) for n in range(16)]
    rows = [(problem, f"<think>{'hm ' * 300}</think> <answer>2+{problem.id}</answer>") for problem in problems] * 16
    rows.sort(key=lambda row: int(row[0].id))
    with Grader(["countdown", "format"], num_workers=2) as grader:
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            results = grader.grade([row[0] for row in rows], [row[1] for row in rows])
            seconds.append(time.perf_counter() - started)
    assert all(result.reward == 2.0 for result in results)
    assert min(seconds) < 0.5, json.dumps(seconds)
