"""The client of `vllm serve`: load, faults, restarts and versions, against a server that samples a real policy.

That vLLM itself speaks as this server does is held by test_vllm_served.py.
"""

import threading
from pathlib import Path

import pytest
import torch

from policy import Policy, load, save
from policy.tokenizer import Tokenizer
from rollouts import Completion, EngineConfig, EngineError, SamplingError, SamplingParams, make_engine
from rollouts.engine import VllmServerConfig
from rollouts.sampler import prompt_seeds_of
from rollouts.stop_strings import StopStrings
from rollouts.vllm_requests import completion_of, request_params
from rollouts.vllm_server import Board, VllmServerEngine, pauses
from tests.policies import tiny_policy
from tests.rollouts.policy_server import serving
from tests.tokenizer_kinds import word_tokenizer

PROMPTS = [[5, 9, 11, 3], list(range(3, 20)), [7] * 8, [40, 41], list(range(20, 52)), [1]]
PARAMS = SamplingParams(max_completion_length=12, temperature=0.9, top_k=30, stop_token_ids=(2, 9), seed=3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tiny_policy(), tmp_path)
    return tmp_path


def connect(policy: Policy, *urls: str, tokenizer: Tokenizer | None = None, **options: object) -> VllmServerEngine:
    server = VllmServerConfig.model_validate({"urls": urls, "retry_timeout": 20, **options})
    engine = make_engine(policy, EngineConfig(kind="vllm_server", vllm_server=server), tokenizer)
    assert isinstance(engine, VllmServerEngine)
    return engine


def sample_here(policy: Policy, num_generations: int) -> list[list[Completion]]:
    """What the server's own sampler gives under the seeds that requests carry."""
    seeds = [request_params(PARAMS, 1, seed)["seed"] for seed in prompt_seeds_of(PARAMS, len(PROMPTS))]
    return make_engine(policy, EngineConfig()).generate(PROMPTS, num_generations, PARAMS, seeds)


def tokens(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[list(completion.token_ids) for completion in group] for group in groups]


def perturbed(policy: Policy) -> Policy:
    with torch.no_grad():
        policy.lm_head.weight.copy_(policy.lm_head.weight.roll(7, dims=0))
    return policy


def test_several_servers_share_the_load_and_keep_the_order(folder: Path) -> None:
    with serving(folder) as one, serving(folder) as two:
        groups = connect(load(folder), one.url, two.url).generate(PROMPTS, 5, PARAMS)
        wanted = sample_here(load(folder), 5)
        assert tokens(groups) == tokens(wanted)
        for completion, other in zip(sum(groups, []), sum(wanted, []), strict=True):
            assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            assert completion.finish_reason == other.finish_reason
        assert one.prompts
        assert two.prompts
        assert sorted(one.prompts + two.prompts) == sorted(PROMPTS)


def test_completions_follow_the_weights_and_carry_their_version(folder: Path) -> None:
    with serving(folder) as server:
        policy = load(folder)
        engine = connect(policy, server.url)
        before = engine.generate(PROMPTS, 2, PARAMS)
        engine.load_weights(perturbed(policy), version=4)
        after = engine.generate(PROMPTS, 2, PARAMS)
        assert tokens(before) == tokens(sample_here(load(folder), 2))
        assert tokens(after) == tokens(sample_here(policy, 2)) != tokens(before)
        assert {c.policy_version for group in before for c in group} == {0}
        assert {c.policy_version for group in after for c in group} == {4}
        assert server.num_reloads == 2, "the weights were sent other than once a version"
        engine.load_weights(perturbed(policy), version=4)
        assert tokens(engine.generate(PROMPTS, 2, PARAMS)) == tokens(sample_here(policy, 2)) != tokens(after)


def test_a_policy_other_than_the_served_one_is_sent_before_the_first_request(folder: Path) -> None:
    policy = perturbed(tiny_policy())
    with serving(folder) as server:
        assert tokens(connect(policy, server.url).generate(PROMPTS, 1, PARAMS)) == tokens(sample_here(policy, 1))


def test_greedy_completions_are_asked_for_once(folder: Path) -> None:
    with serving(folder) as server:
        params = SamplingParams(max_completion_length=8, temperature=0)
        policy = load(folder)
        groups = connect(policy, server.url).generate(PROMPTS, 3, params)
        assert tokens(groups) == tokens(make_engine(policy, EngineConfig()).generate(PROMPTS, 3, params))
        assert len(server.prompts) == len(PROMPTS)


