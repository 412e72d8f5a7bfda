"""The head: logits in fp32, and log-probabilities and entropies without ever holding the logits of all tokens.

The vocabulary is cut into slices. Forward, each slice's logits are folded into four running numbers a token (an online
softmax); backward, they are made again, slice by slice. A slice's share of the head's gradient is then complete as soon
as it is made, and that of the hidden states accumulates in one fp32 buffer.

For logits x = W h / T, with p = softmax(x), L = log sum exp(x) and entropy E = L - sum p x:
    log p(t) = x_t - L          d/dx_v = [v = t] - p_v
    E                           d/dx_v = -p_v (log p_v + E)

Shapes: N tokens, C model width, V vocabulary, S width of a slice of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from policy.decode_layout import has_bf16_products, lies_by_feature
from policy.linear import takes_on_cpu

MAX_ELEMENTS = 1 << 26
"""Logits held at once, in numbers (256 MiB in fp32)."""
MIN_SLICE = 256
"""Narrowest slice of the vocabulary; narrower ones would leave a GPU idle."""

WIDENED_ROWS = 2048
"""Rows of a half-precision head that are widened to fp32 at once, where no gradient is wanted."""

STEP_ROWS = 512
"""Rows of a decoding step on a CPU; for more, products on all of torch's threads are as fast."""


def project(hidden_NC: Tensor, weight_VC: Tensor) -> Tensor:
    """Logits [N, V] in fp32 (fp64 of fp64) whatever the dtype of hidden states and head.

    Rounding logits to bf16 alone moves log-probabilities by percents (MiniMax-M1, section 3.2), and sampler and trainer
    round differently. Products of two bf16 numbers are exact in fp32, so that a GPU's matrix units, which add in fp32,
    need no copies of the operands.
    """
    if _uses_matrix_units(hidden_NC, weight_VC):
        return torch.mm(hidden_NC, weight_VC.t(), out_dtype=torch.float32)
    wide = torch.promote_types(hidden_NC.dtype, torch.float32)
    if lies_by_feature(hidden_NC) and weight_VC.dtype == torch.float32:
        from policy import cpu_products

        return cpu_products.multiply(hidden_NC, weight_VC)
    if takes_on_cpu(hidden_NC, weight_VC):
        from policy import cpu_training_products

        return cpu_training_products.linear(hidden_NC, weight_VC)
    if weight_VC.dtype == wide or torch.is_grad_enabled() or len(weight_VC) <= WIDENED_ROWS:
        return F.linear(hidden_NC.to(wide), weight_VC.to(wide))
    if _takes_bf16_kernel(hidden_NC, weight_VC):
        from policy import cpu_bf16_products

        return cpu_bf16_products.multiply(hidden_NC, weight_VC)
    # Slice by slice the wide copy of a large head stays in the processor's cache, off main memory.
    hidden_NC, logits_NV = hidden_NC.to(wide), hidden_NC.new_empty(len(hidden_NC), len(weight_VC), dtype=wide)
    buffer_SC = weight_VC.new_empty(WIDENED_ROWS, weight_VC.shape[1], dtype=wide)
    for slice_NS, weight_SC in zip(logits_NV.split(WIDENED_ROWS, 1), weight_VC.split(WIDENED_ROWS), strict=True):
        torch.mm(hidden_NC, buffer_SC[: len(weight_SC)].copy_(weight_SC).t(), out=slice_NS)
    return logits_NV


