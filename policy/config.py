"""The shape of a policy, in Hugging Face's names; read from and written to `config.json`."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ShapeError(ValueError):
    """A model shape that cannot be built; the message names the key."""


class PolicyConfig(BaseModel):
    """A DeepSeek-V3 shape: MLA, DeepSeekMoE after `first_k_dense_replace` dense layers, optional MTP modules.

    Names and meanings follow `DeepseekV3Config` of transformers and the official `config.json`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: Literal["deepseek_v3"] = "deepseek_v3"
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0, description="width of the dense feed-forward")
    moe_intermediate_size: int = Field(gt=0, description="width of one expert")
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    n_routed_experts: int = Field(gt=0)
    n_shared_experts: int = Field(default=1, ge=0)
    num_experts_per_tok: int = Field(gt=0)
    n_group: int = Field(default=1, gt=0)
    topk_group: int = Field(default=1, gt=0)
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    first_k_dense_replace: int = Field(default=1, ge=0)
    kv_lora_rank: int = Field(gt=0, description="width of the latent that stands for keys and values")
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0)
    v_head_dim: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = Field(default=0, ge=0, description="MTP modules")
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.qk_rope_head_dim % 2:
            raise ShapeError(f"qk_rope_head_dim must be even (RoPE turns pairs), got {self.qk_rope_head_dim}")
        if self.n_routed_experts % self.n_group:
            raise ShapeError(f"n_group ({self.n_group}) must divide n_routed_experts ({self.n_routed_experts})")
        if self.topk_group > self.n_group:
            raise ShapeError(f"topk_group ({self.topk_group}) must be at most n_group ({self.n_group})")
        eligible = self.n_routed_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > eligible:
            raise ShapeError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the {eligible} eligible experts"
            )
        return self

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer: the latent and the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts (MTP modules, numbered last, always are)."""
        return layer >= self.first_k_dense_replace

    @property
    def num_moe_layers(self) -> int:
        """Layers of the trunk with routed experts."""
        return max(0, self.num_hidden_layers - self.first_k_dense_replace)

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> PolicyConfig:
        """From the mapping in a Hugging Face `config.json`; RoPE in its old or its `rope_parameters` form."""
        kind = values.get("model_type")
        if kind != "deepseek_v3":
            raise ShapeError(f"model_type {kind!r} is not supported (supported: deepseek_v3)")
        rope = values.get("rope_parameters") or {}
        scaling = values.get("rope_scaling") or rope
        if scaling.get("rope_type", scaling.get("type", "default")) != "default":
            raise ShapeError(f"rope_scaling {scaling} is not supported; only plain RoPE is")
        if not values.get("rope_interleave", True):
            raise ShapeError("rope_interleave: false is not supported; DeepSeek's checkpoints interleave")
        if values.get("attention_bias"):
            raise ShapeError("attention_bias: true is not supported")
        if (scoring := values.get("scoring_func", "sigmoid")) != "sigmoid":
            raise ShapeError(f"scoring_func {scoring!r} is not supported (supported: sigmoid)")
        known = {name: values[name] for name in cls.model_fields if name in values}
        known.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        if known.get("q_lora_rank") == 0:
            known["q_lora_rank"] = None
        return cls(**known)

    def to_hf(self) -> dict[str, Any]:
        """The mapping for `config.json`, in the form that transformers and vLLM both read."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            **self.model_dump(),
            "num_key_value_heads": self.num_attention_heads,
            "head_dim": self.qk_rope_head_dim,
            "hidden_act": "silu",
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "rope_interleave": True,
            "rope_scaling": None,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_cache": True,
        }
