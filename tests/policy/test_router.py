"""Routing against the formulas in plain loops, for every kind of router; and replayed.

Shapes: N tokens, C model width, E experts, K experts per token.
"""

import math

import pytest
import torch
from torch import Tensor

from policy import PackedRows, PolicyConfig
from policy.attention import Expanded
from policy.router import Router, linear_fp32
from tests.policies import tiny_policy

QWEN3_MOE = PolicyConfig(
    model_type="qwen3_moe", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    num_attention_heads=4, max_position_embeddings=128, n_routed_experts=8, num_experts_per_tok=3,
    moe_intermediate_size=16,
)  # fmt: skip
V2 = {"model_type": "deepseek_v2"}
SHAPES: dict[str, dict[str, object]] = {
    "v3": {},
    "v3_scaled": {"routed_scaling_factor": 2.5},
    "v3_not_normalised": {"norm_topk_prob": False, "routed_scaling_factor": 16.0},
    "v3_groups": {"n_group": 4, "topk_group": 2},
    "v3_one_group_of_four": {"n_group": 4, "topk_group": 1, "num_experts_per_tok": 2},
    "v3_groups_of_one_expert": {"n_group": 8, "topk_group": 5},
    "v2_greedy": V2 | {"routed_scaling_factor": 16.0},
    "v2_greedy_whatever_the_group": V2 | {"n_group": 4, "topk_group": 1},
    "v2_groups": V2 | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "qwen3_moe": {"norm_topk_prob": False},
    "qwen3_moe_normalised": {"norm_topk_prob": True},
    "qwen3_moe_were_it_in_groups": {
        "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "routed_scaling_factor": 3.0,
        "norm_topk_prob": True,
    },
}  # fmt: skip


def make_router(name: str) -> Router:
    if name.startswith("qwen3_moe"):
        gate = Router(QWEN3_MOE.model_copy(update=SHAPES[name]))
        torch.nn.init.normal_(gate.weight, std=0.25, generator=torch.Generator().manual_seed(0))
        return gate
    gate = tiny_policy(**{"n_routed_experts": 8, "num_experts_per_tok": 3} | SHAPES[name]).moe_layers[0].gate
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8)[torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])])
    return gate


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def score_one(router: Router, x_C: Tensor) -> list[float]:
    """Scores of one token in fp64."""
    logits = (router.weight.detach().double() @ x_C.double()).tolist()
    if router.config.scoring_func == "sigmoid":
        return [1 / (1 + math.exp(-logit)) for logit in logits]
    return [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]


def route_one(router: Router, x_C: Tensor) -> dict[int, float]:
    """Chosen experts of one token and their weights, from the formulas.

    `noaux_tc` is `Gate.forward` of DeepSeek-V3's official code, `group_limited_greedy` is DeepSeek-V2, section 2.2.2.
    """
    config = router.config
    scores = score_one(router, x_C)
    rating = list(scores)
    if config.topk_method == "noaux_tc":
        assert router.e_score_correction_bias is not None
        rating = [score + float(bias) for score, bias in zip(scores, router.e_score_correction_bias, strict=True)]
    if config.topk_method != "greedy" and config.n_group > 1:
        size = config.n_routed_experts // config.n_group
        best = 2 if config.topk_method == "noaux_tc" else 1
        groups = [rating[g * size : (g + 1) * size] for g in range(config.n_group)]
        by_rating = sorted(range(config.n_group), key=lambda g: -sum(sorted(groups[g], reverse=True)[:best]))
        kept = by_rating[: config.topk_group]
        rating = [rating[e] if e // size in kept else -math.inf for e in range(config.n_routed_experts)]
    chosen = sorted(range(config.n_routed_experts), key=lambda e: -rating[e])[: config.num_experts_per_tok]
    total = sum(scores[e] for e in chosen) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in chosen}


