"""Products in bf16 for decoding on the CPU against the same numbers multiplied in fp64."""

import pytest
import torch

from policy.decode_layout import has_bf16_products
from policy.head import WIDENED_ROWS, project

pytestmark = pytest.mark.skipif(not has_bf16_products(), reason="this processor has no avx512_bf16")


@pytest.fixture(autouse=True)
def _no_gradient():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("rows", [1, 16, 17, 33, 64])
@pytest.mark.parametrize(("width", "depth"), [(8, 2), (61, 32), (96, 250)])
def test_products(rows: int, width: int, depth: int) -> None:
    from policy.cpu_bf16_products import multiply

    generator = torch.Generator().manual_seed(rows)
    x_NC, weight_OC = (torch.randn(n, depth, generator=generator).bfloat16() for n in (rows, width))
    out_NO = multiply(x_NC, weight_OC)
    assert out_NO.dtype == torch.float32
    expected_NO = x_NC.double() @ weight_OC.double().T
    torch.testing.assert_close(out_NO.double(), expected_NO, atol=1e-5, rtol=1e-5)
    assert torch.equal(multiply(x_NC[-1:], weight_OC), out_NO[-1:])


def test_a_large_head_gives_fp32_logits_of_either_kind_of_row() -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VC = torch.randn(WIDENED_ROWS + 3, 32, generator=generator).bfloat16()
    hidden_NC = torch.randn(40, 32, generator=generator).bfloat16()
    expected_NV = hidden_NC.double() @ weight_VC.double().T
    for rows in (hidden_NC, hidden_NC[::2], hidden_NC.t().contiguous().t()):
        logits = project(rows, weight_VC)
        wanted = expected_NV[::2] if len(rows) == 20 else expected_NV
        torch.testing.assert_close(logits.double(), wanted, atol=1e-5, rtol=1e-5)
