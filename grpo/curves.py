"""Line plots and expert heat maps as inline SVG and PNG, drawn without a plotting library.

Everything here is geometry: numbers in, pixels out. What is worth plotting is said in `grpo/report.py`,
how the marks look in `templates/curve.svg.j2` and the style sheets beside it.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 44, 350, 8, 166
"""The plot area inside the `WIDTH` by `HEIGHT` drawing, in SVG user units; what is outside holds the labels."""
PLOT_FRAME = {"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM, "width": WIDTH, "height": HEIGHT}
"""The same, for the templates."""
MAX_BUCKETS = 300
"""Points along x: about one per unit of width, so that the size of a drawing does not grow with the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One quantity over the steps of a run."""

    label: str
    """What it is, for the legend."""
    values: Sequence[float | None]
    """One finite value per step; None where it was not recorded or not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A measurement at one step, with its interval: an evaluation."""

    step: float
    """Where along x; outside the run's steps it is drawn at the nearest edge."""
    value: float
    """The measurement, in the unit of the curve."""
    low: float
    """Lower end of its interval; the value itself where there is none."""
    high: float
    """Upper end of its interval; the value itself where there is none."""
    label: str
    """Shown beside the pointer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A plot before it is drawn."""

    title: str
    """A few words, above the plot."""
    unit: str
    """`%` (values are fractions), or a word shown after a value; empty for a bare number."""
    lines: Sequence[Line]
    """At least one, all over the same steps."""
    stacked: bool = False
    """Draw the lines as areas on top of each other: parts of a whole, none negative."""
    marks: Sequence[Mark] = ()
    """Evaluations drawn over the lines."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Neighbouring steps drawn as one point."""

    start: int
    """Index of its first step in the run's list of steps."""
    stop: int
    """Index after its last step."""
    first_step: int
    """Number of its first step."""
    last_step: int
    """Number of its last step."""
    x: float
    """Its place, in SVG user units."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stroke:
    """One line of a drawing."""

    label: str
    """What it is, for the legend."""
    faint: str
    """SVG path of every value; empty where it would repeat `strong`."""
    strong: str
    """SVG path of the smoothed values, or the closed outline of a stacked area."""
    means: Sequence[float | None]
    """Mean of each bucket, in the unit of the curve: what hovering shows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A curve in SVG user units, ready for the template."""

    curve: Curve
    """What is drawn."""
    is_log: bool
    """The vertical axis is logarithmic."""
    x_ticks: Sequence[tuple[float, str]]
    """Place and label."""
    y_ticks: Sequence[tuple[float, str]]
    """Place and label."""
    strokes: Sequence[Stroke]
    """One per line of the curve, in its order."""
    marks: Sequence[tuple[float, float, float, float, str]]
    """x, y, y of the interval's low end, y of its high end, label."""


def make_buckets(steps: Sequence[int], max_buckets: int = MAX_BUCKETS) -> list[Bucket]:
    """Split ascending steps [S] into at most `max_buckets` runs of equal length (the last one may be shorter)."""
    size = math.ceil(len(steps) / max_buckets)
    buckets = []
    for start in range(0, len(steps), max(size, 1)):
        stop = min(start + size, len(steps))
        middle = (steps[start] + steps[stop - 1]) / 2
        x = round(_place_x(middle, steps), 1)
        buckets.append(Bucket(start=start, stop=stop, first_step=steps[start], last_step=steps[stop - 1], x=x))
    return buckets


