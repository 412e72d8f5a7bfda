"""vLLM in this process, for real, on the CPU: `make test-vllm`."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.run import run
from policy import Policy
from policy.tokenizer import build_word_tokenizer
from rollouts import EngineConfig, EngineError, make_engine
from rollouts.engine import VllmColocateConfig
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy
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

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = ROOT / "recipes" / "accelerate" / "cpu.yaml"
CONFIG = EngineConfig(kind="vllm_colocate", max_num_seqs=16, max_num_batched_tokens=256, cache_gib=0.1)


def biased(policy: Policy) -> Policy:
    """Experts' correction biases as training leaves them, which are what an initial policy has not."""
    for layer in policy.moe_layers:
        layer.gate.e_score_correction_bias.uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(1))
    return policy


FAMILIES: dict[str, Callable[[int], Policy]] = {
    "deepseek_v3": lambda seed: biased(tiny_policy(seed, **SERVABLE, num_nextn_predict_layers=1)),
    "qwen2": lambda seed: tiny_llama(seed, model_type="qwen2", hidden_size=128, tie_word_embeddings=True),
    "qwen3_moe": lambda seed: tiny_llama(seed, **TINY_QWEN3_MOE | {"head_dim": 32, "moe_intermediate_size": 32}),
}


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    """vLLM is told things through the environment; other tests are not to hear them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_colocated_engine_is_the_policy(family: str) -> None:
    policy, other = FAMILIES[family](0), FAMILIES[family](1)
    tokenizer = build_word_tokenizer([f"w{n}" for n in range(policy.config.vocab_size - 4)], max_length=128)
    with closing(make_engine(policy, CONFIG, tokenizer)) as engine:
        check_greedy(engine, policy, version=0)
        check_logprobs(engine, policy)
        check_truncation(engine)
        check_seeds(engine)
        check_groups_are_told(engine)
        check_stop_strings(engine, policy, tokenizer)
        engine.load_weights(other, version=3)
        check_greedy(engine, other, version=3)
        check_logprobs(engine, other)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = TINY["base"]
    engine = {"kind": "vllm_colocate", "max_num_seqs": 16, "max_num_batched_tokens": 256, "cache_gib": 0.1}
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder, base=base | {"shape": base["shape"] | SERVABLE}, engine=engine, max_steps=2)


def read_metrics(recipe: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (recipe.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()]


def test_training_with_a_colocated_engine(recipe: Path) -> None:
    run(recipe, [], resume=False)
    metrics = read_metrics(recipe, "tiny")
    assert [step["step"] for step in metrics] == [1, 2]
    assert all(0 < step["sampling/logp_difference_max"] < 1e-4 for step in metrics)


@pytest.mark.multi
def test_two_ranks_with_an_engine_each_train_as_one(recipe: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", f"--config_file={LAUNCH}", "--num_processes=2"]
    train = ["-m", "grpo", "train", str(recipe), "name=two"]
    answer = subprocess.run([sys.executable, *launch, *train], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    for one, two in zip(read_metrics(recipe, "tiny"), read_metrics(recipe, "two"), strict=True):
        for key in ("reward", "num_tokens", "completions/mean_length", "loss"):
            assert two[key] == pytest.approx(one[key], abs=1e-5)


def test_one_shape_has_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name vLLM finds what it compiled."""
    from rollouts.vllm_colocate import model_folder

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    values = tiny_policy().config.to_hf()
    first, again, wider = (model_folder(values | {"hidden_size": size}, None) for size in (32, 32, 64))
    assert first == again != wider
    assert json.loads((wider / "config.json").read_text())["hidden_size"] == 64
    assert set((tmp_path / "grpo_models").iterdir()) == {first, wider}


def test_sleep_on_a_cpu_is_refused() -> None:
    config = CONFIG.model_copy(update={"vllm_colocate": VllmColocateConfig(sleep_level=1)})
    with pytest.raises(EngineError, match="cannot sleep on a CPU: engine.vllm_colocate.sleep_level must be 0, got 1"):
        make_engine(tiny_policy(), config)


def test_a_cache_too_small_for_one_sequence_is_refused() -> None:
    policy = tiny_llama(model_type="qwen2", hidden_size=128, max_position_embeddings=1024)
    with pytest.raises(EngineError, match=r"engine.cache_gib=0.0005: To serve at least one request.*is needed"):
        make_engine(policy, CONFIG.model_copy(update={"cache_gib": 5e-4}))  # of 1.5 MB
    with closing(make_engine(policy, CONFIG)) as engine:
        check_greedy(engine, policy, version=0)
