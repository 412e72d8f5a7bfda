"""A decoding step on the CPU as a list of operations that one call runs, outside of the interpreter's lock.

An operation is a compiled kernel and its arguments: where the weights lie, how wide they are. What the operations of a
step share is the state: how many rows there are, where their residual stream, tokens, positions and blocks lie. Both
are arrays of whole numbers at fixed addresses, so that steps follow each other with nothing between them, as in a graph
on a GPU. Each kernel is compiled by itself and called by its address: a list of them costs no compiling.

Shapes: N rows, C model width, P rotated width, M blocks of the longest sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from policy.cpu_compiler import floats, integers, kernel, operation
from policy.cpu_products import feed_forward_rows, normalise_rows, product
from policy.decode_layout import LEAST_ROWS

if TYPE_CHECKING:
    from policy.paged_attention import Absorbed
    from policy.rope import Rotation

ROWS, LIVE, X, ROOM, TOKENS, POSITIONS, SLOTS, LENGTHS, TABLES, TABLE_WIDTH, COS, SIN, LOGITS = range(13)
"""Of a state: how many rows are computed, of how many sequences (the others are idle), and where these lie: residual
stream [C, N], room to work in, tokens [N], positions [N], flat positions of the cache entries to write [N], how many
entries there are then [N], blocks [N, M], M, cosines and sines [N, P/2], logits [V, N]."""
FIELDS = 13


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """A part of a decoding step."""

    kernel: Any
    """Compiled by `policy.cpu_compiler.operation`."""
    arguments: np.ndarray
    """Its own, int64; what is no whole number as the bits of an fp32 number."""
    room_of_row: int
    """Numbers of room that it wants for each row."""
    room_of_position: int = 0
    """Numbers of room that it wants for each position that a row's blocks hold."""
    weights: tuple[Tensor, ...] = ()
    """What its arguments are addresses of."""

    def room(self, rows: int, positions: int) -> int:
        """Numbers of room that it wants."""
        whole_vectors = -(-rows // LEAST_ROWS) * LEAST_ROWS
        return self.room_of_row * whole_vectors + self.room_of_position * positions


def arguments_of(*values: float) -> np.ndarray:
    """As an operation takes them."""
    bits = (int(np.float32(value).view(np.int32)) if isinstance(value, float) else value for value in values)
    return np.array(tuple(bits), dtype=np.int64)


@intrinsic
def _call(_: Any, kernel: Any, arguments: Any, state: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        number = ir.IntType(64)
        function = ir.FunctionType(ir.VoidType(), (number, number)).as_pointer()
        builder.call(builder.inttoptr(values[0], function), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@kernel
def _run(operations, count, state, steps):
    operations, fields = integers(operations), integers(state)
    for _ in range(steps):
        for i in range(count):
            _call(operations[2 * i], operations[2 * i + 1], state)
        if fields[LIVE] == 0:
            break


def list_of(operations: list[Operation]) -> np.ndarray:
    """Addresses of kernels and arguments, [operations, 2], as `run` takes them."""
    return np.array([(each.kernel.address, each.arguments.ctypes.data) for each in operations], dtype=np.int64)


def run(listed: np.ndarray, state: np.ndarray, steps: int = 1) -> None:
    """Run the operations in order, so many times, or until no row is live."""
    _run(listed.ctypes.data, len(listed), state.ctypes.data, steps)


def run_alone(
    operation: Operation, x_NC: Tensor, rotation: Rotation | None = None, plan: Absorbed | None = None
) -> Tensor:
    """What one operation makes of the residual stream, [N, C]; at least LEAST_ROWS rows."""
    out_CN = x_NC.t().clone(memory_format=torch.contiguous_format)
    state, positions = np.zeros(FIELDS, dtype=np.int64), 0
    state[[ROWS, LIVE, X]] = len(x_NC), len(x_NC), out_CN.data_ptr()
    if plan is not None and rotation is not None:
        table_BM = plan.block_table_BM
        positions = table_BM.shape[1] * plan.cache.shape[2]
        state[[SLOTS, LENGTHS]] = plan.slot_B.data_ptr(), plan.length_B.data_ptr()
        state[[TABLES, TABLE_WIDTH]] = table_BM.data_ptr(), table_BM.shape[1]
        state[[COS, SIN]] = rotation.cos.data_ptr(), rotation.sin.data_ptr()
    room = torch.empty(operation.room(len(x_NC), positions))
    state[ROOM] = room.data_ptr()
    run(list_of([operation]), state)
    return out_CN.t()


def _begin(arguments, state):
    a, s = integers(arguments), integers(state)
    embedding, width, cos_table, sin_table, half, size = floats(a[0]), a[1], floats(a[2]), floats(a[3]), a[4], a[5]
    rows, x, tokens, positions, table_width = (
        s[ROWS],
        floats(s[X]),
        integers(s[TOKENS]),
        integers(s[POSITIONS]),
        s[TABLE_WIDTH],
    )
    slots, lengths, tables, cos, sin = (
        integers(s[SLOTS]),
        integers(s[LENGTHS]),
        integers(s[TABLES]),
        floats(s[COS]),
        floats(s[SIN]),
    )
    for n in range(rows):
        position = positions[n]
        slots[n] = tables[n * table_width + position // size] * size + position % size
        lengths[n] = position + 1
        for i in range(half):
            cos[n * half + i] = cos_table[position * half + i]
            sin[n * half + i] = sin_table[position * half + i]
    for c in range(width):
        for n in range(rows):
            x[c * rows + n] = embedding[tokens[n] * width + c]


def beginning(embedding_VC: Tensor, cos_LP: Tensor, sin_LP: Tensor, block_size: int) -> Operation:
    """From tokens, positions and blocks to the residual stream, and to what attention wants to know."""
    half = cos_LP.shape[1]
    return Operation(
        kernel=operation(_begin),
        arguments=arguments_of(
            embedding_VC.data_ptr(), embedding_VC.shape[1], cos_LP.data_ptr(), sin_LP.data_ptr(), half, block_size
        ),
        room_of_row=0,
        weights=(embedding_VC, cos_LP, sin_LP),
    )


def _head(arguments, state):
    a, s = integers(arguments), integers(state)
    norm, eps, head, width, vocabulary = a[0], floats(arguments + 8)[0], a[2], a[3], a[4]
    rows, room = s[ROWS], s[ROOM]
    normalise_rows(s[X], rows, norm, room, rows, width, eps)
    product(room, rows, head, width, 1, s[LOGITS], rows, rows, vocabulary, width)


def head(norm_C: Tensor, eps: float, weight_VC: Tensor) -> Operation:
    """From the residual stream to logits."""
    vocabulary, width = weight_VC.shape
    return Operation(
        kernel=operation(_head),
        arguments=arguments_of(norm_C.data_ptr(), float(eps), weight_VC.data_ptr(), width, vocabulary),
        room_of_row=width,
        weights=(norm_C, weight_VC),
    )


def _feed_forward(arguments, state):
    a, s = integers(arguments), integers(state)
    norm, eps, gate, up, down, width, inner_width = a[0], floats(arguments + 8)[0], a[2], a[3], a[4], a[5], a[6]
    rows, x, room = s[ROWS], s[X], s[ROOM]
    normalise_rows(x, rows, norm, room, rows, width, eps)
    feed_forward_rows(room, rows, gate, up, down, room + 4 * width * rows, x, rows, width, inner_width)


def feed_forward(norm_C: Tensor, eps: float, gate_IC: Tensor, up_IC: Tensor, down_CI: Tensor) -> Operation:
    """X + down(silu(gate(h)) * up(h)) of h = RMSNorm(X)."""
    inner, width = gate_IC.shape
    addresses = (gate_IC.data_ptr(), up_IC.data_ptr(), down_CI.data_ptr())
    return Operation(
        kernel=operation(_feed_forward),
        arguments=arguments_of(norm_C.data_ptr(), float(eps), *addresses, width, inner),
        room_of_row=2 * width + 2 * inner,
        weights=(norm_C, gate_IC, up_IC, down_CI),
    )