def draw_curve(curve: Curve, steps: Sequence[int], buckets: Sequence[Bucket]) -> Drawing:
    """Place a curve over ascending steps [S], whose buckets come from `make_buckets`.

    Positive values that span decades with few outliers (a gradient norm that spikes) get a logarithmic axis.
    At least one line must hold a value.
    """
    means = [[_mean(line.values[b.start : b.stop]) for b in buckets] for line in curve.lines]
    if curve.stacked:
        tops = _pile_up(means)
        shown = [0.0, *(value for top in tops for value in top)]
    else:
        shown = [value for line in curve.lines for value in line.values if value is not None]
        shown += [end for mark in curve.marks for end in (mark.low, mark.high)]
    assert shown, "a curve without a value has no axis"
    is_log = not curve.stacked and _wants_log(shown)
    ticks = log_ticks(min(shown), max(shown)) if is_log else linear_ticks(*_pad_range(min(shown), max(shown)))

    def place_y(value: float) -> float:
        low, high = (math.log10(end) if is_log else end for end in (ticks[0], ticks[-1]))
        share = ((math.log10(value) if is_log else value) - low) / (high - low)
        return round(BOTTOM - share * (BOTTOM - TOP), 1)

    xs = [bucket.x for bucket in buckets]
    if curve.stacked:
        floors = [[0.0] * len(buckets), *tops]
        strong = [_trace_area(xs, bottom, top, place_y) for bottom, top in zip(floors, tops, strict=False)]
        faint = [""] * len(strong)
    else:
        smoothed = [smooth(mean, geometric=is_log) for mean in means]
        strong = [_trace_line(zip(xs, values, strict=True), place_y) for values in smoothed]
        faint = [_trace_line(_raw_points(line.values, buckets), place_y) for line in curve.lines]
    strokes = [
        Stroke(label=line.label, faint="" if f == s else f, strong=s, means=mean)
        for line, f, s, mean in zip(curve.lines, faint, strong, means, strict=True)
    ]
    y_ticks = [(place_y(tick), label) for tick, label in zip(ticks, format_ticks(ticks, curve.unit), strict=True)]
    marks = [
        (round(_place_x(m.step, steps), 1), place_y(m.value), place_y(m.low), place_y(m.high), m.label)
        for m in curve.marks
    ]
    return Drawing(
        curve=curve, is_log=is_log, x_ticks=_step_ticks(steps), y_ticks=y_ticks, strokes=strokes, marks=marks
    )


def smooth(values: Sequence[float | None], geometric: bool = False) -> list[float | None]:
    """Centred moving mean over about a twentieth of the points; it neither lags nor fills a gap.

    `geometric` averages the logarithms of positive values, so that one spike does not make a plateau on a logarithmic
    axis. Short runs (fewer than 20 points) come back as they are.
    """
    if geometric:
        logs = smooth([None if value is None else math.log(value) for value in values])
        return [None if value is None else math.exp(value) for value in logs]
    reach = len(values) // 40 + (len(values) >= 20)
    if not reach:
        return list(values)
    return [
        None if value is None else _mean(values[max(0, i - reach) : i + reach + 1]) for i, value in enumerate(values)
    ]


def linear_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) from at or below `low` to at or above `high`; low < high."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """At most seven powers of ten, evenly spaced, from at or below `low` to at or above `high`; 0 < low < high."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = math.ceil((last - first) / 6)
    return [10.0**power for power in range(first, last + stride, stride)]


def format_number(value: float, unit: str = "", digits: int = 3) -> str:
    """A number for a person: `48.1%`, `0.532`, `1,280`, `12.4k`, `5e-5`, with its unit after it."""
    if unit == "%":
        return f"{value:.1%}"
    size = abs(value)
    if size < 1e3:
        text = f"{value:.{digits}g}".replace("e-0", "e-")
    elif size < 1e4:
        text = f"{value:,.0f}"
    elif size < 1e6:
        text = f"{value / 1e3:.{digits}g}k"
    else:
        text = f"{value / 1e6:.{digits}g}M" if size < 1e9 else f"{value:.{digits}g}"
    return f"{text} {unit}".rstrip()


def format_ticks(ticks: Sequence[float], unit: str = "") -> list[str]:
    """Labels of an axis, all at one scale (thousands, millions) and as short as they can be while they differ."""
    if unit == "%":
        return [f"{100 * tick:.4g}%" for tick in ticks]
    largest = max(abs(tick) for tick in ticks)
    scale, suffix = (1e6, "M") if largest >= 1e6 else (1e3, "k") if largest >= 1e4 else (1.0, "")
    return [f"{tick / scale:.5g}{suffix if tick else ''}".replace("e-0", "e-").replace("e+0", "e") for tick in ticks]


