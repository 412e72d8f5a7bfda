"""One self-contained HTML page about a run, made from the files of its folder and nothing else.

It is not a dashboard: nothing is served or fetched, and a run that is still going, or was cut off, gives a page too.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from grpo.curves import (
    PLOT_FRAME,
    Curve,
    Drawing,
    Line,
    Mark,
    draw_curve,
    encode_heat_map,
    format_number,
    make_buckets,
)
from grpo.run_files import Evaluation, Row, RunFiles, as_number, read_run, spread

TEMPLATES = Path(__file__).parent / "templates"
MAX_HEAT_STEPS, MAX_HEAT_LAYERS = 150, 64
"""Size limits of the expert load maps."""

CURVES: Sequence[tuple[str, str, Mapping[str, str]]] = (
    ("Completion length", "tokens", {"completions/mean_length": "mean length"}),
    ("Entropy", "nats", {"entropy": "entropy"}),
    ("KL to the reference", "nats", {"kl": "KL"}),
    ("Gradient norm", "", {"grad_norm": "gradient norm"}),
    ("Cut off at the length limit", "%", {"completions/clipped_ratio": "completions"}),
    ("Groups without a signal", "%", {"frac_reward_zero_std": "groups of equal rewards"}),
    ("Clipped by the ratio", "%", {"clip_ratio/region_mean": "tokens"}),
    ("Max expert load", "", {"moe/max_load": "busiest expert"}),
    ("Dead experts", "", {"moe/dead_experts": "experts"}),
    ("Sampler against trainer", "nats", {f"sampling/logp_difference_{kind}": kind for kind in ("mean", "max")}),
    ("Throughput", "tokens/s", {"tokens_per_second": "tokens/s"}),
    ("Learning rate", "", {"learning_rate": "learning rate"}),
    ("Loss", "", {"loss": "loss"}),
)
"""Title, unit, and the metrics to draw with their labels; `choose_curves` adds those that depend on the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """What training brought on one task."""

    base: Evaluation
    """Before training."""
    final: Evaluation
    """After training, on the same task."""
    average: float
    """Difference of avg@k, a share: 0.4 is 40 points."""
    interval: tuple[float, float] | None
    """95% interval of the difference; None unless both evaluations have one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatMap:
    """How the tokens spread over the experts of one layer."""

    title: str
    """Which of the mixture-of-experts layers."""
    image: str
    """PNG as a `data:` address, one pixel per step and expert."""
    num_experts: int
    """Rows of the image."""
    summary: str
    """The busiest and the idlest expert of the last step."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run folder, replacing the old one in a single move, and return its path.

    Reads `config.yaml`, `metrics.jsonl`, `evaluation.json` and `rollouts/step_*.jsonl`; any of them may be missing,
    half-written, or hold NaN. Raises FileNotFoundError if the folder holds none of them.
    """
    run = read_run(run_dir)
    steps = [row["step"] for row in run.metrics]
    buckets = make_buckets(steps)
    drawings = [draw_curve(curve, steps, buckets) for curve in choose_curves(run)]
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    page = _load_template("report.html.j2").render(
        run=run,
        verdict=state_verdict(run),
        facts=list_facts(run),
        tables=[(task, rows, measure_gain(rows)) for task, rows in _group_by_task(run.evaluations)],
        drawings=drawings,
        heat_maps=draw_heat_maps(run.metrics),
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=script,
        # The browser runs this very script and no other, whatever a completion contains.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data={
            "buckets": [(bucket.x, bucket.first_step, bucket.last_step) for bucket in buckets],
            "curves": [_list_hover_values(drawing) for drawing in drawings],
            "groups": run.groups,
        },
    )
    return _replace_file(run_dir / "report.html", page)


def write_curve_svg(run_dir: Path, path: Path) -> Path:
    """Draw accuracy (or reward, where no reward function is recorded) and mean length over the steps, for a README.

    The picture is transparent and legible on light and dark pages. Raises ValueError if neither was recorded.
    """
    run = read_run(run_dir)
    steps = [row["step"] for row in run.metrics]
    curves = {curve.title: curve for curve in choose_curves(run)}
    wanted = (curves.get("Accuracy") or curves.get("Reward"), curves.get("Completion length"))
    drawings = [draw_curve(curve, steps, make_buckets(steps)) for curve in wanted if curve]
    if not drawings:
        raise ValueError(f"{run_dir}/metrics.jsonl holds neither a reward nor a mean length; let the run make a step")
    return _replace_file(path, _load_template("readme.svg.j2").render(name=run.name, drawings=drawings))


def find_accuracy(metrics: Mapping[str, Any]) -> str | None:
    """The metric that counts right answers: the mean of the first reward function, in the order of the recipe."""
    return next(iter(_list_reward_means(metrics)), None)


def choose_curves(run: RunFiles) -> list[Curve]:
    """What there is to plot of a run, in reading order; a quantity without a single finite value is left out."""
    rows = run.metrics
    names = list(dict.fromkeys(key for row in rows for key in row))
    means = _list_reward_means(names)
    wanted: list[Curve] = [_make_curve(rows, "Reward", "", {"reward": "reward"})]
    for accuracy in means[:1]:
        is_share = all(0 <= value <= 1 for value in _list_values(rows, accuracy))
        marks = _mark_evaluations(run) if is_share else ()
        unit, labels = "%" if is_share else "", {accuracy: _shorten_name(accuracy)}
        wanted.append(_make_curve(rows, "Accuracy", unit, labels, marks=marks))
    wanted += [_make_curve(rows, title, unit, labels) for title, unit, labels in CURVES]
    others = {key: _shorten_name(key) for key in means[1:]}
    phases = {
        key: key.removeprefix("time/")
        for key in names
        if key.startswith("time/") and not key.endswith("_busy")  # what goes on beside a phase is no part of the sum
    }
    if "time/forward_backward" in phases:  # a part of the update, which would count twice
        phases.pop("time/update", None)
    wanted.append(_make_curve(rows, "Further rewards", "", others))
    wanted.append(_make_curve(rows, "Step time", "s", phases or {"step_time": "step"}, stacked=bool(phases)))
    return [curve for curve in wanted if curve.lines]


def draw_heat_maps(rows: Sequence[Row]) -> list[HeatMap]:
    """One map per mixture-of-experts layer, from `moe/load`: per step a list per layer of a list per expert."""
    loads = [row["moe/load"] for row in rows if isinstance(row.get("moe/load"), list)]
    columns = [[_clean_loads(layer) for layer in step] for step in spread(loads, MAX_HEAT_STEPS)]
    num_layers = max(map(len, columns), default=0)
    heat_maps = []
    for layer in spread(range(num_layers), MAX_HEAT_LAYERS):
        steps = [step[layer] for step in columns if layer < len(step) and step[layer]]
        if not steps:
            continue
        last = [load or 0.0 for load in steps[-1]]
        mean = sum(last) / len(last)
        summary = "no tokens at the last step"
        if mean > 0:
            busiest, idlest = last.index(max(last)), last.index(min(last))
            summary = (
                f"last step: expert {busiest} has {max(last) / mean:.2f}, "
                f"expert {idlest} {min(last) / mean:.2f} of an even share"
            )
        heat_maps.append(
            HeatMap(
                title=f"Layer {layer + 1} of {num_layers}",
                image=encode_heat_map(steps),
                num_experts=max(map(len, steps)),
                summary=summary,
            )
        )
    return heat_maps


def measure_gain(evaluations: Sequence[Evaluation]) -> Gain | None:
    """Final minus base of one task; None unless both were made.

    The interval is Newcombe's (1998, method 10, "square and add"): it takes the two evaluations as independent, so on
    the same problems it is wider than a paired one would be.
    """
    by_stage = {evaluation.stage: evaluation for evaluation in evaluations}
    base, final = by_stage.get("base"), by_stage.get("final")
    if base is None or final is None or base.average is None or final.average is None:
        return None
    difference, interval = final.average - base.average, None
    if base.interval and final.interval:
        down = math.hypot(final.average - final.interval[0], base.interval[1] - base.average)
        up = math.hypot(final.interval[1] - final.average, base.average - base.interval[0])
        interval = (difference - down, difference + up)
    return Gain(base=base, final=final, average=difference, interval=interval)


def state_verdict(run: RunFiles) -> str:
    """The run in one line: what the evaluations show, or how far training got."""
    gains = [gain for _, rows in _group_by_task(run.evaluations) if (gain := measure_gain(rows))]
    if gains:
        return _state_gain(gains[0])
    if not run.metrics:
        return "No training step is recorded yet."
    total, last = as_number(run.find_setting("max_steps")), run.metrics[-1]["step"]
    progress = f"Step {last:,} of {total:,.0f}" if total else f"Step {last:,}"
    key = find_accuracy(dict.fromkeys(name for row in run.metrics for name in row)) or "reward"
    values = _list_values(run.metrics, key)
    if not values:
        return f"{progress}; no final evaluation yet."
    tenth = max(len(values) // 10, 1)
    first, now = sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth
    name = "reward" if key == "reward" else f"{_shorten_name(key)} reward"
    return f"{progress}: the mean {name} went from {first:.3g} to {now:.3g}; no final evaluation yet."


def list_facts(run: RunFiles) -> list[tuple[str, str]]:
    """The figures under the title: label and value."""
    if not run.metrics:
        return []
    total, last = as_number(run.find_setting("max_steps")), run.metrics[-1]["step"]
    facts = [("Steps", f"{last:,} of {total:,.0f}" if total else f"{last:,}")]
    prompts, size = (as_number(run.find_setting(key)) for key in ("prompts_per_step", "num_generations"))
    if prompts and size:
        facts.append(("Completions a step", f"{prompts * size:,.0f} ({prompts:,.0f} problems × {size:,.0f})"))
    times, speeds = (_list_values(run.metrics, key) for key in ("step_time", "tokens_per_second"))
    if times:
        facts.append(("Time in steps", format_duration(sum(times))))
    if speeds:
        facts.append(("Median throughput", format_number(sorted(speeds)[len(speeds) // 2], "tokens/s")))
    return facts


def format_duration(seconds: float) -> str:
    """`42 s`, `5 min 12 s`, `3 h 07 min`, `2 d 05 h`."""
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // small:02d} {small_unit}"
    return f"{whole} s"


def _state_gain(gain: Gain) -> str:
    base, final, points = gain.base, gain.final, 100 * gain.average
    where = f"{base.num_problems:,} problems of {base.task}" if base.num_problems else base.task
    change = f"from {base.average:.1%} to {final.average:.1%} on {where}"
    if not gain.interval:
        return f"Accuracy went {change} ({points:+.1f} points; the intervals are not recorded)."
    low, high = (100 * end for end in gain.interval)
    if low <= 0 <= high:
        return f"No clear change of accuracy: {change} ({points:+.1f} points, 95% interval {low:+.1f} to {high:+.1f})."
    verb = "rose" if points > 0 else "fell"
    return f"Accuracy {verb} {change}: {points:+.1f} points (95% interval {low:+.1f} to {high:+.1f})."


def _group_by_task(evaluations: Iterable[Evaluation]) -> list[tuple[str, list[Evaluation]]]:
    tasks: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        tasks.setdefault(evaluation.task, []).append(evaluation)
    return list(tasks.items())


def _mark_evaluations(run: RunFiles) -> list[Mark]:
    """The evaluations of the first task, where the steps they belong to are."""
    marks = []
    ends: Mapping[str | int, float] = {"base": -math.inf, "final": math.inf}
    for _, evaluations in _group_by_task(run.evaluations)[:1]:
        for evaluation in evaluations:
            step, average = ends.get(evaluation.stage, evaluation.stage), evaluation.average
            if average is not None and not isinstance(step, str):
                low, high = evaluation.interval or (average, average)
                label = f"evaluation, {evaluation.stage}: {average:.1%}"
                marks.append(Mark(step=step, value=average, low=low, high=high, label=label))
    return marks


def _list_reward_means(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("rewards/") and name.endswith("/mean")]


def _shorten_name(metric: str) -> str:
    return metric.removeprefix("rewards/").removesuffix("/mean")


def _make_curve(
    rows: Sequence[Row],
    title: str,
    unit: str,
    labels: Mapping[str, str],
    *,
    stacked: bool = False,
    marks: Sequence[Mark] = (),
) -> Curve:
    lines = [Line(label=label, values=[as_number(row.get(key)) for row in rows]) for key, label in labels.items()]
    recorded = [line for line in lines if any(value is not None for value in line.values)]
    return Curve(title=title, unit=unit, lines=recorded, stacked=stacked, marks=marks)


def _list_values(rows: Sequence[Row], key: str) -> list[float]:
    return [value for row in rows if (value := as_number(row.get(key))) is not None]


def _clean_loads(layer: object) -> list[float | None]:
    return [as_number(load) for load in layer] if isinstance(layer, list) else []


def _list_hover_values(drawing: Drawing) -> dict[str, Any]:
    lines = [
        {"label": stroke.label, "values": [None if mean is None else float(f"{mean:.4g}") for mean in stroke.means]}
        for stroke in drawing.strokes
    ]
    return {"unit": drawing.curve.unit, "lines": lines}


def _load_template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    environment.filters["number"] = format_number
    environment.globals["plot"] = PLOT_FRAME
    return environment.get_template(name)


def _replace_file(path: Path, text: str) -> Path:
    """Write beside the target, then rename: a reader sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
