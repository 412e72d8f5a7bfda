"""The numbers of a step, worked out by hand."""

import math

import pytest

from grpo.auxiliary import AuxiliaryStats
from grpo.metrics import Graded, engine_metrics, graded, rollout_metrics, update_metrics
from grpo.routers import RouterStats
from grpo.types import Group
from grpo.update import UpdateStats
from rewards import Problem, RewardResult
from rollouts import Completion, EngineStats


def make_group(
    rewards: list[float | None],
    lengths: list[int],
    reasons: list[str],
    statuses: list[str] | None = None,
    parts: list[dict[str, float]] | None = None,
) -> Group:
    return Group(
        problem=Problem(id="1", prompt="?"),
        prompt_ids=[1],
        completions=[
            Completion(token_ids=[5] * length, logprobs=[0.0] * length, finish_reason=reason, policy_version=0)  # type: ignore[arg-type]
            for length, reason in zip(lengths, reasons, strict=True)
        ],
        texts=[""] * len(rewards),
        results=[
            RewardResult(reward=reward, breakdown=part, status=status)  # type: ignore[arg-type]
            for reward, part, status in zip(
                rewards, parts or [{}] * len(rewards), statuses or ["ok"] * len(rewards), strict=True
            )
        ],
    )


def make_stats(routers: RouterStats | None, *, num_skipped: int = 0, mtp_loss: float | None = None) -> UpdateStats:
    return UpdateStats(
        loss=0.5,
        kl=0.01,
        entropy=1.5,
        entropy_kept=1.75,
        clipped_low=0.1,
        clipped_high=0.15,
        dropped=0.05,
        logp_difference_mean=1e-6,
        logp_difference_max=1e-5,
        sampler_ratio_mean=1.01,
        sampler_ratio_min=0.5,
        sampler_ratio_max=2.5,
        effective_sample_size=0.9,
        grad_norm=2.0,
        num_skipped=num_skipped,
        num_halvings=0,
        auxiliary=AuxiliaryStats(mtp_loss=mtp_loss, routers=routers),
    )


def test_rewards_and_their_parts() -> None:
    groups = [
        make_group([1.0, 0.0], [3, 5], ["stop", "length"], parts=[{"a": 1.0, "b": 1.0}, {"a": 0.0}]),
        make_group([0.5, 0.5], [4, 4], ["stop", "stop"], parts=[{"a": 0.5}, {"a": 0.5}]),
    ]
    metrics = rollout_metrics([graded(group) for group in groups])
    assert metrics["reward"] == 0.5
    assert metrics["reward_std"] == pytest.approx((0.5 + 0.0) / 2)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["rewards/a/mean"] == 0.5
    assert metrics["rewards/a/std"] == pytest.approx(math.sqrt(0.125))
    assert (metrics["rewards/b/mean"], metrics["rewards/b/std"]) == (1.0, 0.0)
    assert metrics["completions/mean_length"] == 4
    assert metrics["completions/max_length"] == 5
    assert metrics["completions/clipped_ratio"] == 0.25
    assert metrics["completions/aborted"] == 0


def test_completions_without_a_reward_count_in_no_mean() -> None:
    one = graded(make_group([None, 1.0], [2, 2], ["abort", "stop"], parts=[{}, {"a": 1.0}]))
    none = graded(make_group([None, None], [2, 2], ["stop", "stop"]))
    metrics = rollout_metrics([one, none])
    assert one.rewards == [1.0]
    assert metrics["reward"] == 1.0
    assert metrics["frac_reward_zero_std"] == 1.0
    assert metrics["rewards/a/mean"] == 1.0
    assert metrics["completions/aborted"] == 1
    nothing = rollout_metrics([none])
    assert (nothing["reward"], nothing["reward_std"], nothing["frac_reward_zero_std"]) == (0.0, 0.0, 1.0)


