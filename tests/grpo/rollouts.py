"""Groups of real completions of a tiny policy, for tests of what comes after sampling."""

from typing import Any

import torch

from grpo.advantages import step_advantages
from grpo.batch import Minibatch, Row, make_minibatches, make_rows
from grpo.config import Config
from grpo.distributed import Ranks
from grpo.types import Group
from policy import Policy
from rewards import Problem, RewardResult
from rollouts import EngineConfig, SamplingParams, make_engine


def tiny_config(**changes: object) -> Config:
    """A recipe that is only read for how an update is done."""
    values: dict[str, object] = {
        "name": "test", "device": "cpu", "model": "none", "max_steps": 4, "max_completion_length": 20,
        "dataset": {"countdown": {}}, "learning_rate": 1e-3, "warmup_steps": 0,
    }  # fmt: skip
    return Config.model_validate(values | changes)


def make_groups(
    policy: Policy, num_problems: int = 4, num_generations: int = 3, length: int = 20, **sampling: Any
) -> list[Group]:
    """Sampled groups with rewards that differ within each."""
    prompts = [list(range(3 + p, 7 + 2 * p)) for p in range(num_problems)]
    params = SamplingParams(max_completion_length=length, stop_token_ids=(2, 9, 17), **sampling)
    sampled = make_engine(policy, EngineConfig()).generate(prompts, num_generations, params)
    scores = torch.rand(num_problems, num_generations, generator=torch.Generator().manual_seed(1)).tolist()
    return [
        Group(
            problem=Problem(id=str(p), prompt="?"),
            prompt_ids=prompts[p],
            completions=sampled[p],
            texts=["" for _ in sampled[p]],
            results=[RewardResult(reward=score, breakdown={"score": score}) for score in scores[p]],
        )
        for p in range(num_problems)
    ]


def rows_of(groups: list[Group], config: Config | None = None) -> list[Row]:
    """Rows with the advantages that a recipe gives them."""
    config = config or tiny_config()
    advantages = step_advantages([[r.reward for r in group.results] for group in groups], config)
    return make_rows(groups, advantages, mask_truncated=config.mask_truncated_completions)


def minibatches_of(
    rows: list[Row], max_tokens: int = 100, num_minibatches: int = 1, *, share_prompts: bool = True
) -> list[Minibatch]:
    """What an update is given, on one rank."""
    return make_minibatches(rows, num_minibatches, max_tokens, Ranks(cpu=True), share_prompts=share_prompts)
