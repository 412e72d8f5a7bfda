"""Operations between matrix products that autograd would keep too much of, or a GPU would do in too many passes.

Each is one formula, written out in torch, and a kernel with the same result: of `policy/gpu_kernels.py` on a GPU, of
`policy/cpu_kernels.py` on a CPU in fp32.

Shapes: N tokens or token-expert pairs, I inner width, H heads, P rotated width, D width before it, Q = D + P, V value
width.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from policy.decode_layout import lies_by_feature


def silu_gate(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """silu(gate) * up, the activation of SwiGLU (Shazeer, 2020), keeping only the two for the backward pass."""
    if lies_by_feature(gate_NI) and lies_by_feature(up_NI):
        from policy import cpu_products

        return cpu_products.silu_gate(gate_NI, up_NI)
    kernels = kernels_for(gate_NI, up_NI)
    if kernels is None or gate_NI.ndim != 2:
        return F.silu(gate_NI) * up_NI
    out: Tensor
    if torch.is_grad_enabled():
        out = _SiluGate.apply(gate_NI, up_NI)
    else:
        out = kernels.silu_gate_forward(_packed_rows(gate_NI), _packed_rows(up_NI))
    return out


def silu_gate_halves(gate_up_NI: Tensor) -> Tensor:
    """The same where gate and up are the halves of one tensor, [N, 2I] to [N, I]."""
    if torch.is_grad_enabled() and gate_up_NI.ndim == 2 and kernels_for(gate_up_NI) is not None:
        out: Tensor = _SiluGateHalves.apply(gate_up_NI)
        return out
    return silu_gate(*gate_up_NI.chunk(2, dim=-1))


def turn_pairs(x_NHQ: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
    """Each pair of a head's last P numbers turned by its token's angle ([N, P/2] cosines and sines, fp32), fp32 inside.

    Pairs are neighbours (x[2i], x[2i+1]) where interleaved, else (x[i], x[i + P/2]). Numbers before them are kept.
    """
    if not torch.is_grad_enabled():
        return _turn(x_NHQ, cos, sin, is_interleaved)
    turned: Tensor = _Turn.apply(x_NHQ, cos, sin, is_interleaved)
    return turned


def split_keys_values(keys_values: Tensor, k_rope_NP: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """MLA's keys [N, H, D + P] and values [N, H, V], from own keys beside values [N, H, D + V] and the shared part."""
    if kernels_for(keys_values, k_rope_NP) is not None:
        key_NHQ, value_NHV = _SplitKeysValues.apply(keys_values, k_rope_NP, own)
        return key_NHQ, value_NHV
    k_nope_NHD, value_NHV = keys_values.split([own, keys_values.shape[-1] - own], dim=-1)
    return torch.cat((k_nope_NHD, k_rope_NP[:, None].expand(-1, keys_values.shape[1], -1)), dim=-1), value_NHV


def join_softmaxes(out_NHV: Tensor, log_total_HN: Tensor, more_NHV: Tensor, more_log_total_HN: Tensor) -> None:
    """Two attentions of the same queries over different keys made one over all of them, in place in the first.

    Each is its output and the log sum exp of its scores, fp32; numbers of a token lie side by side.
    """
    if out_NHV.device.type == "cuda":
        from policy import gpu_kernels

        gpu_kernels.join_softmaxes(out_NHV, log_total_HN, more_NHV, more_log_total_HN)
        return
    joined_HN = torch.logaddexp(log_total_HN, more_log_total_HN)
    weight_NH1, more_weight_NH1 = ((x - joined_HN).exp().t()[..., None] for x in (log_total_HN, more_log_total_HN))
    out_NHV.copy_(out_NHV * weight_NH1 + more_NHV * more_weight_NH1)
    log_total_HN.copy_(joined_HN)


def kernels_for(*inputs: Tensor) -> ModuleType | None:
    """The kernels that take these tensors, imported where first used; None where torch has to do."""
    if all(x.device.type == "cuda" for x in inputs):
        from policy import gpu_kernels

        return gpu_kernels
    if all(x.device.type == "cpu" and x.dtype == torch.float32 for x in inputs):
        from policy import cpu_kernels

        return cpu_kernels
    return None


class _SiluGate(Function):
    @staticmethod
    def forward(ctx: Any, gate_NI: Tensor, up_NI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NI, up_NI)
        ctx.kernels = kernels_for(gate_NI, up_NI)
        return ctx.kernels.silu_gate_forward(_packed_rows(gate_NI), _packed_rows(up_NI))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate_NI, up_NI = ctx.saved_tensors
        both = ctx.kernels.silu_gate_backward(_packed_rows(gate_NI), _packed_rows(up_NI), _packed_rows(grads[0]))
        gate_grad, up_grad = both.chunk(2, dim=-1)
        return gate_grad, up_grad


class _SiluGateHalves(Function):
    @staticmethod
    def forward(ctx: Any, gate_up_NI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up_NI)
        ctx.kernels = kernels_for(gate_up_NI)
        return ctx.kernels.silu_gate_forward(*_packed_rows(gate_up_NI).chunk(2, dim=-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        [gate_up_NI] = ctx.saved_tensors
        return ctx.kernels.silu_gate_backward(*_packed_rows(gate_up_NI).chunk(2, dim=-1), _packed_rows(grads[0]))


class _SplitKeysValues(Function):
    @staticmethod
    def forward(ctx: Any, keys_values: Tensor, k_rope_NP: Tensor, own: int) -> tuple[Tensor, Tensor]:
        ctx.own, ctx.kernels = own, kernels_for(keys_values, k_rope_NP)
        k_nope_NHD = _packed_rows(keys_values)[..., :own]
        return ctx.kernels.join_keys(k_nope_NHD, _packed_rows(k_rope_NP)), keys_values[..., own:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return *ctx.kernels.part_gradients(*(_packed_rows(grad) for grad in grads), ctx.own), None


class _Turn(Function):
    @staticmethod
    def forward(ctx: Any, x_NHQ: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.is_interleaved = is_interleaved
        return _turn(x_NHQ, cos, sin, is_interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        # A rotation's transpose is the rotation by the opposite angle; a growth in cos and sin stays a factor.
        return _turn(grads[0], cos, sin, ctx.is_interleaved, is_inverse=True), None, None, None


def _turn(x_NHQ: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool, *, is_inverse: bool = False) -> Tensor:
    kernels = kernels_for(x_NHQ, cos, sin)
    if kernels is not None:
        return kernels.turn(  # type: ignore[no-any-return]
            _packed_rows(x_NHQ), cos, sin, is_interleaved=is_interleaved, is_inverse=is_inverse
        )
    kept, x_NHP = x_NHQ.split([x_NHQ.shape[-1] - 2 * cos.shape[-1], 2 * cos.shape[-1]], dim=-1)
    # A pair as a complex number turns by one product, a quarter of the passes of four products and two sums.
    angle = torch.complex(cos, -sin if is_inverse else sin)[:, None]
    x_NHP = x_NHP.float()
    if is_interleaved:
        pairs = torch.view_as_complex(x_NHP.contiguous().unflatten(-1, (-1, 2)))
        parts = [torch.view_as_real(pairs * angle).flatten(-2)]
    else:
        turned = torch.complex(*x_NHP.chunk(2, dim=-1)).mul_(angle)
        parts = [turned.real, turned.imag]
    return torch.cat((kept, *(part.to(x_NHQ.dtype) for part in parts)), dim=-1)


def _packed_rows(x: Tensor) -> Tensor:
    """As it is where the numbers of a row lie side by side, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
