"""What wrote a checkpoint: a run goes on to the bit only under the same code."""

from __future__ import annotations

from collections.abc import Mapping

import torch

VERSION = "0.1.0"
"""Of this distribution; pyproject.toml reads it here."""


def versions() -> dict[str, str]:
    """Of what decides a run's last bits, by name."""
    return {"grpo-reasoning": VERSION, "torch": str(torch.__version__)}


def describe_change(before: Mapping[str, str]) -> str | None:
    """One line on what differs from the `versions` that a checkpoint names; None where nothing does.

    A checkpoint that names none is older than this record.
    """
    now = versions()
    if before == now:
        return None
    theirs = (
        ", ".join(f"{name} {version}" for name, version in before.items()) or "an older version, which left no name"
    )
    ours = ", ".join(f"{name} {version}" for name, version in now.items())
    return f"the checkpoint is of {theirs}; this is {ours}: the run goes on, but not bit for bit"
