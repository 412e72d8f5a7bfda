"""The questions of a run, one after another: in the dataset's own order, or as a curriculum chooses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from grpo.curriculum import Curriculum, CurriculumConfig
from grpo.data import Dataset, DatasetError
from grpo.types import Question


class Stream:
    """Numbers the askings of a run from 0 and says which problem each is of; every rank holds the same."""

    def __init__(self, dataset: Dataset, curriculum: CurriculumConfig | None = None) -> None:
        self.dataset = dataset
        self.number = 0
        """Questions taken so far."""
        self.curriculum = None if curriculum is None else Curriculum(len(dataset), curriculum, dataset.seed)
        self._fingerprint = _fingerprint(dataset)

    def take(self, count: int, step: int) -> list[Question]:
        """The next questions, for this step."""
        if self.curriculum is None:
            places = self.dataset.places(self.number, count)
        else:
            places = self.curriculum.choose(count, self.number, step)
        questions = [self.question(self.number + index, place) for index, place in enumerate(places)]
        self.number += count
        return questions

    def question(self, number: int, place: int) -> Question:
        """Asking `number`, of the problem at `place` in the dataset."""
        return Question(number=number, place=place, problem=self.dataset.problems[place])

    def remember(self, place: int, pass_rate: float, step: int) -> None:
        """A question of this problem was answered, and this share of its completions passed."""
        if self.curriculum is not None:
            self.curriculum.remember(place, pass_rate, step)

    def state(self) -> dict[str, Any]:
        """What the next questions depend on, as JSON."""
        curriculum = None if self.curriculum is None else self.curriculum.state()
        return {"number": self.number, "dataset": self._fingerprint, "curriculum": curriculum}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave. Raises DatasetError where the dataset is not the one that it speaks of."""
        if state["dataset"] != self._fingerprint:
            raise DatasetError(
                "the dataset is not the one that the run began with (a problem was added, removed, moved or changed); "
                "put it back, or choose another name (name=...)"
            )
        self.number = int(state["number"])
        if self.curriculum is not None:
            self.curriculum.load_state(state["curriculum"])


def _fingerprint(dataset: Dataset) -> str:
    digest = hashlib.sha256()
    for problem in dataset.problems:
        digest.update(json.dumps([problem.id, problem.prompt, problem.answer]).encode())
    return digest.hexdigest()
