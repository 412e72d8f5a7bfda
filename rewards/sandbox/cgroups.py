"""A control group (v2) around a supervisor, where the system delegates one: a bound on all its runs' memory together.

Address space limits are per process and do not see files in memory; a group sees all. Where none is delegated, as in
most containers, runs do without.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
BASE_BYTES = 256 << 20
"""What a supervisor itself may take."""
BASE_PIDS = 16
"""What a supervisor itself may start."""


class ControlGroup:
    """One group: a process and all that it starts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._limits: tuple[int, int] | None = None

    def limit(self, roles: Sequence[Mapping[str, int]]) -> None:
        """Set the bounds for the roles of a run, given as fields of `jail.RunLimits`. OSError if the kernel refuses."""
        memory = sum(r["address_space"] + r["data"] + r["disk_bytes"] + 3 * r["file_bytes"] for r in roles)
        limits = (BASE_BYTES + memory, BASE_PIDS + sum(r["max_threads"] for r in roles))
        if limits == self._limits:
            return
        (self._path / "memory.max").write_text(f"{limits[0]}\n")
        (self._path / "pids.max").write_text(f"{limits[1]}\n")
        self._limits = limits

    def remove(self) -> None:
        """Remove it, once its processes are gone; one that is not yet empty is left to the system."""
        with contextlib.suppress(OSError):
            self._path.rmdir()


def make_group(pid: int, root: Path = ROOT, membership: Path = OWN_GROUPS) -> ControlGroup | None:
    """A new group, beside this process's own, with `pid` in it; None where none with memory and pids is delegated."""
    path: Path | None = None
    try:
        lines = membership.read_text().splitlines()
        own = next((line[3:] for line in lines if line.startswith("0::/")), "/")
        parent = (root / own.lstrip("/")).parent
        if own == "/" or not {"memory", "pids"} <= set((parent / "cgroup.subtree_control").read_text().split()):
            return None
        if not os.access(parent / "cgroup.procs", os.W_OK):
            return None
        path = Path(tempfile.mkdtemp(prefix=f"grpo-sandbox-{os.getpid()}-", dir=parent))
        (path / "cgroup.procs").write_text(f"{pid}\n")
    except OSError:
        if path is not None:
            ControlGroup(path).remove()
        return None
    return ControlGroup(path)
