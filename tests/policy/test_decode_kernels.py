"""Attention over the paged cache: the kernel against the formula in torch, by Triton's interpreter or on the GPU.

Shapes: B sequences, H query heads, Q key width, W cache width, M blocks of the longest sequence.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from policy.paged_attention import Absorbed, CacheLayout, attend_over_cache

pytest.importorskip("triton")

from policy import decode_kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16] if torch.cuda.is_available() else [torch.float32]
SIZE, POSITIONS = 3, [0, 7, 8, 26, 13]
LAYOUTS = {
    "latent": (4, CacheLayout(groups=1, key_width=24, value_start=0, value_width=16)),
    "latent_in_two_tiles": (4, CacheLayout(groups=1, key_width=80, value_start=0, value_width=64)),
    "latent_more_heads_than_a_tile": (20, CacheLayout(groups=1, key_width=40, value_start=0, value_width=32)),
    "groups_of_odd_width": (6, CacheLayout(groups=2, key_width=10, value_start=20, value_width=10)),
    "groups": (6, CacheLayout(groups=3, key_width=64, value_start=192, value_width=64)),
    "one_head_a_group": (2, CacheLayout(groups=2, key_width=16, value_start=32, value_width=16)),
}


def draw(layout: CacheLayout, heads: int, dtype: torch.dtype) -> tuple[Tensor, Absorbed]:
    """Queries, and the plan on the CPU over a cache whose unused entries are large."""
    generator = torch.Generator().manual_seed(0)
    batch, most = len(POSITIONS), max(POSITIONS) // SIZE + 1
    width = max(layout.value_start + layout.groups * layout.value_width, layout.groups * layout.key_width)
    table = torch.randperm(batch * most, generator=generator).view(batch, most)
    cache = torch.full((1, batch * most, SIZE, width), 100.0)
    for row, position in enumerate(POSITIONS):
        for at in range(position + 1):
            cache[0, table[row, at // SIZE], at % SIZE] = torch.randn(width, generator=generator)
    query = torch.randn(batch, heads, layout.key_width, generator=generator)
    return query.to(dtype), Absorbed.at(cache.to(dtype), table, torch.tensor(POSITIONS))


@pytest.mark.parametrize("part", [8, 1024], ids=["several_parts", "one_part"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_equals_the_formula(layout: str, dtype: torch.dtype, part: int) -> None:
    heads, columns = LAYOUTS[layout]
    query, plan = draw(columns, heads, dtype)
    exact = replace(plan, cache=plan.cache.double())
    wanted = attend_over_cache(query.double(), 0, exact, columns, scale=0.3)
    got = decode_kernels.attend(
        query.to(DEVICE), plan.cache[0].to(DEVICE), plan.block_table_BM.to(DEVICE), plan.length_B.to(DEVICE),
        columns, scale=0.3, part=part,
    )  # fmt: skip
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert (got.cpu().double() - wanted).abs().max() < bound


def test_several_tokens_of_a_sequence_share_its_row_of_the_table() -> None:
    heads, columns = LAYOUTS["latent"]
    query, plan = draw(columns, heads, DTYPES[-1])
    cache, table = plan.cache[0].to(DEVICE), plan.block_table_BM.to(DEVICE)
    lengths = torch.cat((plan.length_B, (plan.length_B - 3).clamp(min=1))).to(DEVICE)
    given = query.repeat(2, 1, 1).to(DEVICE), cache
    twice = decode_kernels.attend(*given, table, lengths, columns, scale=0.3)
    assert torch.equal(twice, decode_kernels.attend(*given, table.repeat(2, 1), lengths, columns, scale=0.3))


@pytest.mark.parametrize(
    ("programs", "reach", "bytes_of_part", "part"),
    [(64, 512, 1 << 20, 64), (65, 512, 1 << 20, 1024), (1, 4096, 1 << 20, 128), (8, 1 << 20, 1 << 20, 1024)],
)
def test_few_sequences_are_cut_into_short_parts(programs: int, reach: int, bytes_of_part: int, part: int) -> None:
    """Of no more than 32 MiB together, and never longer ones than many sequences are cut into."""
    assert decode_kernels.part_for(programs, reach, bytes_of_part, 64) == part


@pytest.mark.parametrize("layout", ["latent", "groups"])
def test_a_sequence_has_the_same_bits_whoever_shares_the_batch(layout: str) -> None:
    heads, columns = LAYOUTS[layout]
    query, plan = draw(columns, heads, DTYPES[-1])
    cache, table, length = plan.cache[0].to(DEVICE), plan.block_table_BM.to(DEVICE), plan.length_B.to(DEVICE)
    together = decode_kernels.attend(query.to(DEVICE), cache, table, length, columns, scale=0.3)
    for row in range(len(POSITIONS)):
        one = slice(row, row + 1)
        alone = decode_kernels.attend(query[one].to(DEVICE), cache, table[one], length[one], columns, scale=0.3)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("part", [8, 1024], ids=["several_parts", "one_part"])
def test_in_two_the_second_holds_what_rounding_took_from_the_first(part: int) -> None:
    """With queries of 0 the weights are equal, so that nothing but the result is rounded."""
    heads, columns = LAYOUTS["latent_in_two_tiles"]
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter has numpy's numbers
    query, plan = draw(columns, heads, dtype)
    query = torch.zeros_like(query)
    wanted = attend_over_cache(query.double(), 0, replace(plan, cache=plan.cache.double()), columns, scale=0.3)
    on_device = (tensor.to(DEVICE) for tensor in (query, plan.cache[0], plan.block_table_BM.to(DEVICE), plan.length_B))
    given = [*on_device, columns, 0.3]
    plain = decode_kernels.attend(*given, part=part)  # type: ignore[arg-type]
    first, second = decode_kernels.attend(*given, in_two=True, part=part)  # type: ignore[arg-type]
    assert torch.equal(first, plain)
    assert (first.cpu().double() - wanted).abs().max() > 1e-4
    assert (first.cpu().double() + second.cpu().double() - wanted).abs().max() < 1e-5
    twin = attend_over_cache(query, 0, plan, columns, 0.3, in_two=True)
    assert twin.dtype == dtype
    whole = [0, 1]  # of 1 and 8 positions, whose weights are exact
    assert (twin.double().sum(0) - wanted)[whole].abs().max() < 1e-5
