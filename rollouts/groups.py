"""The completions of one call as they come, prompt by prompt."""

from __future__ import annotations

from rollouts.types import Completion, OnGroup


class Groups:
    """Gathers completions in any order, and says when a prompt has all of its own.

    Shapes: P prompts of the call, G completions of each. A completion's place in the call is p * G + g.
    """

    def __init__(self, num_prompts: int, num_generations: int, on_group: OnGroup | None = None) -> None:
        self._size, self._on_group = num_generations, on_group
        self._completions: list[Completion | None] = [None] * (num_prompts * num_generations)
        self._missing_P = [num_generations] * num_prompts

    def add(self, place: int, completion: Completion) -> None:
        """The completion at this place has ended; the last one of a prompt is told to `on_group`."""
        assert self._completions[place] is None
        self._completions[place] = completion
        prompt = place // self._size
        self._missing_P[prompt] -= 1
        if self._on_group is not None and not self._missing_P[prompt]:
            self._on_group(prompt, self._group(prompt))

    def has(self, place: int) -> bool:
        """Whether the completion at this place has ended."""
        return self._completions[place] is not None

    def all(self) -> list[list[Completion]]:
        """[P][G], once all have ended."""
        return [self._group(prompt) for prompt in range(len(self._missing_P))]

    def _group(self, prompt: int) -> list[Completion]:
        found = self._completions[prompt * self._size : (prompt + 1) * self._size]
        group = [completion for completion in found if completion is not None]
        assert len(group) == self._size
        return group
