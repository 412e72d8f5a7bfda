"""The loss put together: each choice counts where it should, by hand.

Shapes: N packed tokens.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo.aggregation import Counts
from grpo.algorithm import AlgorithmConfig
from grpo.loss import LossTerms, batch_loss
from grpo.types import Batch, Origin
from policy import PackedRows
from policy.packing import Wanted

MASK = torch.tensor([False, True, True, False, True])
COUNTS = Counts(tokens=3, sequences=2, prompts=1)


def make_batch(ratios: list[float], advantages: list[float], **changes: Any) -> tuple[Tensor, Batch]:
    """Rows of two and one learned tokens, each after a prompt of one, with old log-probabilities of -1."""
    logprobs = torch.zeros(5)
    logprobs[MASK] = -1 + torch.tensor(ratios).log()
    row_advantages = torch.tensor(advantages).repeat_interleave(torch.tensor([3, 2]))
    batch = Batch(
        token_ids_N=torch.zeros(5, dtype=torch.int64),
        rows=PackedRows.of([3, 2]),
        origins=(Origin(problem=0, completion=0), Origin(problem=0, completion=1)),
        completion_mask_N=MASK,
        learned=Wanted.of(MASK, PackedRows.of([3, 2])),
        rollout_logprobs_N=torch.where(MASK, -1.0, 0.0),
        advantages_N=torch.where(MASK, row_advantages, 0.0),
        prompt_tokens_B=torch.tensor([3, 3]),
        old_logprobs_N=torch.where(MASK, -1.0, 0.0),
    )
    return logprobs.requires_grad_(), replace(batch, **changes)


def loss_of(logprobs: Tensor, batch: Batch, *, entropy: Tensor | None = None, **choices: Any) -> LossTerms:
    more = {key: choices.pop(key) for key in ("num_kept",) if key in choices}
    algorithm = AlgorithmConfig(**choices)
    entropy_N = torch.zeros(5) if entropy is None else entropy
    return batch_loss(
        logprobs, entropy_N, batch, algorithm, COUNTS, max_completion_length=4,
        entropy_coef=algorithm.entropy_coef, **more,
    )  # fmt: skip


def test_default_by_hand() -> None:
    # ratios 1.1, 1.5 (clipped at 1.2) with A = 2 and 0.5 (clipped at 0.8) with A = -1, over 3 tokens
    terms = loss_of(*make_batch([1.1, 1.5, 0.5], [2.0, -1.0]))
    assert terms.loss.item() == pytest.approx((-2.2 - 2.4 + 0.8) / 3, rel=1e-5)
    assert terms.per_token_N.sum().item() == pytest.approx(terms.loss.item())
    assert terms.high_N[MASK].tolist() == [False, True, False]
    assert terms.low_N[MASK].tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("sequences", ((-2.2 - 2.4) / 2 + 0.8) / 2),
        ("prompts", (-2.2 - 2.4 + 0.8) / 3),
        ("constant", (-2.2 - 2.4 + 0.8) / (2 * 4)),
        ("sums", (-2.2 - 2.4 + 0.8) / 2),
    ],
)
def test_aggregations_by_hand(aggregation: str, expected: float) -> None:
    terms = loss_of(*make_batch([1.1, 1.5, 0.5], [2.0, -1.0]), loss_aggregation=aggregation)
    assert terms.loss.item() == pytest.approx(expected, rel=1e-5)


def test_gspo_by_hand() -> None:
    # s = sqrt(1.1 * 1.5) = 1.2845 (clipped at 1.25) and 0.9
    terms = loss_of(
        *make_batch([1.1, 1.5, 0.9], [2.0, -1.0]),
        importance_sampling_level="sequence",
        epsilon=0.25,
        loss_aggregation="sequences",
    )
    assert terms.loss.item() == pytest.approx((-2 * 1.25 + 0.9) / 2, rel=1e-5)
    assert terms.high_N[MASK].tolist() == [True, True, False]


def test_gmpo_by_hand() -> None:
    # 1.5 held at e^0.2, 0.5 at e^-0.2: sqrt(1.1 * e^0.2) and e^-0.2
    terms = loss_of(
        *make_batch([1.1, 1.5, 0.5], [2.0, -1.0]),
        importance_sampling_level="geometric_mean",
        loss_aggregation="sequences",
    )
    expected = (-2 * math.sqrt(1.1 * math.exp(0.2)) + math.exp(-0.2)) / 2
    assert terms.loss.item() == pytest.approx(expected, rel=1e-5)
    assert (terms.high_N | terms.low_N)[MASK].tolist() == [False, True, True]


def test_without_old_log_probabilities_the_policy_is_its_own_old_one() -> None:
    logprobs, batch = make_batch([1.1, 1.5, 0.5], [2.0, -1.0], old_logprobs_N=None)
    terms = loss_of(logprobs, batch)
    assert terms.loss.item() == pytest.approx((-2 - 2 + 1) / 3, rel=1e-6)
    (slope,) = torch.autograd.grad(terms.loss, logprobs)
    assert slope[MASK].tolist() == pytest.approx([-2 / 3, -2 / 3, 1 / 3], rel=1e-6)


def test_clipped_tokens_have_no_gradient() -> None:
    logprobs, batch = make_batch([1.1, 1.5, 0.5], [2.0, -1.0])
    (slope,) = torch.autograd.grad(loss_of(logprobs, batch).loss, logprobs)
    assert slope.tolist() == pytest.approx([0, -2.2 / 3, 0, 0, 0], rel=1e-5)


def test_kl_penalty_is_added_with_its_weight_and_ratio() -> None:
    ref = torch.where(MASK, -1.4, 0.0)
    logprobs, batch = make_batch([1.0, 1.0, 2.0], [0.0, 0.0], ref_logprobs_N=ref)
    kl = [math.exp(-0.4) + 0.4 - 1] * 2 + [math.exp(-0.4 - math.log(2)) + 0.4 + math.log(2) - 1]
    plain = loss_of(logprobs, batch, beta=0.3, use_bias_correction_kl=False)
    assert plain.loss.item() == pytest.approx(0.3 * sum(kl) / 3, rel=1e-5)
    corrected = loss_of(logprobs, batch, beta=0.3)
    assert corrected.loss.item() == pytest.approx(0.3 * (kl[0] + kl[1] + 2 * kl[2]) / 3, rel=1e-5)
    assert corrected.kl_N[MASK].tolist() == pytest.approx([kl[0], kl[1], 2 * kl[2]], rel=1e-5)


def test_sampler_correction_weighs_the_policy_term_and_not_the_penalty() -> None:
    rollout = torch.where(MASK, -1.0, 0.0)
    rollout[1] = -1 - math.log(2)  # the trainer finds this token twice as likely
    changes = {"rollout_logprobs_N": rollout, "ref_logprobs_N": torch.where(MASK, -1.4, 0.0)}
    logprobs, batch = make_batch([1.0, 1.0, 1.0], [2.0, -1.0], **changes)
    kl = math.exp(-0.4) + 0.4 - 1
    terms = loss_of(logprobs, batch, importance_sampling_correction="token_truncate", beta=0.3)
    assert terms.loss.item() == pytest.approx((-4 - 2 + 1 + 0.3 * 3 * kl) / 3, rel=1e-5)
    assert terms.sampler_ratio_X.tolist() == pytest.approx([2, 1, 1], rel=1e-5)
    terms = loss_of(logprobs, batch, importance_sampling_correction="sequence_mask", importance_sampling_clip_max=1.5)
    assert terms.loss.item() == pytest.approx(1 / 3, rel=1e-5)


def test_off_policy_rows_leave_the_policy_term_only() -> None:
    rollout = torch.where(MASK, -1.0, 0.0)
    rollout[4] = 0.0  # far likelier under the sampler
    logprobs, batch = make_batch([1.0, 1.0, 1.0], [2.0, -1.0], rollout_logprobs_N=rollout)
    terms = loss_of(logprobs, batch, off_policy_mask_threshold=0.5)
    assert terms.loss.item() == pytest.approx((-2 - 2) / 3, rel=1e-5)
    assert terms.is_dropped_N[MASK].tolist() == [False, False, True]


def test_certain_tokens_leave_the_policy_term_and_the_bonus() -> None:
    certain = torch.tensor([True, True, False, True, False])
    logprobs, batch = make_batch([1.0, 1.0, 1.0], [2.0, -1.0], certain_N=certain)
    entropy = torch.tensor([9.0, 0.1, 0.7, 9.0, 0.5], requires_grad=True)
    terms = loss_of(logprobs, batch, entropy=entropy, entropy_coef=0.2, num_kept=2)
    assert terms.loss.item() == pytest.approx((-2 + 1) / 3 - 0.2 * (0.7 + 0.5) / 2, rel=1e-5)
    (slope,) = torch.autograd.grad(terms.loss, entropy)
    assert slope.tolist() == pytest.approx([0, 0, -0.1, 0, -0.1])


def test_outside_the_mask_nothing_counts_not_even_infinities() -> None:
    logprobs, batch = make_batch([1.0, 1.0, 1.0], [2.0, -1.0], ref_logprobs_N=torch.where(MASK, -1.2, 0.0))
    with torch.no_grad():
        logprobs[0] = float("-inf")
    for clipping in ("ppo", "cispo", "sapo", "dppo_tv", "dppo_kl", "none"):
        terms = loss_of(logprobs, batch, clipping=clipping, epsilon_high=5.0, beta=0.1)
        (slope,) = torch.autograd.grad(terms.loss, logprobs)
        assert terms.loss.isfinite()
        assert slope[MASK].isfinite().all()
