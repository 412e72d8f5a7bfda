"""Products of matrices for the update on a CPU in fp32, on the thread that calls, a sixth faster here than torch's.

All are tiles of 8 rows and 32 columns that stay in registers (policy/cpu_products.py), with the columns' matrix read
row by row: as it lies, or copied into panels of 32 columns, which takes a hundredth of the product. Sums run over the
depth in one order, so that runs repeat.

Shapes: N rows, I and O widths in and out, E groups of rows, T rows sorted by group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from policy.cpu_compiler import ZERO, floats, integers, kernel
from policy.cpu_products import TILE, product_tile
from policy.linear import LANES

WIDE = 2 * LANES
"""Columns of a tile."""
NONE, SINGLE, ROWS, NO, YES = np.int64(0), np.int64(1), np.int64(TILE), np.bool_(False), np.bool_(True)
"""Of numpy's types: numba would compile a function anew for each plain constant that it is called with."""
ROWS_AT_ONCE = 256
"""Rows that meet all columns before the next ones do, and the depth of a gradient's products: what they read stays in
the cache of a core."""

_wide, _narrow = (product_tile(LANES, vectors, TILE) for vectors in (WIDE // LANES, 1))
_add_wide, _add_narrow = (product_tile(LANES, vectors, TILE, adds=True) for vectors in (WIDE // LANES, 1))


@intrinsic
def stay_apart(_: Any) -> Any:
    """Keeps the function that calls it from being compiled into others again and again."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


@njit(error_model="numpy")
def product_of_tiles(a, a_row, a_column, b, b_row, out, out_row, rows, width, depth, adds):
    """out[r, c] = sum over d of a[r, d] b[d, c], or added to what is there; whole tiles of rows, width of LANES.

    Rows of b are `b_row` numbers apart; 0 where b lies in panels.
    """
    stay_apart()
    for column in range(0, width, WIDE):
        size = min(WIDE, width - column)
        place, step = (b + 4 * column, b_row) if b_row else (b + 4 * column * depth, size)
        for row in range(0, rows, TILE):
            first, target = a + 4 * row * a_row, out + 4 * (row * out_row + column)
            ahead = first + 4 * TILE * a_row
            if size == WIDE and adds:
                _add_wide(place, step, first, a_row, a_column, target, out_row, depth, ahead)
            elif size == WIDE:
                _wide(place, step, first, a_row, a_column, target, out_row, depth, ahead)
            elif adds:
                _add_narrow(place, step, first, a_row, a_column, target, out_row, depth, ahead)
            else:
                _narrow(place, step, first, a_row, a_column, target, out_row, depth, ahead)


@njit(error_model="numpy")
def product(a, a_row, b, out, out_row, rows, width, depth, room):
    """The same of any number of rows with b in panels; room for TILE * (depth + width) numbers."""
    stay_apart()
    whole = rows - rows % TILE
    for row in range(0, whole, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, whole - row)
        product_of_tiles(
            a + 4 * row * a_row, a_row, SINGLE, b, NONE, out + 4 * row * out_row, out_row, count, width, depth, NO
        )
    left, result = rows - whole, room + 4 * TILE * depth
    if left:
        fill(a + 4 * whole * a_row, a_row, room, depth, left, ROWS, depth)
        product_of_tiles(room, depth, SINGLE, b, NONE, result, width, ROWS, width, depth, NO)
        copy(result, width, out + 4 * whole * out_row, out_row, left, width)


@njit(error_model="numpy")
def product_of_columns(a, a_row, b, b_row, out, depth, rows, width):
    """out[r, c] = sum over d of a[d, r] b[d, c], contiguous; rows and width of LANES."""
    stay_apart()
    for first in range(0, max(depth, 1), ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, depth - first)
        product_of_tiles(
            a + 4 * first * a_row,
            SINGLE,
            a_row,
            b + 4 * first * b_row,
            b_row,
            out,
            width,
            rows,
            width,
            count,
            first > 0,
        )


@njit(error_model="numpy")
def copy(x, x_row, out, out_row, rows, width):
    """Rows from one place to another."""
    stay_apart()
    x, out = floats(x), floats(out)
    for row in range(rows):
        for c in range(width):
            out[row * out_row + c] = x[row * x_row + c]


@njit(error_model="numpy")
def fill(x, x_row, out, out_row, rows, all_rows, width):
    """Rows from one place to another, and zeros after them."""
    stay_apart()
    copy(x, x_row, out, out_row, rows, width)
    out = floats(out)
    for row in range(rows, all_rows):
        for c in range(width):
            out[row * out_row + c] = ZERO


@njit(error_model="numpy")
def pack(b, b_row, out, depth, width):
    """Rows of b in panels of WIDE columns, the last one of LANES where the width says so."""
    stay_apart()
    b, out = floats(b), floats(out)
    for column in range(0, width, WIDE):
        if width - column >= WIDE:
            for d in range(depth):
                for c in range(WIDE):
                    out[column * depth + d * WIDE + c] = b[d * b_row + column + c]
        else:
            for d in range(depth):
                for c in range(LANES):
                    out[column * depth + d * LANES + c] = b[d * b_row + column + c]


@njit(error_model="numpy")
def pack_columns(b, b_row, out, depth, columns, width):
    """Columns of b in the same panels, zeros after the last of them: out[d, c] = b[c, d]."""
    stay_apart()
    b, out = floats(b), floats(out)
    for column in range(0, width, WIDE):
        size = min(WIDE, width - column)
        for c in range(size):
            place = column * depth + c
            if column + c < columns:
                for d in range(depth):
                    out[place + d * size] = b[(column + c) * b_row + d]
            else:
                for d in range(depth):
                    out[place + d * size] = ZERO


@kernel
def _multiply(x, x_row, weights, out, ends, groups, width, depth, panels, room):
    ends, first = integers(ends), NONE
    for group in range(groups):
        if ends[group] > first:
            pack_columns(weights + 4 * group * width * depth, depth, panels, depth, width, width)
            place = out + 4 * first * width
            product(x + 4 * first * x_row, x_row, panels, place, width, ends[group] - first, width, depth, room)
        first = ends[group]


@kernel
def _multiply_back(grad, grad_row, weights, out, ends, groups, width, depth, panels, room):
    ends, first = integers(ends), NONE
    for group in range(groups):
        if ends[group] > first:
            pack(weights + 4 * group * width * depth, width, panels, depth, width)
            place = out + 4 * first * width
            product(
                grad + 4 * first * grad_row, grad_row, panels, place, width, ends[group] - first, width, depth, room
            )
        first = ends[group]


@kernel
def _weigh(grad, grad_row, x, x_row, out, ends, groups, rows, width):
    ends, first = integers(ends), NONE
    for group in range(groups):
        product_of_columns(
            grad + 4 * first * grad_row, grad_row, x + 4 * first * x_row, x_row, out + 4 * group * rows * width,
            ends[group] - first, rows, width,
        )  # fmt: skip
        first = ends[group]


def multiply(x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the transpose of its group's matrix, [T, O]; rows sorted, groups end at `ends_E` (int64)."""
    (groups, width, depth), x_TI, weight_EOI = weight_EOI.shape, packed(x_TI), weight_EOI.contiguous()
    out_TO, room = torch.empty(len(x_TI), width), torch.empty(width * depth + TILE * (depth + width))
    _multiply(
        x_TI.data_ptr(), x_TI.stride(0), weight_EOI.data_ptr(), out_TO.data_ptr(), ends_E.data_ptr(), groups, width,
        depth, room.data_ptr(), room.data_ptr() + 4 * width * depth,
    )  # fmt: skip
    return out_TO


def multiply_back(grad_TO: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Gradient of the rows of `multiply`, [T, I]."""
    (groups, depth, width), grad_TO, weight_EOI = weight_EOI.shape, packed(grad_TO), weight_EOI.contiguous()
    out_TI, room = torch.empty(len(grad_TO), width), torch.empty(width * depth + TILE * (depth + width))
    _multiply_back(
        grad_TO.data_ptr(), grad_TO.stride(0), weight_EOI.data_ptr(), out_TI.data_ptr(), ends_E.data_ptr(), groups,
        width, depth, room.data_ptr(), room.data_ptr() + 4 * width * depth,
    )  # fmt: skip
    return out_TI


def weigh(grad_TO: Tensor, x_TI: Tensor, ends_E: Tensor) -> Tensor:
    """Gradient of the matrices of `multiply`, [E, O, I]."""
    grad_TO, x_TI, groups = packed(grad_TO), packed(x_TI), len(ends_E)
    out_EOI = torch.empty(groups, grad_TO.shape[1], x_TI.shape[1])
    _weigh(
        grad_TO.data_ptr(), grad_TO.stride(0), x_TI.data_ptr(), x_TI.stride(0), out_EOI.data_ptr(), ends_E.data_ptr(),
        groups, grad_TO.shape[1], x_TI.shape[1],
    )  # fmt: skip
    return out_EOI


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x @ weight.T, [..., O], differentiable."""
    x_NI = x.reshape(-1, x.shape[-1])
    return grouped_linear(x_NI, weight_OI[None], torch.tensor([len(x_NI)])).view(*x.shape[:-1], -1)


def grouped_linear(x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each row times the transpose of its group's matrix, [T, O], differentiable; rows sorted, groups end at `ends_E`
    (integers)."""
    out_TO: Tensor = _Linear.apply(x_TI, weight_EOI, ends_E.long())
    return out_TO


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
        # A frozen weight gets no gradient, which is all that the input is kept for.
        ctx.save_for_backward(x_TI if ctx.needs_input_grad[1] else None, weight_EOI, ends_E)
        return multiply(x_TI, weight_EOI, ends_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TI, weight_EOI, ends_E = ctx.saved_tensors
        x_grad_TI = multiply_back(grads[0], weight_EOI, ends_E) if ctx.needs_input_grad[0] else None
        return x_grad_TI, weigh(grads[0], x_TI, ends_E) if ctx.needs_input_grad[1] else None, None


def packed(x: Tensor) -> Tensor:
    """As it is where the numbers of a row lie side by side, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
