"""Rows that each meet the matrix of their own group, where only the device knows how many rows a group has.

Rows are sorted by group. Torch's grouped product then does all of them at once, on the CPU and, in bf16, on GPUs from
Hopper on. For other dtypes, widths and GPUs torch would read the sizes on the host and loop over the groups; there the
rows are laid out in blocks of one size, each of one group, which one batched product serves. Neither drops a row, waits
for the device, or has a shape that depends on how rows are distributed.

Shapes: T rows, E groups, I inner width, O outer width, G blocks, S rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from policy.fused import kernels_for, silu_gate_halves
from policy.linear import takes_on_cpu
from policy.recompute import remade

FEW_ROWS = 64
"""Up to so many rows a group on average, a product of one group is too small for several threads to share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """Rows sorted by group, within a group in the order in which they came."""

    order_T: Tensor
    """Which row comes at each place, int64."""
    ends_E: Tensor
    """Where each group ends, int32; the groups lie end to end."""


def sort_by_group(groups_T: Tensor, num_groups: int) -> Order:
    """The order of rows by their group, int64 0 to E - 1."""
    # A radix sort on a GPU takes a pass for each byte of a key.
    keys_T = groups_T.to(torch.int16) if num_groups <= torch.iinfo(torch.int16).max else groups_T
    sorted_T, order_T = keys_T.sort(stable=True)
    names_E = torch.arange(num_groups, dtype=keys_T.dtype, device=keys_T.device)
    return Order(order_T=order_T, ends_E=torch.searchsorted(sorted_T, names_E, right=True, out_int32=True))


