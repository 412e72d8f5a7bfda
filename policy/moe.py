"""DeepSeekMoE: shared experts for every token and K routed ones (DeepSeek-V3, section 2.1.2; DeepSeekMoE, 2024).

Who goes where is policy/router.py's, the grouped products are policy/grouped.py's, balancing is policy/balance.py's.

Shapes: N tokens, C model width, E routed experts, K experts per token, I expert width, T = N*K token-expert pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from policy.balance import RouterSums, RouterWatch, sum_up
from policy.config import PolicyConfig
from policy.decode_layout import LEAST_ROWS, lies_by_feature
from policy.fused import silu_gate
from policy.grouped import gather_sorted, mix_sorted, sort_by_group, swiglu
from policy.linear import Linear, is_plain_matrix, plain_matrices
from policy.norm import RMSNorm
from policy.recompute import remade
from policy.router import Router

if TYPE_CHECKING:
    from policy.cpu_operations import Operation

FEW_PAIRS = 8192
"""Up to so many token-expert pairs, a GPU that needs no gradient sorts them by counting, in one kernel."""

FEW_TOKENS = 32
"""Up to so many tokens a GPU's decoding step multiplies each token by its experts' matrices in kernels of our own: few
have an expert in common, and sorting them and starting two grouped products takes longer than the products."""


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, intermediate, bias=False)
        self.up_proj = Linear(width, intermediate, bias=False)
        self.down_proj = Linear(intermediate, width, bias=False)

    def forward(self, x_NC: Tensor) -> Tensor:
        """[N, C] to [N, C]."""
        return self.down_proj(remade(silu_gate, self.gate_proj(x_NC), self.up_proj(x_NC)))  # type: ignore[no-any-return]

    def decode_on_cpu(self, x_NC: Tensor, norm: RMSNorm) -> tuple[Tensor, None]:
        """x + self(norm(x)), in one kernel where it can be; there is no router."""
        operation = self.operation_on_cpu(norm) if x_NC.shape[0] >= LEAST_ROWS else None
        if operation is None:
            return x_NC + self(norm(x_NC)), None
        from policy import cpu_operations

        return cpu_operations.run_alone(operation, x_NC), None

    def operation_on_cpu(self, norm: RMSNorm) -> Operation | None:
        """x + self(norm(x)) as a part of a decoding step on the CPU; None where it takes several."""
        if (matrices := self.matrices()) is None:
            return None
        from policy import cpu_operations

        return cpu_operations.feed_forward(norm.weight, norm.epsilon, *matrices)

    def matrices(self) -> list[Tensor] | None:
        """Gate, up and down, where they can be part of one kernel."""
        return plain_matrices(self.gate_proj, self.up_proj, self.down_proj)


class Experts(nn.Module):
    """All routed experts of a layer, stacked, so that one grouped product serves them all."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x_NC: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Weighted sum of each token's experts, [N, C]; nothing is dropped."""
        if lies_by_feature(x_NC) and self.down_proj.dtype == torch.float32:
            from policy import cpu_experts

            return cpu_experts.mix_experts(x_NC, experts_NK, weights_NK, self.gate_up_proj, self.down_proj)
        per_token = experts_NK.shape[1]
        if sorts_by_counting(x_NC, experts_NK):
            from policy import gpu_kernels

            return gpu_kernels.mix_rows(*self.multiply_sorted(x_NC, experts_NK), weights_NK.contiguous())
        order = sort_by_group(experts_NK.flatten(), len(self.down_proj))
        sorted_TC = remade(partial(gather_sorted, per_row=per_token), x_NC, order.order_T)
        out_TC = swiglu(sorted_TC, self.gate_up_proj, self.down_proj, order.ends_E)
        return mix_sorted(out_TC, order.order_T, weights_NK)

    def multiply_sorted(self, x_NC: Tensor, experts_NK: Tensor) -> tuple[Tensor, Tensor]:
        """What each token's experts give, sorted by expert [T, C], and where a token's lie [N, K]; on a GPU."""
        from policy import step_kernels

        source_T, places_NK, ends_E = step_kernels.sort_pairs(experts_NK, len(self.down_proj))
        return swiglu(x_NC.index_select(0, source_T), self.gate_up_proj, self.down_proj, ends_E), places_NK


def sorts_by_counting(x_NC: Tensor, experts_NK: Tensor) -> bool:
    """Whether a kernel sorts these pairs, few and without gradient, on a GPU."""
    return x_NC.is_cuda and not torch.is_grad_enabled() and 0 < experts_NK.numel() <= FEW_PAIRS


