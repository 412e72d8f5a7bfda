"""Causal attention within packed rows on a GPU, in bf16 or fp16, without padding.

Two kernels. FlashAttention-2 takes rows of any lengths; it wants values as wide as keys, so that narrower ones, as MLA
has them, are filled up with zeros. cuDNN's takes a batch of rows of one length and values of any width, and is 1.4 to
1.8 times as fast on an H100, but plans anew for every number and length of rows, which takes longer than a whole pass:
it serves training on several rows of one length, and only a round one, which is likely to come again.

Rows that share prefixes take two passes of the first: every prefix and every rest over itself, then the rests over
their prefix. Both give the logarithm of their softmax's denominator, by which the two are one softmax; and since a
kernel's backward pass makes its weights again from that number alone, the total one makes it give the share that its
keys have in the gradient (Ring Attention, arXiv 2310.01889, joins pieces so). Rests are queries one after another, in
as many runs as keep a GPU busy in the backward pass, which works on one stretch of keys at a time.

Shapes: N packed tokens, L packed keys, B rows, H query heads, G key-value heads, Q query and key width, V value width,
U tokens with shared prefixes counted once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from policy.fused import join_softmaxes
from policy.packing import PackedRows, SharedPrefixes

ROUND_LENGTH = 64
"""Rows as long as a multiple of this are taken to be of a batch of fixed shape."""


def takes_unpadded(query_NHQ: Tensor, value_NGV: Tensor) -> bool:
    """Whether `attend_on_gpu` takes this device, dtype and these widths; its kernels read eight numbers at a time."""
    widths = (query_NHQ.shape[-1], value_NGV.shape[-1])
    is_half = query_NHQ.dtype in (torch.bfloat16, torch.float16)
    return query_NHQ.is_cuda and is_half and widths[1] <= widths[0] <= 256 and not any(w % 8 for w in widths)


def attend_on_gpu(query_NHQ: Tensor, key_NGQ: Tensor, value_NGV: Tensor, rows: PackedRows, scale: float) -> Tensor:
    """Softmax attention [N, H, V] of each token over itself and those before it in its row; see `attend_in_rows`."""
    if rows.shared is not None:
        return attend_after_prefixes(query_NHQ, key_NGQ, value_NGV, rows.shared, scale, FLASH)
    if torch.is_grad_enabled() and rows.slot_N is None and len(rows.lengths) > 1 and rows.longest % ROUND_LENGTH == 0:
        query, key, value = (rows.pad(x).transpose(1, 2) for x in (query_NHQ, key_NGQ, value_NGV))
        is_grouped = query.shape[1] > key.shape[1]
        if can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, True, is_grouped)):
            # By name: an order of preference, once set, stays behind and changes what others' calls choose.
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                out = F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped
                )
            return rows.unpad(out.transpose(1, 2))
    return attend_unpadded(query_NHQ, key_NGQ, value_NGV, rows.bounds, rows.bounds, rows.longest, rows.longest, scale)


def attend_unpadded(
    query_NHQ: Tensor,
    key_LGQ: Tensor,
    value_LGV: Tensor,
    bounds: Tensor,
    key_bounds: Tensor,
    longest: int,
    longest_keys: int,
    scale: float,
) -> Tensor:
    """FlashAttention-2 over packed rows, [N, H, V]: a row's queries are the last of its tokens, its keys are all.

    `bounds` and `key_bounds` (int32 [B + 1]) say where rows start, `longest` and `longest_keys` how long they get.
    """
    width = value_LGV.shape[-1]
    # What `torch.nn.attention.varlen.varlen_attn` calls, whose own arguments change from version to version.
    out_NHQ: Tensor = torch.ops.aten._flash_attention_forward(
        query_NHQ, key_LGQ, _widen(value_LGV, query_NHQ), bounds, key_bounds, longest, longest_keys,
        0.0, True, False, scale=scale,
    )[0]  # fmt: skip
    return out_NHQ[..., :width]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairing:
    """Which queries look at which keys: those of piece i at those of piece i."""

    query_bounds: Tensor
    """Where each piece of the queries starts and, last, where the last one ends, int32."""
    key_bounds: Tensor
    """The same of the keys, int32."""
    most_queries: int
    """Of one piece."""
    most_keys: int
    """Of one piece."""
    is_causal: bool
    """Whether a query looks no further than its own place; pieces are then equally long."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """Attention over pairs of pieces, values as wide as keys."""

    attend: Callable[[Tensor, Tensor, Tensor, Pairing, float], tuple[Tensor, Tensor]]
    """From queries, keys, values and the scale: output, and log sum exp of the scaled scores, [H, queries] fp32."""
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Pairing, float], tuple[Tensor, Tensor, Tensor]]
    """From the output's gradient, queries, keys, values, output, log sum exp and the scale."""


