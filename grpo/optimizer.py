"""AdamW over fp32 master weights, gradients accumulated in fp32, global-norm clipping, learning-rate schedules.

Where the policy computes in bf16, a step of RL is often smaller than a bf16 weight can hold; the masters hold it, and
the policy gets their rounded copy. Where it computes in fp32 the policy's own weights are the masters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from grpo.distributed import Ranks
from grpo.layout import Layout, Whole
from grpo.optimizer_8bit import MIN_NUMBERS, AdamW8bit
from policy import CheckpointError, Policy

if TYPE_CHECKING:
    from grpo.gradient_kernels import GradientSum


class Optimizer(Protocol):
    """Turns the losses of micro-batches into steps of a policy's weights, however these are kept over ranks.

    A step is: `restart`, `backward` for each micro-batch, `reduce`, then `step`, or `restart` to leave it out.
    """

    def restart(self) -> None:
        """Forget all gradients, also those of a pass that broke off."""
        ...

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Add the gradient of one micro-batch's share of the loss; the last of the step is told."""
        ...

    def reduce(self, loss: Tensor, ranks: Ranks) -> None:
        """Sum the gradients over all ranks, and the loss of the step, in place. Every rank calls it, once a step."""
        ...

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip by the norm over all weights, step, forget the gradients; gives the norm before clipping.

        A norm that is not finite, the same on all ranks, leaves everything as it was.
        """
        ...

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters that it moves."""
        ...

    def state_tensors(self) -> dict[str, Tensor]:
        """`master.NAME` (fp32), and once it has stepped `exp_avg.NAME`, `exp_avg_sq.NAME` and `step.NAME`, of each
        trained parameter: whole, however kept; of use on the main rank only.
        """
        ...

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` gave, under any way of keeping; the policy's weights follow."""
        ...


class MasterAdamW:
    """Decoupled weight decay (Loshchilov and Hutter, 2019); one-dimensional weights (norms) are not decayed.

    Frozen weights (all but the adapters, where there are any) have no master. On a GPU one fused kernel steps many
    tensors. In bf16, a trained weight takes 2 bytes, its master 4, the moments 8 (`is_8bit`: 2.03) and, during an
    update, its gradient 4, with another 2 until a micro-batch's gradient is added.
    """

    inner: torch.optim.Optimizer

    def __init__(
        self,
        policy: Policy,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        layout: Layout | None = None,
        is_8bit: bool = False,
    ) -> None:
        """`layout` says how the policy's parameters lie over ranks; None: whole, as 8 bits want them."""
        assert layout is None or not is_8bit
        self._weights = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        self._layout = layout or Whole()
        self.masters: dict[str, Tensor] = {name: self._master_of(weight) for name, weight in self._weights.items()}
        decayed = [master for name, master in self.masters.items() if self._weights[name].ndim > 1]
        plain = [master for name, master in self.masters.items() if self._weights[name].ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self._summing = self._make_summing()
        if is_8bit:
            self.inner = AdamW8bit(groups, lr=0.0, betas=betas, eps=eps)
        else:
            self.inner = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    @property
    def trained(self) -> frozenset[str]:
        """See `Optimizer.trained`."""
        return frozenset(self.masters)

    def start_moments(self) -> None:
        """Take their memory now: moments of 0, as torch's AdamW (not that of 8 bits) makes them at its first step."""
        for master in self.masters.values():
            self.inner.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{key: torch.zeros_like(master) for key in ("exp_avg", "exp_avg_sq")},
            }

    def restart(self) -> None:
        """See `Optimizer.restart`."""
        for weight in self._weights.values():
            weight.grad = None
        self.inner.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """See `Optimizer.backward`."""
        loss.backward()
        self.gather_gradients()

    def gather_gradients(self) -> list[Tensor]:
        """Move gradients that a backward pass left on the policy to the masters; call after every micro-batch.

        Returns the masters' gradients, all of them: zeros where nothing reached a weight, so that ranks agree.
        """
        first, later = dict[int, tuple[Tensor, Tensor]](), dict[int, tuple[Tensor, Tensor]]()
        for index, (name, master) in enumerate(self.masters.items()):
            weight = self._weights[name]
            if weight is master or weight.grad is None:
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                continue
            given, weight.grad = self._layout.own(weight.grad), None
            if master.grad is None:
                master.grad = torch.empty_like(master)
                first[index] = master.grad, given
            else:
                later[index] = master.grad, given
        self._add_up(first, is_first=True)
        self._add_up(later, is_first=False)
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def reduce(self, loss: Tensor, ranks: Ranks) -> None:
        """See `Optimizer.reduce`."""
        self._layout.sum_up(self.gather_gradients(), loss, ranks)

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip, step, copy to the policy, forget the gradients; gives the norm before clipping.

        A norm that is not finite leaves everything as it was.
        """
        norm = self._clip(max_grad_norm)
        if math.isfinite(norm):
            for group in self.inner.param_groups:
                group["lr"] = learning_rate
            self.inner.step()
            self._round()
        self.inner.zero_grad(set_to_none=True)
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments by name, for a checkpoint."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            for key, value in {"master": master.detach(), **self.inner.state.get(master, {})}.items():
                state[f"{key}.{name}"] = value if key == "step" else self._layout.join(self._weights[name], value)
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` gave, the policy's weights included.

        Raises CheckpointError for moments of another kind of optimizer.
        """
        # In one order on all ranks, which hand the moments over one after another in the order in which they have them.
        keys = ["step", "exp_avg", "exp_avg_sq"]
        if isinstance(self.inner, AdamW8bit):
            keys += ["exp_avg_scale", "exp_avg_sq_scale"]
        self._check_state(state, is_8bit=isinstance(self.inner, AdamW8bit))
        for name, master in self.masters.items():
            weight = self._weights[name]
            moments = {key: state[f"{key}.{name}"] for key in keys if f"{key}.{name}" in state}
            with torch.no_grad():
                master.copy_(self._layout.cut(weight, state[f"master.{name}"]))
            if moments:
                # The fused kernel counts steps on the device; the other's count is the host's.
                on_host = {"step"} if isinstance(self.inner, AdamW8bit) else set[str]()
                self.inner.state[master] = {
                    key: (value if key == "step" else self._layout.cut(weight, value)).to(
                        "cpu" if key in on_host else master.device, copy=True
                    )
                    for key, value in moments.items()
                }
        self._round()

    def _add_up(self, pairs: dict[int, tuple[Tensor, Tensor]], *, is_first: bool) -> None:
        """total += given for each (total, given), by the number of the weight; where `is_first`, total = given."""
        summing = self._summing
        if summing is not None:
            taken = {index: pair for index, pair in pairs.items() if summing.takes(*pair)}
            if taken:
                summing.add(taken, is_first=is_first)
            pairs = {index: pair for index, pair in pairs.items() if index not in taken}
        if pairs:
            # All at once, as a GPU's host takes longer to start a small kernel than that takes.
            totals, given = zip(*pairs.values(), strict=True)
            (torch._foreach_copy_ if is_first else torch._foreach_add_)(totals, given)

    def _clip(self, max_grad_norm: float) -> float:
        """Clip by the norm over all weights and pieces; gives the norm before that."""
        masters = list(self.masters.values())
        norm = self._layout.norm([master.grad for master in masters if master.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(masters, max_grad_norm, norm, foreach=True)
        return float(norm)

    def _make_summing(self) -> GradientSum | None:
        """What adds up gradients in half precision on a GPU; None elsewhere."""
        weights, masters = list(self._weights.values()), list(self.masters.values())
        if not (weights and weights[0].is_cuda and weights[0].dtype in (torch.bfloat16, torch.float16)):
            return None
        from grpo.gradient_kernels import GradientSum

        return GradientSum([master.numel() for master in masters], weights[0].dtype, masters[0].device)

    def _master_of(self, weight: Tensor) -> Tensor:
        """The weight itself where it is whole and fp32; else what this rank holds of it, in fp32."""
        own = self._layout.own(weight)
        if own is weight and weight.dtype == torch.float32:
            return weight
        return own.detach().float().requires_grad_()

    @torch.no_grad()
    def _round(self) -> None:
        """Give the policy what its dtype can hold of the masters, where these are not its own memory."""
        pairs = [(self._layout.own(self._weights[name]), master) for name, master in self.masters.items()]
        apart = [(own, master) for own, master in pairs if own.data_ptr() != master.data_ptr()]
        if apart:
            torch._foreach_copy_([own for own, _ in apart], [master for _, master in apart])

    def _check_state(self, state: Mapping[str, Tensor], *, is_8bit: bool) -> None:
        """Refuse moments of the other kind; those of small tensors are the same in both."""
        for name, master in self.masters.items():
            moment = state.get(f"exp_avg.{name}")
            if moment is not None and master.numel() >= MIN_NUMBERS and (moment.dtype == torch.uint8) != is_8bit:
                kind = "adamw" if is_8bit else "adamw_8bit"
                raise CheckpointError(
                    f"the checkpoint holds the moments of optimizer: {kind}; continue the run with that, or choose "
                    "another name (name=...)"
                )


def learning_rate_at(step: int, *, peak: float, warmup_steps: int, max_steps: int, kind: str) -> float:
    """Learning rate of step 0, 1, ...: a linear warm-up, then `constant`, `linear` to 0 or `cosine` to a tenth."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, max_steps - warmup_steps)
    if kind == "linear":
        return peak * (1 - done)
    if kind == "cosine":
        return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))
    return peak
