"""The layout of packed rows against indexing by hand."""

import pytest
import torch

from policy import PackedRows
from policy.packing import LEAST_KEYS

LENGTHS = [(1,), (4,), (3, 3), (5, 1, 4), (1, 1, 6), (2, 7, 7, 1)]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_positions_starts_and_ends(lengths: tuple[int, ...]) -> None:
    rows = PackedRows.of(lengths)
    assert rows.position_ids_N.tolist() == [p for length in lengths for p in range(length)]
    assert rows.position_ids_N.dtype == torch.int64
    assert rows.starts == [sum(lengths[:b]) for b in range(len(lengths))]
    assert rows.last_N.tolist() == [sum(lengths[: b + 1]) - 1 for b in range(len(lengths))]
    assert rows.longest == max(lengths)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_pad_puts_each_row_first_and_zeros_after(lengths: tuple[int, ...]) -> None:
    rows = PackedRows.of(lengths)
    x_N = torch.arange(1.0, 1 + sum(lengths) * 6).view(-1, 2, 3)
    padded = rows.pad(x_N)
    assert padded.shape == (len(lengths), max(lengths), 2, 3)
    for b, (start, length) in enumerate(zip(rows.starts, lengths, strict=True)):
        assert torch.equal(padded[b, :length], x_N[start : start + length])
        assert not padded[b, length:].any()
    assert torch.equal(rows.unpad(padded), x_N)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_pad_and_unpad_pass_gradients_one_to_one(lengths: tuple[int, ...]) -> None:
    rows = PackedRows.of(lengths)
    x_N = torch.zeros(sum(lengths), 2, requires_grad=True)
    direction = torch.randn(len(lengths), max(lengths), 2, generator=torch.Generator().manual_seed(0))
    (grad_N,) = torch.autograd.grad((rows.pad(x_N) * direction).sum(), x_N)
    assert torch.equal(grad_N, rows.unpad(direction))


def test_strided_input_is_taken() -> None:
    """As attention gives it: a slice of a wider tensor."""
    for lengths in ((3, 3), (2, 4)):
        wide = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
        rows = PackedRows.of(lengths)
        assert torch.equal(rows.unpad(rows.pad(wide[..., 2:])), wide[..., 2:])


@pytest.mark.parametrize("lengths", [(), (3, 0)])
def test_an_empty_row_is_our_own_mistake(lengths: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        PackedRows.of(lengths)


SHARED = [  # prefixes, then (prefix, tokens after it) of each row
    ((4,), ((0, 1), (0, 3), (0, 3))),
    ((2, 5), ((0, 3), (0, 1), (1, 2))),
    ((3, 1, 3), ((2, 9), (0, 1), (1, 4), (0, 7), (2, 2))),
]


def shared_rows(prefixes: tuple[int, ...], rows: tuple[tuple[int, int], ...]) -> PackedRows:
    return PackedRows.of(
        [prefixes[f] + rest for f, rest in rows], prefixes=prefixes, prefix_of_row=[f for f, _ in rows]
    )


@pytest.mark.parametrize(("prefixes", "rows"), SHARED)
def test_a_shared_prefix_is_laid_down_once_and_each_token_finds_its_place(
    prefixes: tuple[int, ...], rows: tuple[tuple[int, int], ...]
) -> None:
    packed = shared_rows(prefixes, rows)
    shared = packed.shared
    assert shared is not None
    starts = [(("prefix", f, p), p) for f, length in enumerate(prefixes) for p in range(length)]
    rests = [(("row", b, p), p) for b, (f, rest) in enumerate(rows) for p in range(prefixes[f], prefixes[f] + rest)]
    laid_down = [name for name, _ in starts + rests]
    assert shared.position_ids_U.tolist() == [position for _, position in starts + rests]
    names = [
        ("prefix", f, p) if p < prefixes[f] else ("row", b, p)
        for b, (f, rest) in enumerate(rows)
        for p in range(prefixes[f] + rest)
    ]
    assert [laid_down[place] for place in shared.place_N.tolist()] == names
    assert shared.token_U.tolist() == [names.index(name) for name in laid_down]
    lengths = [*prefixes, *(rest for _, rest in rows)]
    assert shared.bounds.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packed.alone.shared is None
    assert torch.equal(packed.position_ids_N, packed.alone.position_ids_N)
    assert sum((block.rows.lengths for block in shared.blocks), ()) == shared.rest_rows.lengths


def test_runs_of_rests_hold_each_once_with_a_copy_of_its_prefix() -> None:
    together, apart = shared_rows(*SHARED[1]).shared, shared_rows(*SHARED[2]).shared
    assert apart is not None
    assert apart.runs is None  # the rows of a prefix do not follow one another
    assert together is not None
    assert together.runs is not None
    assert together.runs.bounds.tolist() == [0, 3, 4, 6]
    assert together.runs.key_bounds.tolist() == [0, 2, 4, 9]
    assert together.runs.token_K.tolist() == [0, 1, 0, 1, 2, 3, 4, 5, 6]
    assert together.runs.longest == 3


@pytest.mark.parametrize(("copies", "runs"), [(1, [7]), (2, [4, 3]), (3, [3, 3, 1]), (9, [1] * 7)])
def test_long_prefixes_are_copied_for_fewer_runs(copies: int, runs: list[int]) -> None:
    """Seven rests of one token."""
    prefix = -(-LEAST_KEYS // copies)
    shared = shared_rows((prefix,), ((0, 1),) * 7).shared
    assert shared is not None
    assert shared.runs is not None
    assert shared.runs.bounds.diff().tolist() == runs
    assert shared.runs.key_bounds.diff().tolist() == [prefix] * len(runs)
    assert shared.runs.token_K.tolist() == list(range(prefix)) * len(runs)


def test_rests_are_padded_together_only_where_they_are_about_as_long() -> None:
    rests = [1, 16, 24, 25, 30, 40, 10]
    shared = shared_rows((2,), tuple((0, rest) for rest in rests)).shared
    assert shared is not None
    assert [block.rows.lengths for block in shared.blocks] == [(1, 16, 24), (25, 30), (40,), (10,)]


@pytest.mark.parametrize(("first", "last"), [(0, 5), (0, 2), (2, 3), (1, 5)])
def test_some_of_the_rows_share_what_they_shared_among_all(first: int, last: int) -> None:
    lengths, of_row = [12, 4, 5, 10, 5], [2, 0, 1, 0, 2]
    taken = PackedRows.of(lengths, prefixes=[3, 1, 3], prefix_of_row=of_row).take(first, last)
    assert taken.lengths == tuple(lengths[first:last])
    assert taken.shared is not None
    own = [taken.shared.prefix_rows.lengths[prefix] for prefix in taken.shared.prefix_of_row]
    assert own == [[3, 1, 3][prefix] for prefix in of_row[first:last]]
    assert len(taken.shared.prefix_rows.lengths) == len(set(of_row[first:last]))
    assert PackedRows.of(lengths).take(first, last).shared is None


@pytest.mark.parametrize(
    ("lengths", "prefixes", "of_row"),
    [([5, 4], [4], [0, 0]), ([5, 6], [4], [0]), ([5, 6], [4, 2], [0, 0])],
    ids=["no rest", "a row without", "a prefix without rows"],
)
def test_prefixes_that_do_not_fit_the_rows_are_our_own_mistake(
    lengths: list[int], prefixes: list[int], of_row: list[int]
) -> None:
    with pytest.raises(AssertionError):
        PackedRows.of(lengths, prefixes=prefixes, prefix_of_row=of_row)
