"""What to look at where the first step of a run earned nothing: a group of equal rewards moves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo.config import Config
from grpo.types import Group
from rewards.registry import reward_name

MAX_DETAIL = 200
"""Characters of a grader's word on one completion."""


def explain_silence(groups: Sequence[Group], config: Config, rollouts: Path) -> str | None:
    """A paragraph for a person, where no completion got anything of the first reward (the one that evaluation counts).

    `rollouts` is the folder that holds the completions. A problem with a reward of its own counts by that. None where
    some did, or nothing was sampled.
    """
    results = [result for group in groups for result in group.results]
    name = reward_name(config.rewards[0])
    scores = [
        result.reward if group.problem.reward else result.breakdown.get(name)
        for group in groups
        for result in group.results
    ]
    if not results or any(scores):
        return None
    reasons = [completion.finish_reason for group in groups for completion in group.completions]
    causes = {
        f"were cut off at max_completion_length={config.max_completion_length}": reasons.count("length"),
        "held nothing that could be graded (unparsed)": [result.status for result in results].count("unparsed"),
        "were not graded to an end (timeout or error)": sum(
            result.status in ("timeout", "error") for result in results
        ),
        f"have nothing that {name} could compare with (dataset.answer_column)": scores.count(None),
    }
    told = "".join(f"{count} {cause}. " for cause, count in causes.items() if count)
    detail = next((result.detail for result in results if result.detail), "")[:MAX_DETAIL]
    return (
        f"step 1: none of {len(results)} completions got anything from the reward {name!r}, so it teaches nothing yet. "
        f"{told}{f'For instance: {detail}. ' if detail else ''}They are in {rollouts}. Where they ramble or answer in "
        "another form, see to prompt_template (chat for an "
        "instruct model, r1_zero or a text of your own for a base model) and stop_strings; where they are cut off, to "
        "max_completion_length; where they are right, to `grpo reward check`; where they are wrong, to easier problems "
        "or more num_generations"
    )
