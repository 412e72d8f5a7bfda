"""Short rows' attention in one kernel against torch's plain form in fp64, gradients too; and what is not a number."""

import pytest
import torch
from torch import Tensor

from policy.attention import attend_in_rows
from policy.cpu_attention import find_segments
from policy.cpu_training_attention import attend
from policy.packing import PackedRows

LAYOUTS = {
    "even": PackedRows.of([5, 5, 5]),
    "one token": PackedRows.of([1]),
    "uneven": PackedRows.of([5, 9, 1, 40]),
    "shared": PackedRows.of([12, 12, 14, 14], prefixes=[5, 7], prefix_of_row=[0, 0, 1, 1]),
    "shared, in two blocks": PackedRows.of([12, 22, 60, 14], prefixes=[5, 7], prefix_of_row=[0, 0, 1, 1]),
    "shared, out of order": PackedRows.of([52, 75, 65, 54], prefixes=[45, 17], prefix_of_row=[0, 1, 1, 0]),
}


def draw(rows: PackedRows, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys, and values that are part of a wider tensor, as MLA has them."""
    count = sum(rows.lengths) if rows.shared is None else len(rows.shared.token_U)
    generator = torch.Generator().manual_seed(count)
    query, key, wide = (
        torch.randn(count, *shape, generator=generator) for shape in ((heads, 48), (groups, 48), (groups, 35))
    )
    return query, key, wide[..., 3:]


@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_and_gradients_are_those_of_the_plain_form(layout: str, heads: int, groups: int) -> None:
    rows = LAYOUTS[layout]
    inputs = draw(rows, heads, groups)
    back = torch.randn(len(inputs[0]), heads, 32, generator=torch.Generator().manual_seed(1))
    ours = [x.clone().requires_grad_() for x in inputs]
    out = attend(*ours, find_segments(rows), 0.2)
    out.backward(back)
    exact = [x.double().requires_grad_() for x in inputs]
    plain = attend_in_rows(*exact, rows, 0.2)
    plain.backward(back.double())
    results = [(out.detach(), plain.detach()), *((x.grad, y.grad) for x, y in zip(ours, exact, strict=True))]
    for got, wanted in results:
        assert got is not None
        assert wanted is not None
        assert got.shape == wanted.shape
        # A single token's weights are 1 whatever its scores are: gradients of queries and keys are 0.
        assert (got - wanted).abs().max() <= 2e-6 * max(1.0, float(wanted.abs().max()))
    with torch.no_grad():
        assert torch.equal(attend(*inputs, find_segments(rows), 0.2), out)


def test_what_is_not_a_number_spoils_those_that_see_it_alone() -> None:
    rows = LAYOUTS["shared"]
    query, key, value = draw(rows, 2, 2)
    key[3] = torch.nan  # of the first prefix: its later tokens and both of its rests see it
    out = attend(query, key, value, find_segments(rows), 1.0)
    seen = torch.zeros(len(query), dtype=torch.bool)
    seen[3:5] = True
    seen[12 : 12 + 14] = True
    assert torch.equal(out.isnan().all(dim=(1, 2)), seen)
    assert torch.equal(out.isnan().any(dim=2).any(dim=1), seen)


def test_large_scores_stay_finite() -> None:
    rows = LAYOUTS["shared"]
    query, key, value = draw(rows, 2, 2)
    exact = attend_in_rows(100 * query.double(), 100 * key.double(), value.double(), rows, 1.0)
    out = attend(100 * query, 100 * key, value, find_segments(rows), 1.0)
    assert torch.allclose(out.double(), exact, atol=1e-5)
