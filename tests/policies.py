"""A real policy small enough for every test, and the plainest way to decode with one."""

import torch
from torch import Tensor

from policy import PackedRows, Policy, PolicyConfig, initialise
from policy.attention import Expanded
from policy.paged_attention import Absorbed


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


def tiny_llama(seed: int = 0, **changes: object) -> Policy:
    """As `tiny_policy`, with grouped-query attention and dense layers; `model_type` may name another such family."""
    shape: dict[str, object] = dict(  # noqa: C408
        model_type="llama", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.25,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    policy = Policy(PolicyConfig.model_validate(shape | changes))
    initialise(policy, seed)
    return policy


TINY_QWEN3_MOE: dict[str, object] = {
    "model_type": "qwen3_moe", "head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "decoder_sparse_step": 2,
}  # fmt: skip
"""What makes `tiny_llama` a mixture of experts in every second layer, its heads wider than the model."""


@torch.no_grad()
def hidden_over_cache(policy: Policy, token_ids_BS: Tensor, num_prefilled: int, block_size: int = 3) -> Tensor:
    """[B, S, C]: the first tokens of every row in one pass, then one token of every row at a time over the cache."""
    (batch, length), config = token_ids_BS.shape, policy.config
    per_row = -(-length // block_size)
    table = torch.randperm(batch * per_row, generator=torch.Generator().manual_seed(0)).view(batch, per_row)
    # What was there before is large, so that reading beyond a row would show.
    cache = 100 * torch.randn(config.num_hidden_layers, batch * per_row, block_size, config.cache_width)
    cache = cache.to(policy.dtype)
    position = torch.arange(length)
    slot_BS = table[:, position // block_size] * block_size + position % block_size
    rows = PackedRows.of([num_prefilled] * batch)
    plan = Expanded(rows=rows, cache=cache, slot_N=slot_BS[:, :num_prefilled].flatten())
    prefilled = policy(token_ids_BS[:, :num_prefilled].flatten(), rows.position_ids_N, plan).hidden_NC
    hidden = [prefilled.unflatten(0, (batch, num_prefilled))]
    for now in range(num_prefilled, length):
        now_B = torch.full((batch,), now)
        hidden.append(policy(token_ids_BS[:, now], now_B, Absorbed.at(cache, table, now_B)).hidden_NC[:, None])
    return torch.cat(hidden, dim=1)
