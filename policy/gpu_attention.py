"""Causal attention within packed rows on a GPU, in bf16 or fp16, without padding.

Two kernels. FlashAttention-2 takes rows of any lengths; it wants values as wide as keys, so that narrower ones, as MLA
has them, are filled up with zeros. cuDNN's takes a batch of rows of one length and values of any width, and is 1.4 to
1.8 times as fast on an H100, but plans anew for every number and length of rows, which takes as long as a whole pass:
it serves training, and there only rows of one length that are several.

Shapes: N packed tokens, L packed keys, B rows, H query heads, G key-value heads, Q query and key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from policy.packing import PackedRows


def takes_unpadded(query_NHQ: Tensor, value_NGV: Tensor) -> bool:
    """Whether `attend_on_gpu` takes this device, dtype and these widths; its kernels read eight numbers at a time."""
    widths = (query_NHQ.shape[-1], value_NGV.shape[-1])
    is_half = query_NHQ.dtype in (torch.bfloat16, torch.float16)
    return query_NHQ.is_cuda and is_half and widths[1] <= widths[0] <= 256 and not any(w % 8 for w in widths)


def attend_on_gpu(query_NHQ: Tensor, key_NGQ: Tensor, value_NGV: Tensor, rows: PackedRows, scale: float) -> Tensor:
    """Softmax attention [N, H, V] of each token over itself and those before it in its row."""
    if torch.is_grad_enabled() and rows.slot_N is None and len(rows.lengths) > 1:
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
    width, wide = value_LGV.shape[-1], query_NHQ.shape[-1]
    value_LGQ = F.pad(value_LGV, (0, wide - width)) if width < wide else value_LGV
    # What `torch.nn.attention.varlen.varlen_attn` calls, whose own arguments change from version to version.
    out_NHQ: Tensor = torch.ops.aten._flash_attention_forward(
        query_NHQ, key_LGQ, value_LGQ, bounds, key_bounds, longest, longest_keys, 0.0, True, False, scale=scale
    )[0]
    return out_NHQ[..., :width]
