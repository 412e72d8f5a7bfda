"""The display of a running job, on a terminal and in a log."""

import io
import os
import re
import subprocess
import sys

import pytest
from rich.console import Console

from grpo.display import MAX_NOTE, Display, describe_metrics
from tests.full_disk import files_at_most

METRICS = {
    "reward": 0.532,
    "rewards/countdown/mean": 0.481,
    "completions/mean_length": 87.3,
    "tokens_per_second": 12_440,
}


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def make_display(*, terminal=False, width=80, **options):
    file, clock = io.StringIO(), Clock()
    console = Console(file=file, force_terminal=terminal, width=width, height=24, highlight=False, _environ={})
    return Display(console=console, clock=clock, **options), file, clock


def play(output, width):
    """The screen after a terminal of that width played `output`: the control codes that rich's Live writes."""
    screen, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[0-9?;]*[A-Za-z]|\r|\n)|([^\x1b\r\n]+)", output):
        if text:
            assert column + len(text) <= width, f"a line longer than the terminal: {text!r}"
            screen[row] = screen[row][:column].ljust(column) + text + screen[row][column + len(text) :]
            column += len(text)
        elif code == "\n":
            row, column = row + 1, 0
            screen += [""] * (row + 1 - len(screen))
        elif code == "\r":
            column = 0
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code == "\x1b[2K":
            screen[row] = ""
        else:
            assert code[-1] in "mhl", f"unexpected control code {code!r}"
    return [line.rstrip() for line in screen if line.strip()]


def test_figures_are_on_one_line_and_missing_ones_left_out():
    assert describe_metrics(METRICS) == "reward 0.532  accuracy 48.1%  length 87.3  tokens/s 12.4k"
    assert describe_metrics({"reward": float("nan"), "tokens_per_second": None, "loss": 2.0}) == ""


def test_a_log_gets_a_line_every_so_often_and_the_last_of_each_stage():
    display, file, clock = make_display(seconds_between_lines=10)
    with display:
        display.stage("base model", total=3)
        for _ in range(3):
            clock.now += 1
            display.advance()
        display.stage("GRPO", total=25)
        for _ in range(25):
            clock.now += 1
            display.advance(METRICS)
    figures = describe_metrics(METRICS)
    assert file.getvalue().splitlines() == [
        "base model 1/3  2 s left",
        "base model: 3/3 in 3 s",
        f"GRPO 1/25  {figures}  24 s left",
        f"GRPO 11/25  {figures}  14 s left",
        f"GRPO 21/25  {figures}  4 s left",
        f"GRPO: 25/25 in 25 s  {figures}",
    ]


def test_other_ranks_are_silent():
    for terminal in (True, False):
        display, file, clock = make_display(rank=1, terminal=terminal)
        with display:
            display.stage("GRPO", total=2)
            clock.now += 60
            display.advance(METRICS)
            display.note("checkpoint")
        assert file.getvalue() == ""


def test_a_terminal_shows_the_last_state_once_and_keeps_the_summary():
    display, file, clock = make_display(terminal=True)
    with display:
        display.stage("GRPO", total=400, done=118)
        for _ in range(2):
            clock.now += 3
            display.advance(METRICS)
        during = play(file.getvalue(), 80)
    assert len(during) == 2
    assert re.fullmatch(r"GRPO +120/400 +━+[╸╺]?━* +14 min 00 s left", during[0])
    assert during[1] == describe_metrics(METRICS)
    assert play(file.getvalue(), 80) == [f"GRPO: 120/400 in 6 s  {describe_metrics(METRICS)}"]


def test_fast_steps_do_not_pay_for_a_drawing_each():
    display, file, clock = make_display(terminal=True)
    with display:
        display.stage("base model", total=1000)
        before = len(file.getvalue())
        for _ in range(999):
            clock.now += 0.001
            display.advance()
        drawings = file.getvalue()[before:].count("base model")
        assert drawings <= 10
        display.advance()
        assert "1000/1000" in play(file.getvalue(), 80)[0], "the last step is always drawn"


@pytest.mark.parametrize("width", [20, 40, 80])
def test_notes_neither_break_the_live_area_nor_are_obeyed(width):
    display, file, clock = make_display(terminal=True, width=width)
    with display:
        display.stage("a stage with a name that is longer than twenty columns", total=10)
        display.note("x" * 300 + " [bold]plain[/bold] \x1b[2J\x1b[10A\r\x07 two\nlines")
        clock.now += 1
        display.advance(METRICS)
        shown = play(file.getvalue(), width)
    flat = "".join(shown[:-2]).replace(" ", "")
    assert flat == ("x" * 300 + "[bold]plain[/bold][2J[10Atwolines")
    assert len(shown[-1]) <= width


def test_a_flood_of_a_note_is_cut():
    display, file, _ = make_display()
    with display:
        display.note("y" * 100_000)
    assert file.getvalue() == "y" * MAX_NOTE + "…\n"


def fail_inside(display, clock, error):
    with display:
        display.stage("GRPO", total=2)
        clock.now += 1
        display.advance(METRICS)
        print("of a library")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_terminal_as_it_was(error):
    display, file, clock = make_display(terminal=True)
    streams = sys.stdout, sys.stderr
    with pytest.raises(error):
        fail_inside(display, clock, error)
    assert (sys.stdout, sys.stderr) == streams
    output = file.getvalue()
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l"), "the cursor is visible again"
    assert play(output, 80) == ["of a library", f"GRPO: 1/2 in 1 s  {describe_metrics(METRICS)}"]


def test_time_left_follows_the_recent_steps_and_not_an_outlier():
    display, _, clock = make_display()
    display.stage("GRPO", total=1000)
    assert display.estimate_seconds_left() is None
    for _ in range(50):
        clock.now += 1
        display.advance()
    assert display.estimate_seconds_left() == pytest.approx(950)
    for seconds in (60, 1, 1, 1, 1):
        clock.now += seconds
        display.advance()
    assert display.estimate_seconds_left() == pytest.approx(945), "one checkpoint is no trend"
    for _ in range(20):
        clock.now += 2
        display.advance()
    assert display.estimate_seconds_left() == pytest.approx(2 * 925), "twenty slower steps are"


def test_several_steps_at_once_count_as_many():
    display, _, clock = make_display()
    display.stage("evaluation", total=512)
    clock.now += 8
    display.advance(steps=64)
    assert display.estimate_seconds_left() == pytest.approx(448 / 8)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        display.advance(steps=0)


def test_an_output_without_room_costs_lines_and_not_the_run(tmp_path):
    with (tmp_path / "log.txt").open("w") as log:
        display = Display(console=Console(file=log))
        display.note("before")
        with files_at_most(10):
            display.note("a disk without room " * 5)
        display.note("after")
    assert "before" in (text := (tmp_path / "log.txt").read_text())
    assert text.endswith("after\n")


def test_a_reader_that_is_gone_does_not_end_the_run(tmp_path):
    """As in `grpo train recipe.yaml | head`."""
    code = (
        "import pathlib, sys; from grpo.display import Display; display = Display()\n"
        "for _ in range(100): display.note('more than a pipe holds ' * 40)\n"
        "pathlib.Path(sys.argv[1]).write_text('done')"
    )
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "done")], stdout=writer, stderr=writer, stdin=subprocess.DEVNULL
    )
    os.close(writer)
    assert run.returncode == 0
    assert (tmp_path / "done").read_text() == "done"
