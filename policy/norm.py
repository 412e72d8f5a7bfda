"""RMSNorm (Zhang and Sennrich, 2019): x / sqrt(mean(x^2) + eps) * weight over the last dimension.

Torch's own is one kernel on a GPU, but on a CPU a chain of passes, forward and backward. There, in fp32, it is a kernel
of `policy/cpu_kernels.py`, one pass each way.

A residual stream in fp32 between matrix products in half precision is normalised in fp32 and rounded once: rounding
the stream to bf16 after every sublayer is the largest part of what sampler and trainer differ by in bf16
(docs/rollouts.md); kept in fp32 it costs its own bandwidth, and no product changes.

Shapes: N tokens, C width of the last dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from policy.decode_layout import lies_by_feature


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` over one dimension; what it gives has the dtype of its weight, whatever that of its input is."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)
        self.epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        if x.dtype != self.weight.dtype:
            return normalise(x, self.weight, self.epsilon)
        if lies_by_feature(x):
            from policy import cpu_products

            return cpu_products.normalise(x, self.weight, self.epsilon)
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        if torch.is_grad_enabled():
            out: Tensor = _NormaliseOnCpu.apply(x, self.weight, self.epsilon)
            return out
        from policy import cpu_kernels

        return cpu_kernels.normalise(x, self.weight, self.epsilon)


class _NormaliseOnCpu(Function):
    """Keeps nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        from policy import cpu_kernels

        ctx.save_for_backward(x, weight_C)
        ctx.eps = eps
        return cpu_kernels.normalise(x, weight_C, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        from policy import cpu_kernels

        return *cpu_kernels.normalise_backward(*ctx.saved_tensors, grads[0], ctx.eps), None


def normalise(x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight in the dtype of x, rounded once to that of the weight."""
    if x_NC.is_cuda:
        out: Tensor = _Normalise.apply(x_NC, weight_C, eps)
        return out
    return F.rms_norm(x_NC, weight_C.shape, weight_C.to(x_NC.dtype), eps).to(weight_C.dtype)


class _Normalise(Function):
    """On a GPU in one pass over the stream each way, keeping nothing but its inputs."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        from policy import norm_kernels

        ctx.save_for_backward(x_NC, weight_C)
        ctx.eps = eps
        return norm_kernels.normalise(x_NC.contiguous(), weight_C, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        from policy import norm_kernels

        x_NC, weight_C = ctx.saved_tensors
        x_grad_NC, weight_grad_C = norm_kernels.normalise_backward(
            x_NC.contiguous(), weight_C, grads[0].contiguous(), ctx.eps
        )
        return x_grad_NC, weight_grad_C.to(weight_C.dtype), None
