"""What one run of a program may use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_HIGHEST = {"wall_s": 1e6, "memory_mb": 1e9, "disk_mb": 1e9, "output_mb": 1e9, "threads": 1e6, "patience_s": 1e9}
"""What the kernel's own units still hold."""


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
        for name, highest in _HIGHEST.items():
            value = getattr(self, name)
            if value is None and name == "patience_s":
                continue
            kind, wanted = (int, "positive whole number") if name == "threads" else (int | float, "positive number")
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value <= highest:
                raise ValueError(f"limits: {name} must be a {wanted}, at most {highest:g}; got {_shorten(value)}")

    def has_patience(self, cut_off_s: float) -> bool:
        """Whether more runs are worth it after so many seconds of runs that were cut off."""
        return cut_off_s < (10 * self.wall_s if self.patience_s is None else self.patience_s)


def _shorten(value: Any) -> str:
    # An int beyond 4,300 digits has no decimal text.
    return f"an int of {value.bit_length()} bits" if isinstance(value, int) and abs(value) > 1e18 else repr(value)


def merge_limits(*layers: Mapping[str, Any] | Limits | None) -> Limits:
    """Defaults, overridden by each layer in turn. ValueError for an unknown key or a value not positive."""
    merged: dict[str, Any] = {}
    names = [field.name for field in dataclasses.fields(Limits)]
    for layer in layers:
        if isinstance(layer, Limits):
            merged |= dataclasses.asdict(layer)
            continue
        if layer is not None and not isinstance(layer, Mapping):
            raise ValueError(f"limits: must be a mapping of {', '.join(names)}, got {layer!r}")
        for name, value in (layer or {}).items():
            if name not in names:
                raise ValueError(f"limits: unknown key {name!r} (allowed: {', '.join(names)})")
            merged[name] = value
    return Limits(**merged)
