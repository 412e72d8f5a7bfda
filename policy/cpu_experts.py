"""Mixtures of experts for a decoding step on the CPU in fp32: who goes where, and each expert's rows through it.

Numbers lie feature by feature; see `policy/cpu_products.py`, whose products these kernels are made of.

Shapes: N rows, C model width, E experts, K experts per token, I inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numba import njit
from torch import Tensor

from policy.cpu_compiler import ONE, ZERO, exp, floats, integers, kernel, operation, small_integers
from policy.cpu_operations import ROOM, ROWS, SLOTS, Operation, X, arguments_of
from policy.cpu_products import feed_forward_rows, gated, normalise_rows, product

if TYPE_CHECKING:
    from policy.config import PolicyConfig


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
        chosen_NK.data_ptr(), weights_NK.data_ptr(), rows, experts, per_token, *_rules(bias_E, config),
    )  # fmt: skip
    return scores_EN.t(), chosen_NK, weights_NK


def _rules(bias_E: Tensor | None, config: PolicyConfig) -> tuple[bool, bool, int, int, int, bool, float]:
    """The last arguments of `_route`."""
    return (
        config.scoring_func == "sigmoid", bias_E is not None, 1 if config.topk_method == "greedy" else config.n_group,
        config.topk_group, 2 if config.topk_method == "noaux_tc" else 1, config.norm_topk_prob,
        float(config.routed_scaling_factor),
    )  # fmt: skip


@njit(error_model="numpy")
def _record(chosen, slots, record, record_bytes, rows, per_token):
    """Each row's experts beside its cache entry, as whole numbers of one or two bytes."""
    chosen, record = integers(chosen), small_integers(record)
    for n in range(rows):
        for k in range(per_token):
            expert, place = chosen[n * per_token + k], (slots[n] * per_token + k) * record_bytes
            record[place] = expert & 255
            if record_bytes == 2:
                record[place + 1] = expert >> 8


@kernel
def _mix_experts(
    x, stride, chosen, weights, gate_up, down, room, out, rows, most, experts, per_token, width, inner_width,
):  # fmt: skip
    x, chosen, weights, out = floats(x), integers(chosen), floats(weights), floats(out)
    ends = np.zeros(experts + 1, dtype=np.int64)
    for pair in range(rows * per_token):
        ends[chosen[pair] + 1] += 1
    for e in range(experts):
        ends[e + 1] += ends[e]
    places, row_of = ends.copy(), np.empty(rows * per_token, dtype=np.int64)
    shares = np.empty(rows * per_token, dtype=np.float32)
    for n in range(rows):
        for k in range(per_token):
            pair = n * per_token + k
            place = places[chosen[pair]]
            row_of[place], shares[place] = n, weights[pair]
            places[chosen[pair]] += 1
    gathered, hidden = room, room + 4 * width * most
    inner, result = hidden + 8 * inner_width * most, hidden + 12 * inner_width * most
    gathered_numbers, hidden_numbers = floats(gathered), floats(hidden)
    inner_numbers, result_numbers = floats(inner), floats(result)
    for e in range(experts):
        begin = ends[e]
        count = ends[e + 1] - begin
        if count == 0:
            continue
        filled = (count + 7) // 8 * 8  # whole vectors: those of few rows are slow where they overlap
        for c in range(width):
            for i in range(count):
                gathered_numbers[c * filled + i] = x[c * stride + row_of[begin + i]]
            for i in range(count, filled):
                gathered_numbers[c * filled + i] = ZERO
        matrix = gate_up + 8 * e * inner_width * width
        product(gathered, filled, matrix, width, 1, hidden, filled, filled, 2 * inner_width, width)
        for i in range(inner_width * filled):
            inner_numbers[i] = gated(hidden_numbers[i], hidden_numbers[inner_width * filled + i])
        matrix = down + 4 * e * inner_width * width
        product(inner, filled, matrix, inner_width, 1, result, filled, filled, width, inner_width)
        for c in range(width):
            for i in range(count):
                out[c * rows + row_of[begin + i]] += shares[begin + i] * result_numbers[c * filled + i]


