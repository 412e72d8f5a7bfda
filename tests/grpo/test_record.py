"""The run's folder: who may have it, what is written there, and what a resumed run takes back."""

import fcntl
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from grpo.config import Config, load_config
from grpo.record import RunFolder, RunFolderError
from grpo.types import Answer, Group, Question
from rewards import Problem, RewardResult
from rollouts import Completion
from tests.full_disk import files_at_most
from tests.recipes import write_recipe

HOLDER = """
import sys
from pathlib import Path
from grpo.config import load_config
from grpo.record import RunFolder
config = load_config(sys.argv[1])
folder = RunFolder(config.run_dir, print)
folder.open(config, resume=False)
print("open", flush=True)
sys.stdin.read()
"""


def make_config(tmp_path: Path, **changes: Any) -> Config:
    return load_config(write_recipe(tmp_path, **changes))


def opened(config: Config, *, resume: bool = False, notes: list[str] | None = None) -> RunFolder:
    folder = RunFolder(config.run_dir, (notes if notes is not None else []).append)
    folder.open(config, resume=resume)
    return folder


def refusal(config: Config, *, resume: bool = False) -> str:
    with pytest.raises(RunFolderError) as caught:
        opened(config, resume=resume)
    message = str(caught.value)
    assert "\n" not in message
    return message


def worked(config: Config) -> None:
    """A run that got as far as one step."""
    folder = opened(config)
    folder.add_metrics({"step": 1})
    folder.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answer(*rewards: float | None) -> Answer:
    problem = Problem(id="p1", prompt="make 3 …", answer="3", source="data.jsonl:1")
    group = Group(
        problem=problem,
        prompt_ids=[5, 6],
        completions=[Completion(token_ids=[7, 2], logprobs=[-1.0, -2.0], finish_reason="stop", policy_version=0)]
        * len(rewards),
        texts=["<think> é"] * len(rewards),
        results=[RewardResult(reward=reward, breakdown={"format": 1.0}) for reward in rewards],
    )
    return Answer(question=Question(number=4, place=0, problem=problem), group=group)


