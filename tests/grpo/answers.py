"""Answers with rewards of one's choice, for tests of what is asked next."""

from collections.abc import Sequence

from grpo.types import Answer, Group, Question
from rewards import Problem, RewardResult
from rollouts import Completion


def make_answer(number: int, rewards: Sequence[float | None], *, place: int | None = None, version: int = 0) -> Answer:
    """Asking `number`, of the problem at `place` (default: the same number), with one completion for each reward."""
    place = number if place is None else place
    problem = Problem(id=f"p{place}", prompt=f"question {place}")
    group = Group(
        problem=problem,
        prompt_ids=[3, 4 + place],
        completions=[
            Completion(token_ids=[5, 6 + g, 2], logprobs=[-0.1, -0.2 - g / 3, -0.3], finish_reason="stop",
                       policy_version=version)
            for g in range(len(rewards))
        ],
        texts=[f"completion {g} of {number}" for g in range(len(rewards))],
        results=[
            RewardResult(reward=r, breakdown={} if r is None else {"right": r, "form": 1.0}, elapsed_s=0.5)
            for r in rewards
        ],
    )  # fmt: skip
    return Answer(question=Question(number=number, place=place, problem=problem), group=group)
