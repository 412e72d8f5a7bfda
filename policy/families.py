"""The families of models a policy can be: one row each, from which `config.json` is read and written.

A shape is the same `PolicyConfig` whatever the family; a row says which of its fields the family's `config.json` holds
and under which name, what the others are, and what of the family is not supported. Sources: the `config.json` of the
released checkpoints and the configuration classes of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


class ShapeError(ValueError):
    """A model shape that cannot be built; the message names the key."""


ModelType = Literal["deepseek_v3", "deepseek_v2", "llama", "qwen2", "qwen3", "qwen3_moe"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What models of one `model_type` have in common."""

    architecture: str
    """Class of transformers, the entry of `architectures`."""
    attention: Literal["latent", "grouped_query"]
    """Which attention its layers have."""
    fields: Mapping[str, str]
    """Fields of `PolicyConfig` that its `config.json` holds, to the key there; RoPE apart, which has two spellings."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields whose value, unless given, is not the one of `PolicyConfig`; one that is not in `fields` is always so."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Keys of `config.json` that are always written so; reading, another value is refused and an absent key is fine."""
    has_interleaved_rope: bool = False
    """Whether RoPE turns neighbours (x[2i], x[2i+1]) instead of halves (x[i], x[i + width/2])."""
    has_qk_norm: bool = False
    """Whether queries and keys go through an RMSNorm per head before RoPE."""
    has_output_bias: bool = True
    """Whether `attention_bias` also gives the output projection a bias."""


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_EVERY = _same(
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "initializer_range",
    "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
_LATENT = _same("kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_GROUPED_QUERY = _same("num_key_value_heads", "head_dim")
_EXPERTS = _same("moe_intermediate_size", "num_experts_per_tok")
_DEEPSEEK = {
    **_EVERY, **_LATENT, **_EXPERTS,
    **_same("n_routed_experts", "n_shared_experts", "n_group", "topk_group"),
    **_same("routed_scaling_factor", "first_k_dense_replace"),
}  # fmt: skip
_SOFTMAX = {"scoring_func": "softmax", "topk_method": "greedy"}
_FIXED = {"hidden_act": "silu", "attention_dropout": 0.0}
_FIXED_DEEPSEEK = {**_FIXED, "attention_bias": False, "moe_layer_freq": 1}
_FULL_ATTENTION = {"use_sliding_window": False}

FAMILIES: Mapping[str, Family] = {
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        attention="latent",
        fields={**_DEEPSEEK, **_same("norm_topk_prob", "num_nextn_predict_layers")},
        fixed={**_FIXED_DEEPSEEK, "rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        has_interleaved_rope=True,
    ),
    "deepseek_v2": Family(
        architecture="DeepseekV2ForCausalLM",
        attention="latent",
        fields={**_DEEPSEEK, **_same("topk_method")},
        defaults={**_SOFTMAX, "norm_topk_prob": False},
        # DeepSeek's code and transformers do different things for norm_topk_prob; no released model sets it.
        fixed={**_FIXED_DEEPSEEK, "mlp_bias": False, "scoring_func": "softmax", "norm_topk_prob": False},
        has_interleaved_rope=True,
    ),
    "llama": Family(
        architecture="LlamaForCausalLM",
        attention="grouped_query",
        fields={**_EVERY, **_GROUPED_QUERY, **_same("attention_bias")},
        fixed={**_FIXED, "mlp_bias": False},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        attention="grouped_query",
        fields={**_EVERY, **_GROUPED_QUERY},
        defaults={"attention_bias": True},
        fixed={**_FIXED, **_FULL_ATTENTION},
        has_output_bias=False,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        attention="grouped_query",
        fields={**_EVERY, **_GROUPED_QUERY, **_same("attention_bias")},
        fixed={**_FIXED, **_FULL_ATTENTION},
        has_qk_norm=True,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        attention="grouped_query",
        fields={
            **_EVERY,
            **_GROUPED_QUERY,
            **_EXPERTS,
            **_same("attention_bias", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
            "n_routed_experts": "num_experts",
        },
        defaults={**_SOFTMAX, "n_shared_experts": 0, "first_k_dense_replace": 0},
        fixed={**_FIXED, **_FULL_ATTENTION},
        has_qk_norm=True,
    ),
}


def read_hf(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `PolicyConfig` from the mapping in a Hugging Face `config.json`; raises ShapeError."""
    kind = str(values.get("model_type"))
    if kind not in FAMILIES:
        raise ShapeError(f"model_type {kind!r} is not supported (supported: {', '.join(FAMILIES)})")
    if (quantised := values.get("quantization_config")) is not None:
        method = quantised.get("quant_method", "?") if isinstance(quantised, Mapping) else quantised
        raise ShapeError(
            f"quantization_config ({method}): quantised weights are not supported; dequantise the checkpoint first "
            "(DeepSeek's own with inference/fp8_cast_bf16.py of its repository; others with from_pretrained(...), "
            "dequantize() and save_pretrained(...) of transformers), and remove quantization_config"
        )
    family = FAMILIES[kind]
    for key, supported in family.fixed.items():
        if values.get(key) is not None and values[key] != supported:
            raise ShapeError(
                f"{key}: {values[key]!r} is not supported for model_type {kind!r} (supported: {supported!r})"
            )
    fields = {name: values[key] for name, key in family.fields.items() if values.get(key) is not None}
    if not fields.get("q_lora_rank", 1):
        fields["q_lora_rank"] = None  # some checkpoints write 0 for it
    if "n_shared_experts" in family.fields and values.get("n_shared_experts", 0) is None:
        fields["n_shared_experts"] = 0
    if "n_routed_experts" in family.fields and "num_local_experts" in values:
        fields.setdefault("n_routed_experts", values["num_local_experts"])
    return {"model_type": kind, **fields, **_read_rope(values)}


def write_hf(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The mapping for `config.json`, in the form that transformers and vLLM both read."""
    family = FAMILIES[fields["model_type"]]
    values = {key: fields[name] for name, key in family.fields.items()}
    if family.attention == "latent":
        values |= {"num_key_value_heads": fields["num_attention_heads"], "head_dim": fields["qk_rope_head_dim"]}
    return {
        "architectures": [family.architecture],
        "model_type": fields["model_type"],
        **values,
        "rope_theta": fields["rope_theta"],
        "rope_scaling": _write_scaling(fields["rope_scaling"]),
        **family.fixed,
        "use_cache": True,
    }


def _write_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What belongs to the kind of scaling; under `type` too, which is what DeepSeek's own code reads."""
    if scaling is None:
        return None
    kind = scaling["rope_type"]
    keys = {
        "linear": ("factor",),
        "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
    }[kind]
    if kind == "yarn" and (scaling["mscale"], scaling["mscale_all_dim"]) != (1.0, 0.0):
        keys += ("mscale", "mscale_all_dim")
    return {"type": kind, "rope_type": kind, **{key: scaling[key] for key in keys if scaling[key] is not None}}


def _read_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, from their old form or from `rope_parameters`, which holds both."""
    new = dict(values.get("rope_parameters") or {})
    scaling = dict(values.get("rope_scaling") or new)
    theta = values.get("rope_theta") or new.get("rope_theta") or 10000.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if (part := scaling.get("partial_rotary_factor", values.get("partial_rotary_factor"))) not in (None, 1, 1.0):
        raise ShapeError(f"partial_rotary_factor: {part} is not supported; RoPE turns whole heads")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind in ("yarn", "llama3"):
        scaling.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    left_out = {"type", "rope_theta", "partial_rotary_factor"}
    kept = {key: value for key, value in scaling.items() if key not in left_out and value is not None}
    return {"rope_theta": theta, "rope_scaling": {**kept, "rope_type": kind}}
