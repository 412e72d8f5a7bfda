"""vLLM on a GPU, for real, in bf16: in this process, asleep while the policy trains, and served beside it.

An engine in the trainer's process wants one of its own, which these tests start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from grpo.config import load_config
from grpo.distributed import Ranks
from grpo.pretrain import base_model
from grpo.run import run
from policy import Policy, cast_weights, load
from policy.tokenizer import build_word_tokenizer, load_tokenizer
from rollouts import Completion, Engine, EngineConfig, SamplingParams, make_engine
from tests.policies import tiny_llama, tiny_policy
from tests.recipes import TINY, write_recipe
from tests.rollouts.test_vllm_colocated import biased
from tests.rollouts.vllm_checks import PROMPTS, check_bf16, check_groups_are_told
from tests.rollouts.vllm_process import VllmProcess

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CACHE_GIB = 1.0
ENGINE: dict[str, Any] = {
    "kind": "vllm_colocate", "max_num_seqs": 64, "max_num_batched_tokens": 1024, "cache_gib": CACHE_GIB,
    "vllm_colocate": {"gpu_memory_utilization": 0.1},
}  # fmt: skip
WIDE = {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.1}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen2": {
        **WIDE, "model_type": "qwen2", "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "deepseek_v3": {  # vLLM's kernels for latent attention on a GPU know this width alone
        **WIDE, "num_hidden_layers": 3, "num_attention_heads": 12, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "n_routed_experts": 64, "num_experts_per_tok": 6,
        "moe_intermediate_size": 128, "num_nextn_predict_layers": 1,
    },
}  # fmt: skip
REWARD = """
def distinct(problem, completion):
    return float(len(set(completion)) % 7)
"""


def make_policy(family: str, seed: int, device: str) -> Policy:
    policy = tiny_llama(seed, **SHAPES[family]) if family == "qwen2" else biased(tiny_policy(seed, **SHAPES[family]))
    return cast_weights(policy, torch.bfloat16).to(device)


def run_alone(work: Callable[..., None], *arguments: Any) -> None:
    """In a process of its own; raises what it raises there."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        pool.submit(work, *arguments).result()


def free_gib() -> float:
    return torch.cuda.mem_get_info()[0] / 2**30 if torch.cuda.is_available() else 0.0


def show(what: str, found: dict[str, float]) -> None:
    print(f"{what}: {', '.join(f'{key} {value:.4g}' for key, value in found.items())}", flush=True)


def check_colocated(family: str, device: str, sleep_level: int) -> None:
    policy, other = make_policy(family, 0, device), make_policy(family, 1, device)
    tokenizer = build_word_tokenizer([f"w{n}" for n in range(policy.config.vocab_size - 4)], max_length=128)
    changes = {"vllm_colocate": ENGINE["vllm_colocate"] | {"sleep_level": sleep_level}}
    engine = make_engine(policy, EngineConfig.model_validate(ENGINE | changes), tokenizer)
    show(f"{family} as it starts", check_bf16(engine, policy, other, version=0))
    engine.load_weights(other, version=1)
    show(f"{family} after new weights", check_bf16(engine, other, policy, version=1))
    with torch.no_grad():  # as an optimizer does
        for mine, theirs in zip((*other.parameters(), *other.buffers()), (*policy.parameters(), *policy.buffers())):  # noqa: B905
            mine.copy_(theirs)
    second = make_policy(family, 1, device)
    engine.load_weights(other, version=2)
    show(f"{family} after weights that moved in place", check_bf16(engine, other, second, version=2))
    check_groups_are_told(engine)
    freed = [freed_by_sleep(engine) for _ in range(3)]
    engine.close()
    show(f"{family} at sleep level {sleep_level}", {"free GiB more asleep": max(freed), "free GiB closed": free_gib()})
    if sleep_level:  # the best of them: others on this GPU come and go
        assert max(freed) > 0.9 * CACHE_GIB


def freed_by_sleep(engine: Engine) -> float:
    """GiB that are free once `generate` has returned, and were not while it sampled."""
    awake: list[float] = []

    def look(place: int, completions: list[Completion]) -> None:
        awake.append(free_gib())

    engine.generate(PROMPTS, 1, SamplingParams(max_completion_length=4), on_group=look)
    return free_gib() - min(awake)


