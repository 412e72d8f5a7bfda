"""AdamW over fp32 master weights, gradients accumulated in fp32, global-norm clipping, learning-rate schedules.

Where the policy computes in bf16, a step of RL is often smaller than a bf16 weight can hold; the masters hold it,
and the
policy gets their rounded copy. Where it computes in fp32 the policy's own weights are the masters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from grpo.optimizer_8bit import MIN_NUMBERS, AdamW8bit
from policy import CheckpointError, Policy


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
        is_8bit: bool = False,
    ) -> None:
        self._weights = {name: weight for name, weight in policy.named_parameters() if weight.requires_grad}
        self.masters: dict[str, Tensor] = {
            name: weight if weight.dtype == torch.float32 else weight.detach().float().requires_grad_()
            for name, weight in self._weights.items()
        }
        decayed = [master for master in self.masters.values() if master.ndim > 1]
        plain = [master for master in self.masters.values() if master.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        if is_8bit:
            self.inner = AdamW8bit(groups, lr=0.0, betas=betas, eps=eps)
        else:
            self.inner = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    def gather_gradients(self) -> list[Tensor]:
        """Move gradients that a backward pass left on the policy to the masters; call after every micro-batch.

        Returns the masters' gradients, all of them: zeros where nothing reached a weight, so that ranks agree.
        """
        for name, master in self.masters.items():
            weight = self._weights[name]
            if master.grad is None:
                master.grad = torch.zeros_like(master)
            if weight is not master and weight.grad is not None:
                master.grad.add_(weight.grad)
                weight.grad = None
        return [master.grad for master in self.masters.values() if master.grad is not None]

    def forget_gradients(self) -> None:
        """Drop what `gather_gradients` summed up."""
        self.inner.zero_grad(set_to_none=True)

    def step(self, learning_rate: float, max_grad_norm: float) -> float:
        """Clip, step, copy to the policy, forget the gradients; gives the norm before clipping.

        A norm that is not finite leaves everything as it was.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.masters.values()), max_grad_norm, foreach=True))
        if math.isfinite(norm):
            for group in self.inner.param_groups:
                group["lr"] = learning_rate
            self.inner.step()
            with torch.no_grad():
                for name, master in self.masters.items():
                    if self._weights[name] is not master:
                        self._weights[name].copy_(master)
        self.forget_gradients()
        return norm

    def state_tensors(self) -> dict[str, Tensor]:
        """Masters and moments by name, for a checkpoint."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            state[f"master.{name}"] = master.detach()
            for key, value in self.inner.state.get(master, {}).items():
                state[f"{key}.{name}"] = value
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_tensors` gave, the policy's weights included.

        Raises CheckpointError for moments of another kind of optimizer.
        """
        keys = {"step", "exp_avg", "exp_avg_sq"}
        if isinstance(self.inner, AdamW8bit):
            keys |= {"exp_avg_scale", "exp_avg_sq_scale"}
        self._check_state(state, is_8bit=isinstance(self.inner, AdamW8bit))
        for name, master in self.masters.items():
            moments = {key: state[f"{key}.{name}"] for key in keys if f"{key}.{name}" in state}
            with torch.no_grad():
                master.copy_(state[f"master.{name}"])
                if self._weights[name] is not master:
                    self._weights[name].copy_(master)
            if moments:
                # The fused kernel counts steps on the device; the other's count is the host's.
                on_host = {"step"} if isinstance(self.inner, AdamW8bit) else set[str]()
                self.inner.state[master] = {
                    key: value.to("cpu" if key in on_host else master.device, copy=True)
                    for key, value in moments.items()
                }

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