@pytest.mark.parametrize(
    ("closed", "option"),
    [("/server_info?config_format=json", "VLLM_SERVER_DEV_MODE=1"), ("/inference/v1/generate", "--enable-scale-out")],
)
def test_a_server_without_a_route_is_refused_with_the_option_that_opens_it(
    folder: Path, closed: str, option: str
) -> None:
    wanted = f"has no {closed[:10]}.*; start the server with {option}"
    with serving(folder, closed=(closed,)) as server, pytest.raises(EngineError, match=wanted):
        connect(load(folder), server.url).generate(PROMPTS, 1, PARAMS)


@pytest.mark.parametrize("num_beyond", [0, 3])
def test_stop_strings_end_completions_there_too(tmp_path: Path, num_beyond: int) -> None:
    tokenizer = word_tokenizer()
    policy = tiny_policy(vocab_size=len(tokenizer))
    save(policy, tmp_path)
    params = SamplingParams(max_completion_length=30, stop_strings=("the", "is 4"), seed=1)
    prompts = [[5, 9], [7, 8, 3]]
    with serving(tmp_path, tokenizer=tokenizer, num_beyond=num_beyond) as server:
        groups = connect(policy, server.url, tokenizer=tokenizer).generate(prompts, 4, params)
        with pytest.raises(SamplingError, match="need a tokenizer"):
            connect(policy, server.url).generate(prompts, 4, params)
    completions = [completion for group in groups for completion in group if completion.finish_reason == "stop"]
    assert completions
    for completion in completions:
        *before, last = tokenizer.decode(completion.token_ids).split()
        assert last == "the" or (last[0] == "4" and before[-1][-2:] == "is")
        assert "the" not in " ".join(before)
        assert len(completion.logprobs) == len(completion.token_ids)


def test_transient_faults_cost_time_and_nothing_else(folder: Path) -> None:
    with serving(folder) as server:
        server.faults_to_come = 2
        engine = connect(load(folder), server.url)
        assert tokens(engine.generate(PROMPTS, 3, PARAMS)) == tokens(sample_here(load(folder), 3))
        assert server.num_faults == 2
        assert sorted(server.prompts) == sorted(PROMPTS), "a prompt was answered twice"
        assert server.num_reloads == 1


def test_a_server_that_answers_nothing_but_faults_is_given_up(folder: Path) -> None:
    with serving(folder) as server:
        server.faults_to_come = 10**9
        engine = connect(load(folder), server.url, retry_timeout=0.3)
        with pytest.raises(EngineError, match="no vLLM server is left.*failed with status 500.*EngineDeadError"):
            engine.generate(PROMPTS, 1, PARAMS)


def test_a_restarted_server_gets_the_weights_again(folder: Path) -> None:
    policy = perturbed(tiny_policy())
    with serving(folder) as first:
        port = first.server_address[1]
        engine = connect(policy, first.url)
        before = engine.generate(PROMPTS, 2, PARAMS)
    answers: list[list[list[Completion]]] = []
    asking = threading.Thread(target=lambda: answers.append(engine.generate(PROMPTS, 2, PARAMS)))
    asking.start()
    asking.join(0.1)
    assert asking.is_alive(), "the engine did not wait for its server"
    with serving(folder, port=port) as second:
        asking.join(20)
        assert second.num_reloads == 1
    assert tokens(answers[0]) == tokens(before) == tokens(sample_here(policy, 2))


def test_a_server_that_restarts_between_calls_is_noticed(folder: Path) -> None:
    policy = perturbed(tiny_policy())
    with serving(folder) as first:
        port = first.server_address[1]
        engine = connect(policy, first.url)
        engine.load_weights(policy, version=1)
    with serving(folder, port=port) as second:
        assert tokens(engine.generate(PROMPTS, 1, PARAMS)) == tokens(sample_here(policy, 1))
        assert second.num_reloads == 1


def test_the_other_server_does_the_work_of_one_that_is_gone(folder: Path) -> None:
    with serving(folder) as one:
        with serving(folder) as two:
            engine = connect(load(folder), one.url, two.url, retry_timeout=0.2)
        engine.load_weights(load(folder), version=1)
        assert tokens(engine.generate(PROMPTS, 2, PARAMS)) == tokens(sample_here(load(folder), 2))
        assert sorted(one.prompts) == sorted(PROMPTS)


def test_a_dead_server_is_a_clear_error(folder: Path) -> None:
    with serving(folder) as server:
        engine = connect(load(folder), server.url, retry_timeout=0.2)
    message = rf"no vLLM server is left: {server.url} does not answer .*Connection refused.*--resume"
    with pytest.raises(EngineError, match=message):
        engine.generate(PROMPTS, 1, PARAMS)
    with pytest.raises(EngineError, match=message):
        engine.load_weights(load(folder), version=1)
    with pytest.raises(EngineError, match=message):
        connect(load(folder), server.url, retry_timeout=0)


