"""Groups come from another rank as they were, without a pickle."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from grpo.distributed import Ranks
from grpo.exchange import Numbers, gather_groups, pack_groups, unpack_groups
from grpo.state import completion_to_json
from grpo.types import Group
from rewards import Problem, RewardResult
from rollouts import Completion
from tests.grpo.rollouts import make_groups
from tests.policies import tiny_policy


def groups_of_all_kinds() -> list[Group]:
    """What sampling gives, and what it hardly ever does."""
    sampled = make_groups(tiny_policy(), record_experts=True)
    assert sampled[0].completions[0].experts_MTK is not None
    odd = Group(
        problem=Problem(id="odd", prompt="?", columns={"x": object()}),
        prompt_ids=[150_000, 2**31 - 1],
        completions=[
            Completion(token_ids=[], logprobs=[], finish_reason="abort", policy_version=3),
            Completion(token_ids=[5], logprobs=[-math.inf], finish_reason="length", policy_version=4),
        ],
        texts=["\n\x00 \ud800 π 数", ""],
        results=[
            RewardResult(reward=None, status="timeout", detail='"quoted"', elapsed_s=0.1 + 0.2),
            RewardResult(reward=1, breakdown={"format": 1, "math": math.nan, "π": 1e-300}, status="unparsed"),
        ],
    )
    return [*sampled, odd, replace(odd, problem=Problem(id="none", prompt="!"), completions=[], texts=[], results=[])]


def everything(group: Group) -> list[Any]:
    """All of a group as text that tells 1 from 1.0 and one NaN from none, arrays apart."""
    arrays = [
        None if array is None else (array.dtype, array.shape, array.tobytes())
        for completion in group.completions
        for array in (completion.experts_MTK, completion.prompt_experts_MSK)
    ]
    plain = [replace(c, experts_MTK=None, prompt_experts_MSK=None) for c in group.completions]
    return [repr(replace(group, completions=plain)), arrays]


def test_groups_come_back_to_the_bit() -> None:
    groups = groups_of_all_kinds()
    data = pack_groups(groups)
    again = unpack_groups(data, [group.problem for group in groups] + [Problem(id="another rank's", prompt="")])
    assert [everything(group) for group in again] == [everything(group) for group in groups]
    assert all(ours.problem is theirs.problem for ours, theirs in zip(groups, again, strict=True))
    prompts = [completion.prompt_experts_MSK for completion in again[0].completions]
    assert prompts[0] is not None
    assert all(prompt is prompts[0] for prompt in prompts), "one array for all completions of a group"
    assert unpack_groups(pack_groups([]), []) == []


def test_numbers_are_a_list_that_is_made_when_read() -> None:
    groups = make_groups(tiny_policy(), num_problems=1)
    [again] = unpack_groups(pack_groups(groups), [groups[0].problem])
    tokens, list_of = again.completions[0].token_ids, groups[0].completions[0].token_ids
    assert isinstance(tokens, Numbers)
    assert (tokens, list_of, tokens[:2], tokens[-1]) == (list_of, tokens, list_of[:2], list_of[-1])
    assert tokens != [*list_of, 1]
    assert type(tokens[0]) is type(next(iter(tokens))) is int
    assert json.dumps(completion_to_json(again.completions[0])) == json.dumps(
        completion_to_json(groups[0].completions[0])
    )


def test_log_probabilities_take_4_bytes_where_these_hold_them() -> None:
    [group] = make_groups(tiny_policy(), num_problems=1, num_generations=1)
    exact = replace(group.completions[0], logprobs=[x + 1e-12 for x in group.completions[0].logprobs])
    sizes = []
    for completion in (group.completions[0], exact):
        data = pack_groups([replace(group, completions=[completion])])
        assert unpack_groups(data, [group.problem])[0].completions == [completion]
        sizes.append(len(data))
    assert 0 <= sizes[1] - sizes[0] - 4 * len(exact.token_ids) <= 8  # the header ends at a multiple of 8


@pytest.fixture
def unpickled() -> Iterator[list[str]]:
    """Classes and functions that a pickle names, from here on; an audit hook stays for good, so it is told to rest."""
    found, is_on = list[str](), [True]

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if is_on[0] and event == "pickle.find_class":
            found.append(".".join(arguments))

    sys.addaudithook(hear)
    yield found
    is_on[0] = False


def test_one_rank_has_its_own_groups_and_nothing_is_unpickled(unpickled: list[str]) -> None:
    groups, ranks = make_groups(tiny_policy()), Ranks(cpu=True)
    assert gather_groups(groups, [group.problem for group in groups], ranks) == groups
    unpack_groups(pack_groups(groups), [group.problem for group in groups])
    assert unpickled == []
