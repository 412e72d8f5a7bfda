"""Operations between matrix products that autograd would keep too much of, or a GPU would do in too many passes.

Each is one formula: on the CPU written out in torch, on a GPU a kernel of `policy/gpu_kernels.py` with the same result.

Shapes: N tokens or token-expert pairs, I inner width, H heads, P rotated width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def silu_gate(gate_NI: Tensor, up_NI: Tensor) -> Tensor:
    """silu(gate) * up, the activation of SwiGLU (Shazeer, 2020), keeping only the two for the backward pass."""
    if gate_NI.device.type == "cuda" and gate_NI.ndim == 2:
        out: Tensor = _SiluGate.apply(gate_NI, up_NI)
        return out
    return F.silu(gate_NI) * up_NI


def silu_gate_halves(gate_up_NI: Tensor) -> Tensor:
    """The same where gate and up are the halves of one tensor, [N, 2I] to [N, I]."""
    if gate_up_NI.device.type == "cuda" and gate_up_NI.ndim == 2:
        out: Tensor = _SiluGateHalves.apply(gate_up_NI)
        return out
    return silu_gate(*gate_up_NI.chunk(2, dim=-1))


def turn_pairs(x_NHP: Tensor, cos: Tensor, sin: Tensor, *, is_interleaved: bool) -> Tensor:
    """Each pair of numbers turned by its token's angle ([N, P/2] cosines and sines, fp32), fp32 inside.

    Pairs are neighbours (x[2i], x[2i+1]) where interleaved, else (x[i], x[i + P/2]).
    """
    if x_NHP.device.type == "cuda":
        turned: Tensor = _Turn.apply(x_NHP, cos, sin, is_interleaved)
        return turned
    x, cos, sin = x_NHP.float(), cos[:, None], sin[:, None]
    if is_interleaved:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x_NHP.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_NHP.dtype)


class _SiluGate(Function):
    @staticmethod
    def forward(ctx: Any, gate_NI: Tensor, up_NI: Tensor) -> Tensor:
        from policy import gpu_kernels

        ctx.save_for_backward(gate_NI, up_NI)
        return gpu_kernels.silu_gate_forward(_packed_rows(gate_NI), _packed_rows(up_NI))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        from policy import gpu_kernels

        gate_NI, up_NI = ctx.saved_tensors
        both = gpu_kernels.silu_gate_backward(_packed_rows(gate_NI), _packed_rows(up_NI), _packed_rows(grads[0]))
        gate_grad, up_grad = both.chunk(2, dim=-1)
        return gate_grad, up_grad


class _SiluGateHalves(Function):
    @staticmethod
    def forward(ctx: Any, gate_up_NI: Tensor) -> Tensor:
        from policy import gpu_kernels

        ctx.save_for_backward(gate_up_NI)
        return gpu_kernels.silu_gate_forward(*_packed_rows(gate_up_NI).chunk(2, dim=-1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        from policy import gpu_kernels

        [gate_up_NI] = ctx.saved_tensors
        return gpu_kernels.silu_gate_backward(*_packed_rows(gate_up_NI).chunk(2, dim=-1), _packed_rows(grads[0]))


class _Turn(Function):
    @staticmethod
    def forward(ctx: Any, x_NHP: Tensor, cos: Tensor, sin: Tensor, is_interleaved: bool) -> Tensor:
        from policy import gpu_kernels

        ctx.save_for_backward(cos, sin)
        ctx.is_interleaved = is_interleaved
        return gpu_kernels.turn(_packed_rows(x_NHP), cos, sin, is_interleaved=is_interleaved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        from policy import gpu_kernels

        cos, sin = ctx.saved_tensors
        # A rotation's transpose is the rotation by the opposite angle; a growth in cos and sin stays a factor.
        back = gpu_kernels.turn(_packed_rows(grads[0]), cos, sin, is_interleaved=ctx.is_interleaved, is_inverse=True)
        return back, None, None, None


def _packed_rows(x: Tensor) -> Tensor:
    """As it is where the numbers of a row lie side by side, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