def attend_after_prefixes(
    query_UHQ: Tensor, key_UGQ: Tensor, value_UGV: Tensor, shared: SharedPrefixes, scale: float, kernel: Kernel
) -> Tensor:
    """Softmax attention [U, H, V] of each token over itself and those before it in its row."""
    out: Tensor = _AfterPrefixes.apply(query_UHQ, key_UGQ, value_UGV, shared, scale, kernel)
    return out


class _AfterPrefixes(Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_UHQ: Tensor,
        key_UGQ: Tensor,
        value_UGV: Tensor,
        shared: SharedPrefixes,
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        own, across, token_K = _pairings(shared)
        value_UGQ, first = _widen(value_UGV, query_UHQ), shared.num_shared
        out_UHQ, log_total_HU = kernel.attend(query_UHQ, key_UGQ, value_UGQ, own, scale)
        key_KGQ, value_KGQ = (x.index_select(0, token_K) for x in (key_UGQ, value_UGQ))
        earlier = kernel.attend(query_UHQ[first:], key_KGQ, value_KGQ, across, scale)
        join_softmaxes(out_UHQ[first:], log_total_HU[:, first:], *earlier)
        out_UHV = out_UHQ[..., : value_UGV.shape[-1]].contiguous()
        ctx.save_for_backward(query_UHQ, key_UGQ, value_UGV, out_UHV, log_total_HU)
        ctx.shared, ctx.scale, ctx.kernel = shared, scale, kernel
        return out_UHV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_UHQ, key_UGQ, value_UGV, out_UHV, log_total_HU = ctx.saved_tensors
        own, across, token_K = _pairings(ctx.shared)
        first, width, kernel = ctx.shared.num_shared, value_UGV.shape[-1], ctx.kernel
        grad_UHQ, value_UGQ, out_UHQ = (_widen(x, query_UHQ).contiguous() for x in (grads[0], value_UGV, out_UHV))
        query_grad, key_grad, value_grad = kernel.gradients(
            grad_UHQ, query_UHQ, key_UGQ, value_UGQ, out_UHQ, log_total_HU, own, ctx.scale
        )
        key_KGQ, value_KGQ = (x.index_select(0, token_K) for x in (key_UGQ, value_UGQ))
        earlier = kernel.gradients(
            grad_UHQ[first:], query_UHQ[first:], key_KGQ, value_KGQ, out_UHQ[first:],
            log_total_HU[:, first:].contiguous(), across, ctx.scale,
        )  # fmt: skip
        query_grad[first:] += earlier[0]
        for grad, copies_grad in zip((key_grad, value_grad), earlier[1:], strict=True):
            wide = torch.promote_types(grad.dtype, torch.float32)
            total = torch.zeros_like(grad[:first], dtype=wide)
            grad[:first] += total.index_add_(0, token_K, copies_grad.to(wide))
        return query_grad, key_grad, value_grad[..., :width], None, None, None


def _pairings(shared: SharedPrefixes) -> tuple[Pairing, Pairing, Tensor]:
    """Each prefix and each rest with itself; each run of rests with its copy of their prefix; where these come from."""
    runs = shared.runs
    assert runs is not None, "rows of one prefix must follow one another"
    own = Pairing(
        query_bounds=shared.bounds,
        key_bounds=shared.bounds,
        most_queries=shared.longest,
        most_keys=shared.longest,
        is_causal=True,
    )
    across = Pairing(
        query_bounds=runs.bounds,
        key_bounds=runs.key_bounds,
        most_queries=runs.longest,
        most_keys=shared.prefix_rows.longest,
        is_causal=False,
    )
    return own, across, runs.token_K


def _flash(query: Tensor, key: Tensor, value: Tensor, pairs: Pairing, scale: float) -> tuple[Tensor, Tensor]:
    # For a single query the kernel would lay the log sum exp out in another way.
    most_queries = max(2, pairs.most_queries)
    out, log_total, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, pairs.query_bounds, pairs.key_bounds, most_queries, pairs.most_keys,
        0.0, pairs.is_causal, False, scale=scale,
    )  # fmt: skip
    return out, log_total


def _flash_gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_total: Tensor,
    pairs: Pairing,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    no_dropout = torch.empty(2, dtype=torch.uint64, device=query.device)
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
        grad, query, key, value, out, log_total, pairs.query_bounds, pairs.key_bounds,
        max(2, pairs.most_queries), pairs.most_keys, 0.0, pairs.is_causal, no_dropout, no_dropout, scale=scale,
    )  # fmt: skip
    return found


FLASH = Kernel(attend=_flash, gradients=_flash_gradients)
"""FlashAttention-2 on a GPU."""


def _widen(x: Tensor, like: Tensor) -> Tensor:
    """Zeros after the last dimension's end, up to that of `like`."""
    missing = like.shape[-1] - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x
