"""A real policy small enough for every test."""

from policy import Policy, PolicyConfig, initialise


def tiny_policy(seed: int = 0, **changes: object) -> Policy:
    """A DeepSeek-V3 shape of some thousand weights, fp32, drawn with large weights so that its choices are not
    uniform."""
    shape: dict[str, object] = dict(  # noqa: C408
        vocab_size=61, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=4, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=12, v_head_dim=10, max_position_embeddings=128, initializer_range=0.25,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    policy = Policy(PolicyConfig.model_validate(shape | changes))
    initialise(policy, seed)
    return policy
