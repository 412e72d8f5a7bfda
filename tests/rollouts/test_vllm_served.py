"""`vllm serve`, for real, on the CPU: `make test-vllm`. Tests run in this order, on one server; the last kills it."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from grpo.config import load_config
from grpo.distributed import Ranks
from grpo.pretrain import base_model
from grpo.run import run
from policy import Policy, load
from policy.tokenizer import load_tokenizer
from rollouts import EngineConfig, EngineError, SamplingParams, make_engine
from rollouts.engine import VllmServerConfig
from rollouts.vllm_server import VllmServerEngine
from tests.grpo.test_trainer import TIMED
from tests.policies import tiny_policy
from tests.recipes import TINY, write_recipe
from tests.rollouts.vllm_checks import (
    SERVABLE,
    check_greedy,
    check_groups_are_told,
    check_logprobs,
    check_seeds,
    check_stop_strings,
    check_truncation,
)
from tests.rollouts.vllm_process import VllmProcess

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = ROOT / "recipes" / "accelerate" / "cpu.yaml"
PARAMS = SamplingParams(max_completion_length=16, seed=2)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = TINY["base"]
    shape = base["shape"] | SERVABLE | {"initializer_range": 0.25}
    return write_recipe(tmp_path_factory.mktemp("recipe"), base=base | {"shape": shape}, max_steps=2)


@pytest.fixture(scope="module")
def server(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmProcess]:
    """Serves the recipe's base model."""
    folder = base_model(load_config(recipe), Ranks(cpu=True), lambda metrics: None)
    process = VllmProcess(folder, tmp_path_factory.mktemp("server") / "log")
    try:
        process.start()
        yield process
    finally:
        process.kill()


def connect(policy: Policy, server: VllmProcess, retry_timeout: float = 60) -> VllmServerEngine:
    options = VllmServerConfig(urls=(server.url,), retry_timeout=retry_timeout)
    engine = make_engine(policy, EngineConfig(kind="vllm_server", vllm_server=options), load_tokenizer(server.folder))
    assert isinstance(engine, VllmServerEngine)
    return engine


def perturbed(policy: Policy) -> Policy:
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if weight.ndim > 1 and "embed" not in name:
                weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    return policy


def test_served_engine_is_the_policy(server: VllmProcess) -> None:
    policy = load(server.folder)
    engine = connect(policy, server)
    check_greedy(engine, policy, version=0)
    check_logprobs(engine, policy)
    check_truncation(engine)
    check_seeds(engine)
    check_groups_are_told(engine)
    check_stop_strings(engine, policy, load_tokenizer(server.folder))


def test_completions_follow_the_weights(server: VllmProcess) -> None:
    policy = load(server.folder)
    engine = connect(policy, server)
    before = engine.generate([[5, 9]], 4, PARAMS)
    engine.load_weights(perturbed(policy), version=1)
    check_greedy(engine, policy, version=1)
    check_logprobs(engine, policy)
    assert [c.token_ids for c in engine.generate([[5, 9]], 4, PARAMS)[0]] != [c.token_ids for c in before[0]]


def test_another_model_is_refused(server: VllmProcess) -> None:
    with pytest.raises(EngineError, match=r"serves another model.*num_hidden_layers: 2, not 3"):
        connect(tiny_policy(), server)


def read_metrics(recipe: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def overrides(server: VllmProcess) -> list[str]:
    return ["engine.kind=vllm_server", f"engine.vllm_server.urls=['{server.url}']"]


def test_training_with_a_server(server: VllmProcess, recipe: Path) -> None:
    run(recipe, overrides(server), resume=False)
    metrics = read_metrics(recipe, "tiny")
    assert [step["step"] for step in metrics] == [1, 2]
    assert all(0 < step["sampling/logp_difference_max"] < 1e-4 for step in metrics)


def test_training_one_step_off(server: VllmProcess, recipe: Path) -> None:
    """Twice the same but for the last bits, which depend on who shares a batch on the server."""
    settings = ["rollout_lag=1", "max_steps=4", "learning_rate=1e-2", "evaluation.eval_steps=2"]
    for name in ("ahead", "ahead_again"):
        run(recipe, [*overrides(server), *settings, f"name={name}"], resume=False)
    metrics, again = read_metrics(recipe, "ahead"), read_metrics(recipe, "ahead_again")
    assert [step["sampling/policy_lag"] for step in metrics] == [0, 1, 1, 1]
    assert 0 < metrics[0]["sampling/logp_difference_max"] < 1e-4
    for one, two in zip(metrics, again, strict=True):
        for key in one.keys() - TIMED:
            if not key.startswith("time/"):
                figures = [np.array(step[key], dtype=float) for step in (one, two)]
                assert np.allclose(*figures, rtol=1e-3, atol=1e-5, equal_nan=True), key


@pytest.mark.multi
def test_two_ranks_share_a_server_and_train_as_one(server: VllmProcess, recipe: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", f"--config_file={LAUNCH}"]
    train = ["-m", "grpo", "train", str(recipe), "name=two", *overrides(server)]
    answer = subprocess.run(
        [sys.executable, *launch, "--num_processes=2", *train], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == 0, answer.stderr
    for one, two in zip(read_metrics(recipe, "tiny"), read_metrics(recipe, "two"), strict=True):
        for key in ("reward", "num_tokens", "completions/mean_length", "loss"):
            assert two[key] == pytest.approx(one[key], abs=1e-5)


def test_a_killed_server_is_a_clear_error_and_a_restarted_one_is_used_again(server: VllmProcess) -> None:
    policy = perturbed(load(server.folder))
    engine = connect(policy, server, retry_timeout=0.5)
    engine.load_weights(policy, version=6)
    server.kill()
    with pytest.raises(EngineError, match="no vLLM server is left.*Connection refused"):
        engine.generate([[5, 9]], 1, PARAMS)
    server.start()
    check_greedy(engine, policy, version=6)
