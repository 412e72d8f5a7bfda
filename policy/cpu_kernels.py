"""Kernels for the CPU in fp32: what torch would do in many passes over memory, in one. Imported where first used.

Each launcher has a plain twin in `policy/norm.py` or `policy/fused.py`, which defines it; tests compare the two. A
kernel is Python that numba compiles (`policy/cpu_compiler.py`). It takes addresses and strides, in numbers, as a GPU's
does: rows may lie apart, the numbers of a row may not (`policy/fused.py` sees to that). It runs on the thread that
calls it, outside of the GIL, and adds up in a fixed order, so that runs repeat.

Shapes: N rows (tokens, or token-expert pairs), C model width, I inner width, H heads, P rotated width, D width before
it, Q = D + P, V value width.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from policy.cpu_compiler import ONE, ZERO, exp, floats, integers, kernel

ROWS_AT_ONCE = 64
"""Rows whose gradients of a weight are added up before they are added to the rest: many small to one large number would
lose digits."""


# --- RMSNorm -----------------------------------------------------------------------------------------------------


@kernel
def _normalise(x, weight, out, rows, width, stride, eps):
    x, weight, out = floats(x), floats(weight), floats(out)
    for row in range(rows):
        total = ZERO
        for c in range(width):
            total += x[row * stride + c] * x[row * stride + c]
        inverse = np.float32(1 / np.sqrt(total / width + eps))
        for c in range(width):
            out[row * width + c] = x[row * stride + c] * inverse * weight[c]


@kernel
def _normalise_backward(x, weight, grad, x_grad, weight_grads, rows, width, stride, grad_stride, eps):
    """With n = x / rms and g = grad * weight: dx = (g - n * mean(g n)) / rms, dw = sum of grad * n."""
    x, weight, grad, x_grad, weight_grads = (
        floats(x),
        floats(weight),
        floats(grad),
        floats(x_grad),
        floats(weight_grads),
    )
    for first in range(0, rows, ROWS_AT_ONCE):
        for row in range(first, min(rows, first + ROWS_AT_ONCE)):
            total = ZERO
            along = ZERO
            for c in range(width):
                a = x[row * stride + c]
                total += a * a
                along += a * grad[row * grad_stride + c] * weight[c]
            inverse = np.float32(1 / np.sqrt(total / width + eps))
            back = along * inverse * inverse * inverse / np.float32(width)
            for c in range(width):
                a, g = x[row * stride + c], grad[row * grad_stride + c]
                x_grad[row * width + c] = g * weight[c] * inverse - a * back
                weight_grads[width + c] += g * (a * inverse)
        for c in range(width):
            weight_grads[c] += weight_grads[width + c]
            weight_grads[width + c] = ZERO


def normalise(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """RMSNorm of the rows of x, [..., C]."""
    rows_NC = _as_rows(x)
    out = torch.empty(x.shape)
    rows, width = rows_NC.shape
    weight_C = weight_C.contiguous()
    _normalise(rows_NC.data_ptr(), weight_C.data_ptr(), out.data_ptr(), rows, width, rows_NC.stride(0), eps)
    return out


def normalise_backward(x: Tensor, weight_C: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of the rows, contiguous, and of the weight."""
    rows_NC, grad_NC, weight_C = _as_rows(x), _as_rows(grad), weight_C.contiguous()
    x_grad = torch.empty(x.shape)
    rows, width = rows_NC.shape
    weight_grads = torch.zeros(2, width)
    _normalise_backward(
        rows_NC.data_ptr(), weight_C.data_ptr(), grad_NC.data_ptr(), x_grad.data_ptr(), weight_grads.data_ptr(),
        rows, width, rows_NC.stride(0), grad_NC.stride(0), eps,
    )  # fmt: skip
    return x_grad, weight_grads[0]


# --- SwiGLU's activation -----------------------------------------------------------------------------------------


@kernel
def _silu_gate(gate, up, out, rows, width, gate_stride, up_stride):
    gate, up, out = floats(gate), floats(up), floats(out)
    for row in range(rows):
        for c in range(width):
            a = gate[row * gate_stride + c]
            out[row * width + c] = a / (ONE + exp(-a)) * up[row * up_stride + c]


@kernel
def _silu_gate_backward(gate, up, grad, both, rows, width, gate_stride, up_stride, grad_stride):
    gate, up, grad, both = floats(gate), floats(up), floats(grad), floats(both)
    for row in range(rows):
        for c in range(width):
            a, g = gate[row * gate_stride + c], grad[row * grad_stride + c]
            sigmoid = ONE / (ONE + exp(-a))
            both[row * 2 * width + c] = g * up[row * up_stride + c] * sigmoid * (ONE + a * (ONE - sigmoid))
            both[row * 2 * width + width + c] = g * a * sigmoid


