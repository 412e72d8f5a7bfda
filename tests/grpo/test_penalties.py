"""What is taken from rewards, by hand."""

from dataclasses import replace

import pytest
import torch

from grpo.distributed import Ranks
from grpo.penalties import divergences, penalised_rewards, punishments
from grpo.reference import Reference
from grpo.types import Group, Origin
from rewards import Problem, RewardResult
from rollouts import Completion
from tests.grpo.rollouts import make_groups, tiny_config
from tests.policies import tiny_policy


def group_of(lengths: list[int]) -> Group:
    return Group(
        problem=Problem(id="1", prompt="?"),
        prompt_ids=[3],
        completions=[
            Completion(token_ids=[5] * length, logprobs=[-1.0] * length, finish_reason="stop", policy_version=0)
            for length in lengths
        ],
        texts=[""] * len(lengths),
        results=[RewardResult(reward=1.0) for _ in lengths],
    )


def test_soft_overlong_punishment_by_hand() -> None:
    # of 20 tokens the last 8 cost: none up to 12, half at 16, all at 20
    config = tiny_config(soft_punish_cache=8)
    assert punishments(group_of([1, 12, 16, 20]), config) == [0.0, 0.0, -0.5, -1.0]
    found = penalised_rewards([group_of([12, 16])], config, policy=tiny_policy(), reference=None, ranks=Ranks(cpu=True))
    assert found == [[1.0, 0.5]]


def test_a_completion_without_a_reward_has_none_after_either() -> None:
    group = group_of([20, 20])
    group = replace(group, results=[RewardResult(reward=None), RewardResult(reward=0.25)])
    found = penalised_rewards(
        [group], tiny_config(soft_punish_cache=8), policy=tiny_policy(), reference=None, ranks=Ranks(cpu=True)
    )
    assert found == [[None, -0.75]]


@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}])
def test_divergence_in_the_reward_is_of_the_whole_completion(truncation: dict) -> None:
    policy, other = tiny_policy(), tiny_policy()
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    config = tiny_config(beta=0.5, kl_in="reward", kl_estimator="k1", max_tokens_per_micro_batch=60, **truncation)
    groups = make_groups(policy, **truncation)
    found = divergences(groups, config, policy=policy, reference=Reference(other), ranks=Ranks(cpu=True))
    group = groups[1]
    completion = group.completions[2]
    token_ids = torch.tensor([[*group.prompt_ids, *completion.token_ids]])
    expected = 0.0
    with torch.no_grad():
        ours, theirs = policy.logits(token_ids)[0], other.logits(token_ids)[0]
    for n in range(len(group.prompt_ids), token_ids.shape[1]):
        kept = ours[n - 1].topk(truncation.get("top_k", 61)).indices
        place = kept.tolist().index(int(token_ids[0, n]))
        logs = [logits[n - 1][kept].log_softmax(-1)[place] for logits in (ours, theirs)]
        expected += float(logs[0] - logs[1])
    assert found[Origin(problem=1, completion=2)] == pytest.approx(expected, abs=1e-4)
    rewards = penalised_rewards(groups, config, policy=policy, reference=Reference(other), ranks=Ranks(cpu=True))
    assert rewards[1][2] == pytest.approx(group.results[2].reward - 0.5 * expected, abs=1e-4)


def test_a_reference_that_equals_the_policy_costs_nothing() -> None:
    policy = tiny_policy()
    config = tiny_config(beta=0.5, kl_in="reward")
    groups = make_groups(policy)
    found = penalised_rewards(groups, config, policy=policy, reference=Reference(policy), ranks=Ranks(cpu=True))
    assert found == [pytest.approx([r.reward for r in group.results], abs=1e-5) for group in groups]
