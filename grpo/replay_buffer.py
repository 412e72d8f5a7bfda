"""Rare successes, kept for the day when a problem is asked again and nobody solves it.

A group in which every completion fails teaches nothing, although the policy may have solved the same problem before.
Where it has, that old success is added to the group, with the log-probabilities recorded when it was sampled: the ratio
of its tokens is the policy's against the version that wrote them, clipped as any other (ExGRPO, arXiv 2510.02245,
section 3, mixes replayed and fresh completions of a group that way).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from grpo.state import completion_to_json, read_completion, read_result, result_to_json
from grpo.types import Answer, Group
from rewards import RewardResult
from rollouts import Completion


class ReplayBufferConfig(BaseModel):
    """The `replay_buffer` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    capacity: int = Field(default=256, ge=1, description="successes kept, one a problem; the oldest give way")
    max_pass_rate: float = Field(
        default=0.25, gt=0, lt=1, description="share of a group that may pass for it to be rare"
    )
    max_uses: int = Field(default=4, ge=1, description="times that a success is added to a group")
    max_age: int = Field(default=50, ge=1, description="steps for which a success is kept")


@dataclass(frozen=True, kw_only=True, slots=True)
class Success:
    """A completion that was right where few were."""

    completion: Completion
    """With the log-probabilities and the version of when it was sampled."""
    text: str
    """The completion decoded."""
    result: RewardResult
    """What the rewards gave it."""
    step: int
    """Step that sampled it."""
    uses: int = 0
    """Groups that it was added to."""


class ReplayBuffer:
    """At most one success of each problem, by the problem's place in the dataset, the oldest first."""

    def __init__(self, config: ReplayBufferConfig) -> None:
        self.config = config
        self.successes: dict[int, Success] = {}
        self.counts = dict.fromkeys(("stored", "added", "replaced", "evicted", "expired", "used_up"), 0)
        """What happened in the step in hand."""

    def begin(self, step: int) -> None:
        """Forget what is too old at this step, and count anew."""
        self.counts = dict.fromkeys(self.counts, 0)
        for place in [p for p, success in self.successes.items() if step - success.step > self.config.max_age]:
            del self.successes[place]
            self.counts["expired"] += 1

    def visit(self, answer: Answer, passed: Sequence[bool], step: int) -> Answer:
        """Add an old success where none of the completions `passed` [G], keep the first of them where few did."""
        place, group = answer.question.place, answer.group
        if 0 < sum(passed) <= self.config.max_pass_rate * len(passed):
            self._store(place, group, passed.index(True), step)
        success = self.successes.get(place)
        if any(passed) or success is None:
            return answer
        self.counts["added"] += 1
        used = replace(success, uses=success.uses + 1)
        if used.uses < self.config.max_uses:
            self.successes[place] = used
        else:
            del self.successes[place]
            self.counts["used_up"] += 1
        return replace(answer, group=_with_success(group, success))

    def metrics(self) -> dict[str, int]:
        """The accounts of the step in hand, under the names of metrics.jsonl."""
        return {"replay/size": len(self.successes), **{f"replay/{name}": n for name, n in self.counts.items()}}

    def state(self) -> list[dict[str, Any]]:
        """Everything that is kept, as JSON, the oldest first."""
        return [
            {
                "place": place,
                "completion": completion_to_json(success.completion),
                "text": success.text,
                "result": result_to_json(success.result),
                "step": success.step,
                "uses": success.uses,
            }
            for place, success in self.successes.items()
        ]

    def load_state(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take back what `state` gave."""
        self.successes = {
            row["place"]: Success(
                completion=read_completion(row["completion"]),
                text=row["text"],
                result=read_result(row["result"]),
                step=row["step"],
                uses=row["uses"],
            )
            for row in state
        }

    def _store(self, place: int, group: Group, index: int, step: int) -> None:
        if self.successes.pop(place, None) is not None:
            self.counts["replaced"] += 1
        elif len(self.successes) == self.config.capacity:
            del self.successes[next(iter(self.successes))]
            self.counts["evicted"] += 1
        self.successes[place] = Success(
            completion=group.completions[index], text=group.texts[index], result=group.results[index], step=step
        )
        self.counts["stored"] += 1


def _with_success(group: Group, success: Success) -> Group:
    return replace(
        group,
        completions=[*group.completions, success.completion],
        texts=[*group.texts, success.text],
        results=[*group.results, success.result],
    )
