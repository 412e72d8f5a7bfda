"""Shapes to and from `config.json`; what is not supported is refused by name."""

import pytest
from pydantic import ValidationError
from transformers import DeepseekV3Config

from policy import PolicyConfig
from tests.policies import tiny_policy

SHAPE = tiny_policy().config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": 24, "tie_word_embeddings": True, "rope_theta": 5e5},
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": False},
        {"num_nextn_predict_layers": 2, "first_k_dense_replace": 0, "n_shared_experts": 0},
    ],
    ids=["plain", "query_latent", "groups", "mtp"],
)
def test_round_trip_through_config_json(changes: dict[str, object]) -> None:
    config = PolicyConfig.model_validate(SHAPE.model_dump() | changes)
    assert PolicyConfig.from_hf(config.to_hf()) == config


def test_transformers_reads_the_same_numbers() -> None:
    config = PolicyConfig.model_validate(SHAPE.model_dump() | {"rope_theta": 5e5, "num_attention_heads": 2})
    theirs = DeepseekV3Config(**config.to_hf())
    names = set(config.family.fields) - {"num_nextn_predict_layers"}  # theirs has another name
    assert {name: getattr(theirs, name) for name in names} == {name: getattr(config, name) for name in names}
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.num_key_value_heads == 2
    assert PolicyConfig.from_hf(theirs.to_dict()) == config


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
    ids=["old", "old_with_null_scaling", "rope_parameters"],
)
def test_rope_theta_is_read_from_either_form(rope: dict[str, object]) -> None:
    values = SHAPE.to_hf()
    del values["rope_theta"], values["rope_scaling"]
    assert PolicyConfig.from_hf(values).rope_theta == 10000.0
    assert PolicyConfig.from_hf(values | rope).rope_theta == 5e5


def test_query_rank_0_means_none_as_in_some_checkpoints() -> None:
    assert PolicyConfig.from_hf(SHAPE.to_hf() | {"q_lora_rank": 0}).q_lora_rank is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type 'gpt2' is not supported \(supported: deepseek_v3, .*, qwen3_moe\)"),
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "rope_type"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "truncate"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ({"rope_interleave": False}, "rope_interleave: False is not supported"),
        ({"attention_bias": True}, "attention_bias: True is not supported"),
        ({"scoring_func": "softmax"}, r"scoring_func: 'softmax' is not supported .*\(supported: 'sigmoid'\)"),
        ({"topk_method": "greedy"}, "topk_method: 'greedy' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: 2 is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantization_config \(fp8\).*dequantise"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window: True is not supported"),
        ({"model_type": "llama", "mlp_bias": True}, "mlp_bias: True is not supported"),
        (
            {"model_type": "deepseek_v2", "scoring_func": "softmax", "norm_topk_prob": True},
            "norm_topk_prob: True is not supported for model_type 'deepseek_v2'",
        ),
    ],
)
def test_architectures_that_are_not_supported_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig.from_hf(SHAPE.to_hf() | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 7}, r"qk_rope_head_dim must be even .*got 7"),
        ({"n_group": 3}, r"n_group \(3\) must divide n_routed_experts \(4\)"),
        ({"n_group": 2, "topk_group": 3}, r"topk_group \(3\) must be at most n_group \(2\)"),
        ({"n_group": 4, "num_experts_per_tok": 2}, r"num_experts_per_tok \(2\) exceeds the 1 eligible experts"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is needed in the family deepseek_v3"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 0 in the family deepseek_v3, got 4"),
        ({"scoring_func": "softmax"}, "scoring_func is 'sigmoid' in the family deepseek_v3, got 'softmax'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "yarn needs original_max_position_embeddings"),
        ({"hiden_size": 32}, "hiden_size"),
    ],
)
def test_shapes_that_cannot_be_built_name_the_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PolicyConfig.model_validate(SHAPE.model_dump() | changes)


def test_derived_widths_and_layers() -> None:
    config = PolicyConfig.model_validate(SHAPE.model_dump() | {"num_hidden_layers": 5, "first_k_dense_replace": 2})
    assert (config.qk_head_dim, config.cache_width) == (12 + 8, 16 + 8)
    assert [config.is_moe_layer(layer) for layer in range(5)] == [False, False, True, True, True]
    assert config.num_moe_layers == 3
    assert config.model_copy(update={"first_k_dense_replace": 9}).num_moe_layers == 0


GROUPED = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {"attention_bias": True, "eos_token_id": (5, 6)}),
        (
            "llama",
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "original_max_position_embeddings": 32}},
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2}}),
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3_moe", {**EXPERTS, "decoder_sparse_step": 2, "mlp_only_layers": (3,), "norm_topk_prob": False}),
    ],
)
def test_other_families_go_round_through_config_json_too(model_type: str, changes: dict[str, object]) -> None:
    config = PolicyConfig.model_validate({**GROUPED, "model_type": model_type, **changes})
    assert PolicyConfig.from_hf(config.to_hf()) == config
    assert {name: getattr(config, name) for name in changes if name != "rope_scaling"} == {
        name: value for name, value in changes.items() if name != "rope_scaling"
    }


def test_widths_of_grouped_query_attention_follow_from_the_heads() -> None:
    config = PolicyConfig.model_validate({**GROUPED, "model_type": "llama"})
    assert (config.head_dim, config.qk_head_dim, config.rope_width, config.cache_width) == (8, 8, 8, 2 * 2 * 8)
    alone = {name: value for name, value in GROUPED.items() if name != "num_key_value_heads"}
    assert PolicyConfig.model_validate({**alone, "model_type": "qwen2"}).num_key_value_heads == 4
    assert config.num_moe_layers == 0
    with pytest.raises(ValueError, match=r"num_key_value_heads \(3\) must divide num_attention_heads \(4\)"):
        PolicyConfig.model_validate({**GROUPED, "model_type": "llama", "num_key_value_heads": 3})


def test_which_layers_of_qwen3_moe_have_experts() -> None:
    config = PolicyConfig.model_validate(
        {**GROUPED, **EXPERTS, "model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    )
    assert [config.is_moe_layer(layer) for layer in range(4)] == [False, True, False, False]


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SHAPE.hidden_size = 64
