"""Kernels for a decoding step on the CPU in fp32: matrix products, attention over a paged cache, experts.

The numbers of a step lie feature by feature: feature c of all rows side by side, [C, N] in memory. So a row is a lane of a
vector, and a product needs no copy of its matrix in another order: every weight is read once and met with many rows at once.
A row's numbers are added up in one order whoever shares its batch, so that its result does not depend on them to the bit.

Launchers take logical [N, C] tensors in this layout (`policy.decode_layout`). Kernels take addresses and strides in
numbers and run outside of the GIL, on the thread that calls them. Each has a plain twin in torch, where it is called from;
tests compare the two.

Shapes: N rows (one token of each sequence), C model width, O output width, H heads, G key-value heads, Q key width,
R kv_lora_rank, P rotated width, D width before it, V value width, W numbers of a cache entry, M blocks of the longest
sequence, E experts, K experts per token, I inner width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from policy.cpu_kernels import exp, floats, integers, kernel
from policy.decode_layout import by_feature
from policy.paged_attention import Absorbed, CacheLayout

if TYPE_CHECKING:
    from policy.config import PolicyConfig
    from policy.rope import Rotation

HAS_WIDE_VECTORS = bool(llvmlite.binding.get_host_cpu_features().get("avx512f", False))
"""Whether 32 registers of 16 numbers are there: enough for products of 32 rows and 8 features at a time."""
LANES = 16 if HAS_WIDE_VECTORS else 8
"""Numbers of a vector that dot products are taken in."""
TILE = 8
"""Features of a product at a time."""
LEAST_ROWS = 8
"""Rows of the narrowest vector; fewer are filled up."""
QUERIES, KEYS = 4, 4
"""Heads and positions whose scores are taken at a time."""
ZERO, ONE, LARGEST = np.float32(0), np.float32(1), np.finfo(np.float32).max

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


def _fused_multiply_add(builder: Any, a: Any, b: Any, total: Any) -> Any:
    return builder.fadd(total, builder.fmul(a, b, flags=_FUSED), flags=_FUSED)


def _product_tile(lanes: int, features: int, *, adds: bool = False) -> Any:
    """out[o, n] = sum_c w[o, c] x[c, n] for so many o and n, or added to what is there: x and out by feature, w of any
    strides."""
    vector, mask = ir.VectorType(_FLOAT, lanes), ir.Constant(ir.VectorType(_INT32, lanes), [0] * lanes)

    @intrinsic
    def tile(_: Any, x: Any, x_stride: Any, w: Any, o_stride: Any, c_stride: Any, out: Any, stride: Any, depth: Any,
             ahead: Any):
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, x_stride, w, o_stride, c_stride, out, stride, depth, ahead = arguments
            kinds = [_BYTE.as_pointer(), *[_INT32] * 3]
            fetch = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(ir.VoidType(), kinds), "llvm.prefetch.p0i8"
            )
            places = [_at(builder, out, builder.mul(stride, _INT64(o)), vector) for o in range(features)]

            def add(c: Any, totals: list[Any]) -> list[Any]:
                rows = builder.load(_at(builder, x, builder.mul(c, x_stride), vector), align=4)
                following = builder.add(ahead, builder.mul(c, _INT64(4 * features)))
                builder.call(fetch, [builder.inttoptr(following, kinds[0]), _INT32(0), _INT32(2), _INT32(1)])
                column, after = builder.mul(c, c_stride), []
                for o, total in enumerate(totals):
                    weight = builder.load(_at(builder, w, builder.add(column, builder.mul(o_stride, _INT64(o)))), align=4)
                    nothing = ir.Constant(vector, ir.Undefined)
                    spread = builder.shuffle_vector(builder.insert_element(nothing, weight, _INT32(0)), nothing, mask)
                    after.append(_fused_multiply_add(builder, spread, rows, total))
                return after

            nothing = ir.Constant(vector, [0.0] * lanes)
            totals = [builder.load(place, align=4) if adds else nothing for place in places]
            totals = _loop(builder, depth, totals, add)
            for total, place in zip(totals, places, strict=True):
                builder.store(total, place, align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), generate

    return tile


def _score_tile() -> Any:
    """out[q, k] = sum_w query[q, w] key[k, w] of QUERIES queries and KEYS keys, over whole vectors of LANES."""
    vector, count = ir.VectorType(_FLOAT, LANES), QUERIES * KEYS

    def pick(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT32, len(places)), places))

    @intrinsic
    def tile(_: Any, query: Any, query_stride: Any, key: Any, key_stride: Any, out: Any, stride: Any, vectors: Any):
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            query, query_stride, key, key_stride, out, stride, vectors = arguments

            def rows(address: Any, stride: Any, number: int, first: Any) -> list[Any]:
                offsets = [builder.add(first, builder.mul(stride, _INT64(row))) for row in range(number)]
                return [builder.load(_at(builder, address, offset, vector), align=4) for offset in offsets]

            def add(index: Any, totals: list[Any]) -> list[Any]:
                first = builder.mul(index, _INT64(LANES))
                queries, keys = rows(query, query_stride, QUERIES, first), rows(key, key_stride, KEYS, first)
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

        return types.void(*[types.int64] * 7), generate

    return tile


_wide, _middle, _narrow, _single = (_product_tile(*shape) for shape in ((32, TILE), (16, TILE), (8, TILE), (8, 1)))
_add_middle, _add_narrow = (_product_tile(lanes, QUERIES, adds=True) for lanes in (16, 8))
_score = _score_tile()


# --- Products ----------------------------------------------------------------------------------------------------


@njit(error_model="numpy")
def _multiply_rows(x, x_stride, w, o_stride, c_stride, out, stride, rows, depth):
    """TILE features of a product for all rows. What is left of the rows is met by a vector that begins before them: it
    does some again, to the same bits."""
    done, ahead = 0, w + 4 * TILE * o_stride
    while done < rows:
        left = rows - done
        if HAS_WIDE_VECTORS and left > 24 and rows >= 32:
            n = min(done, rows - 32)
            _wide(x + 4 * n, x_stride, w, o_stride, c_stride, out + 4 * n, stride, depth, ahead)
            done, ahead = n + 32, w
        elif HAS_WIDE_VECTORS and left > 8 and rows >= 16:
            n = min(done, rows - 16)
            _middle(x + 4 * n, x_stride, w, o_stride, c_stride, out + 4 * n, stride, depth, ahead)
            done, ahead = n + 16, w
        else:
            n = min(done, rows - 8)
            _narrow(x + 4 * n, x_stride, w, o_stride, c_stride, out + 4 * n, stride, depth, ahead)
            done, ahead = n + 8, w


@njit(error_model="numpy")
def _product(x, x_stride, w, o_stride, c_stride, out, stride, rows, width, depth):
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
        _multiply_rows(
            x, x_stride, w + 4 * o * o_stride, o_stride, c_stride, out + 4 * o * stride, stride, rows, depth
        )


@kernel
def _multiply(x, x_stride, w, out, stride, rows, width, depth):
    _product(x, x_stride, w, depth, 1, out, stride, rows, width, depth)


def multiply(x_NC: Tensor, weight_OC: Tensor) -> Tensor:
    """x @ weight.T, [N, O]."""
    rows, width = x_NC.shape[0], weight_OC.shape[0]
    if rows < LEAST_ROWS:
        return multiply(_filled_up(x_NC), weight_OC)[:rows]
    out_ON = torch.empty(width, rows)
    weight_OC = weight_OC.contiguous()
    _multiply(
        x_NC.data_ptr(), x_NC.stride(1), weight_OC.data_ptr(), out_ON.data_ptr(), rows, rows, width, x_NC.shape[1]
    )
    return out_ON.t()


def _filled_up(x_NC: Tensor) -> Tensor:
    """With rows of zeros to LEAST_ROWS, by feature."""
    filled_CN = torch.zeros(x_NC.shape[1], LEAST_ROWS)
    filled_CN[:, : x_NC.shape[0]] = x_NC.t()
    return filled_CN.t()


# --- Between products --------------------------------------------------------------------------------------------


@kernel
def _normalise(x, x_stride, weight, out, rows, width, eps):
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
    _normalise(x_NC.data_ptr(), x_NC.stride(1), weight_C.data_ptr(), out_CN.data_ptr(), rows, width, eps)
    return out_CN.t()


@njit(error_model="numpy", fastmath={"contract"})
def _gated(gate, up):
    """silu(gate) * up."""
    return gate / (ONE + exp(-gate)) * up


@kernel
def _silu_gate(gate, gate_stride, up, up_stride, out, rows, width):
    gate, up, out = floats(gate), floats(up), floats(out)
    for i in range(width):
        for n in range(rows):
            out[i * rows + n] = _gated(gate[i * gate_stride + n], up[i * up_stride + n])


def silu_gate(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """silu(gate) * up, [N, I]."""
    rows, width = gate_NI.shape
    out_IN = torch.empty(width, rows)
    _silu_gate(
        gate_NI.data_ptr(), gate_NI.stride(1), up_NI.data_ptr(), up_NI.stride(1), out_IN.data_ptr(), rows, width
    )
    return out_IN.t()


# --- Attention over the cache ------------------------------------------------------------------------------------


@njit(error_model="numpy")
def _kept(number, cleans):
    """What is no number is 0 in the cache: see `policy.attention.write_cache`."""
    return ZERO if cleans and not abs(number) <= LARGEST else number


@njit(error_model="numpy", fastmath={"contract"})
def _turn(x, stride, rows, cos, sin, half, is_interleaved, out, starts, offset, cleans):
    """One head's pairs turned; row n's numbers go to starts[n] + offset, side by side."""
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if is_interleaved else (i, i + half)
        for n in range(rows):
            real, imaginary, c, s = x[a * stride + n], x[b * stride + n], cos[n * half + i], sin[n * half + i]
            out[starts[n] + offset + a] = _kept(real * c - imaginary * s, cleans)
            out[starts[n] + offset + b] = _kept(real * s + imaginary * c, cleans)


@njit(error_model="numpy")
def _copy(x, stride, rows, width, out, starts, offset, cleans):
    for c in range(width):
        for n in range(rows):
            out[starts[n] + offset + c] = _kept(x[c * stride + n], cleans)


@njit(error_model="numpy")
def _score_all(query, width, keys, entry, size, table, length, scores, capacity):
    """scores[q, l] of QUERIES queries at all positions, and at some beyond, within their block."""
    whole = width // LANES
    query_numbers, score_numbers = floats(query), floats(scores)
    for block in range((length + size - 1) // size):
        begin = block * size
        for at in range(0, min(size, length - begin), KEYS):
            first = min(at, size - KEYS)
            key = keys + 4 * entry * (size * table[block] + first)
            _score(query, width, key, entry, scores + 4 * (begin + first), capacity, whole)
            numbers = floats(key)
            for q in range(QUERIES):
                for k in range(KEYS):
                    rest = ZERO
                    for w in range(whole * LANES, width):
                        rest += query_numbers[q * width + w] * numbers[k * entry + w]
                    score_numbers[q * capacity + begin + first + k] += rest


@njit(error_model="numpy", fastmath={"contract", "reassoc"})
def _weigh(scores, length, scale):
    """Softmax of scale * score, in place."""
    highest, total = scores[0], ZERO
    for at in range(1, length):
        highest = max(highest, scores[at])
    for at in range(length):
        weight = exp((scores[at] - highest) * np.float32(scale))
        scores[at] = weight
        total += weight
    share = ONE / total
    for at in range(length):
        scores[at] *= share


@njit(error_model="numpy")
def _mix(weights, capacity, values, entry, size, table, length, out, width):
    """out[q, v] += sum_l weights[q, l] values[l, v] of QUERIES queries."""
    weight_numbers, out_numbers = floats(weights), floats(out)
    for block in range((length + size - 1) // size):
        begin = block * size
        count = min(size, length - begin)
        value, weight, v = values + 4 * entry * size * table[block], weights + 4 * begin, 0
        while width - v >= 16:
            _add_middle(value + 4 * v, entry, weight, capacity, 1, out + 4 * v, width, count, value)
            v += 16
        if width - v >= 8:
            _add_narrow(value + 4 * v, entry, weight, capacity, 1, out + 4 * v, width, count, value)
            v += 8
        value_numbers = floats(value)
        for rest in range(v, width):
            for q in range(QUERIES):
                for at in range(count):
                    weight_number = weight_numbers[q * capacity + begin + at]
                    out_numbers[q * width + rest] += weight_number * value_numbers[at * entry + rest]


@njit(error_model="numpy")
def _attend(
    queries, heads, groups, key_width, blocks, entry, size, tables, table_width, lengths,
    value_start, value_width, scale, scores, mixed, out, out_stride, rows,
):  # fmt: skip
    """Softmax attention of every row over its blocks; a group's heads are filled up to whole QUERIES."""
    of_group = heads // groups
    filled, capacity = (of_group + QUERIES - 1) // QUERIES * QUERIES, table_width * size
    mixed_numbers, out_numbers = floats(mixed), floats(out)
    lengths = integers(lengths)
    for n in range(rows):
        table, length = integers(tables + 8 * n * table_width), lengths[n]
        for group in range(groups):
            for first in range(0, of_group, QUERIES):
                query = queries + 4 * ((n * groups + group) * filled + first) * key_width
                keys, values = blocks + 4 * group * key_width, blocks + 4 * (value_start + group * value_width)
                _score_all(query, key_width, keys, entry, size, table, length, scores, capacity)
                for at in range(QUERIES * value_width):
                    mixed_numbers[at] = ZERO
                count = min(QUERIES, of_group - first)
                for q in range(count):
                    _weigh(floats(scores + 4 * q * capacity), length, scale)
                _mix(scores, capacity, values, entry, size, table, length, mixed, value_width)
                for q in range(count):
                    feature = (group * of_group + first + q) * value_width
                    for v in range(value_width):
                        out_numbers[(feature + v) * out_stride + n] = mixed_numbers[q * value_width + v]


