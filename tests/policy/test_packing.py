"""The layout of packed rows against indexing by hand."""

import pytest
import torch

from policy import PackedRows

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
