"""Formulas of memory against what is really held, byte by byte, on the CPU; and against figures read on a GPU."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from policy import PackedRows, Policy, PolicyConfig, cast_weights
from policy.attention import Expanded
from policy.footprint import PassSize, inference_bytes, kept_bytes, layer_pieces, peak_of_pass
from policy.linear import has_tiles
from policy.logprobs import token_logprobs
from policy.lora import LoraConfig, add_adapters
from policy.parameter_count import count_parameters
from policy.recompute import Recomputation
from tests.live_memory import LiveBytes
from tests.policies import TINY_QWEN3_MOE, tiny_llama, tiny_policy

WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
EXPERTS: dict[str, Any] = {**WIDE, "moe_intermediate_size": 32}
EVEN, UNEVEN, LONG = (16,) * 16, (14, 15, 16, 16) * 4, (300, 300)
KINDS = get_args(Recomputation)


def in_bf16_throughout(policy: Policy) -> Policy:
    """The residual stream too."""
    policy.residual_in_fp32 = False
    return cast_weights(policy, torch.bfloat16)


CASES: dict[str, tuple[Policy, tuple[int, ...], LoraConfig | None]] = {
    "llama": (tiny_llama(**WIDE), EVEN, None),
    "llama, unequal rows": (tiny_llama(**WIDE), UNEVEN, None),
    "llama, long rows": (tiny_llama(**WIDE), LONG, None),
    "llama, tied, bf16": (cast_weights(tiny_llama(tie_word_embeddings=True, **WIDE), torch.bfloat16), EVEN, None),
    "llama, adapters": (tiny_llama(**WIDE), EVEN, LoraConfig(r=4)),
    "llama, some adapters": (tiny_llama(**WIDE), EVEN, LoraConfig(r=4, target_modules=("q_proj", "v_proj"))),
    "qwen3": (tiny_llama(model_type="qwen3", **WIDE), EVEN, None),
    "qwen3_moe": (tiny_llama(**{**EXPERTS, **TINY_QWEN3_MOE, "moe_intermediate_size": 32}), EVEN, None),
    "llama, bf16 throughout": (in_bf16_throughout(tiny_llama(**WIDE)), EVEN, None),
    "deepseek": (tiny_policy(**EXPERTS), EVEN, None),
    "deepseek, query latent": (tiny_policy(q_lora_rank=24, **EXPERTS), UNEVEN, None),
    "deepseek, adapters": (tiny_policy(**EXPERTS), EVEN, LoraConfig(r=4)),
    "deepseek, bf16": (cast_weights(tiny_policy(**EXPERTS), torch.bfloat16), EVEN, None),
}


def size_of(policy: Policy, lengths: tuple[int, ...], kind: Recomputation, lora: LoraConfig | None) -> PassSize:
    return PassSize(
        num_tokens=len(lengths) * max(lengths),
        longest=max(lengths),
        itemsize=policy.dtype.itemsize,
        residual_in_fp32=policy.residual_in_fp32,
        is_gpu=False,
        has_tiles=has_tiles(),
        is_ragged=len(set(lengths)) > 1,
        recomputation=kind,
        lora=lora,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_formulas_are_within_a_tenth_of_what_is_held(case: str, kind: Recomputation) -> None:
    policy, lengths, lora = CASES[case]
    if lora is not None and all(weight.requires_grad for weight in policy.parameters()):
        add_adapters(policy, lora, seed=0)
    policy.recomputation = kind
    policy.zero_grad()
    rows = PackedRows.of(lengths)
    token_ids_N = torch.randint(3, 61, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    size = size_of(policy, lengths, kind, lora)
    with LiveBytes() as forward:
        output = policy(token_ids_N, rows.position_ids_N, Expanded(rows=rows))
        kept = forward.now
    del output
    assert kept_bytes(policy.config, size) == pytest.approx(kept, rel=0.07)

    def whole_pass() -> None:
        got = token_logprobs(policy, token_ids_N, rows, rows.position_ids_N > 2)
        (got.logprobs_N.sum() + got.entropy_N.sum()).backward()

    peak = LiveBytes().measure(whole_pass).peak
    assert peak_of_pass(policy.config, size).total == pytest.approx(peak, rel=0.1)


def test_a_plain_layer_is_kept_to_the_byte() -> None:
    policy, lengths, _ = CASES["llama"]
    config, size = policy.config, replace(size_of(policy, lengths, "none", None), has_tiles=False)
    width, heads, inner = 64, 4 * 16, 160
    norms = 2 * 2 * 4 * width  # each: input, output
    attention = 4 * (2 * heads + 2 * heads // 2) + 4 * 4 * 16  # queries, output, keys, values; weights of 4 heads
    assert sum(piece.bytes_per_token for piece in layer_pieces(config, 0, size)) == norms + attention + 3 * 4 * inner


QWEN05 = PolicyConfig(
    model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
)  # fmt: skip
DSV3_05 = PolicyConfig(
    vocab_size=32768, hidden_size=768, intermediate_size=2048, moe_intermediate_size=256, num_hidden_layers=12,
    num_attention_heads=12, n_routed_experts=64, num_experts_per_tok=6, kv_lora_rank=512, qk_rope_head_dim=64,
    qk_nope_head_dim=128, v_head_dim=128, max_position_embeddings=4096,
)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "kind", "is_ragged", "measured_gib"),
    [
        (QWEN05, "none", False, 31.6), (QWEN05, "selective", False, 22.1), (QWEN05, "full", False, 4.4),
        (QWEN05, "none", True, 31.6), (DSV3_05, "none", False, 21.8), (DSV3_05, "selective", False, 12.4),
        (DSV3_05, "full", False, 4.0), (DSV3_05, "none", True, 23.0),
    ],
)  # fmt: skip
def test_formulas_agree_with_an_h100(shape: PolicyConfig, kind: Recomputation, is_ragged: bool, measured_gib: float):
    """The table of docs/policy.md: 32 rows of 1,024 tokens; in it, the gradients of the pass before are not yet freed
    when the weights are counted, but are when the pass begins. The residual stream was in bf16 then.
    """
    parameters = count_parameters(shape)
    size = PassSize(
        num_tokens=32768, longest=1024, itemsize=2, residual_in_fp32=False, is_gpu=True, is_ragged=is_ragged,
        recomputation=kind,
    )  # fmt: skip
    ours = 2 * parameters.total + peak_of_pass(shape, size, parameters).total
    assert ours / 2**30 == pytest.approx(measured_gib, rel=0.05)


def test_parameters_are_those_of_the_released_model() -> None:
    shape = PolicyConfig(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        num_attention_heads=128, n_routed_experts=256, num_experts_per_tok=8, n_group=8, topk_group=4,
        kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128,
        first_k_dense_replace=3, max_position_embeddings=163840,
    )  # fmt: skip
    counts = count_parameters(shape)
    assert counts.total == pytest.approx(671e9, rel=1e-3)  # DeepSeek-V3, section 4.2: 671 B, 37 B for each token
    assert counts.active - counts.embedding == pytest.approx(37e9, rel=0.02)
    assert counts.trained == counts.total


@pytest.mark.parametrize("policy", [tiny_llama(), tiny_policy(num_nextn_predict_layers=1)])
def test_parameters_are_those_of_the_policy(policy: Policy) -> None:
    counts = count_parameters(policy.config)
    assert counts.total == counts.trained == sum(weight.numel() for weight in policy.parameters())
    assert counts.layers == tuple(sum(w.numel() for w in layer.parameters()) for layer in policy.layers)
    lora = LoraConfig(r=4)
    adapted = count_parameters(policy.config, lora)
    add_adapters(policy, lora, seed=0)
    assert adapted.trained == sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    assert adapted.embedding == 0


def test_a_pass_without_gradients_holds_less_than_is_said() -> None:
    policy, lengths, _ = CASES["qwen3"]
    rows, ids_N = PackedRows.of(lengths), torch.randint(3, 61, (sum(lengths),))
    with torch.no_grad():
        live = LiveBytes().measure(lambda: policy(ids_N, rows.position_ids_N, Expanded(rows=rows)))
    said = inference_bytes(policy.config, size_of(policy, lengths, "none", None))
    assert 0.4 * said < live.peak < 1.1 * said