@dataclass(frozen=True, kw_only=True, slots=True)
class Routed:
    """What became known of a layer's router in a pass."""

    experts_NK: Tensor
    """Chosen experts, int64."""
    sums: RouterSums | None
    """Of this layer (M = 1), where the pass was watched."""
    preferred_NK: Tensor | None = None
    """Experts that the router would have chosen, int64; None where no choice was given to it."""


class MixtureOfExperts(nn.Module):
    """Shared experts for every token plus K routed ones."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = FeedForward(config.hidden_size, shared) if shared else None

    def forward(
        self, x_NC: Tensor, given_experts_NK: Tensor | None = None, watch: RouterWatch | None = None
    ) -> tuple[Tensor, Routed]:
        """Output [N, C] and what became known of the routing."""
        if given_experts_NK is None and watch is None and self.gate.chooses_at_once(x_NC):
            experts_NK, weights_NK = self.gate.choose(x_NC)
            return self._mix(x_NC, experts_NK, weights_NK), Routed(experts_NK=experts_NK, sums=None)
        routing = self.gate(x_NC, given_experts_NK)
        out_NC = self._mix(x_NC, routing.experts_NK, routing.weights_NK)
        sums = None if watch is None else sum_up(routing, watch)
        return out_NC, Routed(experts_NK=routing.experts_NK, sums=sums, preferred_NK=routing.preferred_NK)

    def decode_on_cpu(self, x_NC: Tensor, norm: RMSNorm) -> tuple[Tensor, Routed]:
        """x + self(norm(x)) and the choice of experts, in one kernel where it can be."""
        experts_NK = torch.empty(x_NC.shape[0], self.gate.config.num_experts_per_tok, dtype=torch.int64)
        operation = self.operation_on_cpu(norm, experts_NK) if x_NC.shape[0] >= LEAST_ROWS else None
        if operation is None:
            out_NC, routed = self(norm(x_NC))
            return x_NC + out_NC, routed
        from policy import cpu_operations

        return cpu_operations.run_alone(operation, x_NC), Routed(experts_NK=experts_NK, sums=None)

    def operation_on_cpu(self, norm: RMSNorm, chosen_NK: Tensor, record: Tensor | None = None) -> Operation | None:
        """x + self(norm(x)) as a part of a decoding step on the CPU; None where it takes several. The choice of experts
        goes to `chosen_NK` and, where one is given, to the record beside the cache."""
        shared = None if self.shared_experts is None else self.shared_experts.matrices()
        stacked = (self.gate.weight, self.experts.gate_up_proj, self.experts.down_proj)
        if (shared is None and self.shared_experts is not None) or not all(map(is_plain_matrix, stacked)):
            return None
        from policy import cpu_experts

        return cpu_experts.mixture(
            norm.weight, norm.epsilon, self.gate.weight, self.gate.e_score_correction_bias, *stacked[1:], shared,
            self.gate.config, chosen_NK, record,
        )  # fmt: skip

    def decode_on_gpu(self, x_NC: Tensor, inner_NC: Tensor) -> tuple[Tensor, Routed]:
        """x + self(inner) and the choice of experts, in few kernels."""
        if not self.gate.chooses_at_once(inner_NC):
            out_NC, routed = self(inner_NC)
            return x_NC + out_NC, routed
        from policy import layer_kernels

        experts_NK, weights_NK = self.gate.choose(inner_NC)
        routed, shared, experts = Routed(experts_NK=experts_NK, sums=None), self.shared_experts, self.experts
        if len(inner_NC) <= FEW_TOKENS:
            layers = None if shared is None else (shared.gate_proj, shared.up_proj, shared.down_proj)
            matrices = None if layers is None else tuple(layer.weight for layer in layers)
            return layer_kernels.mix_experts(
                x_NC, inner_NC, experts_NK, weights_NK, experts.gate_up_proj, experts.down_proj, matrices
            ), routed
        if not sorts_by_counting(inner_NC, experts_NK):
            return x_NC + self._mix(inner_NC, experts_NK, weights_NK), routed
        sorted_TC, places_NK = experts.multiply_sorted(inner_NC, experts_NK)
        shared_NC = None if shared is None else shared(inner_NC)
        return layer_kernels.gather_into(x_NC, sorted_TC, places_NK, weights_NK, shared_NC), routed

    def _mix(self, x_NC: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        out_NC: Tensor = self.experts(x_NC, experts_NK, weights_NK)
        return out_NC if self.shared_experts is None else out_NC + self.shared_experts(x_NC)
