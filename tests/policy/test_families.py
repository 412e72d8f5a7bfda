"""Every family against a tiny random model of transformers: logits, over the cache too, gradients, files.

Shapes: B rows, S positions, V vocabulary.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import policy
from policy.checkpoint import WEIGHTS
from tests.policies import hidden_over_cache

COMMON = dict(  # noqa: C408
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    max_position_embeddings=128, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LATENT = dict(  # noqa: C408
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10,
)  # fmt: skip
EXPERTS = dict(  # noqa: C408
    moe_intermediate_size=16, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1,
    routed_scaling_factor=2.5, first_k_dense_replace=1,
)  # fmt: skip
GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
V3 = {"model_type": "deepseek_v3", **LATENT, **EXPERTS, "norm_topk_prob": True}
V2 = {"model_type": "deepseek_v2", **LATENT, **EXPERTS, "norm_topk_prob": False, "topk_method": "greedy"}
LLAMA = {"model_type": "llama", "num_key_value_heads": 2}
QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 2}
QWEN3 = {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 12}
QWEN3_MOE = {
    "model_type": "qwen3_moe", "num_key_value_heads": 2, "head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "norm_topk_prob": True,
}  # fmt: skip
# A short old context and a small base, so that within 40 tokens pairs of all three kinds are turned.
YARN = {
    "rope_type": "yarn", "rope_theta": 50.0, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

MODELS: dict[str, dict[str, object]] = {
    "deepseek_v3": V3,
    "deepseek_v3-query_latent-groups": {**V3, **GROUPS, "q_lora_rank": 24},
    "deepseek_v3-yarn": {**V3, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "deepseek_v3-yarn-uneven": {**V3, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.3}},
    "deepseek_v2-greedy": V2,
    "deepseek_v2-query_latent-groups-yarn": {
        **V2,
        **GROUPS,
        "topk_method": "group_limited_greedy",
        "q_lora_rank": 24,
        "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "llama": LLAMA,
    "llama-every_head-biases-tied": {
        **LLAMA,
        "num_key_value_heads": None,
        "attention_bias": True,
        "tie_word_embeddings": True,
    },
    "llama-llama3": {**LLAMA, "rope_parameters": LLAMA3},
    "llama-linear": {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "qwen2-tied": {**QWEN2, "tie_word_embeddings": True},
    "qwen2-yarn": {**QWEN2, "rope_parameters": YARN},
    "qwen3": QWEN3,
    "qwen3-biases": {**QWEN3, "attention_bias": True, "num_key_value_heads": 1},
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe-some_dense": {**QWEN3_MOE, "decoder_sparse_step": 2, "norm_topk_prob": False},
    "qwen3_moe-first_dense": {**QWEN3_MOE, "mlp_only_layers": [0]},
}


def theirs(name: str) -> PreTrainedModel:
    """A random model of transformers, in fp32; what is usually 0 or 1 is random too, so that nothing is left out."""
    shape = COMMON | MODELS[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(str(shape.pop("model_type")), **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            if tensor_name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5)
            elif tensor_name.endswith("bias") or ".mlp.gate.weight" in tensor_name:
                tensor.normal_(0, 0.3)
        for tensor_name, tensor in model.named_buffers():
            if tensor_name.endswith("e_score_correction_bias"):
                tensor.uniform_(-0.1, 0.2)
    return model


def draw_tokens(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers_in_one_pass_and_token_by_token(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path)
    ours, token_ids_BS = policy.load(tmp_path), draw_tokens()
    with torch.no_grad():
        wanted_BSV = model(token_ids_BS).logits
        assert wanted_BSV.std() > 0.5, "logits that hardly differ would be equal to anything"
        assert (ours.logits(token_ids_BS) - wanted_BSV).abs().max() < 1e-4
        over_cache_BSV = ours.project(hidden_over_cache(ours, token_ids_BS, num_prefilled=5))
    assert (over_cache_BSV - wanted_BSV).abs().max() < 1e-4


def put_gradients_in_place_of_weights(module: nn.Module) -> None:
    for weight in module.parameters():
        weight.data = torch.zeros_like(weight) if weight.grad is None else weight.grad


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_transformers(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path)
    ours, token_ids_BS = policy.load(tmp_path), draw_tokens()
    direction_BSV = torch.randn(2, 40, 61, generator=torch.Generator().manual_seed(2))
    (model(token_ids_BS).logits * direction_BSV).sum().backward()
    (ours.logits(token_ids_BS) * direction_BSV).sum().backward()
    # Saved as if they were weights, both sides' gradients stand under the checkpoint's names.
    put_gradients_in_place_of_weights(model)
    put_gradients_in_place_of_weights(ours)
    model.save_pretrained(tmp_path / "theirs")
    policy.save(ours, tmp_path / "ours")
    wanted, got = (load_file(tmp_path / side / WEIGHTS) for side in ("theirs", "ours"))
    assert wanted.keys() == got.keys()
    for key in wanted:
        if not wanted[key].any():
            assert not got[key].any(), key
            continue
        assert torch.cosine_similarity(got[key].flatten(), wanted[key].flatten(), dim=0) > 0.9999, key
        assert torch.allclose(got[key].norm(), wanted[key].norm(), rtol=1e-3), key


@pytest.mark.parametrize("name", MODELS)
def test_round_trips_are_bit_equal_both_ways(name: str, tmp_path: Path) -> None:
    model = theirs(name)
    model.save_pretrained(tmp_path / "theirs")
    ours = policy.load(tmp_path / "theirs")
    policy.save(ours, tmp_path / "ours")
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    again.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / side / WEIGHTS) for side in ("theirs", "ours", "again")]
    assert files[0].keys() == files[1].keys() == files[2].keys()
    for key, tensor in files[0].items():
        assert torch.equal(tensor, files[1][key]), key
        assert torch.equal(tensor, files[2][key]), key
    assert policy.load(tmp_path / "again").config == ours.config
    with torch.no_grad():
        assert torch.equal(again.eval()(draw_tokens()).logits, model(draw_tokens()).logits)
    assert again.config.architectures == [type(model).__name__]
    wanted, got = model.config.to_dict(), again.config.to_dict()
    # RoPE's kind stands there in two spellings; transformers counts MTP modules that it does not have.
    assert wanted["rope_parameters"].items() <= got["rope_parameters"].items()
    apart = {"rope_parameters", "num_nextn_predict_layers", "_name_or_path", "architectures"}
    assert {key: got.get(key) for key in wanted.keys() - apart} == {key: wanted[key] for key in wanted.keys() - apart}
