"""Geometry of the plots: what a reader takes from a drawing must be what was measured."""

import base64
import math
import re
import struct
import zlib

import pytest

from grpo.curves import (
    BALANCED,
    BOTTOM,
    LEFT,
    MAX_BUCKETS,
    RIGHT,
    TOP,
    UNKNOWN,
    Curve,
    Line,
    Mark,
    draw_curve,
    encode_heat_map,
    format_number,
    format_ticks,
    linear_ticks,
    log_ticks,
    make_buckets,
    smooth,
)


def draw(*lines, steps=None, **options):
    steps = steps or list(range(1, len(lines[0]) + 1))
    named = [Line(label=f"line {i}", values=values) for i, values in enumerate(lines)]
    return draw_curve(Curve(title="t", unit="", lines=named, **options), steps, make_buckets(steps))


def read_points(path):
    return [tuple(map(float, point.split())) for point in re.split("[ML]", path.replace("h0", "")) if point]


def test_a_line_goes_through_its_values():
    points = read_points(draw([0.0, 1.0, 2.0, 4.0]).strokes[0].strong)
    xs = [LEFT + i * (RIGHT - LEFT) / 3 for i in range(4)]
    ys = [BOTTOM - value / 4 * (BOTTOM - TOP) for value in (0, 1, 2, 4)]
    assert points == [pytest.approx(point, abs=0.06) for point in zip(xs, ys, strict=True)]


def test_ticks_stand_where_their_values_are():
    drawing = draw([0.0, 10.0])
    places = {label: y for y, label in drawing.y_ticks}
    assert places["0"] == BOTTOM
    assert places["10"] == TOP
    assert places["5"] == pytest.approx((BOTTOM + TOP) / 2)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]),
        (0.0, 0.9, [0, 0.25, 0.5, 0.75, 1]),
        (-0.03, 0.05, [-0.04, -0.02, 0, 0.02, 0.04, 0.06]),
        (1234.0, 1239.0, [1234, 1236, 1238, 1240]),
        (0.0, 1e-9, [0, 2.5e-10, 5e-10, 7.5e-10, 1e-9]),
    ],
)
def test_linear_ticks_are_round_and_enclose_the_range(low, high, expected):
    assert linear_ticks(low, high) == expected


def test_log_ticks_are_powers_of_ten_that_enclose_the_range():
    assert log_ticks(0.3, 42.0) == [0.1, 1, 10, 100]
    many = log_ticks(1e-20, 1e20)
    assert len(many) <= 8
    assert many[0] <= 1e-20
    assert many[-1] >= 1e20


def test_a_gap_breaks_the_line_and_a_lone_value_is_a_dot():
    path = draw([1.0, 2.0, None, 3.0, None, None]).strokes[0].strong
    assert path.count("M") == 2
    assert path.endswith("h0")
    assert len(read_points(path)) == 3


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 1e90])
def test_constant_values_and_a_single_step_have_an_axis(value):
    for count in (1, 5):
        drawing = draw([value] * count)
        points = read_points(drawing.strokes[0].strong)
        assert len(points) == count
        assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in points)
        assert len({label for _, label in drawing.y_ticks}) == len(drawing.y_ticks) >= 2


def test_a_long_run_is_drawn_with_few_points_and_keeps_every_extreme():
    values = [math.sin(i / 50) for i in range(12_345)]
    values[7_777] = 30.0
    drawing = draw(values)
    assert len(drawing.strokes[0].means) <= MAX_BUCKETS
    faint = read_points(drawing.strokes[0].faint)
    assert len(faint) <= 2 * MAX_BUCKETS
    assert min(y for _, y in faint) == pytest.approx(TOP, abs=0.06), "the spike is the top of the axis"


def test_buckets_cover_every_step_once():
    steps = [3, 4, 8, *range(100, 1100)]
    buckets = make_buckets(steps)
    assert [step for b in buckets for step in steps[b.start : b.stop]] == steps
    assert (buckets[0].first_step, buckets[-1].last_step) == (3, 1099)
    assert make_buckets([]) == []


def test_bucket_means_are_what_hovering_shows():
    values = [float(i % 7) for i in range(2 * MAX_BUCKETS)]
    means = draw(values).strokes[0].means
    assert means == [(a + b) / 2 for a, b in zip(values[::2], values[1::2], strict=True)]


