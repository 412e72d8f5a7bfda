"""RMSNorm (Zhang and Sennrich, 2019) between a residual stream in fp32 and matrix products in half precision.

Rounding the stream to bf16 after every sublayer is the largest part of what sampler and trainer differ by in bf16
(docs/rollouts.md); kept in fp32 it costs its own bandwidth, and no product changes.

Shapes: N tokens, C model width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


class StreamNorm(nn.RMSNorm):
    """RMSNorm of the residual stream: what it gives has the dtype of its weight, whatever that of the stream is."""

    def forward(self, x_NC: Tensor) -> Tensor:
        """[N, C] to [N, C]."""
        if x_NC.dtype == self.weight.dtype:
            return super().forward(x_NC)
        assert self.eps is not None
        return normalise(x_NC, self.weight, self.eps)


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