def test_a_new_folder_holds_the_resolved_recipe(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    opened(config).close()
    assert load_config(config.run_dir / "config.yaml") == config


def test_a_folder_that_holds_a_run_is_refused_untouched(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    worked(config)
    before = contents(config.run_dir)
    assert refusal(config) == (
        f"{config.run_dir} already holds a run; continue it with --resume, or choose another name (name=...)"
    )
    other = make_config(tmp_path, learning_rate=0.5, seed=3)
    message = refusal(other, resume=True)
    assert "holds a run with other settings (seed: 0 there, 3 here; learning_rate: 0.001 there, 0.5 here)" in message
    assert "resume it with its own recipe (seed=0 learning_rate=0.001), or choose another name" in message
    assert contents(config.run_dir) == before


def test_a_run_that_left_nothing_may_start_again_with_other_settings(tmp_path: Path) -> None:
    opened(make_config(tmp_path)).close()
    config = make_config(tmp_path, learning_rate=0.5)
    opened(config).close()
    assert load_config(config.run_dir / "config.yaml") == config


@pytest.mark.parametrize("work", ["checkpoints", "rollouts", "metrics.jsonl", "evaluation.json"])
@pytest.mark.parametrize("damage", ["missing", "cut off", "empty"])
def test_work_without_a_readable_recipe_is_left_alone(work: str, damage: str, tmp_path: Path) -> None:
    config = make_config(tmp_path)
    opened(config).close()
    stored = config.run_dir / "config.yaml"
    if damage == "missing":
        stored.unlink()
    else:
        stored.write_text("name: [tin" if damage == "cut off" else "")
    (config.run_dir / work).mkdir() if "." not in work else (config.run_dir / work).write_text("")
    before = contents(config.run_dir)
    assert "already holds a run" in refusal(config)
    assert "holds a run whose config.yaml is missing or damaged; put it back" in refusal(config, resume=True)
    assert contents(config.run_dir) == before


def test_resume_takes_its_own_run_and_may_change_how_long_and_where(tmp_path: Path) -> None:
    worked(make_config(tmp_path))
    (tmp_path / "runs" / "tiny").rename(tmp_path / "moved")
    config = make_config(tmp_path, output_dir=str(tmp_path), name="moved", max_steps=9, save_total_limit=5)
    opened(config, resume=True).close()
    assert yaml.safe_load((tmp_path / "moved" / "config.yaml").read_text())["max_steps"] == 9
    assert (tmp_path / "moved" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_resume_of_nothing_starts(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    opened(config, resume=True).close()
    assert (config.run_dir / "config.yaml").is_file()


def test_one_folder_has_one_owner_at_a_time(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    first = opened(config)
    for resume in (False, True):
        assert refusal(config, resume=resume) == (
            f"another process is running in {config.run_dir}; choose another name (name=...)"
        )
    first.close()
    opened(config).close()


def test_another_process_keeps_its_folder_until_it_ends(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    config = load_config(recipe)
    command = [sys.executable, "-c", HOLDER, str(recipe)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        assert "another process is running in" in refusal(config)
        holder.kill()
    opened(config).close()


def test_a_refused_folder_is_not_kept_locked(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    worked(config)
    refused = RunFolder(config.run_dir, print)
    with pytest.raises(RunFolderError):
        refused.open(config, resume=False)
    with (config.run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.output_dir.write_text("in the way")
    message = refusal(config)
    assert message.startswith(f"{config.run_dir} cannot be written: ")
    assert message.endswith("choose another output_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_ours_is_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    config.output_dir.mkdir(mode=0o500)
    assert f"{config.run_dir} cannot be written: Permission denied" in refusal(config)


def test_a_full_disk_at_the_start_is_named(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    with files_at_most(100):
        assert f"{config.run_dir} cannot be written: File too large; free space" in refusal(config)
    assert not (config.run_dir / "config.yaml").exists()
    opened(config).close()


def test_metrics_are_a_line_a_step_and_valid_json_whatever_the_numbers(tmp_path: Path) -> None:
    folder = opened(make_config(tmp_path))
    folder.add_metrics({"step": 1, "loss": float("nan"), "kl": float("inf"), "moe/load": [[0.5, float("nan")]]})
    folder.add_metrics({"step": 2, "loss": 0.25})
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": None, "kl": None, "moe/load": [[0.5, None]]}, {"step": 2, "loss": 0.25}]


def test_rollouts_hold_every_completion_with_its_reward_and_advantage(tmp_path: Path) -> None:
    folder = opened(make_config(tmp_path))
    folder.add_rollouts(7, [answer(1.0, None)], [[0.5, -0.5]], dropped=[answer(1.0)])
    lines = (folder.path / "rollouts" / "step_000007.jsonl").read_text(encoding="utf-8").splitlines()
    record, dropped = map(json.loads, lines)
    assert (record["step"], record["number"], record["is_trained"]) == (7, 4, True)
    assert (dropped["step"], dropped["number"], dropped["is_trained"]) == (7, 4, False)
    assert [c["advantage"] for c in dropped["completions"]] == [0.0]
    assert record["problem"] == {"id": "p1", "prompt": "make 3 …", "answer": "3", "source": "data.jsonl:1"}
    assert [c["reward"] for c in record["completions"]] == [1.0, None]
    assert [c["advantage"] for c in record["completions"]] == [0.5, -0.5]
    assert record["completions"][0] == {
        "text": "<think> é", "reward": 1.0, "advantage": 0.5, "breakdown": {"format": 1.0}, "status": "ok",
        "detail": "", "num_tokens": 2, "finish_reason": "stop", "policy_version": 0,
    }  # fmt: skip


def test_a_disk_that_refuses_is_said_once_and_costs_only_what_it_refused(tmp_path: Path) -> None:
    notes: list[str] = []
    folder = opened(make_config(tmp_path), notes=notes)
    folder.add_metrics({"step": 1})
    folder.add_evaluation({"stage": "base"})
    before = contents(folder.path)
    with files_at_most(24):
        for step in (2, 3):
            folder.add_metrics({"step": step, "loss": 0.125})
            folder.add_rollouts(step, [answer(1.0, 0.0)], [[1.0, -1.0]])
        folder.add_evaluation({"stage": "final"})
    assert contents(folder.path) == before, "half a line, or a file that was not there"
    assert notes == [
        "metrics.jsonl could not be written (No space left on device); the run goes on without it",
        "rollouts could not be written (File too large); the run goes on without it",
        "evaluation.json could not be written (File too large); the run goes on without it",
    ]
    folder.add_metrics({"step": 4})
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 4}\n'


def test_an_evaluation_takes_the_place_of_one_of_its_stage(tmp_path: Path) -> None:
    folder = opened(make_config(tmp_path))
    assert folder.evaluations() == []
    for stage, value in (("base", 0.1), (5, 0.2), ("base", 0.3)):
        folder.add_evaluation({"stage": stage, "avg@k": value})
    assert folder.evaluations() == [{"stage": 5, "avg@k": 0.2}, {"stage": "base", "avg@k": 0.3}]


def test_a_resumed_run_forgets_what_comes_after_its_checkpoint(tmp_path: Path) -> None:
    folder = opened(make_config(tmp_path))
    for step in (1, 2, 3):
        folder.add_metrics({"step": step})
        folder.add_rollouts(step, [answer(1.0)], [[0.0]])
        (folder.checkpoints / f"step_00000{step}").mkdir(parents=True)
    for stage in ("base", 2, 3, "final"):
        folder.add_evaluation({"stage": stage})
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "lo\xc3')
    folder.forget_after(2)
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert sorted(path.name for path in (folder.path / "rollouts").iterdir()) == [
        "step_000001.jsonl",
        "step_000002.jsonl",
    ]
    assert [evaluation["stage"] for evaluation in folder.evaluations()] == ["base", 2]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step_000001", "step_000002"]


def test_forgetting_where_nothing_was_written_is_fine(tmp_path: Path) -> None:
    folder = opened(make_config(tmp_path))
    before = contents(folder.path)
    folder.forget_after(0)
    assert contents(folder.path) == before


def test_a_full_disk_on_the_way_back_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    folder = opened(make_config(tmp_path))
    for step in (1, 2, 3):
        folder.add_metrics({"step": step})
    before = contents(folder.path)
    with files_at_most(20), pytest.raises(RunFolderError, match="cannot be written: File too large; free space, then"):
        folder.forget_after(2)
    assert contents(folder.path) == before
    folder.forget_after(2)
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_names_that_a_dataset_gives_are_no_paths(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    folder = opened(config)
    before = set(tmp_path.rglob("*"))
    problem = Problem(id="../../outside", prompt="?", source="/etc/outside")
    given = answer(1.0)
    folder.add_rollouts(1, [replace(given, group=replace(given.group, problem=problem))], [[0.0]])
    made = set(tmp_path.rglob("*")) - before
    assert made == {config.run_dir / "rollouts", config.run_dir / "rollouts" / "step_000001.jsonl"}
