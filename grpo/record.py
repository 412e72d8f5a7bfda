"""The run's folder: what is written there, line by line, and how a resumed run takes its place again.

config.yaml, metrics.jsonl, rollouts/step_000001.jsonl (a line a group), evaluation.json, checkpoints/, report.html.
A disk that refuses a line costs that line, is said once, and never stops the run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from grpo.checkpoint import forget_checkpoints_after
from grpo.config import Config, ConfigError
from grpo.saved_recipe import compare
from grpo.types import Answer

WORK = ("evaluation.json", "metrics.jsonl", "rollouts", "checkpoints")
"""What makes a folder a run's, once it has trained or evaluated."""


class RunFolderError(Exception):
    """A run folder that cannot be used; the message says why and what to do."""


class RunFolder:
    """Owns one run's folder; opened by the main process only."""

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self.path, self._note = path, note
        self._refused: set[str] = set()
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.path / "checkpoints"

    @property
    def skipped(self) -> Path:
        """Folder of the updates that were not finite."""
        return self.path / "skipped"

    def open(self, config: Config, *, resume: bool) -> None:
        """Claim the folder for this recipe: new, or with `resume` one that holds the same run.

        A run that ended before it left anything but its config.yaml holds nothing: its folder is as good as new.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._claim()
            if any((self.path / name).exists() for name in WORK):
                self._check_same_run(config, resume=resume)
            self._replace(self.path / "config.yaml", config.to_yaml())
        except RunFolderError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise RunFolderError(
                f"{self.path} cannot be written: {error.strerror}; free space, or choose another output_dir"
            ) from None

    def _check_same_run(self, config: Config, *, resume: bool) -> None:
        if not resume:
            raise RunFolderError(
                f"{self.path} already holds a run; continue it with --resume, or choose another name (name=...)"
            )
        try:
            before = yaml.safe_load((self.path / "config.yaml").read_text())
        except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
            before = None
        if not isinstance(before, dict):
            raise RunFolderError(
                f"{self.path} holds a run whose config.yaml is missing or damaged; put it back, or choose another name "
                "(name=...)"
            )
        try:
            compared = compare(before, config)
        except ConfigError as error:
            raise RunFolderError(
                f"{self.path} holds a run of another version ({error}); resume it with the version that wrote it, or "
                "choose another name (name=...)"
            ) from None
        if compared.differing:
            own = f" ({given})" if (given := compared.overrides()) else ""
            raise RunFolderError(
                f"{self.path} holds a run with other settings ({compared.describe_differing()}); resume it with its "
                f"own recipe{own}, or choose another name (name=...)"
            )
        if compared.filled:
            self._note(
                f"the run began before these keys were there, and goes on as it was: {compared.describe_filled()}"
            )

    def close(self) -> None:
        """Give the folder up."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def forget_after(self, step: int) -> None:
        """Drop metrics, rollouts, evaluations and checkpoints of steps after `step`: they will be made again.

        Raises RunFolderError where the disk refuses: lines of both runs would stand side by side.
        """
        try:
            self._forget_after(step)
        except OSError as error:
            raise RunFolderError(
                f"{self.path} cannot be written: {error.strerror}; free space, then --resume again"
            ) from None

    def _forget_after(self, step: int) -> None:
        forget_checkpoints_after(self.checkpoints, step)
        metrics = self.path / "metrics.jsonl"
        if metrics.exists():
            kept = [line for line in metrics.read_text(errors="replace").splitlines() if _step_of(line) <= step]
            self._replace(metrics, "".join(f"{line}\n" for line in kept))
        for file in (self.path / "rollouts").glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()
        evaluations = self.evaluations()
        kept_evaluations = [e for e in evaluations if e["stage"] == "base" or _is_number_up_to(e["stage"], step)]
        if kept_evaluations != evaluations:
            self._replace(self.path / "evaluation.json", json.dumps(kept_evaluations, indent=2) + "\n")

    def add_metrics(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; numbers that are not finite become null."""
        text = json.dumps({key: _finite(value) for key, value in metrics.items()})

        def append() -> None:
            with (self.path / "metrics.jsonl").open("ab", buffering=0) as file:
                end = file.tell()
                if file.write(line := f"{text}\n".encode()) < len(line):
                    file.truncate(end)  # half a line would spoil the next one too
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self._try("metrics.jsonl", append)

    def add_rollouts(
        self,
        step: int,
        answers: Sequence[Answer],
        advantages: Sequence[Sequence[float]],
        dropped: Sequence[Answer] = (),
    ) -> None:
        """Every completion that a step was trained on, with its reward parts and advantage; then the groups dropped."""
        records = [
            _group_record(step, answer, of_group, is_trained=True)
            for answer, of_group in zip(answers, advantages, strict=True)
        ]
        records += [
            _group_record(step, answer, [0.0] * len(answer.group.completions), is_trained=False) for answer in dropped
        ]
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        file = self.path / "rollouts" / f"step_{step:06d}.jsonl"

        def write() -> None:
            file.parent.mkdir(exist_ok=True)
            self._replace(file, "\n".join(lines) + "\n")

        self._try("rollouts", write)

    def add_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Add to evaluation.json, in the place of one of the same stage."""
        others = [e for e in self.evaluations() if e["stage"] != evaluation["stage"]]
        text = json.dumps([*others, dict(evaluation)], indent=2) + "\n"
        self._try("evaluation.json", lambda: self._replace(self.path / "evaluation.json", text))

    def evaluations(self) -> list[dict[str, Any]]:
        """What evaluation.json holds."""
        file = self.path / "evaluation.json"
        if not file.exists():
            return []
        loaded: list[dict[str, Any]] = json.loads(file.read_text())
        return loaded

    def _claim(self) -> None:
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise RunFolderError(f"another process is running in {self.path}; choose another name (name=...)") from None

    def _try(self, what: str, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if what not in self._refused:
                self._refused.add(what)
                self._note(f"{what} could not be written ({error.strerror}); the run goes on without it")

    @staticmethod
    def _replace(file: Path, text: str) -> None:
        temporary = file.with_name(f".{file.name}.partial")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _group_record(step: int, answer: Answer, advantages: Sequence[float], *, is_trained: bool) -> dict[str, Any]:
    group = answer.group
    completions = [
        {
            "text": text,
            "reward": result.reward,
            "advantage": advantage,
            "breakdown": dict(result.breakdown),
            "status": result.status,
            "detail": result.detail,
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "policy_version": completion.policy_version,
        }
        for completion, text, result, advantage in zip(
            group.completions, group.texts, group.results, advantages, strict=True
        )
    ]
    problem, prompt = group.problem, group.problem.prompt
    text = prompt if isinstance(prompt, str) else "\n\n".join(turn["content"] for turn in prompt)
    about = {"id": problem.id, "prompt": text, "answer": problem.answer, "source": problem.source}
    return {
        "step": step,
        "number": answer.question.number,
        "is_trained": is_trained,
        "problem": about,
        "completions": completions,
    }


def _step_of(line: str) -> float:
    """The step of a line of metrics; a line that a kill cut short belongs to no step that is kept."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def _is_number_up_to(stage: Any, step: int) -> bool:
    return isinstance(stage, int) and stage <= step


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
