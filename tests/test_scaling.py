"""benchmarks/scaling.py: the table of docs/scaling.md follows from its inputs, by formulas worked out here by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from benchmarks.scaling import Host, Links, Way, Work, measure_host, memory_of, messages_of, rows_of, step_of

ROOT = Path(__file__).parents[1]
PHASES = json.loads((ROOT / "benchmarks" / "scaling_phases.json").read_text())
LINKS = Links(
    source="", gpus_per_node=8, nvlink_bytes_per_s=400e9, network_bytes_per_s=25e9, efficiency=0.5, latency_s=0.0
)
WORK = Work(
    name="", source="", sample_s=3.0, grade_s=1.0, update_s=4.0, completions=10, tokens=100, micro_batches=2, layers=9,
    parameters=1e9, root_parameters=1e8,
)  # fmt: skip
HOST = Host(source="", gathered_s=0.01, recorded_s=0.001)


def test_a_ring_moves_all_but_one_share_over_the_slowest_link() -> None:
    assert LINKS.seconds(8e9, ranks=1) == 0
    assert LINKS.seconds(8e9, ranks=8) == pytest.approx(7e9 / 200e9)
    # two nodes: eight cards of 25 GB/s are as fast as half of NVLink
    assert LINKS.seconds(8e9, ranks=16) == pytest.approx(7.5e9 / 100e9)
    slow = replace(LINKS, latency_s=1e-3)
    assert slow.seconds(0, ranks=8, messages=2) == pytest.approx(6e-3)
    assert slow.seconds(0, ranks=9, messages=1) == pytest.approx(4e-3)


@pytest.mark.parametrize(
    ("way", "hidden", "waited"),
    [
        ("ddp", 0, 8e9),  # a sum is two rings of 4 bytes a weight
        ("fsdp2", 2 * (2 * 2e9 + 4e9), 2e9),
        ("zero2", 2 * 4e9, 2e9),
        ("zero3", 2 * (2 * 2e9 + 4e9), 2e9),
    ],
)
def test_bytes_of_each_way(way: Way, hidden: float, waited: float) -> None:
    rate = 200e9 * 8 / 7
    assert messages_of(WORK, way, LINKS, ranks=8) == pytest.approx((hidden / rate, waited / rate))


def test_a_step_is_the_phases_and_what_ranks_add() -> None:
    found = step_of(WORK, "ddp", LINKS, HOST, ranks=8)
    assert found["gathering"] == pytest.approx(0.7)
    assert found["recording"] == pytest.approx(0.07)
    assert found["messages"] == pytest.approx(8e9 * 7 / 8 / 200e9)
    assert found["step_s"] == pytest.approx(8 + 0.7 + 0.07 + 0.035)
    assert found["tokens_per_s"] == pytest.approx(8 * 10 * 100 / 8.805)
    assert found["binds"] == "gathering"
    assert step_of(WORK, "fsdp2", LINKS, HOST, ranks=1)["step_s"] == 8


def test_messages_that_outlast_the_update_are_counted() -> None:
    slow = replace(LINKS, nvlink_bytes_per_s=4e9)
    hidden, waited = messages_of(WORK, "zero3", slow, ranks=8)
    assert hidden > WORK.update_s
    assert step_of(WORK, "zero3", slow, HOST, ranks=8)["messages"] == pytest.approx(hidden - 4 + waited)


def test_memory_falls_with_ranks_but_for_what_is_whole() -> None:
    assert memory_of(WORK, "ddp", 64) == 20e9
    assert memory_of(WORK, "zero2", 1) == 18e9
    assert memory_of(WORK, "zero2", 16) == 2e9 + 1e9
    assert memory_of(WORK, "fsdp2", 16) == 2e9 + 1e9 + 2e8
    assert memory_of(WORK, "zero3", 16) == pytest.approx(2e9 + 18e9 / 16 + 2e8)


def test_the_table_of_the_page_is_what_the_script_prints() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    listed = re.findall(
        r"^\| (\w+) \| (\w+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| (\d+)% \|", page, re.MULTILINE
    )
    rows = {(row["work"], row["way"], row["gpus"]): row for row in rows_of(PHASES, [8, 64, 512])}
    assert len(listed) >= 12
    for work, way, gpus, step_s, messages, gathering, efficiency in listed:
        row = rows[work, way, int(gpus)]
        assert (step_s, messages) == (f"{row['step_s']:.2f}", f"{row['messages']:.3f}")
        assert (gathering, efficiency) == (f"{row['gathering']:.2f}", f"{100 * row['efficiency']:.0f}")
    assert {way for _, way, *_ in listed} == set(get_args(Way))


def test_the_host_is_measured() -> None:
    host = measure_host(tokens=16, completions=4, rounds=2)
    assert 0 < host.gathered_s < 1
    assert 0 < host.recorded_s < 1
