"""What one run of a program may use."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of one run; a stdio case is a run, and so is a function call."""

    wall_s: float = 6.0
    """Seconds until the run is killed."""
    memory_mb: float = 512.0
    """MiB of memory over what the bare interpreter takes."""
    disk_mb: float = 64.0
    """MiB of all files in the scratch folder together."""
    output_mb: float = 8.0
    """MiB of standard output, and of the largest single file."""
    threads: int = 64
    """Most threads at a time."""
    patience_s: float | None = None
    """Seconds of runs cut off by `wall_s` after which a problem's other tests count as failed, unrun; None: ten times
    `wall_s`."""

    def __post_init__(self) -> None:
        for name in ("wall_s", "memory_mb", "disk_mb", "output_mb", "threads", "patience_s"):
            value = getattr(self, name)
            if value is None and name == "patience_s":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"limits: {name} must be a positive number, got {value!r}")

    def has_patience(self, cut_off_s: float) -> bool:
        """Whether more runs are worth it after so many seconds of runs that were cut off."""
        return cut_off_s < (10 * self.wall_s if self.patience_s is None else self.patience_s)


def merge_limits(*layers: Mapping[str, Any] | Limits | None) -> Limits:
    """Defaults, overridden by each layer in turn. ValueError for an unknown key or a value not positive."""
    merged: dict[str, Any] = {}
    names = [field.name for field in dataclasses.fields(Limits)]
    for layer in layers:
        if isinstance(layer, Limits):
            merged |= dataclasses.asdict(layer)
            continue
        for name, value in (layer or {}).items():
            if name not in names:
                raise ValueError(f"limits: unknown key {name!r} (allowed: {', '.join(names)})")
            merged[name] = value
    return Limits(**merged)
