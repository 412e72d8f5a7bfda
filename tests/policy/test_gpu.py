"""The policy on a GPU: the CPU's logits, gradients and log-probabilities, in every family and layout of rows.

Shapes: N packed tokens, B rows, S positions, H query heads, G key-value heads, Q key width, V value width.
"""

import pytest
import torch
from torch import Tensor

from policy import PackedRows, Policy, cast_weights
from policy.attention import attend_in_rows
from policy.logprobs import token_logprobs
from policy.recompute import Recomputation
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = {"ragged": (33, 1, 70, 26), "equal": (32, 32, 32)}
ALIGNED: dict[str, object] = {  # widths that attention and experts take as they are
    "hidden_size": 64, "moe_intermediate_size": 32, "qk_nope_head_dim": 24, "v_head_dim": 16, "kv_lora_rank": 32,
}  # fmt: skip


def make_policy(family: str) -> Policy:
    if family == "deepseek_v3":
        return tiny_policy(**ALIGNED)
    more = TINY_QWEN3_MOE | {"head_dim": 16, "hidden_size": 64} if family == "qwen3_moe" else {"model_type": family}
    return tiny_llama(**more)


def run(policy: Policy, lengths: tuple[int, ...], given: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Log-probabilities, chosen experts, and all gradients in one row, on the CPU in fp64."""
    rows = PackedRows.of(lengths, policy.device)
    token_ids_N = torch.randint(3, 61, (sum(lengths),), generator=torch.Generator().manual_seed(0)).to(policy.device)
    policy.zero_grad()
    got = token_logprobs(policy, token_ids_N, rows, rows.position_ids_N > 0, given_experts_MNK=given)
    (got.logprobs_N.mean() + 0.1 * got.entropy_N.mean()).backward()
    gradients = [w.grad.flatten().double().cpu() for w in policy.parameters() if w.grad is not None]
    return got.logprobs_N.detach().double().cpu(), got.output.experts_MNK, torch.cat(gradients)


@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2", "qwen3", "qwen3_moe"])
def test_log_probabilities_and_gradients_are_those_of_the_cpu(
    family: str, dtype: torch.dtype, lengths: tuple[int, ...]
) -> None:
    """bf16 against fp32 of the same rounded weights, with the same choice of experts."""
    policy = cast_weights(make_policy(family), dtype)
    ours, experts_MNK, gradients = run(policy.cuda(), lengths)
    reference = cast_weights(policy.cpu(), torch.float32)
    wanted, _, wanted_gradients = run(reference, lengths, None if experts_MNK is None else experts_MNK.cpu())
    bound = 1e-4 if dtype == torch.float32 else 0.1
    assert (ours - wanted).abs().mean() < bound
    assert torch.cosine_similarity(gradients, wanted_gradients, dim=0) > 1 - bound**2 - 1e-7
    assert 1 - bound < gradients.norm() / wanted_gradients.norm() < 1 + bound


@pytest.mark.parametrize("recomputation", ["selective", "full"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2"])
def test_recomputation_changes_values_by_nothing_and_gradients_by_rounding(
    family: str, recomputation: Recomputation
) -> None:
    policy = cast_weights(make_policy(family), torch.bfloat16).cuda()
    wanted, experts_MNK, wanted_gradients = run(policy, ROWS["equal"])
    policy.recomputation = recomputation
    ours, ours_MNK, gradients = run(policy, ROWS["equal"])
    assert torch.equal(ours, wanted)
    if experts_MNK is not None:
        assert ours_MNK is not None
        assert torch.equal(ours_MNK, experts_MNK)
    assert (gradients - wanted_gradients).norm() < 1e-3 * wanted_gradients.norm()  # attention adds in any order


@pytest.mark.parametrize("lengths", [(700, 3, 1, 320), (512, 512)], ids=["ragged", "equal"])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "value_width"),
    [(14, 2, 64, 64), (12, 12, 192, 128), (4, 1, 128, 128), (4, 4, 20, 10)],
    ids=["qwen05", "dsv3_05", "wide", "odd"],
)
def test_attention_within_rows_equals_its_definition(
    heads: int, groups: int, width: int, value_width: int, lengths: tuple[int, ...]
) -> None:
    generator, count = torch.Generator().manual_seed(0), sum(lengths)
    shapes = ((count, heads, width), (count, groups, width), (count, groups, value_width))
    inputs = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    grad = torch.randn(count, heads, value_width, generator=generator).bfloat16()

    def attend(device: str, dtype: torch.dtype) -> list[Tensor]:
        tensors = [x.to(device, dtype).requires_grad_() for x in inputs]
        out = attend_in_rows(*tensors, PackedRows.of(lengths, device), width**-0.5)
        return [x.double().cpu() for x in (out, *torch.autograd.grad(out, tensors, grad.to(device, dtype)))]

    for ours, wanted in zip(attend("cuda", torch.bfloat16), attend("cpu", torch.float32), strict=True):
        assert (ours - wanted).norm() < 1e-2 * wanted.norm()


SHARED = {  # prefixes, and of each how many tokens come after it in its rows
    "ragged": ((70, 1, 130), ((1, 60, 33), (5, 1), (80,))),
    "equal": ((64, 64), ((32, 32, 32), (32, 32, 32))),
    "long": ((300,), ((513, 400, 7),)),
}


def shared_rows(layout: str, device: str) -> PackedRows:
    prefixes, rests = SHARED[layout]
    of_row = [f for f, of_prefix in enumerate(rests) for _ in of_prefix]
    lengths = [prefixes[f] + rest for f, of_prefix in enumerate(rests) for rest in of_prefix]
    return PackedRows.of(lengths, device, prefixes=prefixes, prefix_of_row=of_row)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", SHARED)
@pytest.mark.parametrize(
    ("heads", "groups", "width", "value_width"),
    [(14, 2, 64, 64), (12, 12, 192, 128), (4, 1, 128, 128), (4, 4, 20, 10)],
    ids=["qwen05", "dsv3_05", "wide", "odd"],
)
def test_attention_after_shared_prefixes_is_that_of_the_cpu(
    heads: int, groups: int, width: int, value_width: int, layout: str, dtype: torch.dtype
) -> None:
    shared, generator = shared_rows(layout, "cpu").shared, torch.Generator().manual_seed(0)
    assert shared is not None
    count = len(shared.token_U)
    shapes = ((count, heads, width), (count, groups, width), (count, groups, value_width), (count, heads, value_width))
    *inputs, grad = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)

    def attend(device: str, dtype: torch.dtype) -> list[Tensor]:
        tensors = [x.to(device, dtype).requires_grad_() for x in inputs]
        out = attend_in_rows(*tensors, shared_rows(layout, device), width**-0.5)
        return [x.double().cpu() for x in (out, *torch.autograd.grad(out, tensors, grad.to(device, dtype)))]

    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for ours, wanted in zip(attend("cuda", dtype), attend("cpu", torch.float32), strict=True):
        assert (ours - wanted).norm() < bound * wanted.norm()


@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2", "qwen3_moe"])
def test_shared_prefixes_change_values_and_gradients_by_rounding(
    family: str, dtype: torch.dtype, recomputation: Recomputation
) -> None:
    """The same choice of experts in both, and tokens that are equal where rows share them."""
    policy, rows = cast_weights(make_policy(family), dtype).cuda(), shared_rows("ragged", "cuda")
    policy.recomputation = recomputation
    assert rows.shared is not None
    token_ids_U = torch.randint(3, 61, (len(rows.shared.token_U),), generator=torch.Generator().manual_seed(0)).cuda()
    token_ids_N = token_ids_U[rows.shared.place_N]
    found: list[tuple[Tensor, Tensor]] = []
    experts_MNK = None
    for given in (rows.alone, rows):
        policy.zero_grad()
        got = token_logprobs(policy, token_ids_N, given, rows.position_ids_N > 0, given_experts_MNK=experts_MNK)
        experts_MNK = got.output.experts_MNK
        (got.logprobs_N.mean() + 0.1 * got.entropy_N.mean()).backward()
        gradient = torch.cat([w.grad.flatten().double() for w in policy.parameters() if w.grad is not None])
        found.append((got.logprobs_N.detach(), gradient))
    (alone, alone_gradient), (shared, gradient) = found
    bound = 1e-4 if dtype == torch.float32 else 0.1
    assert (alone - shared).abs().mean() < bound
    assert torch.cosine_similarity(gradient, alone_gradient, dim=0) > 1 - bound**2 - 1e-7


def test_what_was_recorded_over_the_cache_is_what_the_trainer_sees_in_bf16() -> None:
    """Sampler and trainer share weights and head; the rest is the rounding of two orders of addition."""
    from rollouts import EngineConfig, SamplingParams, make_engine

    policy = cast_weights(make_policy("deepseek_v3"), torch.bfloat16).cuda()
    params = SamplingParams(max_completion_length=24, temperature=0.9, seed=3)
    prompts = [[5, 9, 11, 3], list(range(3, 20))]
    groups = make_engine(policy, EngineConfig()).generate(prompts, 8, params)
    rows = [prompt + c.token_ids for prompt, group in zip(prompts, groups, strict=True) for c in group]
    packed = PackedRows.of([len(row) for row in rows], "cuda")
    starts = [len(prompt) for prompt in prompts for _ in range(8)]
    wanted_N = packed.position_ids_N >= torch.tensor(starts).repeat_interleave(torch.tensor(packed.lengths)).cuda()
    token_ids_N = torch.tensor([token for row in rows for token in row], device="cuda")
    with torch.no_grad():
        ours_N = token_logprobs(policy, token_ids_N, packed, wanted_N, temperature=0.9).logprobs_N[wanted_N].cpu()
    recorded = torch.tensor([x for group in groups for c in group for x in c.logprobs])
    assert (ours_N - recorded).abs().mean() < 0.1  # logits of up to 10 nats, rounded to 8 bits in every layer
