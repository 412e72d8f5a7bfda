"""The kernels between the products of a decoding step's layer, against what they stand for.

Shapes: N tokens, C model width, H heads, R latent, W cache entry, E experts, K experts per token, I expert width.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from policy import Policy, layer_kernels
from policy.fused import silu_gate
from policy.moe import FEW_TOKENS
from policy.paged_attention import Absorbed
from policy.rope import rotate, rotation_of
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy
from tests.pretended_gpu import pretended_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("width", [5, 32])
def test_a_sum_and_its_norm(width: int) -> None:
    x_NC, more_NC, weight_C = draw(3, width), draw(3, width, seed=1), draw(width, seed=2)
    total_NC, out_NC = layer_kernels.add_normalise(x_NC, more_NC, weight_C, 1e-5)
    assert torch.equal(total_NC, x_NC + more_NC)
    assert torch.allclose(out_NC, F.rms_norm(total_NC, (width,), weight_C, 1e-5), atol=1e-5)


def test_a_sum_in_half_precision_is_rounded_before_its_norm() -> None:
    x_NC, more_NC = draw(3, 32).half(), draw(3, 32, seed=1).half()
    total_NC, out_NC = layer_kernels.add_normalise(x_NC, more_NC, torch.ones(32, device=DEVICE), 1e-5)
    assert total_NC.dtype == torch.float16
    assert torch.equal(total_NC, x_NC + more_NC)
    assert torch.allclose(out_NC, F.rms_norm(total_NC.float(), (32,), None, 1e-5), atol=1e-5)


def test_norms_side_by_side() -> None:
    first_NC, second_NC, weights = draw(3, 20), draw(3, 40, seed=1)[:, 20:], draw(2, 20, seed=2)
    wanted = torch.cat([F.rms_norm(x, (20,), w, 1e-5) for x, w in zip((first_NC, second_NC), weights, strict=True)], 1)
    assert torch.allclose(layer_kernels.join_normed(first_NC, second_NC, *weights, 1e-5), wanted, atol=1e-5)


@pytest.mark.parametrize("heads", [3, 11])
@pytest.mark.parametrize("is_interleaved", [True, False])
def test_queries_are_turned_and_the_latent_is_cached(heads: int, is_interleaved: bool) -> None:
    own, half, rank, rows = 6, 3, 10, 4
    config = tiny_policy(qk_rope_head_dim=2 * half, model_type="deepseek_v3").config
    rotation = rotation_of(torch.tensor([3, 0, 7, 1], device=DEVICE), config)
    query_NX, latent_NW, weight_R = (
        draw(rows, heads * (own + 2 * half)),
        draw(rows, rank + 2 * half, seed=1),
        draw(rank),
    )
    latent_NW[1, -1], latent_NW[2, 0] = float("inf"), float("nan")
    slots, blocks = torch.tensor([5, 0, 2, 3], device=DEVICE), torch.ones(2, 3, rank + 2 * half, device=DEVICE)
    out_NHW = layer_kernels.enter_latent(
        query_NX, latent_NW, weight_R, 1e-6, rotation.cos, rotation.sin, slots, blocks, heads,
        is_interleaved=is_interleaved,
    )  # fmt: skip
    turn = type(rotation)(cos=rotation.cos, sin=rotation.sin, is_interleaved=is_interleaved)
    wanted = rotate(query_NX.unflatten(-1, (heads, -1)), turn)[..., own:]
    assert torch.allclose(out_NHW[..., rank:], wanted, atol=1e-5)
    normed = F.rms_norm(latent_NW[:, :rank], (rank,), weight_R, 1e-6)
    turned = rotate(latent_NW[:, None, rank:], turn)[:, 0]
    entries = torch.cat((normed, turned), dim=1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    expected = torch.ones(6, rank + 2 * half, device=DEVICE).index_copy(0, slots, entries)
    assert torch.allclose(blocks.flatten(0, 1), expected, atol=1e-5)


@pytest.mark.parametrize("shared_width", [0, 12, 40])
def test_experts_are_mixed_into_the_stream(shared_width: int) -> None:
    """Shared experts narrower and wider than one that is chosen; widths that no power of two is."""
    rows, width, experts, own = 3, 20, 5, 24
    x_NC, inner_NC = draw(rows, width), draw(rows, width, seed=1)
    chosen_NK = torch.tensor([[4, 0], [1, 2], [2, 1]], device=DEVICE)
    weights_NK = draw(rows, 2, seed=2)
    gate_up, down = draw(experts, 2 * own, width, seed=3), draw(experts, width, own, seed=4)
    shared = None
    if shared_width:
        shared = draw(shared_width, width, seed=5), draw(shared_width, width, seed=6), draw(width, shared_width, seed=7)
    got = layer_kernels.mix_experts(x_NC, inner_NC, chosen_NK, weights_NK, gate_up, down, shared)
    wanted, none = x_NC.clone(), torch.zeros_like(x_NC)
    sorted_TC = torch.zeros(2 * rows, width, device=DEVICE)
    places_NK = torch.tensor([[5, 1], [0, 3], [2, 4]], device=DEVICE)
    for n in range(rows):
        for k in range(2):
            gate, up = (gate_up[chosen_NK[n, k]] @ inner_NC[n]).chunk(2)
            sorted_TC[places_NK[n, k]] = down[chosen_NK[n, k]] @ (F.silu(gate) * up)
            wanted[n] += weights_NK[n, k] * sorted_TC[places_NK[n, k]]
    more_NC = none
    if shared is not None:
        more_NC = silu_gate(inner_NC @ shared[0].T, inner_NC @ shared[1].T) @ shared[2].T
        wanted += more_NC
    assert torch.allclose(got, wanted, atol=1e-3, rtol=1e-4)
    gathered = layer_kernels.gather_into(
        x_NC, sorted_TC, places_NK, weights_NK, None if shared is None else more_NC.contiguous()
    )
    assert torch.allclose(gathered, wanted, atol=1e-3, rtol=1e-4)


ONE = {"num_hidden_layers": 1, "first_k_dense_replace": 0}
POLICIES: dict[str, tuple[Callable[[], Policy], int]] = {
    "experts": (lambda: tiny_policy(**ONE), FEW_TOKENS + 1),
    "experts of few tokens": (lambda: tiny_policy(**ONE, n_shared_experts=2, q_lora_rank=12), 2),
    "dense": (lambda: tiny_llama(0, model_type="qwen2", num_hidden_layers=1), 2),
    "experts that share nothing": (lambda: tiny_llama(0, **TINY_QWEN3_MOE | {"num_hidden_layers": 2}), 2),
    "groups that the kernel does not route": (
        lambda: tiny_policy(**ONE, n_routed_experts=12, n_group=3, topk_group=2), 2,
    ),
}  # fmt: skip


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU need not be pretended")
@pytest.mark.parametrize("name", POLICIES)
def test_a_decoding_step_is_that_of_a_cpu(name: str) -> None:
    make, rows = POLICIES[name]
    policy = make()
    token_N, position_N = torch.arange(3, 3 + rows), torch.arange(rows) % 5
    table_NM = torch.arange(2 * rows).view(rows, 2)
    caches = [draw(policy.config.num_hidden_layers, 2 * rows, 4, policy.config.cache_width) for _ in range(2)]

    def step(cache: Tensor) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            output = policy(token_N, position_N, Absorbed.at(cache, table_NM, position_N))
        return output.hidden_NC, output.experts_MNK

    plain, plain_experts = step(caches[0])
    with pretended_gpu(may_wait=True):
        ours, experts = step(caches[1])
    assert torch.allclose(ours, plain, atol=1e-4)
    assert torch.allclose(caches[1], caches[0], atol=1e-5)
    if plain_experts is not None:
        assert experts is not None
        assert torch.equal(experts.sort().values, plain_experts.sort().values)
