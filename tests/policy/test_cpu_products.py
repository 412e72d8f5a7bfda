"""Kernels for decoding on the CPU against what they stand for."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from policy import cpu_products as kernels
from policy.config import PolicyConfig
from policy.decode_layout import by_feature, lies_by_feature
from policy.moe import Experts
from policy.router import Router

ROWS = (1, 3, 8, 9, 17, 25, 31, 33, 64)


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("width", "depth"), [(1, 5), (7, 16), (8, 33), (61, 32), (96, 24)])
def test_products(rows: int, width: int, depth: int) -> None:
    x_NC, weight_OC = draw(rows, depth), draw(width, depth, seed=1)
    out_NO = kernels.multiply(by_feature(x_NC), weight_OC)
    assert lies_by_feature(out_NO)
    torch.testing.assert_close(out_NO, x_NC @ weight_OC.T, atol=1e-5, rtol=1e-5)


def test_a_row_of_a_product_does_not_depend_on_the_others() -> None:
    x_NC, weight_OC = draw(64, 40), draw(27, 40, seed=1)
    whole_NO = kernels.multiply(by_feature(x_NC), weight_OC)
    for rows in ROWS:
        assert torch.equal(kernels.multiply(by_feature(x_NC[64 - rows :]), weight_OC), whole_NO[64 - rows :])


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_norm_and_gate(rows: int) -> None:
    x_NC, y_NC, weight_C = 3 * draw(rows, 24), draw(rows, 24, seed=1), draw(24, seed=2)
    expected = F.rms_norm(x_NC, (24,), weight_C, 1e-6)
    torch.testing.assert_close(kernels.normalise(by_feature(x_NC), weight_C, 1e-6), expected)
    torch.testing.assert_close(kernels.silu_gate(by_feature(x_NC), by_feature(y_NC)), F.silu(x_NC) * y_NC)


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_experts(rows: int) -> None:
    config = PolicyConfig(
        vocab_size=8, hidden_size=24, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
        n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=12, n_group=4, topk_group=2,
    )  # fmt: skip
    experts, router = Experts(config), Router(config)
    for seed, weight in enumerate((experts.gate_up_proj, experts.down_proj, router.weight)):
        weight.copy_(draw(*weight.shape, seed=seed))
    router.e_score_correction_bias.copy_(draw(8, seed=4))
    x_NC = draw(rows, 24, seed=3)
    with torch.enable_grad():
        routing = router(x_NC)
        expected_NC = experts(x_NC, routing.experts_NK, routing.weights_NK)
    mine = router(by_feature(x_NC))
    assert torch.equal(mine.experts_NK, routing.experts_NK)
    torch.testing.assert_close(mine.weights_NK, routing.weights_NK)
    torch.testing.assert_close(mine.scores_NE, routing.scores_NE)
    out_NC = experts(by_feature(x_NC), mine.experts_NK, mine.weights_NK)
    torch.testing.assert_close(out_NC, expected_NC, atol=1e-4, rtol=1e-5)
