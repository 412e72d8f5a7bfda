"""A batch that comes in pieces: graded while it comes, as if it had come whole, and without a trace if given up."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rewards import Grader, Problem, RewardResult
from rewards.grader import GraderError
from rewards.grader_pool import GivenUpError
from rewards.grading import Grading
from tests.rewards.test_grader_workers import is_alive, wait_until

PLUGINS = str(Path(__file__).with_name("plugins.py"))
TEXT = Problem(id="1", prompt="?", answer="good", source="data.jsonl:3", columns={"nums": [1, 2], "target": 3})
MODES = pytest.mark.parametrize("num_workers", [0, 2])


def name(function: str) -> str:
    return f"{PLUGINS}:{function}"


def untimed(results: list[RewardResult]) -> list[RewardResult]:
    return [replace(result, elapsed_s=0.0) for result in results]


def no_thread_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name == "grading"]


@MODES
def test_what_comes_in_pieces_is_graded_as_what_comes_whole(num_workers: int) -> None:
    """Groups of four in any order; two neighbours ask the same problem, so list functions see one group of eight."""
    problems = [Problem(id=str(n), prompt="?", answer="x" * n, columns={"nums": [n]}) for n in (1, 2, 2, 3, 4, 5)]
    flat = [problem for problem in problems for _ in range(4)]
    draw = random.Random(5)
    texts = ["".join(draw.choices("ab", k=draw.randint(0, 9))) for _ in flat]
    token_ids = [[draw.randrange(9)] for _ in flat]
    rewards = [name(function) for function in ("length", "batch_size", "call_of_batch", "answer_length")]
    places = [3, 1, 5, 0, 4, 2]
    with Grader(rewards, weights=[1, 100, 3, -2], num_workers=num_workers) as grader:
        whole = grader.grade(flat, texts, token_ids)
        with grader.start(flat) as grading:
            for place in places:
                part = slice(4 * place, 4 * place + 4)
                grading.add(part.start, texts[part], token_ids[part])
            pieces = grading.finish()
        assert grading.busy_s > 0
    assert untimed(pieces) == untimed(whole)
    assert [result.breakdown["batch_size"] for result in whole] == [4.0] * 4 + [8.0] * 8 + [4.0] * 12
    assert no_thread_is_left()


def test_a_piece_is_graded_before_the_next_has_come(tmp_path: Path) -> None:
    """By the order of events: the next piece is handed over only once the functions were called on the one before."""
    (tmp_path / "tells.py").write_text(
        "from pathlib import Path\n"
        "def one(problem, completion):\n    Path(completion).touch()\n    return 1.0\n"
        "def together(completions, **columns):\n"
        "    Path(completions[0] + '_group').touch()\n    return [1.0] * len(completions)\n"
    )
    rewards = [f"{tmp_path / 'tells.py'}:{function}" for function in ("one", "together")]
    problems = [Problem(id=str(place), prompt="?") for place in range(3)]
    with Grader(rewards) as grader, grader.start([p for p in problems for _ in range(2)]) as grading:
        for place in range(2):
            names = [str(tmp_path / f"{place}{g}") for g in range(2)]
            grading.add(2 * place, names)
            for file in (*names, names[0] + "_group"):
                assert wait_until(Path(file).exists), "nothing was graded while others were still to come"
        grading.add(4, [str(tmp_path / "20")])
        assert wait_until((tmp_path / "20").exists)
        grading.add(5, [str(tmp_path / "21")])
        assert [result.reward for result in grading.finish()] == [2.0] * 6
        assert (tmp_path / "20_group").exists()


def test_the_clock_of_a_completion_runs_once_it_is_being_graded(tmp_path: Path) -> None:
    """All of them take longer than one may, and the first waits for its worker the least."""
    (tmp_path / "naps.py").write_text(
        "import time\ndef nap(problem, completion):\n    time.sleep(0.2)\n    return 1.0\n"
    )
    with Grader([f"{tmp_path / 'naps.py'}:nap"], timeout_s=0.8) as grader, grader.start([TEXT] * 7) as grading:
        for place in range(7):
            grading.add(place, ["a"])
        assert [result.status for result in grading.finish()] == ["ok"] * 7
        assert grading.busy_s >= 1.4


def test_a_worker_that_dies_while_pieces_come_costs_no_more_than_ever() -> None:
    with Grader([name("length"), name("exits")]) as grader:
        with grader.start([TEXT] * 4) as grading:
            for place, text in enumerate(["good", "bad", "good", "good"]):
                grading.add(place, [text])
            results = grading.finish()
        assert [result.breakdown for result in results] == [
            {"length": float(length), "exits": float(length == 4)} for length in (4, 3, 4, 4)
        ]
        assert [result.status for result in results] == ["ok", "error", "ok", "ok"]
        assert (grader.errors, grader.restarts) == (1, 1)


HANGS = """
import os, time
from pathlib import Path

