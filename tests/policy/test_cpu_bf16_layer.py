"""Decoding in bf16 by kernels of the CPU against torch's operations, which blocks of three tokens take."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from policy import Policy, bf16_decoding, cast_weights
from policy.decode_layout import has_bf16_products
from tests.policies import hidden_over_cache, tiny_llama, tiny_policy

needs_products = pytest.mark.skipif(not has_bf16_products(), reason="this processor has no avx512_bf16")

WIDE: dict[str, object] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "num_attention_heads": 6}
SHAPES: dict[str, dict[str, object]] = {
    "llama": {},
    "biases": {"model_type": "qwen2"},
    "norms": {"model_type": "qwen3"},
    "many_heads": {"num_attention_heads": 10, "head_dim": 64, "num_key_value_heads": 1},
}


def draw_small(policy: Policy) -> Policy:
    """In bf16, with norms other than 1 and biases other than 0."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in policy.named_parameters():
        if weight.ndim == 1:
            weight.data = ("norm" in name) + 0.3 * torch.randn(weight.shape, generator=generator)
    return cast_weights(policy, torch.bfloat16)


def cache_of(block_size: int) -> Tensor:
    return torch.zeros(1, 1, block_size, 4, dtype=torch.bfloat16)


@needs_products
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_kernel_is_as_far_from_exact_arithmetic_as_torch(shape: str) -> None:
    policy = draw_small(tiny_llama(**WIDE | SHAPES[shape]))
    token_ids_BS = torch.randint(0, 61, (19, 11), generator=torch.Generator().manual_seed(0))
    assert bf16_decoding.reason_for_torch(policy.layers[0], cache_of(4)) is None
    kernel = hidden_over_cache(policy, token_ids_BS, 4, block_size=4)
    theirs = hidden_over_cache(policy, token_ids_BS, 4, block_size=3)
    assert kernel.dtype == torch.bfloat16
    assert not torch.equal(kernel, theirs)  # else nothing was compared
    exact = hidden_over_cache(cast_weights(policy, torch.float64), token_ids_BS, 4, block_size=3)
    (mine, torchs), size = ((x - exact).double().abs() for x in (kernel, theirs)), exact.abs().mean()
    assert torchs.mean() < 0.04 * size
    assert mine.mean() < 1.1 * torchs.mean()
    assert mine.max() < 2 * torchs.max()


@needs_products
@torch.no_grad()
def test_a_row_depends_neither_on_the_batch_nor_on_the_blocks() -> None:
    policy = draw_small(tiny_llama(**WIDE))
    token_ids_BS = torch.randint(0, 61, (49, 11), generator=torch.Generator().manual_seed(0))
    # One token in each prefill: torch's own products differ with the batch.
    whole = hidden_over_cache(policy, token_ids_BS, 1, block_size=4)[:, 1:]
    for rows, block_size in ((1, 4), (16, 8), (17, 16), (33, 4)):
        some = hidden_over_cache(policy, token_ids_BS[-rows:], 1, block_size)[:, 1:]
        assert torch.equal(some, whole[-rows:])


@needs_products
@torch.no_grad()
def test_what_is_no_number_stays_with_its_row() -> None:
    policy = draw_small(tiny_llama(**WIDE))
    token_ids_BS = torch.randint(1, 61, (5, 6), generator=torch.Generator().manual_seed(0))
    expected = hidden_over_cache(policy, token_ids_BS, 2, block_size=4)
    policy.embed_tokens.weight.data[0] = float("nan")
    token_ids_BS[2, 3] = 0
    hidden = hidden_over_cache(policy, token_ids_BS, 2, block_size=4)
    assert hidden[2, 3].isnan().all()
    assert hidden[2, 4:].isfinite().all(), "what is in the cache is cleaned"
    others = [0, 1, 3, 4]
    assert torch.equal(hidden[others], expected[others])


REFUSED: dict[str, tuple[Callable[[], Policy], int, str]] = {
    "latent": (tiny_policy, 4, "grouped-query attention"),
    "narrow": (tiny_llama, 4, "not all multiples of 32"),
    "blocks": (lambda: tiny_llama(**WIDE), 6, "engine.block_size is 6"),
    "output_bias": (lambda: tiny_llama(**WIDE, attention_bias=True), 4, "a bias"),
}


@needs_products
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_to_torch_is_said(case: str) -> None:
    maker, block_size, reason = REFUSED[case]
    layer = cast_weights(maker(), torch.bfloat16).layers[0]
    assert reason in str(bf16_decoding.reason_for_torch(layer, cache_of(block_size)))


def test_other_dtypes_are_left_to_torch() -> None:
    reason = bf16_decoding.reason_for_torch(tiny_llama(**WIDE).layers[0], torch.zeros(1, 1, 4, 4))
    assert reason == "the cache is not bf16 on a CPU"
