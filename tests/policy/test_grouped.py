"""Sorting rows by group, and the layouts in which groups meet their matrices.

Shapes: T rows, E groups.
"""

import numpy as np
import pytest
import torch

from policy.grouped import Blocks, gather_sorted, scatter_sorted, sort_by_group, swiglu

DISTRIBUTIONS = {
    "random": lambda rng: rng.integers(0, 6, 100),
    "all_in_the_first": lambda rng: np.zeros(100, dtype=np.int64),
    "all_in_the_last": lambda rng: np.full(100, 5),
    "some_idle": lambda rng: rng.choice([1, 4], 100),
    "one_each": lambda rng: rng.permutation(6),
    "one_row": lambda rng: np.array([3]),
    "none": lambda rng: np.zeros(0, dtype=np.int64),
    "just_over_a_block": lambda rng: np.repeat(np.arange(6), [33, 1, 33, 1, 33, 1]),
}


def draw_groups(name: str) -> torch.Tensor:
    return torch.from_numpy(DISTRIBUTIONS[name](np.random.default_rng(0)).astype(np.int64))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rows_are_sorted_by_group_and_keep_their_order_within(name: str) -> None:
    groups_T = draw_groups(name)
    order = sort_by_group(groups_T, 6)
    ends, start = order.ends_E.tolist(), 0
    assert order.ends_E.dtype == torch.int32
    for group, end in enumerate(ends):
        assert order.order_T[start:end].tolist() == (groups_T == group).nonzero().flatten().tolist()
        start = end
    assert ends[-1] == len(groups_T)


def test_more_groups_than_a_short_integer_counts_are_sorted_too() -> None:
    groups_T = torch.tensor([39_999, 0, 33_000, 39_999])
    order = sort_by_group(groups_T, 40_000)
    assert order.order_T.tolist() == [1, 2, 0, 3]
    assert order.ends_E[[0, 32_999, 33_000, 39_998, 39_999]].tolist() == [1, 1, 2, 2, 4]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_blocks_hold_every_row_once_and_never_two_groups(name: str) -> None:
    groups_T = draw_groups(name).sort().values
    blocks = Blocks.of(sort_by_group(groups_T, 6).ends_E, len(groups_T))
    assert len(set(blocks.slot_T.tolist())) == len(groups_T)
    assert torch.equal(blocks.group_G[blocks.slot_T // blocks.size], groups_T)
    assert len(blocks.group_G) <= min(len(groups_T), 12)
    x_T = torch.arange(1.0, len(groups_T) + 1)[:, None].expand(-1, 3)
    filled = blocks.fill(x_T)
    assert filled.shape == (len(blocks.group_G), blocks.size, 3)
    assert torch.equal(blocks.empty(filled), x_T)
    assert filled.sum() == x_T.sum(), "what is no row is 0"


def test_the_layout_of_blocks_has_a_shape_that_only_the_number_of_rows_decides() -> None:
    shapes = {
        (len(blocks.group_G), blocks.size)
        for name in ("random", "all_in_the_first", "all_in_the_last", "some_idle")
        for blocks in [Blocks.of(sort_by_group(draw_groups(name), 6).ends_E, 100)]
    }
    assert len(shapes) == 1


def test_gathering_and_scattering_are_each_others_inverse_gradients_too() -> None:
    generator = torch.Generator().manual_seed(0)
    order_T = torch.randperm(12, generator=generator)
    x_N = torch.randn(4, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    gathered = gather_sorted(x_N, order_T, 3)
    assert torch.equal(gathered, x_N[order_T // 3])
    assert torch.equal(scatter_sorted(gathered, order_T), x_N.repeat_interleave(3, dim=0))
    assert torch.autograd.gradcheck(lambda x: gather_sorted(x, order_T, 3), x_N)
    y_T = torch.randn(12, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: scatter_sorted(y, order_T), y_T)


@pytest.mark.parametrize("sizes", [(30, 20, 25, 25), (50, 0, 50, 0), (97, 1, 1, 1), (1, 1, 1, 1)])
def test_groups_filled_up_for_threads_equal_one_group_at_a_time(sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TO, gate_up_EIO, down_EOI = (
        torch.randn(shape, generator=generator) for shape in ((sum(sizes), 16), (4, 24, 16), (4, 16, 12))
    )
    expected = []
    for group, rows in enumerate(x_TO.split(sizes)):
        gate, up = (rows @ gate_up_EIO[group].T).chunk(2, dim=1)
        expected.append((torch.nn.functional.silu(gate) * up) @ down_EOI[group].T)
    ends_E = torch.tensor(sizes).cumsum(0).int()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with torch.no_grad():
            out_TO = swiglu(x_TO, gate_up_EIO, down_EOI, ends_E)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(out_TO, torch.cat(expected), rtol=1e-5, atol=1e-5)