@kernel
def _attend_grouped(
    query, query_stride, key, key_stride, value, value_stride, cos, sin, half, is_interleaved, blocks, entry, size,
    slots, tables, table_width, lengths, scale, queries, scores, mixed, out, rows, heads, groups, width,
):  # fmt: skip
    of_group = heads // groups
    filled = (of_group + QUERIES - 1) // QUERIES * QUERIES
    slots, starts = integers(slots), np.empty(rows, dtype=np.int64)
    cos, sin = floats(cos), floats(sin)
    kept = width - 2 * half
    for n in range(rows):
        starts[n] = slots[n] * entry
    for group in range(groups):
        x, offset = key + 4 * group * width * key_stride, group * width
        _copy(floats(x), key_stride, rows, kept, floats(blocks), starts, offset, True)
        x += 4 * kept * key_stride
        _turn(floats(x), key_stride, rows, cos, sin, half, is_interleaved, floats(blocks), starts, offset + kept, True)
    _copy(floats(value), value_stride, rows, groups * width, floats(blocks), starts, groups * width, True)
    for n in range(rows):
        starts[n] = n * groups * filled * width
    for head in range(heads):
        x, offset = query + 4 * head * width * query_stride, (head // of_group * filled + head % of_group) * width
        _copy(floats(x), query_stride, rows, kept, floats(queries), starts, offset, False)
        x += 4 * kept * query_stride
        _turn(
            floats(x), query_stride, rows, cos, sin, half, is_interleaved, floats(queries), starts, offset + kept, False
        )
    _attend(
        queries, heads, groups, width, blocks, entry, size, tables, table_width, lengths,
        groups * width, width, scale, scores, mixed, out, rows, rows,
    )  # fmt: skip


@kernel
def _attend_latent(
    query, query_stride, latent, latent_stride, norm, eps, up, cos, sin, half, is_interleaved, blocks, entry, size,
    slots, tables, table_width, lengths, scale, queries, scores, mixed, absorbed, out, rows, filled_rows,
    heads, own, rank, value_width,
):  # fmt: skip
    width, filled = rank + 2 * half, (heads + QUERIES - 1) // QUERIES * QUERIES
    slots, starts = integers(slots), np.empty(rows, dtype=np.int64)
    cos, sin, norm, numbers = floats(cos), floats(sin), floats(norm), floats(latent)
    inverse = np.zeros(rows, dtype=np.float32)
    for r in range(rank):
        for n in range(rows):
            inverse[n] += numbers[r * latent_stride + n] * numbers[r * latent_stride + n]
    for n in range(rows):
        inverse[n] = ONE / np.sqrt(inverse[n] / np.float32(rank) + np.float32(eps))
        starts[n] = slots[n] * entry
    cache = floats(blocks)
    for r in range(rank):
        for n in range(rows):
            cache[starts[n] + r] = _kept(numbers[r * latent_stride + n] * inverse[n] * norm[r], True)
    x = floats(latent + 4 * rank * latent_stride)
    _turn(x, latent_stride, rows, cos, sin, half, is_interleaved, cache, starts, rank, True)
    for n in range(rows):
        starts[n] = n * filled * width
    for head in range(heads):
        x = query + 4 * head * (own + 2 * half) * query_stride
        up_head = up + 4 * head * (own + value_width) * rank
        _product(x, query_stride, up_head, 1, rank, absorbed, filled_rows, filled_rows, rank, own)
        _copy(floats(absorbed), filled_rows, rows, rank, floats(queries), starts, head * width, False)
        x += 4 * own * query_stride
        place = head * width + rank
        _turn(floats(x), query_stride, rows, cos, sin, half, is_interleaved, floats(queries), starts, place, False)
    _attend(
        queries, heads, 1, width, blocks, entry, size, tables, table_width, lengths,
        0, rank, scale, scores, mixed, absorbed, filled_rows, rows,
    )  # fmt: skip
    for head in range(heads):
        up_head = up + 4 * (head * (own + value_width) + own) * rank
        x, place = absorbed + 4 * head * rank * filled_rows, out + 4 * head * value_width * filled_rows
        _product(x, filled_rows, up_head, rank, 1, place, filled_rows, filled_rows, value_width, rank)


def attend_latent(
    query_NX: Tensor, latent_NW: Tensor, norm_R: Tensor, eps: float, up_XR: Tensor, rotation: Rotation,
    plan: Absorbed, layer: int, heads: int, scale: float,
) -> Tensor:  # fmt: skip
    """MLA's attention in its absorbed form, [N, H * V], from queries [N, H * (D + P)], what the latents and shared keys
    are before norm and rotation, and the up-projection [H * (D + V), R]; writes the cache first."""
    rows, rank, half = query_NX.shape[0], up_XR.shape[1], rotation.cos.shape[1]
    own = query_NX.shape[1] // heads - 2 * half
    value_width, filled = up_XR.shape[0] // heads - own, -(-heads // QUERIES) * QUERIES
    query_NX = by_feature(query_NX) if rows >= LEAST_ROWS else _filled_up(query_NX)
    latent_NW, up_XR, filled_rows = by_feature(latent_NW), up_XR.contiguous(), query_NX.shape[0]
    queries, scores, mixed = _scratch(rows * filled, rank + 2 * half, rank, plan)
    absorbed, out = torch.zeros(heads * rank, filled_rows), torch.empty(heads * value_width, filled_rows)
    _attend_latent(
        query_NX.data_ptr(), query_NX.stride(1), latent_NW.data_ptr(), latent_NW.stride(1), norm_R.data_ptr(), eps,
        up_XR.data_ptr(), *_turning(rotation), *_cached(plan, layer), scale, queries.data_ptr(), scores.data_ptr(),
        mixed.data_ptr(), absorbed.data_ptr(), out.data_ptr(), rows, filled_rows, heads, own, rank, value_width,
    )  # fmt: skip
    return out.t()[:rows]


def attend_grouped(
    query_NX: Tensor, key_NX: Tensor, value_NX: Tensor, rotation: Rotation, plan: Absorbed, layer: int,
    layout: CacheLayout, scale: float,
) -> Tensor:  # fmt: skip
    """Grouped-query attention, [N, H * Q], from queries, keys and values before their rotation; writes the cache
    first."""
    rows, width, groups = query_NX.shape[0], layout.key_width, layout.groups
    heads = query_NX.shape[1] // width
    query_NX, key_NX, value_NX = by_feature(query_NX), by_feature(key_NX), by_feature(value_NX)
    filled = -(-heads // groups // QUERIES) * QUERIES
    queries, scores, mixed = _scratch(rows * groups * filled, width, width, plan)
    out_XN = torch.empty(heads * width, rows)
    _attend_grouped(
        query_NX.data_ptr(), query_NX.stride(1), key_NX.data_ptr(), key_NX.stride(1), value_NX.data_ptr(),
        value_NX.stride(1), *_turning(rotation), *_cached(plan, layer), scale, queries.data_ptr(), scores.data_ptr(),
        mixed.data_ptr(), out_XN.data_ptr(), rows, heads, groups, width,
    )  # fmt: skip
    return out_XN.t()


def _scratch(queries: int, key_width: int, value_width: int, plan: Absorbed) -> tuple[Tensor, Tensor, Tensor]:
    """Room for queries, for the scores and for the results of QUERIES of them."""
    capacity = plan.block_table_BM.shape[1] * plan.cache.shape[2]
    return torch.zeros(queries, key_width), torch.empty(QUERIES, capacity), torch.empty(QUERIES, value_width)


def _turning(rotation: Rotation) -> tuple[int, int, int, bool]:
    return rotation.cos.data_ptr(), rotation.sin.data_ptr(), rotation.cos.shape[1], rotation.is_interleaved


def _cached(plan: Absorbed, layer: int) -> tuple[int, ...]:
    """The layer's blocks, their sizes, and each row's slot, blocks and length."""
    _, _, size, entry = plan.cache.shape
    blocks = plan.cache.data_ptr() + 4 * layer * plan.cache.stride(0)
    table = plan.block_table_BM
    return (
        blocks, entry, size, plan.slot_B.data_ptr(), table.data_ptr(), table.shape[1], plan.length_B.data_ptr()
    )  # fmt: skip


# --- Experts -----------------------------------------------------------------------------------------------------


@njit(error_model="numpy", fastmath={"contract"})
def _score_experts(logits, stride, n, experts, is_sigmoid, scores):
    if is_sigmoid:
        for e in range(experts):
            scores[e] = ONE / (ONE + exp(-logits[e * stride + n]))
        return
    highest, total = logits[n], ZERO
    for e in range(1, experts):
        highest = max(highest, logits[e * stride + n])
    for e in range(experts):
        scores[e] = exp(logits[e * stride + n] - highest)
        total += scores[e]
    for e in range(experts):
        scores[e] /= total


@njit(error_model="numpy")
def _take_best(ratings, taken, first, count):
    """Place of the highest rating among `count` from `first` on that are not taken; it is now. The first of equals."""
    best = -1
    for place in range(first, first + count):
        if not taken[place] and (best < 0 or ratings[place] > ratings[best]):
            best = place
    taken[best] = True
    return best


@njit(error_model="numpy")
def _keep_groups(ratings, taken, experts, groups, kept, num_best):
    """Take all experts but those of the `kept` groups whose `num_best` best add up to most."""
    size, totals, dropped = experts // groups, np.zeros(groups, dtype=np.float32), np.zeros(groups, dtype=np.bool_)
    for group in range(groups):
        for _ in range(min(num_best, size)):
            totals[group] += ratings[_take_best(ratings, taken, group * size, size)]
    for _ in range(kept):
        _take_best(totals, dropped, 0, groups)
    for e in range(experts):
        taken[e] = not dropped[e // size]


@kernel
def _route(
    logits, stride, bias, scores, chosen, weights, rows, experts, per_token,
    is_sigmoid, is_biased, groups, kept, num_best, is_normalised, factor,
):  # fmt: skip
    logits, bias, scores = floats(logits), floats(bias), floats(scores)
    chosen, weights = integers(chosen), floats(weights)
    own, ratings = np.empty(experts, dtype=np.float32), np.empty(experts, dtype=np.float32)
    taken = np.empty(experts, dtype=np.bool_)
    for n in range(rows):
        _score_experts(logits, stride, n, experts, is_sigmoid, own)
        for e in range(experts):
            scores[e * rows + n], taken[e] = own[e], False
            ratings[e] = own[e] + bias[e] if is_biased else own[e]
        if groups > 1:
            _keep_groups(ratings, taken, experts, groups, kept, num_best)
        total = np.float32(1e-20)
        for k in range(per_token):
            best = _take_best(ratings, taken, 0, experts)
            chosen[n * per_token + k] = best
            total += own[best]
        share = np.float32(factor) / total if is_normalised else np.float32(factor)
        for k in range(per_token):
            weights[n * per_token + k] = own[chosen[n * per_token + k]] * share


def route(logits_NE: Tensor, bias_E: Tensor | None, config: PolicyConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [N, E], chosen experts [N, K], best first, and their weights [N, K], as `policy.router` defines them."""
    (rows, experts), per_token = logits_NE.shape, config.num_experts_per_tok
    scores_EN = torch.empty(experts, rows)
    chosen_NK = torch.empty(rows, per_token, dtype=torch.int64)
    weights_NK = torch.empty(rows, per_token)
    _route(
        logits_NE.data_ptr(), logits_NE.stride(1), 0 if bias_E is None else bias_E.data_ptr(), scores_EN.data_ptr(),
        chosen_NK.data_ptr(), weights_NK.data_ptr(), rows, experts, per_token, config.scoring_func == "sigmoid",
        bias_E is not None, 1 if config.topk_method == "greedy" else config.n_group, config.topk_group,
        2 if config.topk_method == "noaux_tc" else 1, config.norm_topk_prob, config.routed_scaling_factor,
    )  # fmt: skip
    return scores_EN.t(), chosen_NK, weights_NK


@kernel
def _mix_experts(
    x, stride, chosen, weights, gate_up, down, room, out, rows, most, experts, per_token, width, inner_width,
):  # fmt: skip
    x, chosen, weights, out = floats(x), integers(chosen), floats(weights), floats(out)
    order, ends = np.empty(rows * per_token, dtype=np.int64), np.zeros(experts + 1, dtype=np.int64)
    for pair in range(rows * per_token):
        ends[chosen[pair] + 1] += 1
    for e in range(experts):
        ends[e + 1] += ends[e]
    places = ends.copy()
    for pair in range(rows * per_token):
        order[places[chosen[pair]]] = pair
        places[chosen[pair]] += 1
    gathered, hidden = room, room + 4 * width * most
    inner, result = hidden + 8 * inner_width * most, hidden + 12 * inner_width * most
    gathered_numbers, hidden_numbers = floats(gathered), floats(hidden)
    inner_numbers, result_numbers = floats(inner), floats(result)
    for e in range(experts):
        pairs = order[ends[e] : ends[e + 1]]
        count = len(pairs)
        if count == 0:
            continue
        filled = max(count, LEAST_ROWS)
        for c in range(width):
            for i in range(count):
                gathered_numbers[c * filled + i] = x[c * stride + pairs[i] // per_token]
            for i in range(count, filled):
                gathered_numbers[c * filled + i] = ZERO
        matrix = gate_up + 8 * e * inner_width * width
        _product(gathered, filled, matrix, width, 1, hidden, filled, filled, 2 * inner_width, width)
        for i in range(inner_width * filled):
            inner_numbers[i] = _gated(hidden_numbers[i], hidden_numbers[inner_width * filled + i])
        matrix = down + 4 * e * inner_width * width
        _product(inner, filled, matrix, inner_width, 1, result, filled, filled, width, inner_width)
        for c in range(width):
            for i in range(count):
                out[c * rows + pairs[i] // per_token] += weights[pairs[i]] * result_numbers[c * filled + i]


def mix_experts(
    x_NC: Tensor, chosen_NK: Tensor, weights_NK: Tensor, gate_up_EIC: Tensor, down_ECI: Tensor
) -> Tensor:
    """Weighted sum of each row's experts, [N, C], added up in the order of the experts."""
    (rows, width), (experts, _, inner), per_token = x_NC.shape, down_ECI.shape, chosen_NK.shape[1]
    most = max(rows, LEAST_ROWS)
    room = torch.empty(2 * width + 3 * inner, most)
    out_CN = torch.zeros(width, rows)
    _mix_experts(
        x_NC.data_ptr(), x_NC.stride(1), chosen_NK.data_ptr(), weights_NK.data_ptr(), gate_up_EIC.data_ptr(),
        down_ECI.data_ptr(), room.data_ptr(), out_CN.data_ptr(), rows, most, experts, per_token, width, inner,
    )  # fmt: skip
    return out_CN.t()