def score_tokens(
    hidden_NC: Tensor,
    weight_VC: Tensor,
    token_ids_N: Tensor,
    temperature: float = 1.0,
    *,
    slice_width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token under softmax(W h / temperature), and that distribution's entropy: [N], [N], nats.

    Both differentiable, in fp32 (fp64 of fp64). `slice_width` is how much of the vocabulary is looked at at once; None
    leaves it to `MAX_ELEMENTS`.
    """
    if slice_width is None and hidden_NC.device.type == "cpu" and len(hidden_NC) * len(weight_VC) <= MAX_ELEMENTS:
        # Small enough to keep, which saves the second product.
        log_all_NV = (project(hidden_NC, weight_VC) / temperature).log_softmax(dim=-1)
        entropy_N = -(log_all_NV.exp() * log_all_NV).sum(dim=-1)
        return log_all_NV.gather(1, token_ids_N[:, None]).squeeze(1), entropy_N
    if slice_width is None:
        fitting = max(MIN_SLICE, MAX_ELEMENTS // max(1, len(hidden_NC)))
        slice_width = 1 << (fitting.bit_length() - 1)  # products of round widths are faster
    logprobs_N, entropy_N = _TokenScores.apply(hidden_NC, weight_VC, token_ids_N, 1 / temperature, slice_width)
    return logprobs_N, entropy_N


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """What is known of each token's softmax after some slices of the vocabulary, each [N]."""

    peak: Tensor
    """Highest logit x so far."""
    total: Tensor
    """Sum of exp(x - peak)."""
    moment: Tensor
    """Sum of exp(x - peak) (x - peak)."""
    picked: Tensor
    """Logit of the token itself, once its slice has come."""

    @classmethod
    def start(cls, count: int, like: Tensor) -> Running:
        """Before the first slice."""
        zero = like.new_zeros(count)
        # Finite, so that the first step's 0 * (peak - new peak) is 0 and not NaN.
        return cls(peak=zero - 1e30, total=zero, moment=zero.clone(), picked=zero.clone())

    @property
    def log_total_N(self) -> Tensor:
        """L."""
        return self.peak + self.total.log()

    @property
    def entropy_N(self) -> Tensor:
        """L - sum p x, from differences to the peak, so that large logits cost no digits."""
        return self.total.log() - self.moment / self.total


def fold(running: Running, logits_NS: Tensor, first: int, token_ids_N: Tensor, inverse_temperature: float) -> Running:
    """`running` with one more slice of logits, that of tokens first, first + 1, ..."""
    if logits_NS.device.type == "cuda":
        from policy import gpu_kernels

        state = (running.peak, running.total, running.moment, running.picked)
        gpu_kernels.fold_logits(logits_NS, first, token_ids_N, inverse_temperature, state)
        return running
    x_NS = logits_NS * inverse_temperature
    peak = torch.maximum(running.peak, x_NS.amax(dim=-1))
    old, below_NS = (running.peak - peak).exp(), x_NS - peak[:, None]
    weight_NS = below_NS.exp()
    place_N = token_ids_N - first
    is_here = (place_N >= 0) & (place_N < x_NS.shape[1])
    here_N = x_NS.gather(1, place_N.clamp(0, x_NS.shape[1] - 1)[:, None]).squeeze(1)
    return Running(
        peak=peak,
        total=old * running.total + weight_NS.sum(dim=-1),
        moment=old * (running.moment + running.total * (running.peak - peak)) + (weight_NS * below_NS).sum(dim=-1),
        picked=torch.where(is_here, here_N, running.picked),
    )


def gradient_of_logits(
    logits_NS: Tensor,
    first: int,
    token_ids_N: Tensor,
    inverse_temperature: float,
    log_total_N: Tensor,
    entropy_N: Tensor,
    logprob_grad_N: Tensor,
    entropy_grad_N: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient [N, S] of a slice's logits before the temperature, in `dtype`."""
    if logits_NS.device.type == "cuda":
        from policy import gpu_kernels

        return gpu_kernels.logit_gradient(
            logits_NS, first, token_ids_N, inverse_temperature,
            log_total_N, entropy_N, logprob_grad_N, entropy_grad_N, dtype,
        )  # fmt: skip
    log_p_NS = logits_NS * inverse_temperature - log_total_N[:, None]
    is_token_NS = torch.arange(logits_NS.shape[1], device=logits_NS.device) == (token_ids_N - first)[:, None]
    towards_NS = logprob_grad_N[:, None] + entropy_grad_N[:, None] * (log_p_NS + entropy_N[:, None])
    gradient_NS = torch.where(is_token_NS, logprob_grad_N[:, None], 0.0) - log_p_NS.exp() * towards_NS
    return (gradient_NS * inverse_temperature).to(dtype)


class _TokenScores(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NC: Tensor, weight_VC: Tensor, token_ids_N: Tensor, inverse_temperature: float, width: int
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden_NC.dtype, torch.float32)
        running = Running.start(len(hidden_NC), torch.empty(0, dtype=wide, device=hidden_NC.device))
        for first in range(0, len(weight_VC), width):
            logits_NS = project(hidden_NC, weight_VC[first : first + width])
            running = fold(running, logits_NS, first, token_ids_N, inverse_temperature)
            del logits_NS  # before the next slice is made
        log_total_N, entropy_N = running.log_total_N, running.entropy_N
        ctx.save_for_backward(hidden_NC, weight_VC, token_ids_N, log_total_N, entropy_N)
        ctx.inverse_temperature, ctx.width = inverse_temperature, width
        return running.picked - log_total_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_NC, weight_VC, token_ids_N, log_total_N, entropy_N = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad_NC = hidden_NC.new_zeros(hidden_NC.shape, dtype=log_total_N.dtype) if needs_hidden else None
        weight_grad_VC = torch.empty_like(weight_VC) if needs_weight else None
        for first in range(0, len(weight_VC), ctx.width):
            piece = slice(first, first + ctx.width)
            gradient_NS = gradient_of_logits(
                project(hidden_NC, weight_VC[piece]), first, token_ids_N, ctx.inverse_temperature,
                log_total_N, entropy_N, grads[0].contiguous(), grads[1].contiguous(), hidden_NC.dtype,
            )  # fmt: skip
            if hidden_grad_NC is not None:
                _add_product(hidden_grad_NC, gradient_NS, weight_VC[piece])
            if weight_grad_VC is not None:
                torch.mm(gradient_NS.t(), hidden_NC, out=weight_grad_VC[piece])
            del gradient_NS
        return None if hidden_grad_NC is None else hidden_grad_NC.to(hidden_NC.dtype), weight_grad_VC, None, None, None


def _add_product(total_NC: Tensor, a_NS: Tensor, b_SC: Tensor) -> None:
    """total += a b, in the total's dtype."""
    if _uses_matrix_units(a_NS, b_SC):
        torch.addmm(total_NC, a_NS, b_SC, out_dtype=total_NC.dtype, out=total_NC)
    else:
        total_NC.addmm_(a_NS.to(total_NC.dtype), b_SC.to(total_NC.dtype))


def _takes_bf16_kernel(hidden_NC: Tensor, weight_VC: Tensor) -> bool:
    """Whether the CPU's own product in bf16 does: its sums are fp32, and the head is read as it lies, on one thread."""
    is_whole = hidden_NC.dtype == weight_VC.dtype == torch.bfloat16 and weight_VC.is_contiguous()
    is_step = hidden_NC.is_cpu and len(hidden_NC) <= STEP_ROWS and hidden_NC.shape[1] % 2 == 0
    return is_whole and is_step and has_bf16_products()


def _uses_matrix_units(a: Tensor, b: Tensor) -> bool:
    """Whether both are half-precision on a GPU, where a product can be had in fp32 (which autograd does not know)."""
    is_half = a.dtype == b.dtype and a.dtype in (torch.bfloat16, torch.float16)
    return (
        is_half and a.device.type == "cuda" and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
    )
