"""The update: cut as one likes, the gradient is the same; and it is the gradient of the loss as written."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from grpo.algorithm import PRESETS
from grpo.batch import Minibatch, Row, make_batches, make_minibatches, make_rows
from grpo.distributed import Ranks
from grpo.optimizer import MasterAdamW
from grpo.reference import Reference
from grpo.update import UpdateStats, prepare, update
from policy import Policy
from tests.grpo.rollouts import make_groups, minibatches_of, rows_of, tiny_config
from tests.policies import tiny_llama, tiny_policy

CHOICES: list[dict[str, Any]] = [
    *({"algorithm": name} for name in PRESETS),
    *({"loss_aggregation": name} for name in ("sequences", "prompts", "constant", "sums")),
    {"importance_sampling_level": "geometric_mean", "loss_aggregation": "sequences", "epsilon": 0.4},
    {"clipping": "sapo"},
    {"clipping": "dppo_tv", "epsilon": 0.1},
    {"clipping": "dppo_kl", "epsilon": 0.05},
    {"delta": 1.5},
    {"beta": 0.1},
    {"beta": 0.1, "kl_estimator": "k2", "top_p": 0.8},
    {"entropy_coef": 0.05},
    {"top_entropy_quantile": 0.3, "entropy_coef": 0.05},
    {"importance_sampling_correction": "sequence_truncate", "importance_sampling_clip_max": 1.0},
    {"importance_sampling_correction": "token_mask", "importance_sampling_clip_min": 0.9},
    {"off_policy_mask_threshold": 0.01},
    {"top_k": 7},
    {"temperature": 0.7, "min_p": 0.05},
]


def optimizer_of(policy: Policy) -> MasterAdamW:
    return MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)


def gradients(
    policy: Policy,
    minibatches: list[Minibatch],
    reference: Policy | None = None,
    **changes: Any,
) -> tuple[dict, UpdateStats]:
    """Gradients that reached the optimizer: with beta1 = 0 and a learning rate of 0 they are its first moments."""
    optimizer = MasterAdamW(policy, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0)
    stats = update(
        policy, optimizer, minibatches, learning_rate=0.0, config=tiny_config(max_grad_norm=1e9, **changes),
        ranks=Ranks(cpu=True), reference=None if reference is None else Reference(reference),
        entropy_coef=changes.get("entropy_coef", 0.0),
    )  # fmt: skip
    return {name: optimizer.inner.state[master]["exp_avg"] for name, master in optimizer.masters.items()}, stats


def nearby(policy: Policy, seed: int = 0) -> Policy:
    """Another policy, so near that ratios are near 1 and clip now and then."""
    other, generator = tiny_policy(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight, own in zip(other.parameters(), policy.parameters(), strict=True):
            weight.copy_(own + 0.02 * torch.randn(own.shape, generator=generator))
    return other


def rows_drawn_by(policy: Policy, **choices: Any) -> list[Row]:
    config = tiny_config(**choices)
    drawn = {key: choices[key] for key in ("temperature", "top_k", "top_p", "min_p") if key in choices}
    return rows_of(make_groups(policy, **drawn), config)


@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_one_row_at_a_time_gives_the_gradient_of_all(choices: dict[str, Any]) -> None:
    """Off-policy on purpose: sampled by one policy, learned by another near it. In units of the largest gradient."""
    sampler = tiny_policy(initializer_range=0.1)
    rows = rows_drawn_by(sampler, **choices)
    policy, reference = nearby(sampler), sampler if "beta" in choices else None
    choices = {"algorithm": None} | choices
    config, ranks = tiny_config(**choices), Ranks(cpu=True)
    found = []
    for max_tokens in (10**6, 1, 60):  # all rows of a problem after one prompt; each by itself; some together
        minibatches = minibatches_of(rows, max_tokens)
        assert all((batch.rows.shared is None) == (max_tokens == 1) for batch in minibatches[0].batches)
        # Old log-probabilities of the sampler, so that ratios are not 1.
        looked = prepare(sampler, minibatches, config.model_copy(update={"num_iterations": 2}), ranks)
        given = [step.minibatch for step in looked]
        found.append(gradients(policy, given, reference, **choices)[0])
    largest = max(float(whole.abs().max()) for whole in found[0].values())
    assert largest > 1e-2
    for cut in found[1:]:
        for name, whole in found[0].items():
            assert float((whole - cut[name]).abs().max()) < 2e-6 * largest, name


def test_micro_batches_give_the_gradient_of_one_batch() -> None:
    policy = tiny_policy()
    rows = rows_of(make_groups(policy))
    whole, _ = gradients(policy, minibatches_of(rows, 10**6))
    for max_tokens in (1, 40, 90):
        minibatches = minibatches_of(rows, max_tokens)
        assert len(minibatches[0].batches) > 1
        cut, _ = gradients(policy, minibatches)
        for name in whole:
            assert torch.allclose(whole[name], cut[name], atol=1e-6), name


@pytest.mark.parametrize("make", [tiny_policy, tiny_llama], ids=["deepseek_v3", "llama"])
def test_gradient_is_that_of_the_loss_as_written(make: Callable[[], Policy]) -> None:
    policy = make()
    rows = rows_of(make_groups(policy))
    ours, stats = gradients(policy, minibatches_of(rows, 60))
    policy.zero_grad()
    total, loss = sum(len(row.completion.token_ids) for row in rows), torch.zeros(())
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
    _, stats = gradients(policy, minibatches_of(rows, 200))
    assert 0 < stats.logp_difference_max < 1e-5
    assert stats.sampler_ratio_min <= 1 <= stats.sampler_ratio_max
    assert stats.sampler_ratio_mean == pytest.approx(1, abs=1e-5)
    assert stats.effective_sample_size == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("truncation", [{"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}], ids=str)
@pytest.mark.parametrize("choices", [{}, {"num_iterations": 2}], ids=str)
def test_sampler_and_trainer_agree_under_truncated_sampling(
    truncation: dict[str, Any], choices: dict[str, Any]
) -> None:
    policy = tiny_policy()
    rows = rows_drawn_by(policy, **truncation)
    _, stats = gradients(policy, minibatches_of(rows, 200), **truncation, **choices)
    assert 0 < stats.logp_difference_max < 1e-5


def test_truncated_completions_can_be_left_out() -> None:
    policy = tiny_policy()
    masked = rows_of(make_groups(policy, length=4), tiny_config(mask_truncated_completions=True))
    kept = [row for row in masked if row.completion.finish_reason == "stop"]
    assert 0 < len(kept) < len(masked)
    one, _ = gradients(policy, minibatches_of(masked))
    other, _ = gradients(policy, minibatches_of(kept))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_batch_without_anything_to_learn_moves_nothing() -> None:
    policy = tiny_policy()
    for choices in ({}, {"top_entropy_quantile": 0.2}, {"num_iterations": 2}):
        found, stats = gradients(policy, minibatches_of([]), **choices)
        assert all(not gradient.any() for gradient in found.values())
        assert (stats.loss, stats.grad_norm, stats.num_skipped) == (0.0, 0.0, 0)


def test_several_iterations_clip_against_the_policy_they_began_with() -> None:
    policy = tiny_policy()
    minibatches = minibatches_of(rows_of(make_groups(policy)))
    arguments = {"learning_rate": 3e-2, "ranks": Ranks(cpu=True), "config": tiny_config(num_iterations=3)}
    stats = update(policy, optimizer_of(policy), minibatches, **arguments)
    assert stats.clipped_low + stats.clipped_high > 0
    assert stats.logp_difference_max < 1e-5  # measured before the first of them


def test_minibatches_take_a_step_each_on_whole_problems() -> None:
    policy = tiny_policy()
    rows = rows_of(make_groups(policy, num_problems=5))
    minibatches = make_minibatches(rows, 2, 60, Ranks(cpu=True))
    problems = [{o.problem for batch in m.batches for o in batch.origins} for m in minibatches]
    assert problems == [{0, 2, 4}, {1, 3}]
    assert [m.counts.prompts for m in minibatches] == [3, 2]
    assert sum(m.counts.tokens for m in minibatches) == sum(len(row.completion.token_ids) for row in rows)
    one, other = tiny_policy(), tiny_policy()
    arguments = {"learning_rate": 1e-2, "ranks": Ranks(cpu=True)}
    update(one, optimizer_of(one), minibatches, config=tiny_config(num_minibatches=2), **arguments)
    # The same two steps by hand, the second with the log-probabilities of before the first.
    optimizer, config = optimizer_of(other), tiny_config(num_minibatches=2)
    steps = prepare(other, minibatches, config, Ranks(cpu=True))
    for step in steps:
        single = tiny_config()
        update(other, optimizer, [step.minibatch], config=single, **arguments)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), policy.parameters(), strict=True) if a.ndim > 1)


def test_reference_penalty_counts_from_the_reference() -> None:
    policy, reference = tiny_policy(), Reference(tiny_policy())
    minibatches, optimizer = minibatches_of(rows_of(make_groups(policy))), optimizer_of(policy)
    arguments = {"learning_rate": 1e-2, "ranks": Ranks(cpu=True), "config": tiny_config(beta=0.1)}
    first = update(policy, optimizer, minibatches, reference=reference, **arguments)
    second = update(policy, optimizer, minibatches, reference=reference, **arguments)
    assert first.kl == pytest.approx(0, abs=1e-6)
    assert second.kl > 1e-4


def test_an_entropy_bonus_alone_raises_the_entropy() -> None:
    policy = tiny_policy()
    groups = make_groups(policy)
    still = [replace(row, advantage=0.0) for row in rows_of(groups)]
    minibatches, optimizer = minibatches_of(still), optimizer_of(policy)
    arguments = {"learning_rate": 3e-3, "ranks": Ranks(cpu=True), "config": tiny_config()}
    found = [update(policy, optimizer, minibatches, entropy_coef=1.0, **arguments).entropy for _ in range(4)]
    assert found == sorted(found)
    assert found[-1] > found[0] + 0.05


def test_the_most_uncertain_tokens_are_those_of_the_whole_step() -> None:
    policy = tiny_policy()
    rows = rows_of(make_groups(policy))
    config = tiny_config(top_entropy_quantile=0.25)
    total = sum(len(row.completion.token_ids) for row in rows)
    for max_tokens in (10**6, 40):
        [step] = prepare(policy, minibatches_of(rows, max_tokens), config, Ranks(cpu=True))
        assert abs(step.num_kept - total / 4) <= 1
        certain = sum(int((b.certain_N & b.completion_mask_N).sum()) for b in step.minibatch.batches)
        assert certain == total - step.num_kept
    _, stats = gradients(policy, minibatches_of(rows), top_entropy_quantile=0.25)
    assert stats.entropy_kept > stats.entropy


def test_a_sampler_of_its_own_is_seen_and_weighed() -> None:
    sampler = tiny_policy()
    minibatches = minibatches_of(rows_of(make_groups(sampler)))
    policy = nearby(sampler)
    plain, stats = gradients(policy, minibatches)
    assert stats.effective_sample_size < 0.999
    assert stats.sampler_ratio_min < 1 < stats.sampler_ratio_max
    weighed, _ = gradients(policy, minibatches, importance_sampling_correction="token_truncate")
    assert any(not torch.allclose(plain[name], weighed[name], atol=1e-5) for name in plain)
    _, stats = gradients(policy, minibatches, off_policy_mask_threshold=1e-4)
    assert 0 < stats.dropped < 1


def test_expert_load_is_a_share_of_all_choices() -> None:
    policy = tiny_policy()
    rows = rows_of(make_groups(policy))
    _, stats = gradients(policy, minibatches_of(rows, 60))
    routers = stats.auxiliary.routers
    assert routers is not None
    assert len(routers.load_ME) == policy.config.num_moe_layers
    for layer in routers.load_ME:
        assert sum(layer) == pytest.approx(1)


def test_stale_rows_are_weighed_against_what_was_recorded() -> None:
    policy = tiny_policy()
    fresh = rows_of(make_groups(policy))
    for weight in policy.parameters():
        weight.data.mul_(1.02)  # another version of the policy than the one that sampled
    rows = [replace(row, is_stale=row is fresh[0] or row is fresh[5]) for row in fresh]
    total = sum(len(row.completion.token_ids) for row in rows)
    for num_iterations in (1, 2):
        ours, stats = gradients(policy, minibatches_of(rows, 60), num_iterations=num_iterations)
        policy.zero_grad()
        loss, ratios = torch.zeros(()), []
        for row in rows:
            token_ids = torch.tensor([[*row.prompt_ids, *row.completion.token_ids]])
            log_all = policy.logits(token_ids)[0].log_softmax(-1)
            for n, recorded in enumerate(row.completion.logprobs, start=len(row.prompt_ids)):
                logprob = log_all[n - 1, token_ids[0, n]]
                ratio = (logprob - (recorded if row.is_stale else logprob.detach())).exp()
                gain = torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.2) * row.advantage)
                loss = loss - gain / total
                ratios.append(float(ratio.detach()))
        loss.backward()
        assert max(abs(ratio - 1) for ratio in ratios) > 0.01, "a test in which nothing is stale shows nothing"
        assert stats.loss == pytest.approx(loss.item(), abs=1e-6)
        for name, weight in policy.named_parameters():
            assert torch.allclose(ours[name], weight.grad, atol=1e-6), name


def test_rows_of_an_earlier_version_are_stale() -> None:
    groups = make_groups(tiny_policy(), num_problems=1)
    rows = make_rows(groups, [[0.0] * 3], mask_truncated=False)
    assert not any(row.is_stale for row in rows)
    assert all(batch.stale_N is None for batch in make_batches(rows, 60))
    later = make_rows(groups, [[0.0] * 3], mask_truncated=False, version=1)
    assert all(row.is_stale for row in later)
    [batch] = make_batches(later, 10**6)
    assert batch.stale_N is not None
    assert torch.equal(batch.stale_N, batch.completion_mask_N)
