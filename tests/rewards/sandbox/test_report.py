"""What the machine offers is told as it is."""

from __future__ import annotations

import sys

import pytest

from rewards.sandbox.report import describe_machine, report_levels, run_self_test
from rewards.sandbox.sandbox import Sandbox


def test_every_level_is_reported_with_a_reason() -> None:
    reports = report_levels()
    assert [report.level for report in reports] == ["A", "B", "C", "D"]
    assert all(report.reason for report in reports)
    with Sandbox(minimum_level="D", packages=()) as sandbox:
        assert sandbox.level == next(report.level for report in reports if report.is_available)


@pytest.mark.skipif(sys.platform != "linux", reason="the jail's walls are Linux's")
def test_the_self_test_passes_where_walls_stand_and_fails_where_they_do_not() -> None:
    levels = [report.level for report in report_levels() if report.is_available]
    for level in levels:
        with Sandbox(level=level, minimum_level="D", packages=()) as sandbox:
            failed = {check.name for check in run_self_test(sandbox) if not check.has_passed}
        if level in ("A", "B"):
            assert failed == set()
        else:
            assert "read a file of the user's" in failed
            assert ("open a socket" in failed) == (level == "D")


def test_the_machine_is_one_line() -> None:
    assert describe_machine().count("\n") == 0