@pytest.mark.parametrize(
    ("name", "shift"),
    [(name, 0.0) for name in SHAPES] + [(name, -3.0) for name in SHAPES if name.startswith("v3")],
)
def test_router_equals_the_formula(name: str, shift: float) -> None:
    """With all biased scores negative, a group masked with 0 instead of -inf would win."""
    gate = make_router(name)
    if gate.e_score_correction_bias is not None:
        gate.e_score_correction_bias += shift
    x_NC = draw(200, 32)
    routing = gate(x_NC)
    assert routing.weights_NK.dtype == torch.float32
    for x_C, experts, weights, scores in zip(
        x_NC, routing.experts_NK.tolist(), routing.weights_NK, routing.scores_NE, strict=True
    ):
        wanted = route_one(gate, x_C)
        assert set(experts) == set(wanted)
        assert weights.tolist() == pytest.approx([wanted[e] for e in experts], rel=1e-5)
        assert scores.tolist() == pytest.approx(score_one(gate, x_C), rel=1e-5)


def test_one_token_by_hand() -> None:
    """Softmax of logits log 1, log 2, log 3, log 4 is 0.1, 0.2, 0.3, 0.4; groups {0, 1} and {2, 3}."""
    config = QWEN3_MOE.model_copy(
        update={"n_routed_experts": 4, "num_experts_per_tok": 2, "hidden_size": 1} | {"norm_topk_prob": True}
    )
    gate = Router(config)
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([[1.0], [4.0], [2.0], [3.0]]).log())
    routing = gate(torch.ones(1, 1))
    assert dict(zip(routing.experts_NK[0].tolist(), routing.weights_NK[0].tolist(), strict=True)) == pytest.approx(
        {1: 4 / 7, 3: 3 / 7}
    )
    gate.config = config.model_copy(
        update={"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1, "norm_topk_prob": False}
        | {"routed_scaling_factor": 16.0}
    )
    routing = gate(torch.ones(1, 1))
    assert dict(zip(routing.experts_NK[0].tolist(), routing.weights_NK[0].tolist(), strict=True)) == pytest.approx(
        {1: 6.4, 0: 1.6}
    )


def test_bias_steers_the_choice_but_not_the_weights() -> None:
    gate = make_router("v3")
    x_NC = draw(50, 32)
    assert gate.e_score_correction_bias is not None
    gate.e_score_correction_bias[6] = 2.0
    routing = gate(x_NC)
    assert (routing.experts_NK == 6).any(dim=1).all()
    gate.e_score_correction_bias.zero_()
    assert torch.equal(gate(x_NC, routing.experts_NK).weights_NK, routing.weights_NK)


def test_only_noaux_tc_has_a_bias() -> None:
    assert "e_score_correction_bias" in make_router("v3").state_dict()
    for name in ("v2_greedy", "v2_groups", "qwen3_moe"):
        gate = make_router(name)
        assert list(gate.state_dict()) == ["weight"]
        gate.balance(torch.arange(8), rate=0.1)  # nothing to move
        assert list(gate.state_dict()) == ["weight"]


def test_balance_moves_each_bias_one_step_towards_the_mean() -> None:
    gate = make_router("v3")
    assert gate.e_score_correction_bias is not None
    gate.e_score_correction_bias.fill_(0.5)
    gate.balance(torch.tensor([9, 1, 4, 4, 0, 4, 5, 5]), rate=0.01)  # the mean is 4
    steps = [-1, 1, 0, 0, 1, 0, -1, -1]
    assert gate.e_score_correction_bias.tolist() == pytest.approx([0.5 + 0.01 * step for step in steps])


@pytest.mark.parametrize("name", SHAPES)
def test_weights_of_a_given_choice_and_their_gradients(name: str) -> None:
    """The choice is one that the router would not make; the gradient is that of the formula with the choice fixed."""
    gate = make_router(name)
    config, per_token = gate.config, gate.config.num_experts_per_tok
    x_NC = draw(6, 32).requires_grad_()
    generator = torch.Generator().manual_seed(3)
    given_NK = torch.stack([torch.randperm(8, generator=generator)[:per_token] for _ in range(6)])
    routing = gate(x_NC, given_NK)
    assert torch.equal(routing.experts_NK, given_NK)
    assert not torch.equal(gate(x_NC).experts_NK.sort().values, given_NK.sort().values)

    logits_NE = x_NC @ gate.weight.T
    wanted = []
    for n, experts in enumerate(given_NK.tolist()):
        exps = [logits_NE[n, e].exp() for e in range(8)]
        is_sigmoid = config.scoring_func == "sigmoid"
        scores = [exp / (1 + exp) if is_sigmoid else exp / sum(exps) for exp in exps]
        total = sum(scores[e] for e in experts) if config.norm_topk_prob else 1.0
        wanted.append(torch.stack([scores[e] / total * config.routed_scaling_factor for e in experts]))
    wanted_NK = torch.stack(wanted)
    assert torch.allclose(routing.weights_NK, wanted_NK, rtol=1e-5)
    direction = draw(6, per_token, seed=4)
    ours = torch.autograd.grad((routing.weights_NK * direction).sum(), (gate.weight, x_NC))
    theirs = torch.autograd.grad((wanted_NK * direction).sum(), (gate.weight, x_NC))
    for got, formula in zip(ours, theirs, strict=True):
        assert got.abs().sum() > 0
        assert torch.allclose(got, formula, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["v3_groups", "v2_groups", "v2_greedy"])
def test_a_replayed_pass_is_the_pass_gradients_too(name: str) -> None:
    modules = {"num_nextn_predict_layers": 2} if name.startswith("v3") else {}
    policy = tiny_policy(**{"n_routed_experts": 8} | SHAPES[name] | modules)
    rows = PackedRows.of([7, 4])
    token_ids_N = torch.randint(3, 61, (11,), generator=torch.Generator().manual_seed(0))
    direction = draw(11, 32)

    def run(trunk_MNK: Tensor | None, ahead_DNK: Tensor | None) -> tuple[list[Tensor], dict[str, Tensor]]:
        policy.zero_grad()
        output = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows), trunk_MNK)
        ahead = policy.predict_ahead(output.hidden_NC, token_ids_N.roll(-1), rows, given_experts_DNK=ahead_DNK)
        hiddens = [output.hidden_NC, *(each.hidden_NC for each in ahead)]
        torch.stack([(hidden * direction).sum() for hidden in hiddens]).sum().backward()
        grads = {key: weight.grad.clone() for key, weight in policy.named_parameters() if weight.grad is not None}
        return [*hiddens, output.experts_MNK, *(each.experts_MNK for each in ahead)], grads

    tensors, grads = run(None, None)
    trunk_MNK, ahead_DNK = tensors[1 + len(policy.mtp)], None
    if policy.mtp:
        ahead_DNK = torch.cat(tensors[-len(policy.mtp) :])
    mixtures = [*policy.moe_layers, *policy.mtp_moe_layers]
    gates = [name for name, _ in policy.named_parameters() if name.endswith("gate.weight")]
    assert len(gates) == len(mixtures) == 2 + len(policy.mtp)
    for layer in mixtures:  # where a bias steers, a choice of its own would now be another one
        if layer.gate.e_score_correction_bias is not None:
            layer.gate.e_score_correction_bias.copy_(draw(8, seed=3))
    replayed, replayed_grads = run(trunk_MNK, ahead_DNK)
    assert all(torch.equal(a, b) for a, b in zip(tensors, replayed, strict=True))
    assert all(torch.equal(grads[key], replayed_grads[key]) for key in grads)
    assert all(replayed_grads[key].abs().sum() > 0 for key in gates)
    if name.startswith("v3"):
        assert not torch.equal(run(None, None)[0][1 + len(policy.mtp)], trunk_MNK)


def test_logits_are_fp32_products_of_bf16_inputs_and_their_gradients_have_the_inputs_dtype() -> None:
    x_NC, weight_EC = draw(9, 32).bfloat16().requires_grad_(), draw(8, 32, seed=1).bfloat16().requires_grad_()
    direction = draw(9, 8, seed=2)
    logits_NE = linear_fp32(x_NC, weight_EC)
    assert logits_NE.dtype == torch.float32
    wide = [tensor.detach().double().requires_grad_() for tensor in (x_NC, weight_EC)]
    assert torch.allclose(logits_NE.double(), wide[0] @ wide[1].T, atol=1e-5)
    ours = torch.autograd.grad((logits_NE * direction).sum(), (x_NC, weight_EC))
    theirs = torch.autograd.grad((wide[0] @ wide[1].T * direction).sum(), wide)
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.allclose(got.double(), wanted, rtol=1e-2, atol=1e-2)
    alone = linear_fp32(x_NC.detach(), weight_EC)
    assert torch.equal(torch.autograd.grad((alone * direction).sum(), weight_EC)[0], ours[1])
