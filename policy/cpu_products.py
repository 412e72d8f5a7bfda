"""Matrix products for a decoding step on the CPU in fp32, and what lies between them.

The numbers of a step lie feature by feature: feature c of all rows side by side, [C, N] in memory
(`policy/decode_layout.py`). So a row is a lane of a vector, and a product needs no copy of its matrix in another order:
each weight is read once, where it lies, and met with many rows at once. A row's numbers are added up in one order,
whoever shares its batch, so that its result does not depend on them. How such a product stays in registers is from BLIS
(Van Zee and van de Geijn, 2015).

Kernels take addresses and strides in numbers and run outside of the interpreter's lock, on the thread that calls them;
launchers take [N, C] tensors in that layout. Each has a plain twin in torch where it is called from; tests compare the
two. Numba looks at a kernel's own file to see whether what it kept on disk is still true: after a change here, touch
the files that import from it.

Shapes: N rows (one token of each sequence), C model width, O output width, I inner width, L lanes of a vector.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from policy.cpu_compiler import ONE, exp, floats, kernel
from policy.decode_layout import LEAST_ROWS

HAS_WIDE_VECTORS = bool(llvmlite.binding.get_host_cpu_features().get("avx512f", False))
"""Whether 32 registers of 16 numbers are there: enough for products of 32 rows and 8 features at a time."""
LANES = 16 if HAS_WIDE_VECTORS else 8
"""Numbers of a vector that dot products are taken in."""
TILE = 8
"""Features of a product at a time."""
QUERIES, KEYS = 4, 4
"""Heads and positions whose scores are taken at a time."""

_FLOAT, _BYTE, _INT32, _INT64 = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FUSED = ("contract",)


# --- Tiles: the innermost loops, written as vector instructions that LLVM would not find by itself ----------------


def _loop(builder: Any, count: Any, totals: list[Any], body: Any) -> list[Any]:
    """Run `body(index, totals)` `count` times, in registers; gives the totals after the last."""
    start = builder.block
    loop, end = builder.append_basic_block("tile"), builder.append_basic_block("tile.end")
    builder.cbranch(builder.icmp_signed(">", count, _INT64(0)), loop, end)
    builder.position_at_end(loop)
    index = builder.phi(_INT64)
    index.add_incoming(_INT64(0), start)
    carried = [builder.phi(total.type) for total in totals]
    for phi, total in zip(carried, totals, strict=True):
        phi.add_incoming(total, start)
    after = body(index, carried)
    following = builder.add(index, _INT64(1))
    index.add_incoming(following, loop)
    for phi, total in zip(carried, after, strict=True):
        phi.add_incoming(total, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, end)
    builder.position_at_end(end)
    finals = [builder.phi(total.type) for total in totals]
    for final, total, last in zip(finals, totals, after, strict=True):
        final.add_incoming(total, start)
        final.add_incoming(last, loop)
    return finals


def _at(builder: Any, address: Any, index: Any, kind: Any = _FLOAT) -> Any:
    """Pointer to a number, or a vector, of the fp32 numbers at an address."""
    place = builder.gep(builder.inttoptr(address, _FLOAT.as_pointer()), [index])
    return builder.bitcast(place, kind.as_pointer())


def _fetch(builder: Any, place: Any) -> None:
    """Have what lies there in the second cache before it is asked for."""
    kinds = [_BYTE.as_pointer(), *[_INT32] * 3]
    fetch = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0i8")
    builder.call(fetch, [place, _INT32(0), _INT32(2), _INT32(1)])


def _fused_multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    return builder.fadd(total, builder.fmul(a, b, flags=_FUSED), flags=_FUSED)


def product_tile(lanes: int, vectors: int, features: int, *, adds: bool = False) -> Any:
    """out[o, n] = sum_c w[o, c] x[c, n] for so many o, and as many n as so many vectors have lanes, or added to what is
    there: x and out by feature, w of any strides."""
    vector, mask = ir.VectorType(_FLOAT, lanes), ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes)

    @intrinsic
    def tile(
        _: Any,
        x: Any,
        x_stride: Any,
        w: Any,
        o_stride: Any,
        c_stride: Any,
        out: Any,
        stride: Any,
        depth: Any,
        ahead: Any,
    ):
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_stride, w, o_stride, c_stride, out, stride, depth, ahead = arguments

            def places(address: Any, first: Any) -> list[Any]:
                return [_at(builder, address, builder.add(first, _INT64(lanes * i)), vector) for i in range(vectors)]

            outs = [place for o in range(features) for place in places(out, builder.mul(stride, _INT64(o)))]

            def add(c: Any, totals: list[Any]) -> list[Any]:
                rows = [builder.load(place, align=4) for place in places(x, builder.mul(c, x_stride))]
                following = builder.add(ahead, builder.mul(c, _INT64(4 * features)))
                _fetch(builder, builder.inttoptr(following, _BYTE.as_pointer()))
                column, after, nothing = builder.mul(c, c_stride), [], ir.Constant(vector, ir.Undefined)
                for o in range(features):
                    place = _at(builder, w, builder.add(column, builder.mul(o_stride, _INT64(o))))
                    weight = builder.insert_element(nothing, builder.load(place, align=4), _INT32(0))
                    spread, of_o = (
                        builder.shuffle_vector(weight, nothing, mask),
                        totals[o * vectors : (o + 1) * vectors],
                    )
                    after += [_fused_multiply_add(builder, spread, *pair) for pair in zip(rows, of_o, strict=True)]
                return after

            zeros = [ir.Constant(vector, [0.0] * lanes)] * len(outs)
            totals = [builder.load(place, align=4) for place in outs] if adds else zeros
            for total, place in zip(_loop(builder, depth, totals, add), outs, strict=True):
                builder.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return tile


def _score_tile() -> Any:
    """out[q, k] = sum_w query[q, w] key[k, w] of QUERIES queries and KEYS keys, over whole vectors of LANES; what lies
    `ahead` bytes beyond the keys is fetched for a later tile."""
    vector, count = ir.VectorType(_FLOAT, LANES), QUERIES * KEYS

    def pick(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, len(places)), places))

    @intrinsic
    def tile(
        _: Any, query: Any, query_stride: Any, key: Any, key_stride: Any, out: Any, stride: Any, vectors: Any,
        ahead: Any,
    ):  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            query, query_stride, key, key_stride, out, stride, vectors, ahead = arguments
            later = builder.add(key, ahead)

            def rows(address: Any, stride: Any, number: int, first: Any) -> list[Any]:
                offsets = [builder.add(first, builder.mul(stride, _INT64(row))) for row in range(number)]
                return [builder.load(_at(builder, address, offset, vector), align=4) for offset in offsets]

            def add(index: Any, totals: list[Any]) -> list[Any]:
                first = builder.mul(index, _INT64(LANES))
                queries, keys = rows(query, query_stride, QUERIES, first), rows(key, key_stride, KEYS, first)
                for k in range(KEYS):
                    _fetch(builder, _at(builder, later, builder.add(first, builder.mul(key_stride, _INT64(k))), _BYTE))
                pairs = [(q, k) for q in queries for k in keys]
                return [_fused_multiply_add(builder, q, k, total) for (q, k), total in zip(pairs, totals, strict=True)]

            sums = _loop(builder, vectors, [ir.Constant(vector, [0.0] * LANES)] * count, add)
            # Vectors are folded in pairs: each time half as many hold twice as many sums in half as many parts.
            width = LANES
            while width > 1:
                half = width // 2
                low = [first + i for first in range(0, LANES, width) for i in range(half)]
                halves = [[*places, *(LANES + place for place in places)] for places in (low, [i + half for i in low])]
                sums = [
                    builder.fadd(*(pick(builder, a, b, places) for places in halves), flags=_FUSED)
                    for a, b in zip(sums[::2], sums[1::2], strict=True)
                ]
                width = half
            for q in range(QUERIES):
                of_q, first = sums[q * KEYS // LANES], q * KEYS % LANES
                scores = pick(builder, of_q, of_q, list(range(first, first + KEYS)))
                builder.store(scores, _at(builder, out, builder.mul(stride, _INT64(q)), scores.type), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), generate

    return tile


_wide, _uneven, _middle, _narrow = (product_tile(*shape, TILE) for shape in ((16, 2), (8, 3), (16, 1), (8, 1)))
_single = product_tile(8, 1, 1)
add_middle, add_narrow = (product_tile(lanes, 1, QUERIES, adds=True) for lanes in (16, 8))
score = _score_tile()


# --- Products ----------------------------------------------------------------------------------------------------


@njit(error_model="numpy")
def _multiply_rows(x, x_stride, w, o_stride, c_stride, out, stride, rows, depth):
    """TILE features of a product for all rows. What is left of the rows is met by a vector that begins before them: it
    does some again, to the same bits."""
    done, ahead = 0, w + 4 * TILE * o_stride
    while done < rows:
        left = rows - done
        if HAS_WIDE_VECTORS and left > 24 and not 32 < left <= 40 and rows >= 32:
            n = min(done, rows - 32)
            _wide(x + 4 * n, x_stride, w, o_stride, c_stride, out + 4 * n, stride, depth, ahead)
            done, ahead = n + 32, w
        elif HAS_WIDE_VECTORS and left > 16 and rows >= 24:
            n = min(done, rows - 24)
            _uneven(x + 4 * n, x_stride, w, o_stride, c_stride, out + 4 * n, stride, depth, ahead)
            done, ahead = n + 24, w
        elif HAS_WIDE_VECTORS and left > 8 and rows >= 16:
            n = min(done, rows - 16)
            _middle(x + 4 * n, x_stride, w, o_stride, c_stride, out + 4 * n, stride, depth, ahead)
            done, ahead = n + 16, w
        else:
            n = min(done, rows - 8)
            _narrow(x + 4 * n, x_stride, w, o_stride, c_stride, out + 4 * n, stride, depth, ahead)
            done, ahead = n + 8, w


@njit(error_model="numpy")
def product(x, x_stride, w, o_stride, c_stride, out, stride, rows, width, depth):
    """out[o, n] = sum_c w[o, c] x[c, n]; at least LEAST_ROWS rows."""
    if width < TILE:
        for o in range(width):
            for first in range(0, rows, 8):
                n = min(first, rows - 8)
                place = out + 4 * (o * stride + n)
                _single(x + 4 * n, x_stride, w + 4 * o * o_stride, o_stride, c_stride, place, stride, depth, w)
        return
    for first in range(0, width, TILE):
        o = min(first, width - TILE)
        _multiply_rows(x, x_stride, w + 4 * o * o_stride, o_stride, c_stride, out + 4 * o * stride, stride, rows, depth)


@kernel
def _multiply(x, x_stride, w, out, stride, rows, width, depth):
    product(x, x_stride, w, depth, 1, out, stride, rows, width, depth)


def multiply(x_NC: Tensor, weight_OC: Tensor) -> Tensor:
    """x @ weight.T, [N, O]."""
    rows, width = x_NC.shape[0], weight_OC.shape[0]
    if rows < LEAST_ROWS:
        return multiply(filled_up(x_NC), weight_OC)[:rows]
    out_ON = torch.empty(width, rows)
    weight_OC = weight_OC.contiguous()
    _multiply(
        x_NC.data_ptr(), x_NC.stride(1), weight_OC.data_ptr(), out_ON.data_ptr(), rows, rows, width, x_NC.shape[1]
    )
    return out_ON.t()


def filled_up(x_NC: Tensor) -> Tensor:
    """With rows of zeros to LEAST_ROWS, by feature."""
    filled_CN = torch.zeros(x_NC.shape[1], LEAST_ROWS)
    filled_CN[:, : x_NC.shape[0]] = x_NC.t()
    return filled_CN.t()


# --- Between products --------------------------------------------------------------------------------------------


@kernel
def normalise_rows(x, x_stride, weight, out, rows, width, eps):
    x, weight, out = floats(x), floats(weight), floats(out)
    inverse = np.zeros(rows, dtype=np.float32)
    for c in range(width):
        for n in range(rows):
            a = x[c * x_stride + n]
            inverse[n] += a * a
    for n in range(rows):
        inverse[n] = ONE / np.sqrt(inverse[n] / np.float32(width) + np.float32(eps))
    for c in range(width):
        for n in range(rows):
            out[c * rows + n] = x[c * x_stride + n] * inverse[n] * weight[c]


def normalise(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """RMSNorm, [N, C]."""
    rows, width = x_NC.shape
    out_CN = torch.empty(width, rows)
    normalise_rows(x_NC.data_ptr(), x_NC.stride(1), weight_C.data_ptr(), out_CN.data_ptr(), rows, width, eps)
    return out_CN.t()


@njit(error_model="numpy", fastmath={"contract"})
def gated(gate, up):
    """silu(gate) * up."""
    return gate / (ONE + exp(-gate)) * up


@kernel
def _silu_gate(gate, gate_stride, up, up_stride, out, rows, width):
    gate, up, out = floats(gate), floats(up), floats(out)
    for i in range(width):
        for n in range(rows):
            out[i * rows + n] = gated(gate[i * gate_stride + n], up[i * up_stride + n])


def silu_gate(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """silu(gate) * up, [N, I]."""
    rows, width = gate_NI.shape
    out_IN = torch.empty(width, rows)
    _silu_gate(gate_NI.data_ptr(), gate_NI.stride(1), up_NI.data_ptr(), up_NI.stride(1), out_IN.data_ptr(), rows, width)
    return out_IN.t()


@njit(error_model="numpy")
def feed_forward_rows(x, stride, gate, up, down, room, out, rows, width, inner_width):
    """out += down(silu(gate(x)) * up(x)); room for 2 * inner_width + width numbers a row."""
    gates, ups = room, room + 4 * inner_width * rows
    result = ups + 4 * inner_width * rows
    product(x, stride, gate, width, 1, gates, rows, rows, inner_width, width)
    product(x, stride, up, width, 1, ups, rows, rows, inner_width, width)
    gate_numbers, up_numbers = floats(gates), floats(ups)
    for i in range(inner_width * rows):
        gate_numbers[i] = gated(gate_numbers[i], up_numbers[i])
    product(gates, rows, down, inner_width, 1, result, rows, rows, width, inner_width)
    add_rows(result, rows, out, rows, width)


@njit(error_model="numpy")
def add_rows(x, stride, out, rows, width):
    """out += x."""
    x, out = floats(x), floats(out)
    for c in range(width):
        for n in range(rows):
            out[c * rows + n] += x[c * stride + n]
