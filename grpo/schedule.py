"""What a run may write grows with it: `max_completion_length` from small to large."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LengthScheduleConfig(BaseModel):
    """The `length_schedule` section of a recipe; evaluation always has the full length."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int = Field(ge=1, description="most tokens of a completion at the first step")
    steps: int = Field(ge=1, description="steps until max_completion_length is reached")
    rises: int | None = Field(default=None, ge=1, description="equal rises to get there; default: one each step")


def completion_length_at(step: int, full: int, schedule: LengthScheduleConfig | None) -> int:
    """Most tokens of a completion at step 0, 1, ...: from `start` in equal rises to `full` at step `steps`."""
    if schedule is None or step >= schedule.steps:
        return full
    rises = schedule.rises or schedule.steps
    done = step * rises // schedule.steps
    return schedule.start + (full - schedule.start) * done // rises
