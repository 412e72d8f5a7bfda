"""vLLM on a CPU loads what `policy.save` writes, and says greedily what our engine says. `make test-vllm` runs this."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import policy
from policy import Policy
from policy.tokenizer import load_tokenizer
from rollouts import EngineConfig, SamplingParams, make_engine
from tests.policies import tiny_llama, tiny_policy
from tests.prompts import QUESTIONS

MODEL = os.environ.get("GRPO_TEST_MODEL", "")
SCRIPT = Path(__file__).resolve().parent.parent / "vllm_greedy.py"
NUM_TOKENS = 32
# vLLM's kernels on a CPU have sizes below which they do not go, and none for MLA of another rank than 512.
WIDE = {
    "vocab_size": 128, "hidden_size": 256, "intermediate_size": 512, "initializer_range": 0.1,
    "max_position_embeddings": 512,
}  # fmt: skip
DEEPSEEK = {
    **WIDE, "moe_intermediate_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 64, "q_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}  # fmt: skip
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_MLA_DISABLE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

pytestmark = [pytest.mark.vllm, pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")]


def tokens_of_vllm(folder: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder)],
        input=json.dumps({"prompts": prompts, "num_tokens": num_tokens}),
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    tokens: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return tokens


def tokens_of_ours(ours: Policy, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    params = SamplingParams(max_completion_length=num_tokens, temperature=0.0)
    groups = make_engine(ours, EngineConfig()).generate(prompts, 1, params)
    return [list(group[0].token_ids) for group in groups]


def draw_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in range(5, 45, 4)]


def make_deepseek() -> Policy:
    ours = tiny_policy(**DEEPSEEK)
    for layer in ours.moe_layers:
        # Also negative, where masking unselected groups with 0 would choose from them.
        layer.gate.e_score_correction_bias.uniform_(-1.5, 0.1, generator=torch.Generator().manual_seed(1))
    return ours


@pytest.mark.parametrize(
    "make",
    [make_deepseek, lambda: tiny_llama(**WIDE, model_type="qwen2", num_key_value_heads=2, tie_word_embeddings=True)],
    ids=["deepseek_v3", "qwen2"],
)
def test_vllm_says_what_our_engine_says(make, tmp_path: Path) -> None:
    ours, prompts = make(), draw_prompts()
    policy.save(ours, tmp_path)
    got = tokens_of_ours(ours, prompts, NUM_TOKENS)
    assert len({tuple(tokens) for tokens in got}) == len(prompts)
    assert tokens_of_vllm(tmp_path, prompts, NUM_TOKENS) == got


@pytest.mark.skipif(not MODEL, reason="GRPO_TEST_MODEL names no model")
def test_vllm_says_what_our_engine_says_with_a_real_model(tmp_path: Path) -> None:
    ours, tokenizer = policy.load(MODEL, dtype=torch.float32), load_tokenizer(MODEL)
    policy.save(ours, tmp_path)
    tokenizer.save(tmp_path)
    prompts = [tokenizer.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    assert tokens_of_vllm(tmp_path, prompts, 64) == tokens_of_ours(ours, prompts, 64)
