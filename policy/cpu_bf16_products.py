"""Matrix products for a decoding step on the CPU in bf16, and what lies between them.

Numbers lie as in `policy/cpu_products.py`, a row in a lane, but two neighbouring features of a row lie side by side, in
one word of 32 bits: words [C/2, N]. So do they in a weight's row. AVX-512's VDPBF16PS multiplies both numbers of two
words and adds the products to a sum in fp32, 16 words at a time: a weight's word is read where it lies and met with the
words of 16 rows, and no second, packed copy of the weights is needed. Rows are filled up to whole vectors. A row's
products are added up in one order, whoever shares its batch.

Only what a product or the cache takes is rounded to bf16: torch's operations round what a product gives, too.

Shapes: N rows (one token of each sequence) filled up to vectors, C model width, O output width, I inner width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from policy.cpu_compiler import ONE, ZERO, exp, floats, kernel

LANES = 16
"""Rows of a vector."""
TILE = 8
"""Features of a product at a time: more would crowd the first cache where the rows of a weight lie 4 KiB apart."""

_BYTE, _HALF, _WORD, _INT64, _FLOAT = (*(ir.IntType(bits) for bits in (8, 16, 32, 64)), ir.FloatType())


class _BFloat(ir.Type):
    """LLVM's bf16, which llvmlite does not name."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


BFLOAT = _BFloat()
SUMS, WORDS, PAIRS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_WORD, LANES), ir.VectorType(BFLOAT, 2 * LANES)


# --- Single numbers ----------------------------------------------------------------------------------------------


@intrinsic
def words(_: Any, address: Any) -> Any:
    """The 32-bit words at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint32)(types.int64), generate


@intrinsic
def halves(_: Any, address: Any) -> Any:
    """The bf16 numbers at an address, as 16 bits each."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.uint16)(types.int64), generate


@intrinsic
def narrowed(_: Any, number: Any) -> Any:
    """The nearest bf16 number, as its 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], BFLOAT), _HALF)

    return types.uint16(types.float32), generate


@intrinsic
def widened(_: Any, half: Any) -> Any:
    """The number whose bf16 is `half`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _WORD), _WORD(16)), _FLOAT)

    return types.float32(types.uint16), generate


@njit(error_model="numpy")
def joined(first, second):
    """Two numbers, rounded, as a word."""
    return np.uint32(narrowed(first)) | np.uint32(np.uint32(narrowed(second)) << np.uint32(16))


@intrinsic
def fetch(_: Any, address: Any) -> Any:
    """Bring what lies at an address into the second cache."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), generate


# --- Tiles -------------------------------------------------------------------------------------------------------


def at(builder: Any, address: Any, index: Any, kind: Any, unit: Any = _WORD) -> Any:
    """Pointer to a `kind` that begins so many units after an address."""
    place = builder.gep(builder.inttoptr(address, unit.as_pointer()), [index])
    return builder.bitcast(place, kind.as_pointer())


def load(builder: Any, place: Any) -> Any:
    """What lies there, at any address."""
    return builder.load(place, align=2)


def multiply_pairs(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total + the products of both numbers of each word of a and b, vectors of words."""
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(SUMS, [SUMS, PAIRS, PAIRS]), "llvm.x86.avx512bf16.dpbf16ps.512"
    )
    return builder.call(function, [total, builder.bitcast(a, PAIRS), builder.bitcast(b, PAIRS)])


def spread(builder: Any, word: Any) -> Any:
    """A word in all lanes."""
    nothing = ir.Constant(WORDS, ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(nothing, word, _WORD(0)), nothing, ir.Constant(WORDS, None))


def prefetch(builder: Any, address: Any) -> None:
    """Bring what lies there into the second cache."""
    kinds = [_BYTE.as_pointer(), *[_WORD] * 3]
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0i8"
    )
    builder.call(function, [builder.inttoptr(address, kinds[0]), _WORD(0), _WORD(2), _WORD(1)])


