"""Reading a run folder back: tolerant of a run that is still going, was cut off in mid-line, or recorded NaN.

It writes nothing, and says nothing of how a page shows what it read: that is `grpo/report.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import yaml

MAX_GROUPS, MAX_GROUP_STEPS, MAX_COMPLETIONS = 60, 20, 16
"""What is read of the rollouts: groups in all, steps they come from, completions of each group."""
MAX_TEXT = 3_000_000
"""Characters of prompts and completions, all groups together; longer ones lose their middle."""

Row = Mapping[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One entry of `evaluation.json`, cleaned; None where a number is missing or not finite."""

    stage: str | int
    """`base`, `final`, or the step after which it was made."""
    task: str
    """Name of the set of problems."""
    num_problems: int | None
    """Problems in the set."""
    k: int | None
    """Completions sampled per problem."""
    greedy: float | None
    """Share of the problems solved at temperature 0."""
    average: float | None
    """avg@k: share of the sampled completions that are right."""
    interval: tuple[float, float] | None
    """95% interval of `average`, low and high."""
    mean_length: float | None
    """Tokens per completion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """What could be read of a run folder."""

    name: str
    """Name of the folder."""
    config_text: str
    """`config.yaml` as it stands; empty if there is none."""
    config: Row
    """The same, parsed."""
    metrics: Sequence[Row]
    """One object per step, ascending; of a step recorded twice (a resumed run), the later one."""
    evaluations: Sequence[Evaluation]
    """Base first, then by step, then final; of one made twice, the later."""
    groups: Sequence[Mapping[str, Any]]
    """A sample of the rollouts, cleaned and ready for JSON."""
    groups_note: str
    """Which groups those are, for a reader."""
    warnings: Sequence[str]
    """What could not be read."""

    def find_setting(self, key: str) -> Any:
        """The value of a configuration key at whatever depth it stands, the shallowest first; None if there is none."""
        level = [self.config]
        while level:
            for section in level:
                if key in section:
                    return section[key]
            level = [value for section in level for value in section.values() if isinstance(value, Mapping)]
        return None


def read_run(run_dir: Path) -> RunFiles:
    """Read `config.yaml`, `metrics.jsonl`, `evaluation.json` and `rollouts/step_*.jsonl`, those that there are.

    Of the rollouts only a sample is opened (`groups_note` says which), so that the time does not grow with the run.
    Raises FileNotFoundError if the folder does not exist or holds none of the four.
    """
    found = [run_dir / name for name in ("config.yaml", "metrics.jsonl", "evaluation.json", "rollouts")]
    if not any(path.exists() for path in found):
        raise FileNotFoundError(
            f"{run_dir} is not a run folder: it holds none of config.yaml, metrics.jsonl, evaluation.json, rollouts/; "
            "give the folder that the run wrote, such as runs/<name>"
        )
    warnings: list[str] = []
    config_text, config = _read_config(run_dir / "config.yaml", warnings)
    groups, groups_note = _read_groups(run_dir / "rollouts", warnings)
    return RunFiles(
        name=run_dir.resolve().name,
        config_text=config_text,
        config=config,
        metrics=_read_metrics(run_dir / "metrics.jsonl", warnings),
        evaluations=_read_evaluations(run_dir / "evaluation.json", warnings),
        groups=groups,
        groups_note=groups_note,
        warnings=warnings,
    )


def as_number(value: object) -> float | None:
    """A finite float that can be drawn; None for anything else that a JSON file may hold in its place."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced, the first and the last among them if `count` > 1."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def _read_config(path: Path, warnings: list[str]) -> tuple[str, Row]:
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # ValueError: a date such as 2024-13-45
        warnings.append("config.yaml is not valid YAML")
        return text, {}
    return text, config if isinstance(config, Mapping) else {}


def _read_metrics(path: Path, warnings: list[str]) -> list[Row]:
    rows: dict[int, Row] = {}
    for row in _read_lines(path, warnings):
        step = as_number(row.get("step"))
        if step is not None:
            rows[int(step)] = {**row, "step": int(step)}
    return [rows[step] for step in sorted(rows)]


def _read_evaluations(path: Path, warnings: list[str]) -> list[Evaluation]:
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except ValueError:
        entries = None
    if not isinstance(entries, list):
        warnings.append("evaluation.json is not a JSON list")
        return []
    cleaned = [_clean_evaluation(entry) for entry in entries if isinstance(entry, Mapping)]
    latest = {(evaluation.stage, evaluation.task): evaluation for evaluation in cleaned}
    return sorted(latest.values(), key=_stage_order)


def _stage_order(evaluation: Evaluation) -> float:
    if isinstance(evaluation.stage, int):
        return evaluation.stage
    return {"base": -math.inf, "final": math.inf}.get(evaluation.stage, 1e99)


