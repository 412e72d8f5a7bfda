"""One step off, with a server that samples a real policy: who samples what, faults, and runs that stop and go on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from grpo.asking import Asked
from grpo.collect import make_collector
from grpo.config import ConfigError, load_config
from grpo.data import Dataset, read_problems
from grpo.distributed import PreemptedError, Ranks
from grpo.pipeline import AskerAhead, make_asking, moving
from grpo.pretrain import base_model
from grpo.run import run
from grpo.weights import keep_weights
from policy import Policy, load
from policy.tokenizer import load_tokenizer
from rewards import Grader
from rollouts import EngineError, make_engine
from tests.grpo.test_distributed import CPU
from tests.grpo.test_trainer import CARRIED, assert_same_steps, metrics_of, read_rollouts
from tests.recipes import TINY, write_recipe
from tests.rewards.test_grader_workers import wait_until
from tests.rollouts.policy_server import PolicyServer, serving

MAX_STEPS = 6


SLOW = """
import time
import zlib
from pathlib import Path

def slow(problem, completion):
    if Path(__file__).with_name("wait").exists():
        Path(__file__).with_name("waiting").touch()
        time.sleep(30)
    return float(zlib.crc32(completion.encode()) % 5 == 0)
"""
"""A reward that one completion in five gets, however little the base model knows; it may be made to hang."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that starts from a base model that is there, and learns fast."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "slow.py").write_text(SLOW)
    rewards = [f"{folder / 'slow.py'}:slow", "format"]
    base = TINY["base"] | {"max_steps": 10}
    model = base_model(load_config(write_recipe(folder, base=base)), Ranks(cpu=True), lambda metrics: None)
    changes = {"max_steps": MAX_STEPS, "learning_rate": 1e-2, "save_steps": 2, "rollout_lag": 1, "rewards": rewards}
    changes |= {"max_completion_length": 24}
    return write_recipe(folder, base=None, model=str(model), evaluation={"num_problems": 0}, **changes)


@pytest.fixture(scope="module")
def server(recipe: Path) -> Iterator[PolicyServer]:
    with serving(model_of(recipe)) as server:
        yield server


def model_of(recipe: Path) -> Path:
    return Path(load_config(recipe, ["rollout_lag=0"]).model or "")


def served(server: PolicyServer, *more: str) -> list[str]:
    return ["engine.kind=vllm_server", f"engine.vllm_server.urls=['{server.url}']", *more]


def versions_of(run: Path) -> list[set[int]]:
    """Of each step's completions."""
    return [
        {completion["policy_version"] for group in read_rollouts(run, step) for completion in group["completions"]}
        for step in range(1, MAX_STEPS + 1)
    ]


@pytest.fixture(scope="module")
def plain(recipe: Path, server: PolicyServer) -> Path:
    run(recipe, served(server, f"output_dir={recipe.parent}", "name=plain"), resume=False)
    return recipe.parent / "plain"


@pytest.fixture(scope="module")
def stateful(recipe: Path, server: PolicyServer) -> Path:
    run(recipe, served(server, f"output_dir={recipe.parent}", "name=stateful", *CARRIED), resume=False)
    return recipe.parent / "stateful"


def test_every_step_but_the_first_is_sampled_by_the_version_before(plain: Path) -> None:
    assert versions_of(plain) == [{0}, {0}, {1}, {2}, {3}, {4}]
    metrics = metrics_of(plain)
    assert [line["sampling/policy_lag"] for line in metrics] == [0, 1, 1, 1, 1, 1]
    assert metrics[0]["sampling/logp_difference_max"] < 1e-5
    assert all(line["sampling/logp_difference_max"] > 1e-3 for line in metrics[1:]), "weights that hardly move"
    assert any(line["clip_ratio/region_mean"] > 0 for line in metrics[1:]), "ratios that are all 1"


def test_without_lag_the_newest_weights_sample(recipe: Path, server: PolicyServer, tmp_path: Path) -> None:
    settings = [f"output_dir={tmp_path}", "rollout_lag=0", "max_steps=2"]
    run(recipe, served(server, *settings, "name=served"), resume=False)
    metrics = metrics_of(tmp_path / "served")
    assert [line["sampling/policy_lag"] for line in metrics] == [0, 0]
    assert all(line["sampling/logp_difference_max"] < 1e-5 for line in metrics)
    assert not list((tmp_path / "served" / "checkpoints").glob("*/sampler.safetensors"))


