"""The policy as a whole: drawing of weights, dtypes, causality, and what a pass gives."""

import pytest
import torch

from policy import PackedRows, cast_weights, initialise
from policy.attention import Expanded
from policy.logprobs import next_token_loss
from tests.policies import tiny_policy


def draw_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(3, 61, shape, generator=torch.Generator().manual_seed(0))


def test_the_same_seed_draws_the_same_weights() -> None:
    first, again, other = (dict(tiny_policy(seed).named_parameters()) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(weight.ndim == 1 or not torch.equal(weight, other[name]) for name, weight in first.items())


def test_initialise_draws_from_a_normal_distribution_and_sets_norms_to_one() -> None:
    policy = tiny_policy(num_nextn_predict_layers=1, q_lora_rank=24)
    initialise(policy, 0)
    pooled = torch.cat([weight.detach().flatten() for weight in policy.parameters() if weight.ndim > 1])
    assert float(pooled.std()) == pytest.approx(0.25, rel=0.02)
    assert abs(float(pooled.mean())) < 0.005
    norms = {name: weight for name, weight in policy.named_parameters() if weight.ndim == 1}
    assert {"norm.weight", "layers.0.self_attn.q_a_layernorm.weight", "mtp.0.enorm.weight"} <= set(norms)
    assert all((weight == 1).all() for weight in norms.values())


def test_tied_weights_are_one_tensor_and_stay_so() -> None:
    policy = tiny_policy(tie_word_embeddings=True)
    assert "lm_head.weight" not in dict(policy.named_parameters())
    cast_weights(policy, torch.bfloat16)
    assert policy.lm_head.weight is policy.embed_tokens.weight
    untied = tiny_policy()
    assert untied.lm_head.weight is not untied.embed_tokens.weight


@torch.no_grad()
def test_logits_never_look_right() -> None:
    policy, token_ids_BS = tiny_policy(), draw_tokens(2, 15)
    before = policy.logits(token_ids_BS)
    for place in (0, 7, 14):
        changed = token_ids_BS.clone()
        changed[:, place] = (changed[:, place] + 1) % 61
        after = policy.logits(changed)
        assert torch.allclose(after[:, :place], before[:, :place], atol=1e-5)
        assert (after[:, place] - before[:, place]).abs().max() > 1e-2


@torch.no_grad()
def test_whole_rows_equal_packed_rows() -> None:
    policy, token_ids_BS = tiny_policy(), draw_tokens(3, 8)
    rows = PackedRows.of([8, 8, 8])
    hidden_NC = policy(token_ids_BS.flatten(), rows.position_ids_N, Expanded(rows=rows)).hidden_NC
    assert torch.equal(policy.logits(token_ids_BS).flatten(0, 1), policy.project(hidden_NC))


@torch.no_grad()
def test_chosen_experts_of_every_layer() -> None:
    rows = PackedRows.of([6, 5])
    policy = tiny_policy(num_hidden_layers=4, n_routed_experts=8)
    experts_MNK = policy(draw_tokens(11), rows.position_ids_N, Expanded(rows=rows)).experts_MNK
    assert experts_MNK.shape == (3, 11, 2)
    assert len(policy.moe_layers) == policy.config.num_moe_layers == 3
    for experts_NK in experts_MNK:
        assert all(len(set(row)) == 2 for row in experts_NK.tolist()), "an expert was chosen twice for one token"
        assert experts_NK.shape == (11, 2)
        assert 0 <= int(experts_NK.min()) <= int(experts_NK.max()) < 8
    dense = tiny_policy(first_k_dense_replace=3)
    assert dense(draw_tokens(11), rows.position_ids_N, Expanded(rows=rows)).experts_MNK is None
    assert dense.moe_layers == []


def test_gradient_reaches_every_weight() -> None:
    policy = tiny_policy(num_nextn_predict_layers=2, q_lora_rank=24)
    next_token_loss(policy, draw_tokens(60), PackedRows.of([20] * 3), mtp_weight=0.3).total.backward()
    assert [name for name, weight in policy.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@torch.no_grad()
def test_bf16_keeps_correction_biases_and_logits_in_fp32() -> None:
    policy = tiny_policy()
    exact = policy.logits(draw_tokens(2, 10))
    policy.moe_layers[0].gate.e_score_correction_bias.fill_(0.1001)
    assert cast_weights(policy, torch.bfloat16) is policy
    assert policy.dtype == torch.bfloat16
    assert {weight.dtype for weight in policy.parameters()} == {torch.bfloat16}
    assert policy.moe_layers[0].gate.e_score_correction_bias.unique().item() == torch.tensor(0.1001).item()
    hidden_NC = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits = policy.project(hidden_NC)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, hidden_NC.float() @ policy.lm_head.weight.float().T, atol=1e-5)
    policy.moe_layers[0].gate.e_score_correction_bias.zero_()
    rounded = policy.logits(draw_tokens(2, 10))
    assert rounded.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(rounded, exact, dim=-1).median() > 0.99
