"""DeepSeekMoE with sigmoid scores and auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2).

The semantics are those of the official `inference/model.py` (class `Gate`): experts are chosen by score plus bias,
groups that were not chosen are masked with -inf, and the weights are the scores without the bias, normalised, times the
scaling factor.

Shapes: N tokens, C model width, E routed experts, K experts per token, I expert width, T = N*K token-expert pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.config import PolicyConfig


def count_experts(experts_NK: Tensor, num_experts: int) -> Tensor:
    """How many token-expert pairs fell on each expert, int64 [E]."""
    chosen_T = experts_NK.flatten()
    return chosen_T.new_zeros(num_experts).index_add_(0, chosen_T, torch.ones_like(chosen_T))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, intermediate, bias=False)
        self.up_proj = nn.Linear(width, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, width, bias=False)

    def forward(self, x_NC: Tensor) -> Tensor:
        """[N, C] to [N, C]."""
        return self.down_proj(F.silu(self.gate_proj(x_NC)) * self.up_proj(x_NC))  # type: ignore[no-any-return]


class Router(nn.Module):
    """Chooses K experts for each token and the weight of each; computes in fp32."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        is_biased = config.topk_method == "noaux_tc"
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if is_biased else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_NC: Tensor, given_experts_NK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Chosen experts [N, K] and their weights [N, K] (fp32).

        With `given_experts_NK` the choice is taken as given and only the weights, with their gradients, are computed.
        """
        logits_NE = F.linear(x_NC.float(), self.weight.float())
        scores_NE = logits_NE.sigmoid() if self.config.scoring_func == "sigmoid" else logits_NE.softmax(dim=-1)
        experts_NK = self._choose(scores_NE.detach()) if given_experts_NK is None else given_experts_NK
        weights_NK = scores_NE.gather(1, experts_NK)
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return experts_NK, weights_NK * self.config.routed_scaling_factor

    @torch.no_grad()
    def balance(self, load_E: Tensor, rate: float) -> None:
        """Move each bias by `rate` towards a uniform load: down where above the mean, up where below."""
        if self.e_score_correction_bias is None:
            return
        load_E = load_E.to(self.e_score_correction_bias)
        self.e_score_correction_bias += rate * torch.sign(load_E.mean() - load_E)

    def _choose(self, scores_NE: Tensor) -> Tensor:
        config = self.config
        biased_NE = scores_NE if self.e_score_correction_bias is None else scores_NE + self.e_score_correction_bias
        if config.n_group > 1 and config.topk_method != "greedy":
            grouped = biased_NE.unflatten(1, (config.n_group, -1))
            num_best = min(2, grouped.shape[-1]) if config.topk_method == "noaux_tc" else 1
            best_two = grouped.topk(num_best, dim=-1).values.sum(dim=-1)
            kept = best_two.topk(config.topk_group, dim=-1).indices
            dropped = torch.ones_like(best_two, dtype=torch.bool).scatter_(1, kept, False)
            biased_NE = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(1)
        return biased_NE.topk(config.num_experts_per_tok, dim=-1).indices


class Experts(nn.Module):
    """All routed experts of a layer, stacked, so that one grouped product serves them all."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x_NC: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Weighted sum of each token's experts, [N, C]; nothing is dropped."""
        per_token = experts_NK.shape[1]
        order_T = experts_NK.flatten().argsort(stable=True)
        ends_E = count_experts(experts_NK, len(self.down_proj)).cumsum(0).to(torch.int32)
        sorted_TC = x_NC.index_select(0, order_T // per_token)
        gate_TI, up_TI = torch._grouped_mm(sorted_TC, self.gate_up_proj.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        out_TC = torch._grouped_mm(F.silu(gate_TI) * up_TI, self.down_proj.transpose(1, 2), offs=ends_E)
        back_T = torch.empty_like(order_T).index_copy_(0, order_T, torch.arange(len(order_T), device=order_T.device))
        out_NKC = out_TC.index_select(0, back_T).unflatten(0, (-1, per_token))
        return torch.einsum("nkc,nk->nc", out_NKC, weights_NK.to(out_NKC.dtype))


class MixtureOfExperts(nn.Module):
    """Shared experts for every token plus K routed ones."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        shared = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = FeedForward(config.hidden_size, shared) if shared else None

    def forward(self, x_NC: Tensor, given_experts_NK: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Output [N, C] and the experts that were chosen [N, K]."""
        experts_NK, weights_NK = self.gate(x_NC, given_experts_NK)
        out_NC = self.experts(x_NC, experts_NK, weights_NK)
        if self.shared_experts is not None:
            out_NC = out_NC + self.shared_experts(x_NC)
        return out_NC, experts_NK
