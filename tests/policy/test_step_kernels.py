"""The kernels of a decoding step against torch's small operations, which they stand for."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from policy import Policy, step_kernels
from policy.attention import write_cache
from policy.grouped import invert, sort_by_group
from policy.latent_attention import _multiply_wide
from policy.paged_attention import Absorbed
from policy.rope import rope_frequencies, rotation_of
from policy.router import Router
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy
from tests.pretended_gpu import pretended_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUTERS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"n_routed_experts": 16, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "one group, not a power of two": {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 6},
    "deepseek_v2": {
        "model_type": "deepseek_v2", "n_routed_experts": 8, "n_group": 4, "topk_group": 2, "scoring_func": "softmax",
        "topk_method": "group_limited_greedy", "norm_topk_prob": False, "routed_scaling_factor": 2.5,
    },
    "qwen3_moe": TINY_QWEN3_MOE | {"n_routed_experts": 8},
}  # fmt: skip


def make_router(name: str) -> Router:
    make = tiny_llama if name == "qwen3_moe" else tiny_policy
    router = make(**ROUTERS[name]).moe_layers[0].gate
    if router.e_score_correction_bias is not None:
        router.e_score_correction_bias.copy_(
            torch.randn(len(router.weight), generator=torch.Generator().manual_seed(3))
        )
    return router.to(DEVICE)


@pytest.mark.parametrize("name", ROUTERS)
def test_routing_is_that_of_the_router(name: str) -> None:
    router = make_router(name)
    x_NC = torch.randn(9, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        wanted = router(x_NC)
    assert step_kernels.can_route(router.config)
    experts_NK, weights_NK = step_kernels.route(wanted.logits_NE, router.e_score_correction_bias, router.config)
    assert torch.equal(experts_NK, wanted.experts_NK)
    assert torch.allclose(weights_NK, wanted.weights_NK, rtol=1e-5)


def test_of_equal_ratings_the_lower_number_is_taken() -> None:
    router = make_router("deepseek_v3")
    logits_NE = torch.zeros(2, 16, device=DEVICE)
    logits_NE[1, 9] = 1.0
    experts_NK, weights_NK = step_kernels.route(logits_NE, torch.zeros(16, device=DEVICE), router.config)
    assert experts_NK.tolist() == [[0, 1, 2], [9, 0, 1]]
    assert weights_NK.sum(dim=1).tolist() == pytest.approx([router.config.routed_scaling_factor] * 2)


def test_a_token_that_is_no_number_names_experts_that_there_are() -> None:
    router = make_router("deepseek_v3")
    experts_NK, weights_NK = step_kernels.route(torch.full((1, 16), float("nan"), device=DEVICE), None, router.config)
    assert experts_NK.tolist() == [[0, 1, 2]]
    assert weights_NK.isnan().all()


def test_groups_that_are_no_powers_of_two_are_left_to_torch() -> None:
    config = tiny_policy(n_routed_experts=12, n_group=3, topk_group=2).config
    assert not step_kernels.can_route(config)


@pytest.mark.parametrize(("tokens", "per_token", "experts"), [(1, 1, 1), (3, 2, 5), (50, 3, 70)])
def test_pairs_are_sorted_as_torch_sorts_them(tokens: int, per_token: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    experts_NK = torch.randint(0, experts, (tokens, per_token), generator=generator).to(DEVICE)
    wanted = sort_by_group(experts_NK.flatten(), experts)
    source_T, places_NK, ends_E = step_kernels.sort_pairs(experts_NK, experts)
    assert torch.equal(source_T, wanted.order_T // per_token)
    assert torch.equal(places_NK.flatten(), invert(wanted.order_T))
    assert torch.equal(ends_E, wanted.ends_E)
    assert ends_E.dtype == torch.int32


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}]
)
def test_angles_are_those_of_torch(scaling: dict[str, Any] | None) -> None:
    config = tiny_policy(rope_scaling=scaling).config
    positions = torch.tensor([0, 1, 17, 32767])
    wanted = rotation_of(positions, config)
    growth = float(wanted.cos[0, 0])
    frequencies = rope_frequencies(config).to(DEVICE)
    cos, sin = step_kernels.rotation(positions.to(DEVICE), frequencies, growth)
    assert torch.allclose(cos.cpu(), wanted.cos, atol=2e-6)
    assert torch.allclose(sin.cpu(), wanted.sin, atol=2e-6)


def test_new_tokens_have_the_places_that_torch_gives_them() -> None:
    table_BM, position_B = torch.tensor([[4, 7, 1], [2, 9, 3], [5, 0, 0]]), torch.tensor([5, 2, 0])
    wanted = Absorbed.at(torch.zeros(1, 10, 3, 1), table_BM, position_B)
    slot_B, length_B = step_kernels.place(table_BM.to(DEVICE), position_B.to(DEVICE), 3)
    assert torch.equal(slot_B.cpu(), wanted.slot_B)
    assert torch.equal(length_B.cpu(), wanted.length_B)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_is_both_parts_without_what_is_no_number(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, width, generator=generator).to(dtype) for width in (5, 8))
    first[1, 2], second[2, 7], second[3, 0] = float("nan"), float("inf"), -float("inf")
    wide, slots = second.repeat(1, 2), torch.tensor([7, 0, 3, 5])
    wanted = torch.ones(3, 3, 13, dtype=dtype)
    ours = wanted.to(DEVICE)
    write_cache(wanted, slots, first, second)
    step_kernels.write(ours, slots.to(DEVICE), first.to(DEVICE), wide.to(DEVICE)[:, 8:])  # rows may lie apart
    assert torch.equal(ours.cpu(), wanted)


def test_halves_are_added_and_laid_out_by_token() -> None:
    a_HBR, b_HRV = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((3, 8, 6), (3, 6, 5)))
    both = _multiply_wide(a_HBR, b_HRV)
    wanted = torch.add(*both.chunk(2, dim=1)).transpose(0, 1)
    assert torch.equal(step_kernels.add_halves(both.to(DEVICE), torch.float32).cpu(), wanted)
    rounded = step_kernels.add_halves(both.to(DEVICE), torch.bfloat16).cpu()
    assert rounded.dtype == torch.bfloat16
    assert torch.allclose(rounded.float(), wanted, rtol=2**-7)  # Triton's interpreter cuts digits off


ONE_STEP = (torch.tensor([5, 9]), torch.tensor([3, 1]), torch.tensor([[1, 2], [3, 0]]))


@torch.no_grad()
def decode(policy: Policy, cache: Tensor) -> Tensor:
    """Hidden states of one token of two sequences, over whatever the cache holds."""
    token_B, position_B, table_BM = ONE_STEP
    hidden: Tensor = policy(token_B, position_B, Absorbed.at(cache, table_BM, position_B)).hidden_NC
    return hidden


def kernels_of_a_step(policy: Policy) -> Counter[str]:
    """And the step gives what it gives on a CPU, in its cache too."""
    shape = (policy.config.num_hidden_layers, 4, 3, policy.config.cache_width)
    cache = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    plain_cache = cache.clone()
    plain = decode(policy, plain_cache)
    decode(policy, cache.clone())
    with pretended_gpu() as kernels:
        ours = decode(policy, cache)
    assert torch.allclose(ours, plain, atol=1e-5)
    assert torch.allclose(cache, plain_cache, atol=1e-5)
    return kernels


# Kernels of one layer and of what is in none, head and sampling aside. The experts' products come in blocks here, in
# fp32, by 34 kernels, where a GPU's grouped products and their activation are 3 in bf16.
COUNTED = {
    "qwen2": (partial(tiny_llama, model_type="qwen2"), 16, 5),
    "deepseek_v3": (partial(tiny_policy, first_k_dense_replace=0), 57, 5),
}


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU need not be pretended")
@pytest.mark.parametrize(("make", "most_of_a_layer", "most_of_the_rest"), COUNTED.values(), ids=COUNTED)
def test_kernels_of_a_decoding_step_stay_few(
    make: Callable[..., Policy], most_of_a_layer: int, most_of_the_rest: int
) -> None:
    one, two = (kernels_of_a_step(make(num_hidden_layers=layers)).total() for layers in (1, 2))
    assert two - one <= most_of_a_layer
    assert 2 * one - two <= most_of_the_rest


def test_all_compile_for_a_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.policy.compile_for_gpu"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {name for name in vars(step_kernels) if name.endswith("_kernel")}
    compiled = {(name, code) for name, code in map(str.split, done.stdout.splitlines())}
    assert {name for name, _ in compiled} == kernels
    # Other numbers of tokens are no other kernel, which would take a second to compile.
    assert Counter(name for name, _ in compiled)["_sort_kernel"] == 1
    assert Counter(name for name, _ in compiled)["_place_kernel"] == 1
