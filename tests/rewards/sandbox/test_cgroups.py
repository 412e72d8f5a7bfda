"""A group is made where one is delegated and gets the limits of the run; elsewhere there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from rewards.sandbox.cgroups import BASE_BYTES, BASE_PIDS, make_group

ROLE = {"address_space": 100, "data": 0, "disk_bytes": 10, "file_bytes": 1, "max_threads": 5}


def delegate(tmp_path: Path, controllers: str, membership: str) -> tuple[Path, Path]:
    """A folder that looks as the kernel's does to a process in `user/app/own`."""
    root = tmp_path / "cgroup"
    (root / "user" / "app" / "own").mkdir(parents=True)
    (root / "user" / "app" / "cgroup.subtree_control").write_text(controllers)
    (root / "user" / "app" / "cgroup.procs").write_text("")
    (tmp_path / "membership").write_text(membership)
    return root, tmp_path / "membership"


def test_a_delegated_group_is_made_and_limited(tmp_path: Path) -> None:
    group = make_group(123, *delegate(tmp_path, "cpu memory pids\n", "1:name=systemd:/x\n0::/user/app/own\n"))
    assert group is not None
    (made,) = (tmp_path / "cgroup" / "user" / "app").glob("grpo-sandbox-*")
    group.limit([ROLE, ROLE])
    assert (made / "cgroup.procs").read_text() == "123\n"
    assert (made / "memory.max").read_text() == f"{BASE_BYTES + 2 * 113}\n"
    assert (made / "pids.max").read_text() == f"{BASE_PIDS + 10}\n"
    for file in made.iterdir():
        file.unlink()
    group.remove()
    assert not made.exists()


@pytest.mark.parametrize(
    ("controllers", "membership"),
    [
        ("cpu pids", "0::/user/app/own\n"),
        ("memory pids", "0::/\n"),
        ("memory pids", "4:memory:/x\n"),
        ("memory pids", "0::/gone/own\n"),
    ],
)
def test_without_delegation_there_is_no_group(tmp_path: Path, controllers: str, membership: str) -> None:
    assert make_group(123, *delegate(tmp_path, controllers, membership)) is None


def test_without_control_groups_there_is_no_group(tmp_path: Path) -> None:
    assert make_group(123, tmp_path / "none", tmp_path / "none") is None
