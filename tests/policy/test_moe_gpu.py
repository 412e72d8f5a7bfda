"""The mixture of experts on a GPU: equal to the CPU, without waiting for the device, and capturable.

Shapes: N tokens, K experts per token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from policy import cast_weights
from policy.balance import RouterWatch
from policy.grouped import has_grouped_product
from policy.moe import MixtureOfExperts
from policy.packing import PackedRows
from tests.policies import tiny_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES: dict[str, dict[str, object]] = {
    "v3_groups": {"n_group": 4, "topk_group": 2},
    "v2_groups": {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "v2_greedy": {"model_type": "deepseek_v2", "routed_scaling_factor": 4.0},
    "unaligned": {"hidden_size": 66, "moe_intermediate_size": 30},
}
COUNTS = [1, 7, 256, 3000]


def make_moe(shape: str, dtype: torch.dtype) -> MixtureOfExperts:
    sizes = {"hidden_size": 64, "moe_intermediate_size": 48, "n_routed_experts": 16, "num_experts_per_tok": 6}
    policy = tiny_policy(**sizes | SHAPES[shape], num_hidden_layers=2)
    return cast_weights(policy, dtype).moe_layers[0]


def draw(moe: MixtureOfExperts, count: int) -> Tensor:
    width = moe.gate.weight.shape[1]
    return torch.randn(count, width, generator=torch.Generator().manual_seed(count)).to(moe.gate.weight.dtype)


@contextmanager
def no_sync() -> Iterator[None]:
    """Within, whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gpu_equals_cpu_gradients_too(dtype: torch.dtype, shape: str, count: int) -> None:
    """Against fp32 on the CPU with the same rounded weights and the same choice."""
    moe = make_moe(shape, dtype)
    exact = make_moe(shape, dtype).float()
    x_NC = draw(moe, count)
    direction = torch.randn(x_NC.shape, generator=torch.Generator().manual_seed(1))
    experts_NK = exact.gate(x_NC.float()).experts_NK

    def run(layer: MixtureOfExperts, x: Tensor, given: Tensor) -> list[Tensor]:
        x = x.detach().requires_grad_()
        out_NC, _ = layer(x, given)
        weights = list(layer.parameters())
        grads = torch.autograd.grad((out_NC * direction.to(x)).sum(), [x, *weights])
        return [each.detach().float().cpu() for each in (out_NC, *grads)]

    ours = run(moe.cuda(), x_NC.cuda(), experts_NK.cuda())
    for got, wanted in zip(ours, run(exact, x_NC.float(), experts_NK), strict=True):
        scale = wanted.abs().max()
        assert (got - wanted).abs().max() <= (1e-4 if dtype == torch.float32 else 5e-2) * scale


@pytest.mark.parametrize("shape", SHAPES)
def test_gpu_routes_as_the_cpu_does(shape: str) -> None:
    moe = make_moe(shape, torch.float32)
    x_NC = draw(moe, 500)
    wanted = moe.gate(x_NC).experts_NK.sort().values
    assert (moe.cuda().gate(x_NC.cuda()).experts_NK.sort().values.cpu() == wanted).float().mean() > 0.999


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_forward_and_backward_never_wait_for_the_device(dtype: torch.dtype, shape: str) -> None:
    moe = make_moe(shape, dtype).cuda()
    x_NC = draw(moe, 300).cuda().requires_grad_()
    watch = RouterWatch.of(PackedRows.of([100, 200], "cuda"), with_losses=True)

    def step() -> None:
        out_NC, routed = moe(x_NC, None, watch)
        assert routed.sums is not None
        (out_NC.float().sum() + routed.sums.balance_M.sum() + routed.sums.z_M.sum()).backward()
        moe.gate.balance(routed.sums.load_ME[0], 0.01)

    step()  # the first call may load kernels
    with no_sync():
        step()


def test_bf16_on_this_device_goes_through_the_grouped_product() -> None:
    """Or the tests above prove nothing about it; older devices go through blocks."""
    moe = make_moe("v3_groups", torch.bfloat16).cuda()
    is_new_enough = torch.cuda.get_device_capability()[0] in (9, 10)
    assert has_grouped_product(draw(moe, 8).cuda(), moe.experts.down_proj) == is_new_enough


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_a_decoding_step_can_be_captured_and_replayed(dtype: torch.dtype, shape: str) -> None:
    moe = make_moe(shape, dtype).cuda()
    x_NC = draw(moe, 24).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            moe(x_NC)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out_NC, routed = moe(x_NC)
    for seed in range(3):  # other tokens, other experts, the same graph
        x_NC.copy_(torch.randn(x_NC.shape, generator=torch.Generator().manual_seed(seed)).to(x_NC))
        graph.replay()
        wanted_NC, wanted = moe(x_NC)
        assert torch.equal(routed.experts_NK, wanted.experts_NK)
        assert torch.allclose(out_NC, wanted_NC, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
