"""Attention within short rows on a CPU against torch's plain form in fp64, gradients too; and what is not a number."""

import pytest
import torch
from torch import Tensor

from policy.attention import attend_in_rows
from policy.cpu_attention import SHORT_ROW, takes_short_rows
from policy.packing import PackedRows

LAYOUTS = {
    "even": PackedRows.of([5, 5, 5]),
    "one token": PackedRows.of([1]),
    "uneven": PackedRows.of([5, 9, 1]),
    "shared": PackedRows.of([12, 12, 14, 14], prefixes=[5, 7], prefix_of_row=[0, 0, 1, 1]),
    "shared, in two blocks": PackedRows.of([12, 22, 60, 14], prefixes=[5, 7], prefix_of_row=[0, 0, 1, 1]),
    "shared, out of order": PackedRows.of([12, 15, 15, 14], prefixes=[5, 7], prefix_of_row=[0, 1, 1, 0]),
}


def draw(rows: PackedRows, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, and values that are part of a wider tensor, as MLA has them."""
    count = sum(rows.lengths) if rows.shared is None else len(rows.shared.token_U)
    generator = torch.Generator().manual_seed(count)
    query, key, wide = (
        torch.randn(count, *shape, generator=generator) for shape in ((heads, 8), (groups, 8), (groups, 9))
    )
    return query, key, wide[..., 3:]


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_are_those_of_the_plain_form(layout: str, heads: int, groups: int) -> None:
    rows = LAYOUTS[layout]
    inputs = draw(rows, heads, groups)
    assert takes_short_rows(*inputs, rows)
    back = torch.randn(len(inputs[0]), heads, 6, generator=torch.Generator().manual_seed(1))
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out = attend_in_rows(*leaves, rows, 0.37)
        out.backward(back.to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape
        assert torch.allclose(ours.double(), exact, rtol=1e-5, atol=3e-6)
    with torch.no_grad():
        assert torch.equal(attend_in_rows(*inputs, rows, 0.37), results[0][0])


def test_what_is_not_a_number_spoils_those_that_see_it_alone() -> None:
    rows = LAYOUTS["shared"]
    query, key, value = draw(rows, 2, 2)
    key[3] = torch.nan  # of the first prefix: its later tokens and both of its rests see it
    out = attend_in_rows(query, key, value, rows, 1.0)
    seen = torch.zeros(len(query), dtype=torch.bool)
    seen[3:5] = True
    seen[12 : 12 + 14] = True
    assert torch.equal(out.isnan().all(dim=(1, 2)), seen)
    assert torch.equal(out.isnan().any(dim=2).any(dim=1), seen)


def test_long_rows_and_other_dtypes_are_torchs() -> None:
    rows = PackedRows.of([SHORT_ROW + 1, 3])
    inputs = draw(rows, 2, 2)
    assert not takes_short_rows(*inputs, rows)
    assert not takes_short_rows(*(x.double() for x in draw(LAYOUTS["even"], 2, 2)), LAYOUTS["even"])
    long_rest = PackedRows.of([300, 20], prefixes=[10], prefix_of_row=[0, 0])
    assert not takes_short_rows(*draw(long_rest, 2, 2), long_rest)