def test_a_stopped_run_goes_on_as_if_it_had_not_been(
    recipe: Path, server: PolicyServer, stateful: Path, tmp_path: Path
) -> None:
    """Questions that were out when it stopped are asked again, of the weights that were to sample them."""
    for last in (3, MAX_STEPS):
        settings = [f"output_dir={tmp_path}", "name=pieces", f"max_steps={last}", *CARRIED]
        run(recipe, served(server, *settings), resume=True)
    assert_same_steps(stateful, tmp_path / "pieces")
    one, other = (
        load_file(folder / "checkpoints" / f"step_{MAX_STEPS:06d}" / "sampler.safetensors")
        for folder in (stateful, tmp_path / "pieces")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_step_given_up_while_it_is_sampled_ahead_is_asked_again(
    recipe: Path, server: PolicyServer, stateful: Path, tmp_path: Path
) -> None:
    """SIGTERM while a reward hangs in a step that is sampled beside the update: that update is saved."""
    settings = served(server, f"output_dir={tmp_path}", "name=pieces", "save_steps=0", *CARRIED)
    wait, waiting, before = recipe.with_name("wait"), recipe.with_name("waiting"), len(server.prompts)

    def interrupt() -> None:
        wait_until(lambda: len(server.prompts) > before + 6, 60)  # two steps, or three
        wait.touch()
        wait_until(waiting.exists, 60)
        time.sleep(1.5)  # until the update beside it is over: at its end, the run would stop with nothing to give up
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(PreemptedError, match=r"was given up, 0.1 s after SIGTERM"):
            run(recipe, [*settings, "reward_workers=1", "reward_timeout=60", "stop_timeout=0.1"], resume=False)
    finally:
        thread.join()
        wait.unlink()  # or the tests after this one would hang
    assert not [thread for thread in threading.enumerate() if thread.name == "grading"]
    done = len(metrics_of(tmp_path / "pieces"))
    assert 0 < done < MAX_STEPS
    assert (tmp_path / "pieces" / "checkpoints" / f"step_{done:06d}" / "sampler.safetensors").is_file()
    run(recipe, settings, resume=True)
    assert_same_steps(stateful, tmp_path / "pieces")


@contextmanager
def asking(recipe: Path, server: PolicyServer, retry_timeout: float = 20) -> Iterator[tuple[AskerAhead, Policy]]:
    config = load_config(recipe, served(server, f"engine.vllm_server.retry_timeout={retry_timeout}"))
    assert config.model is not None
    policy = load(config.model)
    dataset = Dataset(read_problems(config.dataset, seed=0, split="train", count=8), 0)
    with Grader(config.rewards, num_workers=0) as grader:
        engine = make_engine(policy, config.engine)
        collector = make_collector(config, policy, load_tokenizer(Path(config.model)), grader, engine)
        ahead = make_asking(collector, Ranks(cpu=True), dataset, keep_weights(policy, config, Ranks(cpu=True)))
        assert isinstance(ahead, AskerAhead)
        yield ahead, policy
        engine.close()


def texts(asked: Asked) -> list[Sequence[str]]:
    return [answer.group.texts for answer in asked.filled.trained]


def move(policy: Policy) -> None:
    """As an optimizer does, in place; far enough for other completions."""
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(1.5)


def test_the_next_step_is_sampled_by_itself_with_weights_that_stay(recipe: Path, server: PolicyServer) -> None:
    """By the order of events: its answers come while this thread only moves the policy."""
    with asking(recipe, server) as (ahead, policy):
        ahead.ask(0)
        before = len(server.prompts)
        ahead.ask_ahead(0)
        move(policy)
        assert wait_until(lambda: len(server.prompts) == before + 2), "nothing was asked ahead"
        second = ahead.ask(1)
    with asking(recipe, server) as (ahead, policy):
        ahead.ask(0)
        ahead.ask_ahead(0)
        assert texts(ahead.ask(1)) == texts(second)
    assert {c.policy_version for a in second.filled.trained for c in a.group.completions} == {0}


def test_a_server_that_comes_back_gets_the_weights_that_sample_not_those_that_move(recipe: Path) -> None:
    folder = model_of(recipe)
    with serving(folder) as server, asking(recipe, server) as (ahead, policy):
        make_a_step(ahead, policy)
        ahead.ask_ahead(1)
        wanted = texts(ahead.ask(2))
    with serving(folder) as server, asking(recipe, server) as (ahead, policy):
        make_a_step(ahead, policy)
        server.faults_to_come = 10**9
        ahead.ask_ahead(1)
        assert wait_until(lambda: server.num_faults > 0)
        move(policy)
        with serving(folder) as second:  # what a restart leaves of the first
            server.engine = second.engine
            server.instance = second.instance
            server.faults_to_come = 0
            assert texts(ahead.ask(2)) == wanted


def make_a_step(ahead: AskerAhead, policy: Policy) -> None:
    ahead.ask(0)
    ahead.ask_ahead(0)
    move(policy)
    ahead.ask(1)


def test_an_evaluation_waits_for_what_is_out_and_sees_the_newest_weights(recipe: Path, server: PolicyServer) -> None:
    with asking(recipe, server) as (ahead, policy):
        first = ahead.ask(0)
        ahead.ask_ahead(0)
        move(policy)
        ahead.settle(policy, 1)
        assert sums_at(server) == {name: float(weight.detach().sum()) for name, weight in policy.named_parameters()}
        second = ahead.ask(1)
        assert {c.policy_version for a in second.filled.trained for c in a.group.completions} == {0}
        ahead.ask_ahead(1)
        third = ahead.ask(2)
        assert {c.policy_version for a in third.filled.trained for c in a.group.completions} == {1}
        assert texts(first) != texts(second)


def sums_at(server: PolicyServer) -> dict[str, float]:
    engine: Any = server.engine
    return {name: float(weight.detach().sum()) for name, weight in engine.policy.named_parameters()}


def test_what_is_saved_is_before_the_questions_that_are_out(recipe: Path, server: PolicyServer) -> None:
    with asking(recipe, server) as (ahead, _):
        first = ahead.state()
        ahead.ask(0)
        assert ahead.state() == first
        ahead.ask_ahead(0)
        second = ahead.state()
        ahead.ask(1)
        assert ahead.state() == second
        assert (first["stream"]["number"], second["stream"]["number"]) == (0, 2)
        ahead.ask_ahead(1)
        assert (second["sampler_version"], ahead.state()["sampler_version"]) == (0, 1)


def test_what_fails_ahead_is_raised_where_it_is_waited_for(recipe: Path) -> None:
    with serving(model_of(recipe)) as server, asking(recipe, server, retry_timeout=0.1) as (ahead, _):
        ahead.ask(0)
        server.faults_to_come = 10**9
        ahead.ask_ahead(0)
        assert wait_until(lambda: server.num_faults > 0)
        with pytest.raises(EngineError, match="no vLLM server is left"):
            ahead.ask(1)


def test_closing_ends_the_thread_that_asks(recipe: Path) -> None:
    with serving(model_of(recipe)) as server, asking(recipe, server) as (ahead, _):
        ahead.ask(0)
        server.faults_to_come = 10**9
        ahead.ask_ahead(0)
        assert wait_until(lambda: server.num_faults > 0)
        ahead.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("asking step")]