def encode_heat_map(columns: Sequence[Sequence[float | None]]) -> str:
    """A PNG as a `data:` address: one column of pixels per step, one row per expert, expert 0 on top.

    `columns` [steps][experts] holds each expert's share of the tokens; a column is compared with its own mean, so
    shares and counts look the same. Balanced is transparent, starved blue, overloaded orange, unknown grey.
    """
    levels = [_rate_loads(column) for column in columns]
    height = max(len(column) for column in levels)
    rows = b"".join(
        b"\0" + bytes(column[expert] if expert < len(column) else UNKNOWN for column in levels)
        for expert in range(height)
    )
    colours = [STARVED] * BALANCED + [OVERLOADED] * (BALANCED + 1) + [(128, 128, 128)]
    alphas = [round(255 * abs(level - BALANCED) / BALANCED) for level in range(2 * BALANCED + 1)] + [70]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in (
            (b"IHDR", struct.pack(">IIBBBBB", len(levels), height, 8, 3, 0, 0, 0)),
            (b"PLTE", bytes(part for colour in colours for part in colour)),
            (b"tRNS", bytes(alphas)),
            (b"IDAT", zlib.compress(rows, 9)),
            (b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()


BALANCED = 8
"""Palette index of an expert that gets exactly its share; 0 is a quarter of it or less, 16 four times or more."""
UNKNOWN = 2 * BALANCED + 1
"""Palette index of a load that was not recorded."""
STARVED, OVERLOADED = (46, 104, 206), (222, 110, 24)
"""Red, green, blue."""


def _rate_loads(loads: Sequence[float | None]) -> list[int]:
    mean = _mean(loads) or 0.0
    if mean <= 0:
        return [UNKNOWN] * len(loads)

    def rate(load: float | None) -> int:
        if load is None:
            return UNKNOWN
        doublings = math.log2(max(load / mean, 0.25))
        return BALANCED + round(BALANCED * min(doublings, 2.0) / 2)

    return [rate(load) for load in loads]


def _place_x(step: float, steps: Sequence[int]) -> float:
    span = steps[-1] - steps[0]
    share = (min(max(step, steps[0]), steps[-1]) - steps[0]) / span if span else 0.5
    return LEFT + share * (RIGHT - LEFT)


def _step_ticks(steps: Sequence[int]) -> list[tuple[float, str]]:
    span = steps[-1] - steps[0]
    ticks = linear_ticks(steps[0], steps[-1], count=min(5, span)) if span else [float(steps[0])]
    inside = [tick for tick in ticks if steps[0] <= tick <= steps[-1] and tick == int(tick)]
    return [(round(_place_x(tick, steps), 1), label) for tick, label in zip(inside, format_ticks(inside), strict=True)]


def _pad_range(low: float, high: float) -> tuple[float, float]:
    """The range to show: from zero where the values come near it, and never empty."""
    if 0 < low < high / 2:
        low = 0.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) / 10 or 0.5
        return (0.0, 1.0) if low == 0 else (low - pad, high + pad)
    return low, high


def _wants_log(values: Sequence[float]) -> bool:
    middle = sorted(values)[len(values) // 2]
    return min(values) > 0 and max(values) > 40 * middle


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _pile_up(means: Sequence[Sequence[float | None]]) -> list[list[float]]:
    """Running sums over the lines [L][buckets]: the top edge of each stacked area."""
    tops: list[list[float]] = []
    for line in means:
        floor = tops[-1] if tops else [0.0] * len(line)
        tops.append([base + max(value or 0.0, 0.0) for base, value in zip(floor, line, strict=True)])
    return tops


def _raw_points(values: Sequence[float | None], buckets: Sequence[Bucket]) -> Iterator[tuple[float, float | None]]:
    """The values themselves, or each bucket's extremes in the order they came, so that no spike is lost."""
    for bucket in buckets:
        inside = [value for value in values[bucket.start : bucket.stop] if value is not None]
        if not inside:
            yield bucket.x, None
            continue
        ends = {inside.index(min(inside)), inside.index(max(inside))}
        for index in sorted(ends):
            yield bucket.x, inside[index]


def _trace_line(points: Iterable[tuple[float, float | None]], place_y: Callable[[float], float]) -> str:
    """An SVG path that breaks where a value is missing and shows a lone value as a dot."""
    runs: list[list[str]] = [[]]
    for x, value in points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append(f"{x:g} {place_y(value):g}")
    return "".join("M" + "L".join(run) + ("h0" if len(run) == 1 else "") for run in runs if run)


def _trace_area(
    xs: Sequence[float], bottom: Sequence[float], top: Sequence[float], place_y: Callable[[float], float]
) -> str:
    there = [f"{x:g} {place_y(value):g}" for x, value in zip(xs, top, strict=True)]
    back = [f"{x:g} {place_y(value):g}" for x, value in zip(xs, bottom, strict=True)]
    return "M" + "L".join(there + back[::-1]) + "Z"
