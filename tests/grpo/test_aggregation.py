"""How much a token counts, by hand."""

from typing import get_args

import pytest

from grpo.aggregation import AGGREGATIONS, Counts, token_weights
from grpo.algorithm import Aggregation
from grpo.batch import Row, make_batches
from grpo.types import Origin
from rollouts import Completion

COUNTS = Counts(tokens=10, sequences=4, prompts=2)


def row(problem: int, completion: int, length: int) -> Row:
    sampled = Completion(token_ids=[5] * length, logprobs=[-1.0] * length, finish_reason="stop", policy_version=0)
    origin = Origin(problem=problem, completion=completion)
    return Row(prompt_ids=[3, 4], completion=sampled, advantage=1.0, learned=True, origin=origin)


ROWS = [row(0, 0, 1), row(0, 1, 3), row(1, 0, 4), row(1, 1, 2)]


def test_every_named_aggregation_is_there() -> None:
    assert AGGREGATIONS.keys() == set(get_args(Aggregation))


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("tokens", [1 / 10] * 4),
        ("sequences", [1 / 4, 1 / 12, 1 / 16, 1 / 8]),
        ("prompts", [1 / 8, 1 / 8, 1 / 12, 1 / 12]),  # problems of 4 and 6 tokens
        ("constant", [1 / (4 * 7)] * 4),
        ("sums", [1 / 4] * 4),
    ],
)
@pytest.mark.parametrize("max_tokens", [1, 10**6])
def test_weights_by_hand(aggregation: str, expected: list[float], max_tokens: int) -> None:
    found = {}
    for batch in make_batches(ROWS, max_tokens):
        weights_N = token_weights(batch, COUNTS, aggregation, 7)
        assert not weights_N[~batch.completion_mask_N].any()
        for origin, part in zip(batch.origins, weights_N.split(batch.rows.lengths), strict=True):
            assert (part[2:] == part[2]).all()
            found[origin] = part[2].item()
    assert [found[r.origin] for r in ROWS] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("aggregation", ["tokens", "sequences", "prompts"])
def test_means_weigh_one_in_all(aggregation: str) -> None:
    total = sum(token_weights(batch, COUNTS, aggregation, 7).sum().item() for batch in make_batches(ROWS, 8))
    assert total == pytest.approx(1, rel=1e-6)
