"""Rows that go on from the cache against whole rows.

Shapes: S tokens of a row, L tokens of all rows, C model width.
"""

import numpy as np
import pytest
import torch

from policy import PackedRows, Policy
from policy.attention import Expanded
from policy.continued_attention import QUERIES, Continued, attend_to_context
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy

BLOCK = 4


@pytest.mark.parametrize(
    "policy", [tiny_policy(), tiny_llama(), tiny_llama(**TINY_QWEN3_MOE)], ids=lambda p: p.config.model_type
)
def test_hidden_states_in_parts_are_those_of_whole_rows(policy: Policy) -> None:
    """Three rows cut at different places, one of them not at all; the third begins with the second's first blocks,
    written in the same pass."""
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randint(3, 61, (length,), generator=generator) for length in (30, 25))
    rows = [one, two, torch.cat((two[:8], one[:9]))]
    tables = [np.arange(10, 18), np.arange(20, 27), np.array([20, 21, 5, 6, 7])]
    cache = 100 * torch.randn(3, 30, BLOCK, policy.config.cache_width, generator=generator)
    found: list[list[torch.Tensor]] = [[], [], []]
    for cuts in ([(0, 13), (0, 25), (8, 12)], [(13, 14), None, (12, 17)], [(14, 30), None, None]):
        at = [(i, *cut) for i, cut in enumerate(cuts) if cut is not None]
        packed = PackedRows.of([end - begin for _, begin, end in at])
        slots = [[tables[i][p // BLOCK] * BLOCK + p % BLOCK for p in range(end)] for i, _, end in at]
        plan = Continued.of(
            packed,
            cache,
            torch.tensor([slot for of_row, (_, begin, _) in zip(slots, at, strict=True) for slot in of_row[begin:]]),
            [end for _, _, end in at],
            torch.tensor([slot for of_row in slots for slot in of_row]),
        )
        position_ids_N = torch.cat([torch.arange(begin, end) for _, begin, end in at])
        with torch.no_grad():
            token_ids_N = torch.cat([rows[i][begin:end] for i, begin, end in at])
            hidden_NC = policy(token_ids_N, position_ids_N, plan).hidden_NC
        for (i, _, _), part in zip(at, hidden_NC.split(list(packed.lengths)), strict=True):
            found[i].append(part)
    for i, row in enumerate(rows):
        whole = PackedRows.of([len(row)])
        with torch.no_grad():
            wanted_SC = policy(row, whole.position_ids_N, Expanded(rows=whole)).hidden_NC
        got_SC = torch.cat(found[i])
        torch.testing.assert_close(got_SC, wanted_SC[len(row) - len(got_SC) :], atol=2e-5, rtol=1e-4)


def test_many_queries_are_taken_in_turns() -> None:
    """Each is the mean, weighted by the softmax, of the values up to its own."""
    before, count = 5, QUERIES + 3
    key, value = torch.randn(before + count, 1, 2), torch.randn(before + count, 1, 3)
    query = torch.randn(count, 2, 2)
    plan = Continued.of(
        PackedRows.of([count]), torch.zeros(1, 1, 1, 1), torch.zeros(0), [before + count], torch.zeros(0)
    )
    out = attend_to_context(query, key, value, plan, scale=0.7)
    for place in (0, QUERIES - 1, QUERIES, count - 1):
        seen = before + place + 1
        weights = (0.7 * query[place] @ key[:seen, 0].T).softmax(dim=-1)
        torch.testing.assert_close(out[place], weights @ value[:seen, 0])