def silu_gate_forward(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """silu(gate) * up, of the shape of gate."""
    (rows, width), out_NI = gate_NI.shape, torch.empty(gate_NI.shape)
    _silu_gate(gate_NI.data_ptr(), up_NI.data_ptr(), out_NI.data_ptr(), rows, width, gate_NI.stride(0), up_NI.stride(0))
    return out_NI


def silu_gate_backward(gate_NI: Tensor, up_NI: Tensor, grad_NI: Tensor) -> Tensor:
    """Gradients of gate and up side by side, [N, 2I]."""
    rows, width = gate_NI.shape
    both = torch.empty(rows, 2 * width)
    _silu_gate_backward(
        gate_NI.data_ptr(), up_NI.data_ptr(), grad_NI.data_ptr(), both.data_ptr(), rows, width,
        gate_NI.stride(0), up_NI.stride(0), grad_NI.stride(0),
    )  # fmt: skip
    return both


# --- rotation ----------------------------------------------------------------------------------------------------


@njit(error_model="numpy", inline="always")  # so that steps are constants, as vectors need
def _turn_head(x, out, cos, sin, source, target, angle, half, step, apart, sign):
    """Pair i is numbers i * step and i * step + apart."""
    for i in range(half):
        a, b = x[source + i * step], x[source + i * step + apart]
        c, s = cos[angle + i], sin[angle + i] * sign
        out[target + i * step] = a * c - b * s
        out[target + i * step + apart] = b * c + a * s


@kernel
def _turn(x, out, cos, sin, rows, heads, kept, half, row_stride, head_stride, is_interleaved, sign):
    """Of each head `kept` numbers copied, then pairs turned."""
    x, out, cos, sin = floats(x), floats(out), floats(cos), floats(sin)
    width, sign = kept + 2 * half, np.float32(sign)
    for row in range(rows):
        for head in range(heads):
            source, target = row * row_stride + head * head_stride, (row * heads + head) * width
            for c in range(kept):
                out[target + c] = x[source + c]
            if is_interleaved:
                _turn_head(x, out, cos, sin, source + kept, target + kept, row * half, half, 2, 1, sign)
            else:
                _turn_head(x, out, cos, sin, source + kept, target + kept, row * half, half, 1, half, sign)


def turn(x_NHQ: Tensor, cos_NP: Tensor, sin_NP: Tensor, *, is_interleaved: bool, is_inverse: bool = False) -> Tensor:
    """The last P numbers of each head turned, pair by pair, by its token's angle, or back; the ones before are kept.

    cos and sin are [N, P/2].
    """
    cos_NP, sin_NP = cos_NP.contiguous(), sin_NP.contiguous()
    (rows, heads, width), half = x_NHQ.shape, cos_NP.shape[1]
    out_NHQ = torch.empty(rows, heads, width)
    _turn(
        x_NHQ.data_ptr(), out_NHQ.data_ptr(), cos_NP.data_ptr(), sin_NP.data_ptr(), rows, heads, width - 2 * half, half,
        x_NHQ.stride(0), x_NHQ.stride(1), is_interleaved, -1.0 if is_inverse else 1.0,
    )  # fmt: skip
    return out_NHQ


# --- MLA's keys and values ---------------------------------------------------------------------------------------


@kernel
def _join_keys(nope, rope, key, rows, heads, own, shared, row_stride, head_stride, rope_stride):
    nope, rope, key = floats(nope), floats(rope), floats(key)
    width = own + shared
    for row in range(rows):
        for head in range(heads):
            source, target = row * row_stride + head * head_stride, (row * heads + head) * width
            for c in range(own):
                key[target + c] = nope[source + c]
            for c in range(shared):
                key[target + own + c] = rope[row * rope_stride + c]


@kernel
def _part_gradients(
    key_grad, value_grad, both, rope_grad, rows, heads, own, shared, values, key_row, key_head, value_row, value_head
):
    """Of own keys and values side by side, and of the shared part added up over heads."""
    key_grad, value_grad, both, rope_grad = floats(key_grad), floats(value_grad), floats(both), floats(rope_grad)
    width = own + values
    for row in range(rows):
        for head in range(heads):
            target = (row * heads + head) * width
            keys, vals = row * key_row + head * key_head, row * value_row + head * value_head
            for c in range(own):
                both[target + c] = key_grad[keys + c]
            for c in range(values):
                both[target + own + c] = value_grad[vals + c]
            if head == 0:
                for c in range(shared):
                    rope_grad[row * shared + c] = key_grad[keys + own + c]
            else:
                for c in range(shared):
                    rope_grad[row * shared + c] += key_grad[keys + own + c]


def join_keys(k_nope_NHD: Tensor, k_rope_NP: Tensor) -> Tensor:
    """Keys [N, H, D + P]: each head's own part, then the part that all heads share."""
    (rows, heads, own), shared = k_nope_NHD.shape, k_rope_NP.shape[1]
    key_NHQ = torch.empty(rows, heads, own + shared)
    _join_keys(
        k_nope_NHD.data_ptr(), k_rope_NP.data_ptr(), key_NHQ.data_ptr(), rows, heads, own, shared,
        k_nope_NHD.stride(0), k_nope_NHD.stride(1), k_rope_NP.stride(0),
    )  # fmt: skip
    return key_NHQ


def part_gradients(key_grad_NHQ: Tensor, value_grad_NHV: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """Back through `join_keys`: gradients of own parts and values, side by side, and of the shared part [N, P]."""
    (rows, heads, width), values = key_grad_NHQ.shape, value_grad_NHV.shape[-1]
    both, rope_grad_NP = torch.empty(rows, heads, own + values), torch.empty(rows, width - own)
    _part_gradients(
        key_grad_NHQ.data_ptr(), value_grad_NHV.data_ptr(), both.data_ptr(), rope_grad_NP.data_ptr(), rows, heads, own,
        width - own, values, key_grad_NHQ.stride(0), key_grad_NHQ.stride(1), value_grad_NHV.stride(0),
        value_grad_NHV.stride(1),
    )  # fmt: skip
    return both, rope_grad_NP


# --- experts' outputs --------------------------------------------------------------------------------------------


@kernel
def _mix_rows(rows, places, weights, out, count, per_token, width):
    """Without weights, whose address is then 0, as if all were 1."""
    is_weighted = weights != 0
    rows, places, weights, out = floats(rows), integers(places), floats(weights), floats(out)
    for token in range(count):
        for k in range(per_token):
            source = places[token * per_token + k] * width
            weight = weights[token * per_token + k] if is_weighted else ONE
            if k == 0:
                for c in range(width):
                    out[token * width + c] = weight * rows[source + c]
            else:
                for c in range(width):
                    out[token * width + c] += weight * rows[source + c]


@kernel
def _mix_rows_backward(grad, rows, places, weights, rows_grad, weights_grad, count, per_token, width):
    grad, rows, places, weights = floats(grad), floats(rows), integers(places), floats(weights)
    rows_grad, weights_grad = floats(rows_grad), floats(weights_grad)
    for token in range(count):
        for k in range(per_token):
            source, weight = places[token * per_token + k] * width, weights[token * per_token + k]
            product = ZERO
            for c in range(width):
                g = grad[token * width + c]
                product += g * rows[source + c]
                rows_grad[source + c] = g * weight
            weights_grad[token * per_token + k] = product


def mix_rows(rows_TC: Tensor, places_NK: Tensor, weights_NK: Tensor | None) -> Tensor:
    """Of each token its K rows, at the places given (int64), added up with its weights (None: all 1), [N, C].

    All contiguous, as in `policy.gpu_kernels.mix_rows`.
    """
    (count, per_token), width = places_NK.shape, rows_TC.shape[1]
    out_NC, weights = torch.empty(count, width), 0 if weights_NK is None else weights_NK.data_ptr()
    _mix_rows(rows_TC.data_ptr(), places_NK.data_ptr(), weights, out_NC.data_ptr(), count, per_token, width)
    return out_NC


def mix_rows_backward(grad_NC: Tensor, rows_TC: Tensor, places_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rows [T, C] and of the weights [N, K]; each of the T places belongs to one token."""
    (count, per_token), width = places_NK.shape, rows_TC.shape[1]
    rows_grad_TC, weights_grad_NK = torch.empty_like(rows_TC), torch.empty_like(weights_NK)
    _mix_rows_backward(
        grad_NC.data_ptr(), rows_TC.data_ptr(), places_NK.data_ptr(), weights_NK.data_ptr(), rows_grad_TC.data_ptr(),
        weights_grad_NK.data_ptr(), count, per_token, width,
    )  # fmt: skip
    return rows_grad_TC, weights_grad_NK


# --- attention within short rows ---------------------------------------------------------------------------------


@njit(error_model="numpy", inline="always")
def highest(peak, x, first, count):
    """The highest of `peak` and some numbers: eight at a time, since each comparison waits for the one before."""
    a = b = c = d = e = f = g = h = peak
    whole = first + count - count % 8
    for i in range(first, whole, 8):
        a = x[i] if x[i] > a else a
        b = x[i + 1] if x[i + 1] > b else b
        c = x[i + 2] if x[i + 2] > c else c
        d = x[i + 3] if x[i + 3] > d else d
        e = x[i + 4] if x[i + 4] > e else e
        f = x[i + 5] if x[i + 5] > f else f
        g = x[i + 6] if x[i + 6] > g else g
        h = x[i + 7] if x[i + 7] > h else h
    for i in range(whole, first + count):
        a = x[i] if x[i] > a else a
    return max(max(max(a, b), max(c, d)), max(max(e, f), max(g, h)))


@kernel
def _softmax_rows(own, before, layout, heads, rows, longest, scale):
    own, before, layout, scale = floats(own), floats(before), integers(layout), np.float32(scale)
    for head in range(heads):
        for row in range(rows):
            length, num_before = layout[4 * row], layout[4 * row + 3]
            for i in range(longest):
                x = ((head * rows + row) * longest + i) * longest
                y = layout[4 * row + 1] + head * layout[4 * row + 2] + i * num_before
                seen = i + 1 if i < length else 0
                if seen:
                    peak = highest(highest(own[x], own, x, seen), before, y, num_before)
                    total = ZERO
                    for j in range(seen):
                        weight = exp((own[x + j] - peak) * scale)
                        own[x + j] = weight
                        total += weight
                    for j in range(num_before):
                        weight = exp((before[y + j] - peak) * scale)
                        before[y + j] = weight
                        total += weight
                    share = ONE / total
                    for j in range(seen):
                        own[x + j] *= share
                    for j in range(num_before):
                        before[y + j] *= share
                for j in range(seen, longest):
                    own[x + j] = ZERO


@kernel
def _softmax_rows_backward(own, before, own_grad, before_grad, layout, heads, rows, longest, scale):
    """With weights w and their gradients g: w * (g - sum of w g) * scale, in the place of the latter."""
    own, before, layout, scale = floats(own), floats(before), integers(layout), np.float32(scale)
    own_grad, before_grad = floats(own_grad), floats(before_grad)
    for head in range(heads):
        for row in range(rows):
            length, num_before = layout[4 * row], layout[4 * row + 3]
            for i in range(longest):
                x = ((head * rows + row) * longest + i) * longest
                y = layout[4 * row + 1] + head * layout[4 * row + 2] + i * num_before
                seen = i + 1 if i < length else 0
                if seen:
                    total = ZERO
                    for j in range(seen):
                        total += own[x + j] * own_grad[x + j]
                    for j in range(num_before):
                        total += before[y + j] * before_grad[y + j]
                    for j in range(seen):
                        own_grad[x + j] = own[x + j] * (own_grad[x + j] - total) * scale
                    for j in range(num_before):
                        before_grad[y + j] = before[y + j] * (before_grad[y + j] - total) * scale
                for j in range(seen, longest):
                    own_grad[x + j] = ZERO


def softmax_rows(own_HBRR: Tensor, before: Tensor, layout_B4: Tensor, scale: float) -> None:
    """Scores to weights, in place: softmax(scale * scores) over what comes before a row and, up to itself, the row.

    See `policy.cpu_attention` for the layout. What a token must not see, and what pads rows, becomes 0.
    """
    heads, rows, longest, _ = own_HBRR.shape
    _softmax_rows(own_HBRR.data_ptr(), before.data_ptr(), layout_B4.data_ptr(), heads, rows, longest, scale)


def softmax_rows_backward(
    own_HBRR: Tensor, before: Tensor, own_grad_HBRR: Tensor, before_grad: Tensor, layout_B4: Tensor, scale: float
) -> None:
    """Gradients of weights to those of scores, in place."""
    heads, rows, longest, _ = own_HBRR.shape
    _softmax_rows_backward(
        own_HBRR.data_ptr(), before.data_ptr(), own_grad_HBRR.data_ptr(), before_grad.data_ptr(), layout_B4.data_ptr(),
        heads, rows, longest, scale,
    )  # fmt: skip


def _as_rows(x: Tensor) -> Tensor:
    """[..., C] as rows [N, C] whose numbers lie side by side; a copy only where they do not, or rows lie unevenly."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])