def _store_numbers(builder: Any, sums: list[Any], out: Any, stride: Any, lane: int) -> None:
    """As they are, in fp32."""
    for o, of in enumerate(sums):
        place = at(builder, out, builder.add(builder.mul(stride, _INT64(o)), _INT64(lane)), SUMS)
        builder.store(of, place, align=4)


def _store_rows(builder: Any, sums: list[Any], out: Any, stride: Any, lane: int) -> None:
    """As they are, in fp32, a row's features side by side."""
    # In one list of numbers, halves that alternate move the highest bit of a number's place to its end; TILE has three.
    half = LANES // 2
    masks = [[place for i in range(half) for place in (begin + i, LANES + begin + i)] for begin in (0, half)]
    for _ in range(TILE.bit_length() - 1):
        pairs = zip(sums[: TILE // 2], sums[TILE // 2 :], strict=True)
        sums = [builder.shuffle_vector(a, b, ir.Constant(WORDS, mask)) for a, b in pairs for mask in masks]
    for pair, both in enumerate(sums):
        for second in range(2):
            features = ir.Constant(ir.VectorType(_WORD, TILE), [TILE * second + o for o in range(TILE)])
            row = _INT64(lane + 2 * pair + second)
            place = at(builder, out, builder.mul(stride, row), ir.VectorType(_FLOAT, TILE))
            builder.store(builder.shuffle_vector(both, both, features), place, align=4)


def _add(builder: Any, sums: list[Any], out: Any, stride: Any, lane: int) -> None:
    """To what is there."""
    for o, of in enumerate(sums):
        place = at(builder, out, builder.add(builder.mul(stride, _INT64(o)), _INT64(lane)), SUMS)
        builder.store(builder.fadd(builder.load(place, align=4), of), place, align=4)


def _product_tile(vectors: int, end: Any) -> Any:
    """sum_c w[o, c] x[c, n] of TILE features o and so many vectors of rows n; `end` stores the sums."""

    @intrinsic
    def tile(_: Any, x: Any, x_stride: Any, w: Any, out: Any, stride: Any, depth: Any, ahead: Any):
        """x words [depth, x_stride], w words [TILE, depth]; fetches as many words from `ahead` on."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_stride, w, out, stride, depth, ahead = arguments
            nothing = ir.Constant(SUMS, [0.0] * LANES)
            sums = [[cgutils.alloca_once_value(builder, nothing) for _ in range(TILE)] for _ in range(vectors)]
            starts = [builder.add(w, builder.mul(depth, _INT64(4 * o))) for o in range(TILE)]
            with cgutils.for_range(builder, depth) as loop:
                begin = builder.mul(loop.index, x_stride)
                prefetch(builder, builder.add(ahead, builder.mul(loop.index, _INT64(4 * TILE))))
                rows = [
                    load(builder, at(builder, x, builder.add(begin, _INT64(LANES * v)), WORDS)) for v in range(vectors)
                ]
                for o, start in enumerate(starts):
                    weight = spread(builder, load(builder, at(builder, start, loop.index, _WORD)))
                    for of_vector, row in zip(sums, rows, strict=True):
                        total = multiply_pairs(builder, builder.load(of_vector[o]), weight, row)
                        builder.store(total, of_vector[o])
            for v, of_vector in enumerate(sums):
                end(builder, [builder.load(total) for total in of_vector], out, stride, LANES * v)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return tile


def _product(end: Any) -> Any:
    wide, narrow = _product_tile(2, end), _product_tile(1, end)

    @njit(error_model="numpy")
    def multiply_rows(x, w, out, stride, step, rows, depth, ahead):
        """TILE features of a product for all rows, whose results lie `step` bytes apart."""
        for n in range(0, rows - LANES, 2 * LANES):
            wide(x + 4 * n, rows, w, out + step * n, stride, depth, ahead if n == 0 else w)
        if rows % (2 * LANES):
            n = rows - LANES
            narrow(x + 4 * n, rows, w, out + step * n, stride, depth, ahead if n == 0 else w)

    return multiply_rows


_to_numbers, _to_rows, _added = (_product(end) for end in (_store_numbers, _store_rows, _add))


# --- Products: rows a multiple of LANES, widths of TILE, depth (numbers of a row of w) even -------------------------


@njit(error_model="numpy")
def product_numbers(x, w, out, rows, width, depth, following):
    """out[o, n] = sum_c w[o, c] x[c, n] in fp32; any width from TILE on. `following` is fetched at the end: the matrix
    of the next product."""
    for first in range(0, width, TILE):
        o = min(first, width - TILE)
        weight = w + 2 * o * depth
        ahead = weight + 2 * TILE * depth if o + TILE < width else following
        _to_numbers(x, weight, out + 4 * o * rows, rows, 4, rows, depth // 2, ahead)


@njit(error_model="numpy")
def product_rows(x, w, out, stride, rows, width, depth, following):
    """out[n, o] of the same; rows of out lie `stride` numbers apart."""
    for o in range(0, width, TILE):
        weight = w + 2 * o * depth
        ahead = weight + 2 * TILE * depth if o + TILE < width else following
        _to_rows(x, weight, out + 4 * o, stride, 4 * stride, rows, depth // 2, ahead)


@njit(error_model="numpy")
def add_product(x, w, out, rows, width, depth, following):
    """out[o, n] of the same, added to what is there."""
    for o in range(0, width, TILE):
        weight = w + 2 * o * depth
        ahead = weight + 2 * TILE * depth if o + TILE < width else following
        _added(x, weight, out + 4 * o * rows, rows, 4, rows, depth // 2, ahead)


@kernel
def _multiply(x, w, out, rows, width, depth):
    product_numbers(x, w, out, rows, width, depth, w)


def filled_up(rows: int) -> int:
    """So many rows as whole vectors."""
    return -(-rows // LANES) * LANES


def multiply(x_NC: Tensor, weight_OC: Tensor) -> Tensor:
    """x @ weight.T of bf16 in fp32, [N, O], feature by feature."""
    (rows, depth), width = x_NC.shape, len(weight_OC)
    x_words = torch.zeros(depth // 2, filled_up(rows), dtype=torch.int32)
    x_words[:, :rows] = x_NC.contiguous().view(torch.int32).t()
    out_ON = torch.empty(width, filled_up(rows))
    _multiply(x_words.data_ptr(), weight_OC.data_ptr(), out_ON.data_ptr(), filled_up(rows), width, depth)
    return out_ON.t()[:rows]


# --- Between products --------------------------------------------------------------------------------------------


@njit(error_model="numpy", fastmath={"reassoc", "contract"})
def normalise_words(x, weight, eps, inverse, out, rows, width):
    """RMSNorm of fp32 numbers [C, N] to words; room for one number a row."""
    x, weight, inverse, out = floats(x), halves(weight), floats(inverse), words(out)
    for n in range(rows):
        inverse[n] = ZERO
    for c in range(width):
        for n in range(rows):
            inverse[n] += x[c * rows + n] * x[c * rows + n]
    for n in range(rows):
        inverse[n] = ONE / np.sqrt(inverse[n] / np.float32(width) + np.float32(eps))
    for c in range(0, width, 2):
        first, second = widened(weight[c]), widened(weight[c + 1])
        for n in range(rows):
            a, b = x[c * rows + n] * inverse[n], x[(c + 1) * rows + n] * inverse[n]
            out[c // 2 * rows + n] = joined(a * first, b * second)


@njit(error_model="numpy", fastmath={"contract"})
def _gated(gate, up):
    return gate / (ONE + exp(-gate)) * up


@njit(error_model="numpy")
def gate_words(gate, up, rows, width):
    """silu(gate) * up of fp32 numbers [I, N] as words, in the place of gate."""
    out, gate, up = words(gate), floats(gate), floats(up)
    for i in range(0, width * rows, 2 * rows):
        for n in range(i, i + rows):
            out[i // 2 + n - i] = joined(_gated(gate[n], up[n]), _gated(gate[n + rows], up[n + rows]))
