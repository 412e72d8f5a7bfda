"""Which experts a token goes to and with what weights: the routers of DeepSeek-V3, DeepSeek-V2 and Qwen3-MoE.

Scores are the sigmoid or the softmax of the router's logits (`scoring_func`), in fp32. By `topk_method` a token goes to

- `noaux_tc`: the K best of score plus bias, within the `topk_group` groups whose best two add up to most
  (DeepSeek-V3, equation 16, and class `Gate` of the official `inference/model.py`, which masks other groups with -inf);
- `greedy`: the K best scores, whatever their group;
- `group_limited_greedy`: the K best scores within the `topk_group` groups with the best single one (DeepSeek-V2,
  section 2.2.2).

The weights are the scores of the chosen, without the bias, divided by their sum where `norm_topk_prob` says so, times
`routed_scaling_factor`.

Shapes: N tokens, C model width, E routed experts, G groups, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from policy.config import PolicyConfig
from policy.decode_layout import lies_by_feature
from policy.head import project

FEW_TOKENS = 4096
"""More than a decoding step has; longer passes choose as training does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Routing:
    """Where each token goes, and what balancing needs to know of why."""

    experts_NK: Tensor
    """Chosen experts, int64, none twice for one token."""
    weights_NK: Tensor
    """Weight of each in the token's output, fp32, differentiable."""
    logits_NE: Tensor
    """The router's logits, fp32, differentiable."""
    scores_NE: Tensor
    """Their sigmoid or softmax, fp32, differentiable."""
    preferred_NK: Tensor | None = None
    """Experts that the router would have chosen, int64; None where no choice was given to it."""

    def spread(self, place_N: Tensor) -> Routing:
        """The same of tokens that lie at these places, some at one; gradients add up in one order."""
        return Routing(
            experts_NK=self.experts_NK.index_select(0, place_N),
            weights_NK=F.embedding(place_N, self.weights_NK),
            logits_NE=F.embedding(place_N, self.logits_NE),
            scores_NE=F.embedding(place_N, self.scores_NE),
            preferred_NK=None if self.preferred_NK is None else self.preferred_NK.index_select(0, place_N),
        )


class Router(nn.Module):
    """Chooses K experts for each token and the weight of each. Parameter names follow transformers."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        is_biased = config.topk_method == "noaux_tc"
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if is_biased else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_NC: Tensor, given_experts_NK: Tensor | None = None) -> Routing:
        """Route tokens. A choice that is given is taken as it is; its weights and their gradients are computed.

        A given choice may be of any integer dtype; where it is below 0 the router chooses.
        """
        config = self.config
        logits_NE = linear_fp32(x_NC, self.weight)
        if given_experts_NK is None and lies_by_feature(logits_NE):
            from policy import cpu_experts

            scores_NE, experts_NK, weights_NK = cpu_experts.route(logits_NE, self.e_score_correction_bias, config)
            return Routing(experts_NK=experts_NK, weights_NK=weights_NK, logits_NE=logits_NE, scores_NE=scores_NE)
        scores_NE = logits_NE.sigmoid() if config.scoring_func == "sigmoid" else logits_NE.softmax(dim=-1)
        own_NK = self._choose(scores_NE.detach())
        experts_NK = own_NK
        if given_experts_NK is not None:
            experts_NK = torch.where(given_experts_NK < 0, own_NK, given_experts_NK.long())
        weights_NK = scores_NE.gather(1, experts_NK)
        if config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(dim=-1, keepdim=True) + 1e-20)
        return Routing(
            experts_NK=experts_NK,
            weights_NK=weights_NK * config.routed_scaling_factor,
            logits_NE=logits_NE,
            scores_NE=scores_NE,
            preferred_NK=None if given_experts_NK is None else own_NK,
        )

    def chooses_at_once(self, x_NC: Tensor) -> bool:
        """Whether `choose` takes these: a decoding step's tokens on a GPU, where small kernels would wait in a row."""
        if not x_NC.is_cuda or torch.is_grad_enabled() or len(x_NC) > FEW_TOKENS:
            return False
        from policy import step_kernels

        return step_kernels.can_route(self.config)

    def choose(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Experts and weights of `forward` in one kernel behind the product, without gradient.

        Its exponential differs from torch's in the last digit, which moves ties that are as near as that; of equal
        ratings it takes the lower number.
        """
        from policy import step_kernels

        return step_kernels.route(linear_fp32(x_NC, self.weight), self.e_score_correction_bias, self.config)

    @torch.no_grad()
    def balance(self, load_E: Tensor, rate: float) -> None:
        """Move each bias by `rate` towards a uniform load: down where above the mean, up where below.

        Auxiliary-loss-free balancing (DeepSeek-V3, section 2.1.2; Wang et al., 2024, algorithm 1). A router without
        biases stays as it is.
        """
        if self.e_score_correction_bias is not None:
            load_E = load_E.to(self.e_score_correction_bias)
            self.e_score_correction_bias += rate * torch.sign(load_E.mean() - load_E)

    def _choose(self, scores_NE: Tensor) -> Tensor:
        config = self.config
        rating_NE = scores_NE if self.e_score_correction_bias is None else scores_NE + self.e_score_correction_bias
        if config.n_group > 1 and config.topk_method != "greedy":
            grouped = rating_NE.unflatten(1, (config.n_group, -1))
            num_best = min(2, grouped.shape[-1]) if config.topk_method == "noaux_tc" else 1
            rating_NG = grouped.topk(num_best, dim=-1).values.sum(dim=-1)
            kept = rating_NG.topk(config.topk_group, dim=-1).indices
            dropped = torch.ones_like(rating_NG, dtype=torch.bool).scatter_(1, kept, False)
            rating_NE = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(1)
        return rating_NE.topk(config.num_experts_per_tok, dim=-1).indices


def linear_fp32(x_NC: Tensor, weight_EC: Tensor) -> Tensor:
    """x @ weight.T in fp32 whatever the inputs' dtype, [N, E]; keeps x for the backward pass as it came."""
    if x_NC.dtype == weight_EC.dtype == torch.float32:
        return project(x_NC, weight_EC)
    product: Tensor = _LinearFp32.apply(x_NC, weight_EC)
    return product


class _LinearFp32(torch.autograd.Function):
    """Plain autograd would keep an fp32 copy of every layer's input."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_EC: Tensor) -> Tensor:
        ctx.save_for_backward(x_NC, weight_EC)
        return project(x_NC, weight_EC)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NC, weight_EC = ctx.saved_tensors
        [grad_NE] = grads
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = (grad_NE @ weight_EC.float()).to(x_NC.dtype) if needs_x else None
        grad_weight = (grad_NE.T @ x_NC.float()).to(weight_EC.dtype) if needs_weight else None
        return grad_x, grad_weight
