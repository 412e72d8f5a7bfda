"""A curriculum: which problem is asked next, by what share of its completions passed before.

Each problem is in one pool: `unseen`, `hard` (below the target range), `target`, `easy` (above it), or `retired`. The
pools that hold something take turns by their shares; within a pool the problem that waited longest comes first. A
problem that keeps passing retires, and is due again some steps later: back in `easy`, at the head of the line.

Nothing is drawn at random: the choice follows from the seed (the order of the unseen ones) and from what happened.
Shapes: P problems of the dataset.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

POOLS = ("unseen", "hard", "target", "easy")


class PoolShares(BaseModel):
    """How often each pool has its turn, relative to the others; an empty pool is passed over."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    unseen: float = Field(default=0.4, gt=0)
    hard: float = Field(default=0.1, gt=0)
    target: float = Field(default=0.4, gt=0)
    easy: float = Field(default=0.1, gt=0)


class CurriculumConfig(BaseModel):
    """The `curriculum` section of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    memory: float = Field(default=0.5, ge=0, lt=1, description="weight of the pass rate so far at each new one")
    target_low: float = Field(default=0.2, ge=0, le=1, description="least pass rate of the target pool")
    target_high: float = Field(default=0.8, ge=0, le=1, description="largest pass rate of the target pool")
    shares: PoolShares = Field(default_factory=PoolShares)
    retire_at: float = Field(default=0.95, gt=0, le=1, description="pass rate from which a problem retires")
    retire_after: int = Field(default=2, ge=1, description="askings before a problem may retire")
    revisit_steps: int = Field(default=100, ge=1, description="steps until a retired problem is due again")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.target_low <= self.target_high <= self.retire_at:
            raise ValueError(
                "curriculum needs target_low <= target_high <= retire_at, got "
                f"target_low={self.target_low}, target_high={self.target_high}, retire_at={self.retire_at}"
            )
        return self


class Curriculum:
    """The pass-rate memory of a dataset's problems, and the choice that follows from it."""

    def __init__(self, num_problems: int, config: CurriculumConfig, seed: int) -> None:
        self.config = config
        self.rate_P = np.zeros(num_problems)
        """Exponential mean of the shares of completions that passed."""
        self.visits_P = np.zeros(num_problems, dtype=np.int64)
        """Askings that were answered."""
        self.last_step_P = np.zeros(num_problems, dtype=np.int64)
        """Step of the last answer."""
        order = list(range(num_problems))
        random.Random(f"order {seed} 0").shuffle(order)
        self.turn_P = np.empty(num_problems, dtype=np.int64)
        """Number of the last asking; of a problem never asked its place in the dataset's order, below 0."""
        self.turn_P[order] = np.arange(num_problems) - num_problems
        self.credits = dict.fromkeys(POOLS, 0.0)
        """What each pool is owed, in askings."""
        self._unanswered: set[int] = set()

    def choose(self, count: int, number: int, step: int) -> list[int]:
        """Places of the next problems, for askings `number` to `number + count` at this step.

        A problem whose answer is still out is not asked again, unless there is nothing else.
        """
        pools, chosen = self._lines(step), list[int]()
        for n in range(number, number + count):
            if not any(pools.values()):
                pools = {"unseen": self._by_turn(np.arange(len(self.turn_P)))}
            place = pools[self._next_pool(pools)].pop()
            self.turn_P[place] = n
            self._unanswered.add(place)
            chosen.append(place)
        return chosen

    def remember(self, place: int, pass_rate: float, step: int) -> None:
        """An asking of this problem was answered, and this share of its completions passed."""
        kept = self.config.memory if self.visits_P[place] else 0.0
        self.rate_P[place] = kept * self.rate_P[place] + (1 - kept) * pass_rate
        self.visits_P[place] += 1
        self.last_step_P[place] = step
        self._unanswered.discard(place)

    def metrics(self, step: int) -> dict[str, float]:
        """Problems in each pool at this step, and the mean of what is remembered."""
        pool_P, seen_P = self._pools(step), self.visits_P > 0
        counts = {f"curriculum/{name}": int((pool_P == index).sum()) for index, name in enumerate((*POOLS, "retired"))}
        return counts | {"curriculum/pass_rate": float(self.rate_P[seen_P].mean()) if seen_P.any() else 0.0}

    def state(self) -> dict[str, Any]:
        """Everything that the next choice depends on, as JSON; to be taken when no answer is out."""
        assert not self._unanswered, "a problem that was asked has not been answered"
        seen = np.flatnonzero(self.visits_P)
        columns = (seen, self.rate_P[seen], self.visits_P[seen], self.last_step_P[seen], self.turn_P[seen])
        return {
            "credits": dict(self.credits),
            "seen": [list(row) for row in zip(*(c.tolist() for c in columns), strict=True)],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave; of a curriculum that has asked nothing yet."""
        self.credits = dict(state["credits"])
        for place, rate, visits, last_step, turn in state["seen"]:
            self.rate_P[place], self.visits_P[place] = rate, visits
            self.last_step_P[place], self.turn_P[place] = last_step, turn

    def _pools(self, step: int) -> np.ndarray:
        """Index of each problem's pool in POOLS, [P]; one more for retired."""
        config, rate_P = self.config, self.rate_P
        pool_P = np.where(rate_P < config.target_low, 1, np.where(rate_P <= config.target_high, 2, 3))
        is_sure_P = (rate_P >= config.retire_at) & (self.visits_P >= config.retire_after)
        pool_P[is_sure_P & (step - self.last_step_P < config.revisit_steps)] = len(POOLS)
        pool_P[self.visits_P == 0] = 0
        return pool_P

    def _lines(self, step: int) -> dict[str, list[int]]:
        """The problems of each pool that may be asked, the one that waited longest last."""
        pool_P = self._pools(step)
        pool_P[list(self._unanswered)] = -1
        return {name: self._by_turn(np.flatnonzero(pool_P == index)) for index, name in enumerate(POOLS)}

    def _by_turn(self, places: np.ndarray) -> list[int]:
        newest_first: list[int] = places[np.argsort(-self.turn_P[places])].tolist()
        return newest_first

    def _next_pool(self, pools: Mapping[str, list[int]]) -> str:
        """Smooth weighted round robin: every pool that holds something is owed its share, the one owed most pays."""
        owed = {name: getattr(self.config.shares, name) for name in POOLS if pools.get(name)}
        total = sum(owed.values())
        for name, share in owed.items():
            self.credits[name] += share / total
        name = max(owed, key=self.credits.__getitem__)
        self.credits[name] -= 1
        return name