def test_smoothing_keeps_gaps_constants_and_straight_lines():
    assert smooth([2.0] * 50) == [2.0] * 50
    straight = [float(i) for i in range(100)]
    assert smooth(straight)[10:90] == pytest.approx(straight[10:90]), "no lag"
    with_gap = [1.0] * 20 + [None] + [1.0] * 20
    assert smooth(with_gap) == with_gap
    assert smooth([0.0, 9.0, 0.0]) == [0.0, 9.0, 0.0], "a short run is shown as it is"


def test_one_spike_of_a_gradient_norm_neither_flattens_nor_lifts_the_rest():
    drawing = draw([0.4] * 50 + [80.0] + [0.4] * 50)
    assert drawing.is_log
    ys = [y for _, y in read_points(drawing.strokes[0].strong)]
    decade = (BOTTOM - TOP) / 3
    assert max(ys) - min(ys) < decade
    assert not draw([0.0, *[0.4] * 50, 80.0]).is_log, "zero has no logarithm"


def test_stacked_areas_add_up_and_do_not_overlap():
    drawing = draw([1.0, 1.0], [2.0, None], stacked=True)
    first, second = (read_points(stroke.strong.rstrip("Z")) for stroke in drawing.strokes)
    assert second[2:] == first[:2][::-1], "the floor of the second is the top of the first"
    assert second[0][1] == pytest.approx(TOP, abs=0.06), "the axis ends at 1 + 2"
    assert second[1] == first[1], "a phase that was not recorded adds nothing"


def test_marks_outside_the_steps_stand_at_the_edges_and_widen_the_axis():
    marks = [
        Mark(step=-math.inf, value=0.2, low=0.1, high=0.3, label="base"),
        Mark(step=math.inf, value=0.9, low=0.8, high=1.0, label="final"),
    ]
    drawing = draw([0.4, 0.5], marks=marks)
    assert [mark[0] for mark in drawing.marks] == [LEFT, RIGHT]
    for _, y, y_low, y_high, _ in drawing.marks:
        assert BOTTOM >= y_low > y > y_high >= TOP


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.4812, "%", "48.1%"),
        (0.53214, "", "0.532"),
        (1280.4, "tokens", "1,280 tokens"),
        (12_440.0, "", "12.4k"),
        (3_000_000.0, "", "3M"),
        (0.00005, "", "5e-5"),
    ],
)
def test_numbers_are_written_for_a_person(value, unit, text):
    assert format_number(value, unit) == text


def test_labels_of_an_axis_share_their_scale():
    assert format_ticks([8000.0, 9000.0, 10000.0]) == ["8k", "9k", "10k"]
    assert format_ticks([0.0, 0.25, 0.5], "%") == ["0%", "25%", "50%"]
    assert format_ticks([0.0, 5e-5]) == ["0", "5e-5"]


def read_png(address):
    """Width, height and palette indices [row][column] of a PNG that `encode_heat_map` made, checksums verified."""
    png = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(png):
        (size,) = struct.unpack(">I", png[at : at + 4])
        kind, body = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size]) == (zlib.crc32(kind + body),)
        chunks[kind], at = body, at + 12 + size
    width, height = struct.unpack(">II", chunks[b"IHDR"][:8])
    raw = zlib.decompress(chunks[b"IDAT"])
    assert len(chunks[b"PLTE"]) == 3 * len(chunks[b"tRNS"])
    return [list(raw[row * (width + 1) + 1 : (row + 1) * (width + 1)]) for row in range(height)], chunks


def test_heat_map_shows_each_expert_against_its_even_share():
    columns = [[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.125, 0.25, 0.125]]
    pixels, chunks = read_png(encode_heat_map(columns))
    assert [row[0] for row in pixels] == [BALANCED] * 4
    assert [row[1] for row in pixels] == [2 * BALANCED, 0, 0, 0]
    assert [row[2] for row in pixels] == [12, 4, BALANCED, 4]
    assert chunks[b"tRNS"][BALANCED] == 0, "an even share is transparent"
    counts = [[1000 * load for load in column] for column in columns]
    assert encode_heat_map(counts) == encode_heat_map(columns), "shares or counts, the same picture"


def test_heat_map_marks_what_was_not_recorded():
    pixels, _ = read_png(encode_heat_map([[0.5, None], [0.0, 0.0], [1.0]]))
    assert pixels[1] == [UNKNOWN, UNKNOWN, UNKNOWN]
