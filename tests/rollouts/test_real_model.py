"""A real small model: the engine's greedy tokens are those of transformers, prompt for prompt.

Takes minutes, and a model: `GRPO_TEST_MODEL=folder/or/file.gguf pytest -m slow tests/rollouts/test_real_model.py`. The
Llama, Qwen2 or Qwen3 must come with a tokenizer that has a chat template; SmolLM2-135M-Instruct is one.
"""

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import policy
from policy.gguf import find_gguf
from policy.tokenizer import load_tokenizer
from rollouts import EngineConfig, SamplingParams, make_engine
from tests.prompts import QUESTIONS

MODEL = os.environ.get("GRPO_TEST_MODEL", "")
NUM_TOKENS = 64

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not MODEL, reason="GRPO_TEST_MODEL names no model")]


def theirs() -> PreTrainedModel:
    file = find_gguf(Path(MODEL))
    options = {"gguf_file": file.name} if file else {}
    place = file.parent if file else MODEL
    return AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options).eval()


@torch.no_grad()
def test_greedy_tokens_of_a_real_model_are_those_of_transformers(tmp_path: Path) -> None:
    torch.set_num_threads(2)
    ours, tokenizer = policy.load(MODEL, dtype=torch.float32), load_tokenizer(MODEL)
    prompts = [tokenizer.render_chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    params = SamplingParams(max_completion_length=NUM_TOKENS, temperature=0.0, stop_token_ids=(tokenizer.eos_token_id,))
    got = [list(group[0].token_ids) for group in make_engine(ours, EngineConfig()).generate(prompts, 1, params)]

    model, wanted = theirs(), []
    for prompt in prompts:
        tokens = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        wanted.append(tokens[0, len(prompt) :].tolist())
    assert len({tuple(tokens) for tokens in got}) > 15, "a model that says the same to everyone shows nothing"
    for question, ours_tokens, their_tokens in zip(QUESTIONS, got, wanted, strict=True):
        assert ours_tokens == their_tokens, question

    policy.save(ours, tmp_path)
    tokenizer.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    assert load_tokenizer(tmp_path).render_chat([{"role": "user", "content": QUESTIONS[0]}]) == prompts[0]