def test_frozen_weights_are_shared_and_those_that_train_are_not(recipe: Path, server: PolicyServer) -> None:
    config = load_config(recipe, served(server))
    policy = load(config.model or "")
    policy.embed_tokens.weight.requires_grad_(False)
    dataset = Dataset(read_problems(config.dataset, seed=0, split="train", count=8), 0)
    with Grader(config.rewards, num_workers=0) as grader:
        engine = make_engine(policy, config.engine)
        collector = make_collector(config, policy, load_tokenizer(Path(config.model or "")), grader, engine)
        sampler = make_asking(
            collector, Ranks(cpu=True), dataset, keep_weights(policy, config, Ranks(cpu=True))
        ).sampler
    assert sampler is not None
    assert sampler.embed_tokens.weight is policy.embed_tokens.weight
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert "embed_tokens.weight" not in moving(sampler, trained)
    assert any(name.endswith("e_score_correction_bias") for name in moving(sampler, trained))
    for name, tensor in moving(sampler, trained).items():
        assert tensor.data_ptr() != moving(policy, trained)[name].data_ptr()


@pytest.mark.parametrize("kind", ["builtin", "vllm_colocate"])
def test_engines_that_sample_where_the_policy_trains_are_refused(kind: str, recipe: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"rollout_lag: 1 .* engine.kind: {kind} .* set engine.kind: vllm_server, or"
    ):
        load_config(recipe, [f"engine.kind={kind}"])
    with pytest.raises(ConfigError, match="rollout_lag: Input should be 0 or 1, got 2"):
        load_config(recipe, ["rollout_lag=2"])


@pytest.mark.multi
def test_two_ranks_train_as_one(recipe: Path, server: PolicyServer, plain: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU), "-m", "grpo", "train"]
    settings = served(server, f"output_dir={tmp_path}", "name=two")
    done = subprocess.run(
        [*launch, str(recipe), *settings],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert versions_of(tmp_path / "two") == versions_of(plain)
    for one, two in zip(metrics_of(plain), metrics_of(tmp_path / "two"), strict=True):
        for key in ("reward", "num_tokens", "loss", "sampling/policy_lag"):
            assert two[key] == pytest.approx(one[key], abs=1e-5)
    assert json.loads((tmp_path / "two" / "checkpoints" / f"step_{MAX_STEPS:06d}" / "data.json").read_text()) == (
        json.loads((plain / "checkpoints" / f"step_{MAX_STEPS:06d}" / "data.json").read_text())
    )
