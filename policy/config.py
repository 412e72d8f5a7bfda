"""The shape of a policy, in Hugging Face's names; read from and written to `config.json` by policy/families.py."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from policy.families import FAMILIES, Family, ModelType, ShapeError, read_hf, write_hf

__all__ = ["PolicyConfig", "RopeScaling", "ShapeError"]


class RopeScaling(BaseModel):
    """How RoPE's frequencies are changed for a context longer than that of pretraining; see policy/rope.py."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float = Field(ge=1, description="how many times longer the context is")
    original_max_position_embeddings: int | None = Field(default=None, gt=0, description="positions of pretraining")
    low_freq_factor: float = Field(default=1.0, gt=0, description="llama3")
    high_freq_factor: float = Field(default=4.0, gt=0, description="llama3")
    beta_fast: float = Field(default=32.0, gt=0, description="yarn: turns in the old context from which on no change")
    beta_slow: float = Field(default=1.0, gt=0, description="yarn: turns up to which all is interpolated")
    mscale: float = Field(default=1.0, ge=0, description="yarn: weight of the growth of rotated queries and keys")
    mscale_all_dim: float = Field(default=0.0, ge=0, description="yarn, MLA: weight of the growth of all scores")
    attention_factor: float | None = Field(default=None, gt=0, description="yarn: the growth itself, where given")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rope_type != "linear" and self.original_max_position_embeddings is None:
            raise ShapeError(f"rope_scaling of type {self.rope_type} needs original_max_position_embeddings")
        if self.rope_type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ShapeError(
                f"rope_scaling.low_freq_factor ({self.low_freq_factor}) must be below high_freq_factor "
                f"({self.high_freq_factor})"
            )
        return self


class PolicyConfig(BaseModel):
    """A decoder: latent (MLA) or grouped-query attention, dense or mixture-of-experts layers, optional MTP modules.

    Names and meanings follow the official `config.json` of DeepSeek-V3, then those of the other families. What a
    family does not have keeps its default: 0 heads or experts mean none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: ModelType = "deepseek_v3"
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0, description="width of the dense feed-forward")
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    max_position_embeddings: int = Field(gt=0)
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    # Latent attention (deepseek_v3, deepseek_v2).
    kv_lora_rank: int = Field(default=0, ge=0, description="width of the latent that stands for keys and values")
    q_lora_rank: int | None = Field(default=None, gt=0)
    qk_nope_head_dim: int = Field(default=0, ge=0)
    qk_rope_head_dim: int = Field(default=0, ge=0)
    v_head_dim: int = Field(default=0, ge=0)
    # Grouped-query attention (llama, qwen2, qwen3, qwen3_moe).
    num_key_value_heads: int = Field(default=0, ge=0, description="left out: as many as query heads")
    head_dim: int = Field(default=0, ge=0, description="left out: hidden_size / num_attention_heads")
    attention_bias: bool = Field(default=False, description="biases of the projections to queries, keys and values")
    # Mixture of experts (deepseek_v3, deepseek_v2, qwen3_moe).
    n_routed_experts: int = Field(default=0, ge=0)
    n_shared_experts: int = Field(default=1, ge=0)
    num_experts_per_tok: int = Field(default=0, ge=0)
    moe_intermediate_size: int = Field(default=0, ge=0, description="width of one expert")
    scoring_func: Literal["sigmoid", "softmax"] = Field(default="sigmoid", description="from router logits to scores")
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = Field(
        default="noaux_tc",
        description="noaux_tc: biased scores, groups by their best two; greedy: scores, no groups; "
        "group_limited_greedy: scores, groups by their best one",
    )
    n_group: int = Field(default=1, gt=0)
    topk_group: int = Field(default=1, gt=0)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = Field(default=1, ge=0, description="layers before this one are dense")
    decoder_sparse_step: int = Field(default=1, gt=0, description="of the others, every n-th has experts")
    mlp_only_layers: tuple[int, ...] = Field(default=(), description="and these do not")
    num_nextn_predict_layers: int = Field(default=0, ge=0, description="MTP modules (deepseek_v3)")
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """The family's defaults, and the widths that follow from others."""
        family = FAMILIES.get(values.get("model_type", "deepseek_v3"))
        if family is None:
            return values  # refused below, with the list
        values = {**family.defaults, **values}
        if family.attention == "grouped_query" and isinstance(heads := values.get("num_attention_heads"), int):
            values["num_key_value_heads"] = values.get("num_key_value_heads") or heads
            if not values.get("head_dim") and heads > 0 and isinstance(width := values.get("hidden_size"), int):
                values["head_dim"] = width // heads
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, info in type(self).model_fields.items():
            if name in self.family.fields or name in ("model_type", "rope_theta", "rope_scaling"):
                continue
            wanted = self.family.defaults.get(name, info.default)
            if getattr(self, name) != wanted:
                raise ShapeError(f"{name} is {wanted!r} in the family {self.model_type}, got {getattr(self, name)!r}")
        self._check_attention()
        if "n_routed_experts" in self.family.fields:
            self._check_experts()
        return self

    def _check_attention(self) -> None:
        if self.family.attention == "latent":
            self._need_positive("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        elif self.num_attention_heads % self.num_key_value_heads:
            raise ShapeError(
                f"num_key_value_heads ({self.num_key_value_heads}) must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        else:
            self._need_positive("head_dim")
        if self.rope_width % 2:
            key = "qk_rope_head_dim" if self.family.attention == "latent" else "head_dim"
            raise ShapeError(f"{key} must be even (RoPE turns pairs), got {self.rope_width}")

    def _check_experts(self) -> None:
        self._need_positive("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
        if self.n_routed_experts % self.n_group:
            raise ShapeError(f"n_group ({self.n_group}) must divide n_routed_experts ({self.n_routed_experts})")
        if self.topk_group > self.n_group:
            raise ShapeError(f"topk_group ({self.topk_group}) must be at most n_group ({self.n_group})")
        groups = 1 if self.topk_method == "greedy" else self.n_group
        eligible = self.n_routed_experts // groups * min(self.topk_group, groups)
        if self.num_experts_per_tok > eligible:
            raise ShapeError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the {eligible} eligible experts"
            )

    def _need_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name):
                raise ShapeError(f"{name} is needed in the family {self.model_type}, and above 0")

    @property
    def family(self) -> Family:
        """What all models of this `model_type` have in common."""
        return FAMILIES[self.model_type]

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        return self.head_dim or self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rope_width(self) -> int:
        """How much of a query or key head RoPE turns."""
        return self.head_dim or self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer: the latent and the shared rotated key, or the keys and values."""
        if self.family.attention == "latent":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

    @property
    def num_cache_layers(self) -> int:
        """Layers that a cache has room for where MTP modules draft: the trunk's, then the modules'."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def is_moe_layer(self, layer: int) -> bool:
        """Whether a layer's feed-forward is a mixture of experts (MTP modules, numbered last, always are)."""
        return (
            self.n_routed_experts > 0
            and layer >= self.first_k_dense_replace
            and (layer + 1) % self.decoder_sparse_step == 0
            and layer not in self.mlp_only_layers
        )

    @property
    def num_moe_layers(self) -> int:
        """Layers of the trunk with routed experts."""
        return sum(self.is_moe_layer(layer) for layer in range(self.num_hidden_layers))

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> PolicyConfig:
        """From the mapping in a Hugging Face `config.json`; RoPE in its old or its `rope_parameters` form."""
        return cls(**read_hf(values))

    def to_hf(self) -> dict[str, Any]:
        """The mapping for `config.json`, in the form that transformers and vLLM both read."""
        return write_hf(self.model_dump(mode="json"))
