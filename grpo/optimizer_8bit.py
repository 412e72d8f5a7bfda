"""AdamW with its two moments in 8 bits (Dettmers et al., 2022, "8-bit Optimizers via Block-wise Quantization").

A block of 256 numbers is divided by its largest magnitude, and each is replaced by the nearest of 256 values, fine near
0 (the paper's dynamic tree: a decimal exponent, then a linear fraction). Moments take 2.03 bytes a weight instead of 8.
Weights stay what they are, fp32.

Our own, in plain torch: torchao's steps through `torch.compile`, weight by weight; bitsandbytes' has no step for a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 256
"""Numbers that share a scale."""
BYTES_PER_MOMENT = 1 + 4 / BLOCK
"""A code, and a share of the block's scale in fp32."""
MIN_NUMBERS = 4096
"""Smaller tensors (norms, biases) keep their moments in fp32, as in the paper's experiments; they weigh nothing."""
CHUNK = 1 << 24
"""Numbers stepped at once."""
WORK_BYTES = 14 * 4 * CHUNK
"""Of what is made in between: moments, their quotients by the scales, codes as they are found."""


def dynamic_values(*, is_signed: bool) -> Tensor:
    """The 256 values of a code, ascending, fp32: 0, 1, and for each decade 10^-6 to 1 the middles of equal parts of
    [0.1, 1], twice as many as in the decade below; half of the codes for negative numbers, or none.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        parts = 2**decade if is_signed else 2 ** (decade + 1)
        middles = [10.0 ** (decade - 6) * (0.1 + 0.9 * (part + 0.5) / parts) for part in range(parts)]
        values += middles + ([-value for value in middles] if is_signed else [])
    return torch.tensor(sorted(values), dtype=torch.float32)


def encode(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [n] uint8 and scales [n / 256 rounded up] fp32 of numbers [n]; `values` are those of a code.

    Where no value is negative, only 0 becomes 0: as a second moment that rounding made 0 would let a weight leap.
    """
    blocks = _in_blocks(x)
    scale = blocks.abs().amax(dim=1)
    relative = blocks / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(relative, (values[1:] + values[:-1]) / 2, out_int32=True)
    if values[0] == 0:
        codes = torch.where(blocks > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8).flatten()[: x.numel()], scale


def decode(codes: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    """The numbers [n], fp32, that `encode` gave codes and scales of."""
    blocks = _in_blocks(values.index_select(0, codes.int()))
    return (blocks * scale[:, None]).flatten()[: codes.numel()]


def _in_blocks(x: Tensor) -> Tensor:
    lacking = -x.numel() % BLOCK
    return (torch.nn.functional.pad(x, (0, lacking)) if lacking else x).view(-1, BLOCK)


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay; state is the step, codes and scales of both moments (fp32 moments of small tensors)."""

    def __init__(
        self,
        params: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        assert chunk % BLOCK == 0
        self._chunk = chunk
        self._values: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step for every parameter that has a gradient; `closure` must be None."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_one(weight, weight.grad, group)

    def _step_one(self, weight: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            self._begin(state, weight)
        state["step"] += 1
        step = int(state["step"])
        if "exp_avg_scale" not in state:
            _step_numbers(weight, grad, state["exp_avg"], state["exp_avg_sq"], step, group)
            return
        signed, unsigned = self._values_on(weight.device)
        for place, blocks in _chunks(weight.numel(), self._chunk):
            mean = decode(state["exp_avg"][place], state["exp_avg_scale"][blocks], signed)
            square = decode(state["exp_avg_sq"][place], state["exp_avg_sq_scale"][blocks], unsigned)
            _step_numbers(weight.view(-1)[place], grad.reshape(-1)[place], mean, square, step, group)
            state["exp_avg"][place], state["exp_avg_scale"][blocks] = encode(mean, signed)
            state["exp_avg_sq"][place], state["exp_avg_sq_scale"][blocks] = encode(square, unsigned)

    def _begin(self, state: dict[str, Tensor], weight: Tensor) -> None:
        state["step"] = torch.zeros((), dtype=torch.float32)
        if weight.numel() < MIN_NUMBERS:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
            return
        signed, _ = self._values_on(weight.device)
        zero = int((signed == 0).nonzero())
        num_blocks = -(-weight.numel() // BLOCK)
        for name, code in (("exp_avg", zero), ("exp_avg_sq", 0)):
            state[name] = torch.full((weight.numel(),), code, dtype=torch.uint8, device=weight.device)
            state[f"{name}_scale"] = torch.zeros(num_blocks, device=weight.device)

    def _values_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._values:
            self._values[device] = (
                dynamic_values(is_signed=True).to(device),
                dynamic_values(is_signed=False).to(device),
            )
        return self._values[device]


def _chunks(count: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Slices of numbers, and of the blocks that they are."""
    for start in range(0, count, most):
        stop = min(count, start + most)
        yield slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))


def _step_numbers(weight: Tensor, grad: Tensor, mean: Tensor, square: Tensor, step: int, group: dict[str, Any]) -> None:
    """AdamW (Loshchilov and Hutter, 2019, algorithm 2), all in place."""
    (beta1, beta2), rate = group["betas"], group["lr"]
    mean.lerp_(grad, 1 - beta1)
    square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    spread = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    weight.mul_(1 - rate * group["weight_decay"]).addcdiv_(mean, spread, value=-rate / (1 - beta1**step))
