"""Dynamic sampling: a step is filled with groups that teach something (DAPO, arXiv 2503.14476, section 3.2, eq. 11).

A group whose completions all have the same reward has no advantage anywhere. Here such groups are dropped and others
asked in their place, round by round, under a cap. Everything that was asked is accounted for:

    asked = kept + filled + dropped + pending        and        trained = carried + kept + filled = prompts_per_step

with `carried` what the step before left. With `oversample` 1 a round asks just what is missing, nothing is ever left
over, and every step is on-policy. Above 1 a round asks more, and the groups with signal that the step has no place for
stay pending: they open the next step, one version old. It follows from `oversample` < 2 that they are fewer than a step
holds, so none gets older than that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field

from grpo.advantages import VARIANCE_TOLERANCE
from grpo.types import Answer, Group


class DynamicSamplingConfig(BaseModel):
    """The `dynamic_sampling` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_rounds: int = Field(default=4, ge=1, description="times that a step samples, at most")
    oversample: float = Field(default=1.0, ge=1, lt=2, description="problems asked for each that is missing")
    metric: str = Field(default="reward", description="what must differ within a group: `reward`, or a reward's name")


@dataclass(frozen=True, kw_only=True, slots=True)
class Filled:
    """The groups of one step, and what became of everything that was asked for it."""

    trained: list[Answer]
    """[prompts_per_step]: carried over, then kept, then filled up without signal where the cap was reached."""
    dropped: list[Answer] = field(default_factory=list)
    """Without signal, and replaced."""
    pending: list[Answer] = field(default_factory=list)
    """With signal, for the next step."""
    num_carried: int = 0
    """Of `trained`, groups that were pending before."""
    num_filled: int = 0
    """Of `trained`, groups without signal."""
    num_rounds: int = 1
    """Times that was sampled."""

    def metrics(self) -> dict[str, int]:
        """The accounts, under the names of metrics.jsonl."""
        kept = len(self.trained) - self.num_carried - self.num_filled
        return {
            "dynamic/asked": kept + self.num_filled + len(self.dropped) + len(self.pending),
            "dynamic/kept": kept,
            "dynamic/filled": self.num_filled,
            "dynamic/dropped": len(self.dropped),
            "dynamic/pending": len(self.pending),
            "dynamic/carried": self.num_carried,
            "dynamic/rounds": self.num_rounds,
        }


def fill_step(
    prompts_per_step: int,
    config: DynamicSamplingConfig,
    pending: Sequence[Answer],
    ask: Callable[[int], list[Answer]],
) -> Filled:
    """Sample in rounds until there are `prompts_per_step` groups with signal, the `pending` ones first.

    `ask` gives the answers to so many questions more, in order. They, and `pending`, are the same on all ranks, so
    that all do as many rounds. Where `max_rounds` are not enough, the newest groups without signal fill the step up.
    """
    kept, silent, num_rounds = list(pending), list[Answer](), 0
    while len(kept) < prompts_per_step and num_rounds < config.max_rounds:
        missing = prompts_per_step - len(kept)
        for answer in ask(int(missing * config.oversample)):
            (kept if has_signal(answer.group, config.metric) else silent).append(answer)
        num_rounds += 1
    num_filled = max(0, prompts_per_step - len(kept))
    split = len(silent) - num_filled
    return Filled(
        trained=[*kept[:prompts_per_step], *silent[split:]],
        dropped=silent[:split],
        pending=kept[prompts_per_step:],
        num_carried=len(pending),
        num_filled=num_filled,
        num_rounds=num_rounds,
    )


def has_signal(group: Group, metric: str = "reward") -> bool:
    """Whether the group's rewards differ, or its scores by the reward called `metric`; what has none takes no part."""
    found = [r.reward if metric == "reward" else r.breakdown.get(metric) for r in group.results]
    scores = [score for score in found if score is not None]
    return bool(scores) and max(scores) - min(scores) > VARIANCE_TOLERANCE
