"""Idle passes: where all must do equally many, they take part with every weight and change nothing."""

from dataclasses import replace

import pytest
import torch

from grpo.batch import Minibatch
from grpo.distributed import Ranks
from grpo.idle import fill_up
from grpo.memory import DeviceMemoryError, do_in_memory
from grpo.optimizer import MasterAdamW
from grpo.update import update
from tests.grpo.rollouts import make_groups, minibatches_of, rows_of, tiny_config
from tests.policies import tiny_policy
from tests.small_memory import room_for


def in_pieces() -> Ranks:
    """One rank that takes itself for one of those that wait for each other."""
    ranks = Ranks(cpu=True)
    ranks.sharding = "fsdp2"
    return ranks


def test_whole_ranks_need_none_and_others_at_least_one() -> None:
    policy, [minibatch] = tiny_policy(), minibatches_of(rows_of(make_groups(tiny_policy())))
    assert fill_up([], policy, Ranks(cpu=True)) == []
    assert fill_up(minibatch.batches, policy, in_pieces()) == minibatch.batches
    [idle] = fill_up([], policy, in_pieces())
    assert idle.is_idle
    assert not any(batch.is_idle for batch in minibatch.batches)


@pytest.mark.parametrize("with_row", [True, False])
def test_an_idle_pass_reaches_every_weight_and_changes_nothing(with_row: bool) -> None:
    """Beside a row that is learned from, and alone."""
    policy = tiny_policy(num_nextn_predict_layers=2)
    config = tiny_config(
        beta=0.1, kl_in="reward", mtp_weight=0.1, router_aux_loss_coef=0.1, bias_update_rate=0.01, entropy_coef=0.1,
        top_entropy_quantile=0.5, freeze_router=False,
    )  # fmt: skip
    [minibatch] = minibatches_of(rows_of(make_groups(policy, num_problems=1), config), 10**6)
    idle = fill_up([], policy, in_pieces())
    busy, results = minibatch.batches if with_row else [], []
    for batches in (busy, [*busy, *idle, *idle]):
        policy, reached = tiny_policy(num_nextn_predict_layers=2), set[str]()
        for name, weight in policy.named_parameters():
            weight.register_post_accumulate_grad_hook(lambda _, name=name, reached=reached: reached.add(name))
        optimizer = MasterAdamW(policy, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0)
        counts = minibatch.counts if with_row else replace(minibatch.counts, tokens=0, sequences=0, prompts=0)
        stats = update(
            policy, optimizer, [Minibatch(batches=batches, counts=counts)], learning_rate=1e-3, config=config,
            ranks=Ranks(cpu=True), entropy_coef=0.1,
        )  # fmt: skip
        results.append((stats, policy.state_dict()))
    (one, before), (other, after) = results
    assert one == other
    assert reached == dict(policy.named_parameters()).keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_out_of_memory_in_pieces_is_an_error_at_once() -> None:
    policy, [minibatch] = tiny_policy(), minibatches_of(rows_of(make_groups(tiny_policy())), 10**6)
    config, optimizer = tiny_config(), MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    with (
        room_for(policy, 20),
        pytest.raises(DeviceMemoryError, match=r"rank 0: out of memory .* set max_tokens_per_micro_batch: \d+ or"),
    ):
        update(policy, optimizer, [minibatch], learning_rate=1e-3, config=config, ranks=in_pieces())
    assert do_in_memory(len, minibatch.batches, in_pieces()) == (len(minibatch.batches), minibatch.batches, 0)