@pytest.mark.parametrize("sleep_level", [2, 1, 0])
@pytest.mark.parametrize("family", SHAPES)
def test_colocated_engine_is_the_policy_and_sleeps(family: str, sleep_level: int) -> None:
    run_alone(check_colocated, family, "cuda", sleep_level)


def recipe_of(family: str, folder: Path, device: str, **changes: Any) -> Path:
    (folder / "reward.py").write_text(REWARD)
    shape = {key: value for key, value in SHAPES[family].items() if key != "vocab_size"} | {
        "max_position_embeddings": 128
    }
    values: dict[str, Any] = {
        "device": "auto" if device == "cuda" else "cpu", "dtype": "bfloat16", "base": TINY["base"] | {"shape": shape},
        "rewards": [f"{folder / 'reward.py'}:distinct"], "prompts_per_step": 8, "num_generations": 8,
        "max_completion_length": 32, "learning_rate": 1e-3,
    }  # fmt: skip
    return write_recipe(folder, **values | changes)


def show_metrics(what: str, recipe: Path, name: str = "tiny") -> list[dict[str, Any]]:
    file = recipe.parent / "runs" / name / "metrics.jsonl"
    metrics: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    for step in metrics:
        wanted = ("sampling/logp_difference", "time/sample", "time/update", "time/sync", "memory/", "grad_norm")
        show(f"{what} step {step['step']}", {key: step[key] for key in step if key.startswith(wanted)})
    return metrics


def check_training(family: str, folder: Path, device: str) -> None:
    """With steps so large that the weights of the step before would be far off."""
    recipe = recipe_of(family, folder, device, engine=ENGINE)
    run(recipe, [], resume=False)
    metrics = show_metrics(f"{family} trained", recipe)
    assert [step["step"] for step in metrics] == [1, 2, 3]
    assert all(step["grad_norm"] > 0 and 0 < step["sampling/logp_difference_mean"] < 0.05 for step in metrics)


@pytest.mark.parametrize("family", SHAPES)
def test_training_with_a_colocated_engine(family: str, tmp_path: Path) -> None:
    run_alone(check_training, family, tmp_path, "cuda")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recipe_of("deepseek_v3", tmp_path_factory.mktemp("recipe"), "cuda")


@pytest.fixture(scope="module", params=["folder", "nccl"])
def server(
    recipe: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VllmProcess]:
    """Serves the recipe's base model: on this GPU, or where weights go by NCCL, which wants two, on another."""
    options: tuple[str, ...] = ()
    if request.param == "nccl":
        if torch.cuda.device_count() < 2:
            pytest.skip("NCCL needs a second GPU")
        options = ('--weight-transfer-config={"backend": "nccl"}',)
    folder = base_model(load_config(recipe), Ranks(cpu=False), lambda metrics: None)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    log = tmp_path_factory.mktemp("server") / "log"
    process = VllmProcess(folder, log, gpu=gpus[1 if options else 0], options=options)
    try:
        process.start()
        yield process
    finally:
        process.kill()


def test_served_engine_is_the_policy_and_follows_its_weights(server: VllmProcess, recipe: Path) -> None:
    transfer = "nccl" if "nccl" in str(server.options) else "folder"
    section = {"urls": [server.url], "weight_transfer": transfer}
    policy, other = (load(server.folder, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    with torch.no_grad():
        for weight in other.parameters():
            if weight.ndim > 1:
                weight.copy_(weight.flatten()[torch.randperm(weight.numel(), device=weight.device)].view_as(weight))
    tokenizer = load_tokenizer(server.folder)
    engine = make_engine(
        policy, EngineConfig.model_validate({"kind": "vllm_server", "vllm_server": section}), tokenizer
    )
    show(f"served, {transfer}, as it starts", check_bf16(engine, policy, other, version=0))
    engine.load_weights(other, version=1)
    show(f"served, {transfer}, after new weights", check_bf16(engine, other, policy, version=1))
    engine.close()
    changes = ["engine.kind=vllm_server", f"engine.vllm_server.urls=['{server.url}']"]
    run(recipe, [*changes, f"engine.vllm_server.weight_transfer={transfer}", f"name={transfer}"], resume=False)
    metrics = show_metrics(f"served, {transfer}, trained", recipe, transfer)
    assert all(step["grad_norm"] > 0 and 0 < step["sampling/logp_difference_mean"] < 0.05 for step in metrics)
