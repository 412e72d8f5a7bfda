"""The commands that look into rewards."""

import json
from pathlib import Path

from typer.testing import CliRunner

from grpo.cli import app

RUN = CliRunner().invoke


def test_a_verdict_is_explained_stage_by_stage() -> None:
    shown = RUN(app, ["reward", "check", "math", "--completion", r"so \boxed{\frac{2}{4}}", "--gold", "0.5"])
    assert shown.exit_code == 0, shown.output
    stages = [line.split()[0] for line in shown.output.splitlines()]
    assert stages[0] == "gold"
    assert stages[-1] == "verdict"
    assert "reward 1.0, status ok" in shown.output


def test_a_file_is_graded_and_counted(tmp_path: Path) -> None:
    rows = [
        {"completion": r"\boxed{7}", "gold": "7", "expected": 1},
        {"completion": r"\boxed{8}", "gold": "7", "expected": 1},
        {"completion": "", "gold": "7", "expected": 0},
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = RUN(app, ["reward", "check", "--file", str(tmp_path / "answers.jsonl")])
    assert shown.exit_code == 0, shown.output
    assert "3 rows, mean reward 0.3333; ok 2, unparsed 1" in shown.output
    assert "1 differ from the column 'expected'" in shown.output


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"completion": "7"}\n')
    for file in ("answers.jsonl", "missing.jsonl"):
        shown = RUN(app, ["reward", "check", "--file", str(tmp_path / file)])
        assert shown.exit_code == 2
        assert file in shown.output
        assert len(shown.output.splitlines()) == 1


def test_another_reward_grades_files_only(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text(json.dumps({"completion": "no tags", "gold": "7"}))
    shown = RUN(app, ["reward", "check", "format", "--file", str(tmp_path / "answers.jsonl")])
    assert "1 rows, mean reward 0.0000" in shown.output
    shown = RUN(app, ["reward", "check", "format", "--completion", "x", "--gold", "y"])
    assert shown.exit_code == 2
    assert "--file" in shown.output


def test_without_anything_to_check_the_remedy_is_named() -> None:
    shown = RUN(app, ["reward", "check"])
    assert shown.exit_code == 2
    assert "--file" in shown.output


def test_the_sandbox_says_what_this_machine_offers() -> None:
    shown = RUN(app, ["sandbox"])
    assert shown.exit_code in (0, 1, 2), shown.output
    assert "level A" in shown.output
    assert "level D" in shown.output
    assert ("FAIL" in shown.output) == (shown.exit_code == 1)
