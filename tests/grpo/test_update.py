"""The update: cut as one likes, the gradient is the same; and it is the gradient of the loss as written."""

from collections.abc import Callable

import pytest
import torch

from grpo.advantages import group_advantages
from grpo.batch import Row, count_learned_tokens, make_batches, make_rows
from grpo.distributed import Ranks
from grpo.optimizer import MasterAdamW
from grpo.types import Batch, Group
from grpo.update import UpdateStats, update
from policy import Policy
from tests.grpo.rollouts import make_groups, tiny_config
from tests.policies import tiny_llama, tiny_policy


def rows_of(groups: list[Group], *, mask_truncated: bool = False) -> list[Row]:
    advantages = [group_advantages([r.reward for r in group.results], "group") for group in groups]
    return make_rows(groups, advantages, mask_truncated=mask_truncated)


def gradients(policy: Policy, batches: list[Batch], num_tokens: int, **changes: object) -> tuple[dict, UpdateStats]:
    """Gradients that reached the optimizer: with beta1 = 0 and a learning rate of 0 they are its first moments."""
    optimizer = MasterAdamW(policy, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0)
    config = tiny_config(max_grad_norm=1e9, **changes)
    stats = update(
        policy, optimizer, batches, num_tokens=num_tokens, learning_rate=0.0, config=config, ranks=Ranks(cpu=True)
    )
    return {name: optimizer.inner.state[master]["exp_avg"] for name, master in optimizer.masters.items()}, stats


def test_micro_batches_give_the_gradient_of_one_batch() -> None:
    policy = tiny_policy()
    rows = rows_of(make_groups(policy))
    whole, _ = gradients(policy, make_batches(rows, 10**6), count_learned_tokens(rows))
    for max_tokens in (1, 40, 90):
        batches = make_batches(rows, max_tokens)
        assert len(batches) > 1
        cut, _ = gradients(policy, batches, count_learned_tokens(rows))
        for name in whole:
            assert torch.allclose(whole[name], cut[name], atol=1e-6), name


@pytest.mark.parametrize("make", [tiny_policy, tiny_llama], ids=["deepseek_v3", "llama"])
def test_gradient_is_that_of_the_loss_as_written(make: Callable[[], Policy]) -> None:
    policy = make()
    rows = rows_of(make_groups(policy))
    ours, stats = gradients(policy, make_batches(rows, 60), count_learned_tokens(rows))
    policy.zero_grad()
    total, loss = count_learned_tokens(rows), torch.zeros(())
    for row in rows:
        token_ids = torch.tensor([[*row.prompt_ids, *row.completion.token_ids]])
        log_all = policy.logits(token_ids)[0].log_softmax(-1)
        for n in range(len(row.prompt_ids), token_ids.shape[1]):
            logprob = log_all[n - 1, token_ids[0, n]]
            loss = loss - (logprob - logprob.detach()).exp() * row.advantage / total
    loss.backward()
    assert stats.loss == pytest.approx(loss.item(), abs=1e-6)
    for name, weight in policy.named_parameters():
        assert torch.allclose(ours[name], weight.grad, atol=1e-6), name


def test_sampler_and_trainer_agree_before_the_first_step() -> None:
    policy = tiny_policy()
    rows = rows_of(make_groups(policy))
    _, stats = gradients(policy, make_batches(rows, 200), count_learned_tokens(rows))
    assert 0 < stats.logp_difference_max < 1e-5


def test_truncated_completions_can_be_left_out() -> None:
    policy = tiny_policy()
    groups = make_groups(policy, length=4)
    masked = rows_of(groups, mask_truncated=True)
    kept = [row for row in masked if row.completion.finish_reason == "stop"]
    assert 0 < len(kept) < len(masked)
    one, _ = gradients(policy, make_batches(masked, 100), count_learned_tokens(masked))
    other, _ = gradients(policy, make_batches(kept, 100), count_learned_tokens(kept))
    assert count_learned_tokens(masked) == count_learned_tokens(kept)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_without_anything_to_learn_moves_nothing() -> None:
    policy = tiny_policy()
    found, stats = gradients(policy, [], 0)
    assert all(not gradient.any() for gradient in found.values())
    assert (stats.loss, stats.grad_norm, stats.is_skipped) == (0.0, 0.0, False)


def test_several_iterations_clip_against_the_policy_they_began_with() -> None:
    policy = tiny_policy()
    rows = rows_of(make_groups(policy))
    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    arguments = {"num_tokens": count_learned_tokens(rows), "learning_rate": 3e-2, "ranks": Ranks(cpu=True)}
    stats = update(policy, optimizer, make_batches(rows, 100), config=tiny_config(num_iterations=3), **arguments)
    assert stats.clipped > 0
    assert stats.logp_difference_max < 1e-5  # measured before the first of them


def test_reference_penalty_counts_from_the_reference() -> None:
    policy, reference = tiny_policy(), tiny_policy()
    rows = rows_of(make_groups(policy))
    arguments = {"num_tokens": count_learned_tokens(rows), "learning_rate": 1e-2, "ranks": Ranks(cpu=True)}
    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    config = tiny_config(beta=0.1)
    first = update(policy, optimizer, make_batches(rows, 100), config=config, reference=reference, **arguments)
    second = update(policy, optimizer, make_batches(rows, 100), config=config, reference=reference, **arguments)
    assert first.kl == pytest.approx(0, abs=1e-6)
    assert second.kl > 1e-4


def test_expert_load_is_a_share_of_all_choices() -> None:
    policy = tiny_policy()
    rows = rows_of(make_groups(policy))
    _, stats = gradients(policy, make_batches(rows, 60), count_learned_tokens(rows))
    routers = stats.auxiliary.routers
    assert routers is not None
    assert len(routers.load_ME) == policy.config.num_moe_layers
    for layer in routers.load_ME:
        assert sum(layer) == pytest.approx(1)


def test_rows_of_a_batch_fit_its_budget_and_none_is_lost() -> None:
    policy = tiny_policy()
    rows = rows_of(make_groups(policy, num_problems=7))
    batches = make_batches(rows, 100)
    assert sum(int(batch.completion_mask_N.sum()) for batch in batches) == count_learned_tokens(rows)
    assert sum(len(batch.rows.lengths) for batch in batches) == len(rows)
    assert all(len(batch.rows.lengths) * batch.rows.longest <= 100 for batch in batches)
