"""Each named algorithm teaches: a tiny policy, a task that it does by chance at first, three seeds.

Two optimizer steps a batch, so that ratios and clipping take part.
"""

from statistics import fmean, stdev

import pytest

from grpo.advantages import step_advantages
from grpo.algorithm import PRESETS
from grpo.batch import make_minibatches, make_rows
from grpo.distributed import Ranks
from grpo.optimizer import MasterAdamW
from grpo.types import Group
from grpo.update import update
from rewards import Problem, RewardResult
from rollouts import EngineConfig, SamplingParams, make_engine
from tests.grpo.rollouts import tiny_config
from tests.policies import tiny_policy

NUM_STEPS, NUM_PROBLEMS, NUM_GENERATIONS = 25, 8, 8


def reward_of(token_ids: list[int]) -> float:
    """The share of small numbers among the tokens; the third of the vocabulary that counts comes up by chance."""
    return fmean(token < 20 for token in token_ids)


def learning_curve(algorithm: str | None, seed: int) -> list[float]:
    """The mean reward of each step."""
    policy = tiny_policy(seed)
    config = tiny_config(algorithm=algorithm, num_minibatches=2)
    params = SamplingParams(max_completion_length=config.max_completion_length, stop_token_ids=(2,))
    engine = make_engine(policy, EngineConfig())
    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    prompts = [[3 + p, 4 + p, 5 + p] for p in range(NUM_PROBLEMS)]
    curve = []
    for step in range(NUM_STEPS):
        engine.load_weights(policy, step)
        seeds = [1_000_000 * seed + 1_000 * step + p for p in range(NUM_PROBLEMS)]
        groups = [
            Group(
                problem=Problem(id=str(p), prompt="?"),
                prompt_ids=prompts[p],
                completions=completions,
                texts=[""] * NUM_GENERATIONS,
                results=[RewardResult(reward=reward_of(list(c.token_ids))) for c in completions],
            )
            for p, completions in enumerate(engine.generate(prompts, NUM_GENERATIONS, params, seeds))
        ]
        rewards = [[result.reward for result in group.results] for group in groups]
        curve.append(fmean(reward or 0.0 for group in rewards for reward in group))
        rows = make_rows(groups, step_advantages(rewards, config), mask_truncated=config.mask_truncated_completions)
        minibatches = make_minibatches(rows, config.num_minibatches, 4096, Ranks(cpu=True))
        update(policy, optimizer, minibatches, learning_rate=2e-3, config=config, ranks=Ranks(cpu=True))
    return curve


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [None, *PRESETS])
def test_the_reward_rises_on_every_seed(algorithm: str | None) -> None:
    for seed in range(3):
        curve = learning_curve(algorithm, seed)
        first, last = curve[:5], curve[-5:]
        error = (stdev(first) ** 2 / 5 + stdev(last) ** 2 / 5) ** 0.5
        print(f"{algorithm} seed {seed}: {fmean(first):.3f} to {fmean(last):.3f}, standard error {error:.3f}")
        assert fmean(last) - fmean(first) > max(0.1, 5 * error), (algorithm, seed, curve)
