"""Shapes to and from `config.json`; what is not supported is refused by name."""

import pytest
from pydantic import ValidationError
from transformers import DeepseekV3Config

from policy import PolicyConfig, ShapeError
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
    names = set(SHAPE.model_dump()) - {"rope_theta", "num_nextn_predict_layers"}  # theirs: moved, and dropped
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
        ({"model_type": "llama"}, r"model_type 'llama' is not supported \(supported: deepseek_v3\)"),
        ({"rope_scaling": {"type": "yarn", "factor": 40}}, "rope_scaling .*yarn.* is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling .*yarn.* is not supported"),
        ({"rope_interleave": False}, "rope_interleave: false is not supported"),
        ({"attention_bias": True}, "attention_bias: true is not supported"),
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported"),
    ],
)
def test_architectures_that_are_not_supported_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        PolicyConfig.from_hf(SHAPE.to_hf() | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_rope_head_dim": 7}, r"qk_rope_head_dim must be even .*got 7"),
        ({"n_group": 3}, r"n_group \(3\) must divide n_routed_experts \(4\)"),
        ({"n_group": 2, "topk_group": 3}, r"topk_group \(3\) must be at most n_group \(2\)"),
        ({"n_group": 4, "num_experts_per_tok": 2}, r"num_experts_per_tok \(2\) exceeds the 1 eligible experts"),
        ({"hidden_size": 0}, "hidden_size"),
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


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SHAPE.hidden_size = 64