def test_failures_of_grading_are_counted_by_kind() -> None:
    statuses = ["ok", "unparsed", "timeout", "error", "error"]
    metrics = rollout_metrics([graded(make_group([0.0] * 5, [1] * 5, ["stop"] * 5, statuses))])
    counts = {kind: metrics[f"grading/{kind}"] for kind in ("unparsed", "timeout", "error")}
    assert counts == {"unparsed": 1, "timeout": 1, "error": 2}


def test_what_ranks_exchange_is_plain_data() -> None:
    small = graded(make_group([1.0], [3], ["stop"], parts=[{"a": 1.0}]))
    assert small == Graded(
        rewards=[1.0], breakdowns=[{"a": 1.0}], statuses=["ok"], lengths=[3], finish_reasons=["stop"]
    )


def test_update_metrics_and_expert_load() -> None:
    routers = RouterStats(load_ME=[[0.5, 0.25, 0.25, 0.0], [0.25] * 4], entropy_M=[0.5, 1.5], balance_M=None, z_M=None)
    metrics = update_metrics(make_stats(routers))
    assert metrics["loss"] == 0.5
    assert metrics["kl"] == 0.01
    assert metrics["entropy"] == 1.5
    assert (metrics["clip_ratio/low_mean"], metrics["clip_ratio/high_mean"]) == (0.1, 0.15)
    assert metrics["clip_ratio/region_mean"] == pytest.approx(0.25)
    ratio = {kind: metrics[f"sampling/importance_sampling_ratio/{kind}"] for kind in ("mean", "min", "max")}
    assert ratio == {"mean": 1.01, "min": 0.5, "max": 2.5}
    assert metrics["sampling/effective_sample_size"] == 0.9
    assert metrics["sampling/off_policy_masked"] == 0.05
    assert metrics["sampling/logp_difference_max"] == 1e-5
    assert metrics["grad_norm"] == 2.0
    assert metrics["update/skipped"] == 0
    assert metrics["moe/load"] == [[0.5, 0.25, 0.25, 0.0], [0.25] * 4]
    assert metrics["moe/max_load"] == 2.0
    assert metrics["moe/dead_experts"] == 1
    assert metrics["moe/entropy"] == 1.0
    assert metrics["moe/layers/max_load"] == [2.0, 1.0]
    assert metrics["moe/layers/dead_experts"] == [1, 0]
    assert metrics["moe/layers/entropy"] == [0.5, 1.5]
    assert not {"moe/balance_loss", "moe/z_loss", "mtp/loss"} & metrics.keys()


def test_auxiliary_losses_are_reported_where_they_are_in_use() -> None:
    routers = RouterStats(load_ME=[[0.5, 0.5]] * 2, entropy_M=[0.5] * 2, balance_M=[1.0, 2.0], z_M=[3.0, 5.0])
    metrics = update_metrics(make_stats(routers, mtp_loss=2.5))
    assert (metrics["moe/balance_loss"], metrics["moe/z_loss"], metrics["mtp/loss"]) == (1.5, 4.0, 2.5)


def test_a_dense_policy_has_no_expert_load() -> None:
    metrics = update_metrics(make_stats(None, num_skipped=1))
    assert metrics["update/skipped"] == 1
    assert not any(name.startswith("moe/") for name in metrics)


def test_what_samplers_did_is_summed_over_ranks_and_what_did_not_happen_is_left_out() -> None:
    before = EngineStats(num_drafted=10, num_accepted=9, num_cached_tokens=3)
    after = EngineStats(num_drafted=18, num_accepted=11, num_cached_tokens=3, num_preemptions=2)
    assert engine_metrics([after - before, EngineStats(num_drafted=2, num_accepted=1)]) == {
        "sampling/drafted": 10,
        "sampling/acceptance_rate": 0.3,
        "sampling/preemptions": 2,
    }
    assert engine_metrics([EngineStats(num_cached_tokens=16)]) == {"sampling/cached_prompt_tokens": 16}
    assert engine_metrics([EngineStats(), EngineStats()]) == {}