def swiglu(x_TO: Tensor, gate_up_EIO: Tensor, down_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)) with the matrices of each row's group, [T, O]; rows sorted, groups end at `ends_E`.

    `gate_up_EIO` holds the gates' rows above the ups' (its width I is twice that of `down_EOI`).
    """
    if not (x_TO.is_cuda or torch.is_grad_enabled()) and 1 < len(ends_E) <= len(x_TO) <= FEW_ROWS * len(ends_E):
        largest = int(ends_E.diff(prepend=ends_E.new_zeros(1)).max())
        if torch.get_num_threads() > 1 and largest * len(ends_E) <= 2 * len(x_TO):
            return _swiglu_filled(x_TO, gate_up_EIO, down_EOI, ends_E, largest)
    if takes_on_cpu(x_TO, gate_up_EIO) and takes_on_cpu(x_TO, down_EOI):
        from policy.cpu_training_products import grouped_linear

        inner_TI = remade(silu_gate_halves, grouped_linear(x_TO, gate_up_EIO, ends_E))
        return grouped_linear(inner_TI, down_EOI, ends_E)
    if has_grouped_product(x_TO, down_EOI):
        inner_TI = remade(silu_gate_halves, F.grouped_mm(x_TO, gate_up_EIO.transpose(1, 2), offs=ends_E))
        return F.grouped_mm(inner_TI, down_EOI.transpose(1, 2), offs=ends_E)
    blocks = Blocks.of(ends_E, len(x_TO))
    x_GSO = blocks.fill(x_TO)
    inner_GSI = silu_gate_halves(torch.bmm(x_GSO, gate_up_EIO.index_select(0, blocks.group_G).transpose(1, 2)))
    return blocks.empty(torch.bmm(inner_GSI, down_EOI.index_select(0, blocks.group_G).transpose(1, 2)))


def _swiglu_filled(x_TO: Tensor, gate_up_EIO: Tensor, down_EOI: Tensor, ends_E: Tensor, largest: int) -> Tensor:
    """The same with each group filled up to the largest, so that threads share out groups, not a small product."""
    row_T = torch.arange(len(x_TO))
    group_T = torch.searchsorted(ends_E, row_T, right=True, out_int32=True)
    starts_E = torch.cat((ends_E.new_zeros(1), ends_E[:-1]))
    slot_T = row_T + group_T * largest - starts_E.index_select(0, group_T)
    x_ESO = x_TO.new_zeros(len(ends_E) * largest, x_TO.shape[1]).index_copy_(0, slot_T, x_TO)
    gate_up_ESI = torch.bmm(x_ESO.unflatten(0, (-1, largest)), gate_up_EIO.transpose(1, 2))
    out_ESO = torch.bmm(silu_gate_halves(gate_up_ESI), down_EOI.transpose(1, 2))
    return out_ESO.flatten(0, 1).index_select(0, slot_T)


def has_grouped_product(x_TO: Tensor, down_EOI: Tensor) -> bool:
    """Whether torch's grouped product takes these as they are, without a loop over groups led by the host."""
    bytes_per_number = x_TO.element_size()
    is_aligned = all(width * bytes_per_number % 16 == 0 for width in down_EOI.shape[1:])
    if not x_TO.is_cuda:
        return is_aligned
    is_taken = is_aligned and x_TO.dtype == torch.bfloat16
    return is_taken and torch.cuda.get_device_capability(x_TO.device)[0] in (9, 10)


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """A layout of sorted rows in blocks of S, each of one group, the last of a group filled up with zeros.

    S lies between the mean size of a group and twice that (at least 8), so that at most 2E blocks suffice however the
    rows are distributed.
    """

    slot_T: Tensor
    """Place of each row in the flattened blocks, int64."""
    group_G: Tensor
    """Group of each block, int64; blocks that no group needs hold zeros for the last one."""
    size: int
    """S, rows of a block."""

    @classmethod
    def of(cls, ends_E: Tensor, num_rows: int) -> Blocks:
        """The layout of `num_rows` sorted rows whose groups end at `ends_E`."""
        num_groups, device = len(ends_E), ends_E.device
        size = max(8, 1 << (num_rows // num_groups).bit_length())
        num_blocks = min(num_rows, (num_rows + num_groups * (size - 1)) // size)  # enough for any distribution
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        block_ends_E = ((counts_E + size - 1) // size).cumsum(0)
        group_T = torch.searchsorted(ends_E, torch.arange(num_rows, device=device, dtype=torch.int32), right=True)
        group_G = torch.searchsorted(block_ends_E, torch.arange(num_blocks, device=device), right=True)
        first_slot_E = (block_ends_E - (counts_E + size - 1) // size) * size
        shift_E = first_slot_E - (ends_E - counts_E)
        return cls(
            slot_T=torch.arange(num_rows, device=device) + shift_E.index_select(0, group_T),
            group_G=group_G.clamp_(max=num_groups - 1),
            size=size,
        )

    def fill(self, x_T: Tensor) -> Tensor:
        """[T, ...] to [G, S, ...], zeros where there is no row."""
        flat = x_T.new_zeros(len(self.group_G) * self.size, *x_T.shape[1:])
        blocks: Tensor = flat.index_copy_(0, self.slot_T, x_T).unflatten(0, (-1, self.size))
        return blocks

    def empty(self, x_GS: Tensor) -> Tensor:
        """[G, S, ...] to [T, ...]."""
        return x_GS.flatten(0, 1).index_select(0, self.slot_T)


def gather_sorted(x_N: Tensor, order_T: Tensor, per_row: int) -> Tensor:
    """Each row of x once for each of its `per_row` places among T = N * per_row sorted ones, [T, ...]."""
    if not torch.is_grad_enabled():
        return x_N.index_select(0, order_T // per_row)
    gathered: Tensor = _GatherSorted.apply(x_N, order_T, per_row)
    return gathered


class _GatherSorted(torch.autograd.Function):
    """Plain autograd would add gradients up with atomic additions in the rows' dtype, in no fixed order."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, order_T: Tensor, per_row: int) -> Tensor:
        ctx.save_for_backward(order_T)
        ctx.per_row = per_row
        return x_N.index_select(0, order_T // per_row)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        [order_T], [grad_T] = ctx.saved_tensors, grads
        kernels = kernels_for(grad_T)
        if kernels is not None and grad_T.ndim == 2:
            places_NK = invert(order_T).unflatten(0, (-1, ctx.per_row))
            return kernels.mix_rows(grad_T.contiguous(), places_NK, None), None, None
        return scatter_sorted(grad_T, order_T).unflatten(0, (-1, ctx.per_row)).sum(1), None, None


def scatter_sorted(x_T: Tensor, order_T: Tensor) -> Tensor:
    """Sorted rows back in the order in which they came, [T, ...]."""
    return torch.empty_like(x_T).index_copy_(0, order_T, x_T)


def mix_sorted(x_TC: Tensor, order_T: Tensor, weights_NK: Tensor) -> Tensor:
    """Of each token its K sorted rows, added up with its weights, [N, C]."""
    if kernels_for(x_TC) is not None and kernels_for(weights_NK) is not None:
        mixed: Tensor = _MixSorted.apply(x_TC, order_T, weights_NK)
        return mixed
    x_NKC = scatter_sorted(x_TC, order_T).unflatten(0, (-1, weights_NK.shape[1]))
    # Not `einsum`, which takes a product of matrices for every token.
    return (x_NKC * weights_NK.to(x_NKC.dtype)[..., None]).sum(dim=1)


class _MixSorted(torch.autograd.Function):
    """Without a copy of the rows in the order of the tokens."""

    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, order_T: Tensor, weights_NK: Tensor) -> Tensor:
        ctx.kernels = kernels_for(x_TC)
        x_TC, weights_NK, places_NK = x_TC.contiguous(), weights_NK.contiguous(), invert(order_T).view_as(weights_NK)
        ctx.save_for_backward(x_TC, places_NK, weights_NK)
        return ctx.kernels.mix_rows(x_TC, places_NK, weights_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        x_grad_TC, weights_grad_NK = ctx.kernels.mix_rows_backward(grads[0].contiguous(), *ctx.saved_tensors)
        return x_grad_TC, None, weights_grad_NK


def invert(order_T: Tensor) -> Tensor:
    """Where each row went, of the order in which they now are."""
    return torch.empty_like(order_T).scatter_(0, order_T, torch.arange(len(order_T), device=order_T.device))
