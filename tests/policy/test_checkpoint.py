"""Round trips to Hugging Face: equal bits, equal logits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import policy
from policy import CheckpointError, Policy, PolicyConfig, ShapeError
from policy.checkpoint import checkpoint_tensors

SHAPES = {
    "plain": {},
    "query_latent": {"q_lora_rank": 24},
    "grouped_experts": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "scaled": {"routed_scaling_factor": 2.5, "norm_topk_prob": False},
    "tied": {"tie_word_embeddings": True},
    "two_dense": {"first_k_dense_replace": 2, "n_shared_experts": 2},
}


def theirs(**changes: object) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    shape = dict(  # noqa: C408
        vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        n_group=1, topk_group=1, routed_scaling_factor=1.0, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8,
        qk_nope_head_dim=12, v_head_dim=10, first_k_dense_replace=1, norm_topk_prob=True, max_position_embeddings=64,
        tie_word_embeddings=False, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    config = DeepseekV3Config(**(shape | changes))
    config.topk_method, config.scoring_func = "noaux_tc", "sigmoid"
    model = DeepseekV3ForCausalLM(config).eval()
    for layer in model.model.layers[config.first_k_dense_replace :]:
        layer.mlp.gate.weight.data.normal_(0, 0.3)
        layer.mlp.gate.e_score_correction_bias.data.uniform_(0, 0.2)
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str, tmp_path: Path) -> None:
    model = theirs(**SHAPES[shape])
    model.save_pretrained(tmp_path)
    ours = policy.load(tmp_path)
    token_ids_BS = torch.randint(0, 61, (3, 20))
    with torch.no_grad():
        difference = (ours.logits(token_ids_BS) - model(token_ids_BS).logits).abs().max().item()
    assert difference < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_bit_equal(shape: str, tmp_path: Path) -> None:
    theirs(**SHAPES[shape]).save_pretrained(tmp_path / "theirs")
    policy.save(policy.load(tmp_path / "theirs"), tmp_path / "ours")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name


def test_transformers_loads_what_we_save(tmp_path: Path) -> None:
    ours = make_policy(num_nextn_predict_layers=1)
    policy.save(ours, tmp_path)
    model, report = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    token_ids_BS = torch.randint(0, 61, (2, 17))
    with torch.no_grad():
        assert (ours.logits(token_ids_BS) - model.eval()(token_ids_BS).logits).abs().max() < 1e-4


def make_policy(**changes: object) -> Policy:
    from tests.policies import tiny_policy

    return tiny_policy(**changes)


def test_mtp_round_trip_keeps_every_tensor(tmp_path: Path) -> None:
    ours = make_policy(num_nextn_predict_layers=2)
    policy.save(ours, tmp_path)
    again = policy.load(tmp_path)
    before, after = dict(checkpoint_tensors(ours)), dict(checkpoint_tensors(again))
    assert "model.layers.3.eh_proj.weight" in before
    assert "model.layers.4.shared_head.norm.weight" in before
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sharded_checkpoint_loads(tmp_path: Path) -> None:
    model = theirs()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    token_ids_BS = torch.randint(0, 61, (1, 9))
    with torch.no_grad():
        assert (policy.load(tmp_path).logits(token_ids_BS) - model(token_ids_BS).logits).abs().max() < 1e-4


def test_bf16_keeps_the_correction_bias_in_fp32(tmp_path: Path) -> None:
    ours = make_policy()
    ours.moe_layers[0].gate.e_score_correction_bias.fill_(0.1001)
    policy.save(ours, tmp_path, dtype=torch.bfloat16)
    again = policy.load(tmp_path)
    assert again.dtype == torch.bfloat16
    assert again.moe_layers[0].gate.e_score_correction_bias.dtype == torch.float32
    assert torch.equal(
        again.moe_layers[0].gate.e_score_correction_bias, ours.moe_layers[0].gate.e_score_correction_bias
    )


def test_checkpoint_of_another_shape_names_the_tensor(tmp_path: Path) -> None:
    policy.save(make_policy(), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"moe_intermediate_size": 24}))
    with pytest.raises(CheckpointError, match=r"gate_proj.weight has shape \[16, 32\].*asks for \[24, 32\]"):
        policy.load(tmp_path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    policy.save(make_policy(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'model.norm.weight'"):
        policy.load(tmp_path)


def test_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    policy.save(make_policy(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # old files hold these; they follow
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no place for 1 tensors, such as 'model.layers.0.*o_proj.bias'"):
        policy.load(tmp_path)


def test_half_written_checkpoint_is_refused(tmp_path: Path) -> None:
    policy.save(make_policy(), tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="damaged or half-written"):
        policy.load(tmp_path)


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no config.json"):
        policy.load(tmp_path)


def test_no_such_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        policy.load(tmp_path / "missing")


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ShapeError, match="'gpt2' is not supported"):
        policy.load(tmp_path)


def test_config_says_which_key_is_wrong() -> None:
    shape = make_policy().config.model_dump()
    with pytest.raises(ValueError, match="n_group"):
        PolicyConfig(**shape | {"n_group": 3})
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        PolicyConfig(**shape | {"num_experts_per_tok": 9})