def hangs(problem, completion):
    if completion:
        Path(completion).with_suffix(".partial").write_text(str(os.getpid()))
        Path(completion).with_suffix(".partial").rename(completion)
        time.sleep(60)
    return 1.0
"""


def begin_to_hang(grader: Grader, file: Path) -> tuple[Grading, int]:
    """A batch of three whose first completion a worker is at; the worker's process."""
    grading = grader.start([TEXT] * 3)
    grading.add(0, [str(file)])
    assert wait_until(file.exists)
    return grading, int(file.read_text())


def fail_within(grading: Grading) -> None:
    with grading:
        raise ZeroDivisionError


def interrupt_finish(grading: Grading) -> None:
    grading.add(1, ["", ""])
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    grading.finish()


@pytest.mark.parametrize(
    ("how", "error"),
    [("cancel", GivenUpError), ("error", ZeroDivisionError), ("interrupt", KeyboardInterrupt), ("close", GivenUpError)],
)
def test_a_batch_given_up_leaves_nothing_behind(how: str, error: type[BaseException], tmp_path: Path) -> None:
    """Neither a thread nor a worker that is still at it, nor a result for the next batch."""
    (tmp_path / "hangs.py").write_text(HANGS)
    with Grader([f"{tmp_path / 'hangs.py'}:hangs"], timeout_s=60) as grader:
        grading, worker = begin_to_hang(grader, tmp_path / "pid")
        if how in ("cancel", "close"):
            (grading.cancel if how == "cancel" else grader.close)()
            with pytest.raises(GivenUpError):
                grading.add(1, [""])
        end = {"error": fail_within, "interrupt": interrupt_finish}.get(how, Grading.finish)
        with pytest.raises(error):
            end(grading)
        assert not is_alive(worker)
        assert no_thread_is_left()
        if how != "close":
            assert [result.reward for result in grader.grade([TEXT], [""])] == [1.0]


def test_closing_ends_a_batch_that_another_thread_waits_for(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    raised: list[type[BaseException]] = []
    grader = Grader([f"{tmp_path / 'hangs.py'}:hangs"], timeout_s=60)

    def wait_for_it() -> None:
        try:
            grader.grade([TEXT], [str(tmp_path / "busy")])
        except GraderError as error:
            raised.append(type(error))

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    assert wait_until((tmp_path / "busy").exists)
    grader.close()
    thread.join(10)
    assert raised == [GivenUpError]


def test_what_ends_the_grading_ends_the_sampling(tmp_path: Path) -> None:
    """A worker that cannot be replaced is an error in the thread that hands over more, not one that nobody sees."""
    path = tmp_path / "fading.py"
    path.write_text("import os\ndef f(problem, completion):\n    os._exit(1)\n")
    with Grader([f"{path}:f"]) as grader:
        path.unlink()
        with pytest.raises(GraderError, match="could not be replaced: .*no file"):
            add_for_ever(grader)
        assert no_thread_is_left()


def add_for_ever(grader: Grader) -> None:
    with grader.start([TEXT] * 10_000) as grading:
        for place in range(10_000):
            grading.add(place, ["a"])
            time.sleep(0.001)


def waits_for_the_other(grader: Grader) -> Callable[[], None]:
    order: list[str] = []
    thread = threading.Thread(target=lambda: order.append(f"graded {len(grader.grade([TEXT], ['abc']))}"))
    thread.start()

    def then() -> None:
        order.append("finished")
        thread.join()
        assert order == ["finished", "graded 1"]

    return then


@MODES
def test_misuse_is_said(num_workers: int) -> None:
    with Grader([name("length")], num_workers=num_workers) as grader:
        with grader.start([TEXT] * 3) as grading:
            grading.add(1, ["a"])
            with pytest.raises(ValueError, match="completion 1 was added twice"):
                grading.add(0, ["a", "b"])
            with pytest.raises(ValueError, match="completions 2 to 3 were added to a batch of 3"):
                grading.add(2, ["a", "b"])
            with pytest.raises(ValueError, match="1 completions were added with 2 completion_ids"):
                grading.add(0, ["a"], [[1], [2]])
            with pytest.raises(TypeError, match="a completion is text, got bytes"):
                grading.add(0, [b"a"])  # type: ignore[list-item]
            with pytest.raises(GraderError, match="this thread has a batch in hand"):
                grader.grade([TEXT], ["a"])
            then = waits_for_the_other(grader)
            with pytest.raises(ValueError, match="2 of the 3 completions have not been added"):
                grading.finish()
        then()
