"""Prompts told of as soon as their completions are there, by the built-in engine and the client of servers."""

from pathlib import Path

import pytest
import torch

from policy import Policy, load, save
from rollouts import Completion, EngineConfig, EngineError, SamplingParams, make_engine
from rollouts.groups import Groups
from tests.policies import tiny_policy
from tests.rollouts.policy_server import serving
from tests.rollouts.test_server_engine import connect
from tests.small_memory import room_for

PROMPTS = [[5, 9, 11, 3], list(range(3, 20)), [7] * 8, [12, 4], [31], [8, 6]]
PARAMS = SamplingParams(max_completion_length=12, stop_token_ids=(2, 9), seed=3)


class Told:
    """What an engine said, in order, and how many passes the policy had made by then."""

    def __init__(self, policy: Policy) -> None:
        self.groups: dict[int, list[Completion]] = {}
        self.passes_when_told: list[int] = []
        self.num_passes = 0
        policy.norm.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.num_passes += 1

    def __call__(self, place: int, completions: list[Completion]) -> None:
        assert place not in self.groups, "a prompt was told of twice"
        self.groups[place] = completions
        self.passes_when_told.append(self.num_passes)


def said(groups: list[list[Completion]]) -> list[list[list[int]]]:
    """Tokens alone: log-probabilities change in their last bits with a beginning that lies in the cache already, and
    with a hook, for which a step is taken module by module."""
    return [[list(each.token_ids) for each in group] for group in groups]


def completion(token: int) -> Completion:
    return Completion(token_ids=[token], logprobs=[0.0], finish_reason="stop", policy_version=0)


def test_a_prompt_is_told_of_with_its_last_completion() -> None:
    told: list[tuple[int, list[Completion]]] = []
    groups = Groups(2, 2, lambda place, group: told.append((place, group)))
    groups.add(3, completion(3))
    groups.add(0, completion(0))
    assert not told
    assert groups.has(0)
    assert not groups.has(1)
    groups.add(2, completion(2))
    assert told == [(1, [completion(2), completion(3)])]
    groups.add(1, completion(1))
    assert told[1:] == [(0, [completion(0), completion(1)])]
    assert groups.all() == [[completion(0), completion(1)], [completion(2), completion(3)]]


def test_the_builtin_engine_tells_while_it_samples_the_rest() -> None:
    policy = tiny_policy()
    told = Told(policy)
    groups = make_engine(policy, EngineConfig(max_num_seqs=4, block_size=4)).generate(PROMPTS, 3, PARAMS, None, told)
    assert [told.groups[place] for place in range(len(PROMPTS))] == groups
    unwatched = make_engine(tiny_policy(), EngineConfig(max_num_seqs=4, block_size=4)).generate(PROMPTS, 3, PARAMS)
    assert said(groups) == said(unwatched)
    assert told.passes_when_told[0] < told.num_passes / 2, "the first prompt was not told of while others were sampled"


def test_where_memory_runs_out_no_prompt_is_told_of_twice() -> None:
    """What was told before stands: only the rest is sampled again."""
    policy = tiny_policy()
    told = Told(policy)
    expected = make_engine(tiny_policy(), EngineConfig()).generate(PROMPTS, 8, PARAMS)
    with room_for(policy, 20) as refused:
        groups = make_engine(policy, EngineConfig(max_num_seqs=40, max_num_batched_tokens=20)).generate(
            PROMPTS, 8, PARAMS, None, told
        )
    assert refused
    assert [told.groups[place] for place in range(len(PROMPTS))] == groups
    assert [[c.token_ids for c in group] for group in groups] == [[c.token_ids for c in group] for group in expected]


def test_what_is_raised_where_a_prompt_is_told_of_ends_the_call() -> None:
    engine = make_engine(tiny_policy(), EngineConfig())

    def refuse(place: int, completions: list[Completion]) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        engine.generate(PROMPTS, 2, PARAMS, None, refuse)
    assert engine.generate(PROMPTS, 2, PARAMS) == make_engine(tiny_policy(), EngineConfig()).generate(
        PROMPTS, 2, PARAMS
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tiny_policy(), tmp_path)
    return tmp_path


def test_the_client_of_servers_tells_as_answers_come(folder: Path) -> None:
    with serving(folder) as server:
        engine, answered = connect(load(folder), server.url), list[int]()
        told: dict[int, list[Completion]] = {}

        def note(place: int, completions: list[Completion]) -> None:
            if not told:
                server.faults_to_come = 2  # those that come after it are asked again, and none is told of twice
            told[place] = completions
            answered.append(len(server.prompts))

        groups = engine.generate(PROMPTS, 2, PARAMS, None, note)
        assert [told[place] for place in range(len(PROMPTS))] == groups
        assert len(answered) == len(PROMPTS)
        assert answered[0] < len(PROMPTS), "nothing was told before the last answer was there"

        def refuse(place: int, completions: list[Completion]) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            engine.generate(PROMPTS, 2, PARAMS, None, refuse)
        assert said(engine.generate(PROMPTS, 2, PARAMS)) == said(groups)


def test_new_weights_wait_for_a_call_in_another_thread(folder: Path) -> None:
    """All completions of a call are of one version, whoever brings the next in the meantime."""
    from threading import Thread

    policy = load(folder)
    with serving(folder) as server:
        engine = connect(policy, server.url)
        before = engine.generate(PROMPTS, 2, PARAMS)
        other, pushes = tiny_policy(seed=1), list[Thread]()

        def push_at_the_first(place: int, completions: list[Completion]) -> None:
            if not pushes:
                pushes.append(Thread(target=lambda: engine.load_weights(other, 7)))
                pushes[0].start()
                pushes[0].join(0.05)

        during = engine.generate(PROMPTS, 2, PARAMS, None, push_at_the_first)
        pushes[0].join()
        after = engine.generate(PROMPTS, 2, PARAMS)
    assert said(during) == said(before)
    assert {c.policy_version for group in during for c in group} == {0}
    assert {c.policy_version for group in after for c in group} == {7}
    with torch.no_grad():
        assert said(after) != said(before)


def test_closing_the_client_ends_a_call_in_another_thread(folder: Path) -> None:
    from threading import Thread

    with serving(folder) as server:
        engine, raised = connect(load(folder), server.url, retry_timeout=60), list[str]()
        server.faults_to_come = 10**9

        def ask() -> None:
            with pytest.raises(EngineError) as caught:
                engine.generate(PROMPTS, 1, PARAMS)
            raised.append(str(caught.value))

        thread = Thread(target=ask)
        thread.start()
        while not server.num_faults:
            thread.join(0.005)
        engine.close()
        thread.join(10)
    assert raised == ["the engine was closed"]