def mix_experts(x_NC: Tensor, chosen_NK: Tensor, weights_NK: Tensor, gate_up_EIC: Tensor, down_ECI: Tensor) -> Tensor:
    """Weighted sum of each row's experts, [N, C], added up in the order of the experts."""
    (rows, width), (experts, _, inner), per_token = x_NC.shape, down_ECI.shape, chosen_NK.shape[1]
    most = -(-rows // 8) * 8
    room = torch.empty(2 * width + 3 * inner, most)
    out_CN = torch.zeros(width, rows)
    _mix_experts(
        x_NC.data_ptr(), x_NC.stride(1), chosen_NK.data_ptr(), weights_NK.data_ptr(), gate_up_EIC.data_ptr(),
        down_ECI.data_ptr(), room.data_ptr(), out_CN.data_ptr(), rows, most, experts, per_token, width, inner,
    )  # fmt: skip
    return out_CN.t()


def _mixture(arguments, state):
    a, s = integers(arguments), integers(state)
    norm, eps, router, bias, gate_up, down = a[0], floats(arguments + 8)[0], a[2], a[3], a[4], a[5]
    shared_gate, shared_up, shared_down, chosen, record, record_bytes = a[6], a[7], a[8], a[9], a[10], a[11]
    width, experts, per_token, inner_width, shared_width = a[12], a[13], a[14], a[15], a[16]
    is_sigmoid, is_biased, groups, kept, num_best, is_normalised = (
        a[17] != 0,
        a[18] != 0,
        a[19],
        a[20],
        a[21],
        a[22] != 0,
    )
    factor, rows, x, room = floats(arguments + 184)[0], s[ROWS], s[X], s[ROOM]
    logits = room + 4 * width * rows
    scores = logits + 4 * experts * rows
    weights = scores + 4 * experts * rows
    rest = weights + 4 * per_token * rows
    normalise_rows(x, rows, norm, room, rows, width, eps)
    product(room, rows, router, width, 1, logits, rows, rows, experts, width)
    _route(
        logits, rows, bias, scores, chosen, weights, rows, experts, per_token,
        is_sigmoid, is_biased, groups, kept, num_best, is_normalised, factor,
    )  # fmt: skip
    if record_bytes > 0:
        _record(chosen, integers(s[SLOTS]), record, record_bytes, rows, per_token)
    most = (rows + 7) // 8 * 8
    _mix_experts(
        room, rows, chosen, weights, gate_up, down, rest, x, rows, most, experts, per_token, width, inner_width
    )
    if shared_width > 0:
        feed_forward_rows(room, rows, shared_gate, shared_up, shared_down, rest, x, rows, width, shared_width)


def mixture(
    norm_C: Tensor, eps: float, router_EC: Tensor, bias_E: Tensor | None, gate_up_EIC: Tensor, down_ECI: Tensor,
    shared: Sequence[Tensor] | None, config: PolicyConfig, chosen_NK: Tensor, record: Tensor | None = None,
) -> Operation:  # fmt: skip
    """X + a mixture of experts of RMSNorm(X); `shared` is the gate, up and down of the shared experts. The experts
    chosen go to `chosen_NK` (int64, room for as many rows as there may be), and where a record [blocks, block_size, K]
    beside the cache is given, there too."""
    (experts, width, inner), per_token = down_ECI.shape, config.num_experts_per_tok
    shared_width = 0 if shared is None else shared[0].shape[0]
    given = tuple(each for each in (bias_E, record, *(shared or ())) if each is not None)
    return Operation(
        kernel=operation(_mixture),
        arguments=arguments_of(
            norm_C.data_ptr(), float(eps), router_EC.data_ptr(), 0 if bias_E is None else bias_E.data_ptr(),
            gate_up_EIC.data_ptr(), down_ECI.data_ptr(),
            *((0, 0, 0) if shared is None else (matrix.data_ptr() for matrix in shared)), chosen_NK.data_ptr(),
            *((0, 0) if record is None else (record.data_ptr(), record.element_size())),
            width, experts, per_token, inner, shared_width, *_rules(bias_E, config),
        ),
        room_of_row=width + 2 * experts + per_token + max(2 * width + 3 * inner, width + 2 * shared_width),
        weights=(norm_C, router_EC, gate_up_EIC, down_ECI, chosen_NK, *given),
    )  # fmt: skip
