"""Operations by hand, and against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from policy import PackedRows
from policy.flops import Flops
from policy.logprobs import token_logprobs
from policy.lora import LoraConfig
from tests.policies import tiny_llama


def test_operations_by_hand() -> None:
    flops = Flops.of(tiny_llama().config)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32  # queries and output, keys and values, SwiGLU, norms
    met = 3 * layer + 32 + 61 * 32  # final norm, head; the embedding is looked up
    pairs = 5 * 6 / 2 + 3 * 4 / 2
    attention = 3 * 4 * 2 * (8 + 8) * pairs  # layers, heads, a score and a share of a value
    assert flops.forward([5, 3]) == 2 * met * 8 + attention
    assert flops.training([5, 3]) == 3 * flops.forward([5, 3])


def test_operations_are_what_torch_counts() -> None:
    """But for norms, which torch does not count, and attention, of which the CPU computes what is masked too."""
    policy, lengths = tiny_llama(hidden_size=40), [2] * 32  # a width that leaves all products to torch
    rows = PackedRows.of(lengths)
    ids_N = torch.randint(3, 61, (64,))
    with FlopCounterMode(display=False) as counter:
        got = token_logprobs(policy, ids_N, rows, rows.position_ids_N > 0)
        got.logprobs_N.sum().backward()
    # Of each row of two the head scores one token.
    head = 6 * 61 * 40 * 32
    assert counter.get_total_flops() + head == pytest.approx(Flops.of(policy.config).training(lengths), rel=0.05)


def test_frozen_weights_cost_no_gradient() -> None:
    config = tiny_llama().config
    plain, adapted = Flops.of(config), Flops.of(config, LoraConfig(r=1, target_modules=("q_proj",)))
    assert 0.6 < adapted.training([64]) / plain.training([64]) < 0.75