def test_another_model_is_refused(folder: Path) -> None:
    with serving(folder) as server:
        with pytest.raises(EngineError, match=r"serves another model, 'tiny' \(num_hidden_layers: 3, not 2\)"):
            connect(tiny_policy(num_hidden_layers=2), server.url)
        with pytest.raises(EngineError, match="serves tiny, not 'large'; change engine.vllm_server.model"):
            connect(load(folder), server.url, model="large")


def test_logprobs_of_another_distribution_are_refused(folder: Path) -> None:
    with (
        serving(folder, logprobs_mode="raw_logprobs") as server,
        pytest.raises(EngineError, match="returns raw_logprobs.*--logprobs-mode processed_logprobs"),
    ):
        connect(load(folder), server.url)


def test_a_server_on_a_cpu_that_would_sample_another_policy_is_refused(folder: Path) -> None:
    message = r"on a CPU.*--enforce-eager --compilation-config .*-rotary.* --worker-extension-cls rollouts.vllm_cpu.Rel"
    with serving(folder, device="cpu") as server, pytest.raises(EngineError, match=message):
        connect(load(folder), server.url)


def test_the_key_comes_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(folder, key="secret") as server:
        monkeypatch.setenv("TINY_KEY", "wrong")
        with pytest.raises(EngineError, match=r"another API key.*api_key_env"):
            connect(load(folder), server.url, api_key_env="TINY_KEY")
        monkeypatch.setenv("TINY_KEY", "secret")
        connect(load(folder), server.url, api_key_env="TINY_KEY")


def test_nccl_without_a_gpu_says_what_to_choose(folder: Path) -> None:
    with serving(folder) as server, pytest.raises(EngineError, match="on a GPU, it is on cpu; choose folder"):
        connect(load(folder), server.url, weight_transfer="nccl")


@pytest.mark.parametrize(
    ("prompts", "changes", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 120], {}, "prompt 0 has 120 tokens; with max_completion_length=12 that exceeds the context of 128"),
        ([[1]], {"temperature": 0.001}, r"greedy\) or from 0.01 on, got 0.001"),
    ],
)
def test_bad_requests_are_named(folder: Path, prompts: list[list[int]], changes: dict, message: str) -> None:
    params = SamplingParams(**{"max_completion_length": 12} | changes)
    with serving(folder) as server:
        engine = connect(load(folder), server.url)
        assert engine.generate([], 4, PARAMS) == []
        with pytest.raises(SamplingError, match=message):
            engine.generate(prompts, 1, params)


def test_logits_that_are_no_numbers_abort_the_completion() -> None:
    for bad in (float("nan"), float("-inf"), -9999.0):
        completion = completion_of([4, 5, 6], [-1.0, bad, -1.0], "stop", params=PARAMS, version=2)
        assert (completion.token_ids, completion.logprobs) == ([4], [-1.0])
        assert completion.finish_reason == "abort"


def test_tokens_that_complete_a_stop_string_end_a_completion_whatever_vllm_says() -> None:
    tokenizer = word_tokenizer()
    token_ids = [
        *tokenizer.encode("So the"),
        0,
        *tokenizer.encode("end it"),
    ]  # with padding, of which rewards see nothing
    params = SamplingParams(max_completion_length=5, stop_strings=("the end",))
    stops = StopStrings(tokenizer, params.stop_strings)
    for count, kept, reason in ((5, 4, "stop"), (4, 4, "stop"), (3, 3, "length")):
        completion = completion_of(
            token_ids[:count], [-1.0] * count, "length", params=params, version=1, stop_strings=stops
        )
        assert (completion.token_ids, completion.finish_reason) == (token_ids[:kept], reason)


def test_greedy_completions_are_certain() -> None:
    greedy = SamplingParams(max_completion_length=4, temperature=0)
    assert completion_of([4, 5], [-0.7, -0.1], "length", params=greedy, version=0).logprobs == [0.0, 0.0]


def test_seeds_of_requests_fit_what_vllm_takes() -> None:
    seeds = [request_params(PARAMS, 8, seed)["seed"] for seed in (0, 1, 2**63 + 11, 2**64 - 1)]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_a_prompt_given_back_is_done_by_another() -> None:
    board, gave_back = Board(3), threading.Event()

    def fail_once() -> None:
        place = board.take()
        assert place is not None
        board.put_back(place)
        gave_back.set()

    def work() -> None:
        gave_back.wait()
        while (place := board.take()) is not None:
            board.finish(place, [])

    board.join(fail_once)
    board.join(work)
    assert board.wait(str) == [[], [], []]


def test_pauses_double_and_end() -> None:
    assert list(pauses(0)) == [0.0]
    wanted = [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert [pause for pause, _ in zip(pauses(1000), wanted, strict=False)] == wanted
