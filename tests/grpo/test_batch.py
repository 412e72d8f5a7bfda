"""Micro-batches: within their budget, none lost, prompts shared where that pays."""

from collections import Counter

import pytest
import torch

from grpo.batch import LEAST_SAVED_ON_CPU, Row, count_sharing, cut_by_prompts, make_batches
from grpo.types import Batch, Origin
from rollouts import Completion
from tests.grpo.rollouts import make_groups, rows_of
from tests.policies import tiny_policy


def make_row(problem: int, completion: int, prompt: int, length: int) -> Row:
    return Row(
        prompt_ids=[3 + (problem + i) % 50 for i in range(prompt)],
        completion=Completion(
            token_ids=[3 + (7 * completion + i) % 50 for i in range(length)],
            logprobs=[-1.0] * length,
            finish_reason="stop",
            policy_version=0,
        ),
        advantage=1.0,
        learned=True,
        origin=Origin(problem=problem, completion=completion),
    )


def make_group(problem: int, prompt: int, lengths: list[int]) -> list[Row]:
    return [make_row(problem, g, prompt, length) for g, length in enumerate(lengths)]


GROUPS = [*make_group(0, 9, [12, 3, 7]), *make_group(1, 6, [30, 1]), *make_group(2, 11, [5, 5, 5, 5])]


def tokens_gone_over(batch: Batch) -> int:
    return len(batch.token_ids_N) if batch.rows.shared is None else len(batch.rows.shared.token_U)


@pytest.mark.parametrize("max_tokens", [1, 20, 41, 60, 10**6])
@pytest.mark.parametrize("share_prompts", [False, True])
def test_rows_fit_their_budget_and_none_is_lost(share_prompts: bool, max_tokens: int) -> None:
    batches = make_batches(GROUPS, max_tokens, share_prompts=share_prompts)
    assert Counter(origin for batch in batches for origin in batch.origins) == Counter(row.origin for row in GROUPS)
    by_origin = {row.origin: row for row in GROUPS}
    for batch in batches:
        padded = len(batch.rows.lengths) * batch.rows.longest
        size = padded if batch.rows.shared is None else tokens_gone_over(batch)
        assert size <= max_tokens or len(batch.rows.lengths) == 1
        for origin, token_ids, mask in zip(
            batch.origins,
            batch.token_ids_N.split(batch.rows.lengths),
            batch.completion_mask_N.split(batch.rows.lengths),
            strict=True,
        ):
            row = by_origin[origin]
            assert token_ids.tolist() == [*row.prompt_ids, *row.completion.token_ids]
            assert int(mask.sum()) == len(row.completion.token_ids)
    if not share_prompts:
        assert all(batch.rows.shared is None for batch in batches)


def test_what_is_shared_are_the_prompts() -> None:
    [batch] = make_batches(GROUPS, 10**6)
    shared = batch.rows.shared
    assert shared is not None
    assert tokens_gone_over(batch) == count_sharing(GROUPS) == 9 + 6 + 11 + 22 + 31 + 20
    assert torch.equal(batch.token_ids_N[shared.token_U][shared.place_N], batch.token_ids_N)
    assert sum(shared.prefix_rows.lengths) == int((~batch.completion_mask_N[shared.token_U]).sum())


def test_a_problem_without_room_goes_on_in_the_next_part_with_its_prompt_again() -> None:
    parts = cut_by_prompts(GROUPS, 45)
    assert [[(row.origin.problem, row.origin.completion) for row in part] for part in parts] == [
        [(2, 0), (2, 1), (2, 2), (2, 3), (0, 1)],
        [(0, 2), (0, 0), (1, 1)],
        [(1, 0)],
    ]
    assert [count_sharing(part) for part in parts] == [11 + 20 + 9 + 3, 9 + 7 + 12 + 6 + 1, 6 + 30]


def test_prompts_are_shared_only_where_that_pays() -> None:
    """A prompt of 10 tokens and two completions: of 2n + 20 tokens, 10 are saved."""
    for length, pays in ((5, True), (89, True), (91, False)):
        assert (LEAST_SAVED_ON_CPU * (2 * length + 20) <= 10) == pays
        [batch] = make_batches(make_group(0, 10, [length, length]), 10**6)
        assert (batch.rows.shared is not None) == pays
    [batch] = make_batches([make_row(0, 0, 10, 5)], 10**6)
    assert batch.rows.shared is None


def test_rows_are_in_order_of_length_on_a_cpu_so_that_neighbours_can_be_padded_together() -> None:
    for share_prompts in (False, True):
        [batch] = make_batches(rows_of(make_groups(tiny_policy())), 10**6, share_prompts=share_prompts)
        lengths = batch.rows.lengths if batch.rows.shared is None else batch.rows.shared.rest_rows.lengths
        assert list(lengths) == sorted(lengths)
