"""Decoding by kernels of the CPU against torch's operations, which blocks of three tokens take."""

from collections.abc import Callable

import pytest
import torch

from policy import Policy
from tests.policies import hidden_over_cache, tiny_llama, tiny_policy

MAKERS: dict[str, Callable[[], Policy]] = {
    "latent": tiny_policy,
    "query_latent": lambda: tiny_policy(q_lora_rank=12),
    "wide_latent": lambda: tiny_policy(kv_lora_rank=40, num_attention_heads=3),
    "no_shared_experts": lambda: tiny_policy(n_shared_experts=0, n_group=2, topk_group=1),
    "grouped": tiny_llama,
    "biases": lambda: tiny_llama(model_type="qwen2"),
    "norms": lambda: tiny_llama(model_type="qwen3"),
}


@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("maker", MAKERS)
def test_kernels_decode_as_torch_does(maker: str, rows: int) -> None:
    policy = MAKERS[maker]()
    token_ids_BS = torch.randint(0, 61, (rows, 11), generator=torch.Generator().manual_seed(0))
    expected = hidden_over_cache(policy, token_ids_BS, 4, block_size=3)
    for block_size in (4, 5):
        hidden = hidden_over_cache(policy, token_ids_BS, 4, block_size=block_size)
        torch.testing.assert_close(hidden, expected, atol=3e-5, rtol=0)