def _clean_evaluation(entry: Row) -> Evaluation:
    average, stage = as_number(entry.get("avg@k")), entry.get("stage")
    num_problems, k = as_number(entry.get("num_problems")), as_number(entry.get("k"))
    return Evaluation(
        stage=stage if isinstance(stage, int) else str(stage),
        task=str(entry.get("task", "")),
        num_problems=None if num_problems is None else int(num_problems),
        k=None if k is None else int(k),
        greedy=as_number(entry.get("greedy")),
        average=average,
        interval=None if average is None else _read_interval(entry.get("ci95"), average),
        mean_length=as_number(entry.get("mean_length")),
    )


def _read_interval(ci95: object, average: float) -> tuple[float, float] | None:
    """From both ways of writing it: `[low, high]`, or the half-width."""
    half_width = as_number(ci95)
    if half_width is not None:
        return max(average - half_width, 0.0), min(average + half_width, 1.0)
    if isinstance(ci95, Sequence) and len(ci95) == 2:
        low, high = as_number(ci95[0]), as_number(ci95[1])
        if low is not None and high is not None:
            return low, high
    return None


def _read_groups(folder: Path, warnings: list[str]) -> tuple[list[dict[str, Any]], str]:
    numbered = {}
    for path in folder.glob("step_*.jsonl"):
        match = re.fullmatch(r"step_(\d{1,18})\.jsonl", path.name)
        if match:
            numbered[int(match[1])] = path
    chosen = spread(sorted(numbered), MAX_GROUP_STEPS)
    per_step = MAX_GROUPS // max(len(chosen), 1)
    rows = [
        (step, row)
        for step in chosen
        for row in islice(filter(_has_completions, _read_lines(numbered[step], warnings)), per_step)
    ]
    texts = sum(2 + len(row["completions"][:MAX_COMPLETIONS]) for _, row in rows)
    groups = [_clean_group(step, row, MAX_TEXT // texts) for step, row in rows]
    if not groups:
        return [], ""
    every = len(chosen) == len(numbered)
    which = "every step" if every else f"{len(chosen)} steps, spread evenly over the {len(numbered):,} recorded"
    return groups, f"{len(groups)} groups: the first {per_step}, at most, of {which}."


def _has_completions(row: Row) -> bool:
    return isinstance(row.get("completions"), list)


def _clean_group(step: int, row: Row, max_characters: int) -> dict[str, Any]:
    problem = row.get("problem")
    problem = problem if isinstance(problem, Mapping) else {}
    completions = [each for each in row["completions"] if isinstance(each, Mapping)]
    prompt, seen = _read_prompt(problem.get("prompt")), str(row.get("prompt_text") or "")
    return {
        "step": step,
        "id": str(problem.get("id", "")),
        "prompt": _clip(prompt or seen, max_characters),
        "prompt_text": "" if seen == prompt or not prompt else _clip(seen, max_characters),
        "answer": _clip(str(problem.get("answer") or ""), 400),
        "source": _clip(str(problem.get("source") or ""), 400),
        "completions": [_clean_completion(each, max_characters) for each in completions[:MAX_COMPLETIONS]],
        "left_out": len(completions[MAX_COMPLETIONS:]),
    }


def _clean_completion(completion: Row, max_characters: int) -> dict[str, Any]:
    breakdown = completion.get("breakdown")
    parts = islice(breakdown.items(), 12) if isinstance(breakdown, Mapping) else ()
    return {
        "text": _clip(str(completion.get("text") or ""), max_characters),
        "reward": as_number(completion.get("reward")),
        "advantage": as_number(completion.get("advantage")),
        "breakdown": {_clip(str(name), 100): as_number(score) for name, score in parts},
        "status": _clip(str(completion.get("status") or ""), 100),
        "detail": _clip(str(completion.get("detail") or ""), 400),
        "num_tokens": as_number(completion.get("num_tokens")),
        "finish_reason": _clip(str(completion.get("finish_reason") or ""), 100),
    }


def _read_prompt(prompt: object) -> str:
    """Text as it is; the messages of a chat one under the other."""
    if isinstance(prompt, Sequence) and not isinstance(prompt, str):
        return "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt if isinstance(m, Mapping))
    return str(prompt or "")


def _clip(text: str, max_characters: int) -> str:
    """Both ends of a text that is too long: the question or the first thoughts, and the answer."""
    if len(text) <= max_characters:
        return text
    half = max_characters // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _read_lines(path: Path, warnings: list[str]) -> Iterator[Row]:
    """The objects of a JSON Lines file one by one; lines that hold none are skipped and counted in `warnings`."""
    if not path.is_file():
        return
    unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, Mapping):
                yield row
            elif line.strip():
                unreadable += 1
    if unreadable:
        warnings.append(f"{path.name}: {unreadable} unreadable line{'s' * (unreadable > 1)} skipped")
