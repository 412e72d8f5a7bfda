"""Adapters: nothing at first, merged what they are unmerged, and peft's once they are files.

Shapes: B rows, S tokens.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import policy as policies
from policy import PackedRows, Policy
from policy.logprobs import token_logprobs
from policy.lora import LoraConfig, LoraError, adapters, add_adapters, load_adapters, save_adapters
from tests.policies import hidden_over_cache, tiny_llama, tiny_policy

CONFIG = LoraConfig(r=3, alpha=7)
IDS_BS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
POLICIES = {"latent": tiny_policy, "grouped_query": tiny_llama}


def adapted(kind: str, config: LoraConfig = CONFIG) -> Policy:
    """With adapters that do something."""
    policy = POLICIES[kind]()
    add_adapters(policy, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapters(policy).values():
            layer.lora_B.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
    return policy


def logits(policy: Policy) -> Tensor:
    with torch.no_grad():
        return policy.logits(IDS_BS)


@pytest.mark.parametrize("kind", POLICIES)
def test_new_adapters_change_nothing_and_are_all_that_is_trained(kind: str) -> None:
    policy = POLICIES[kind]()
    before = logits(policy)
    add_adapters(policy, CONFIG, seed=0)
    assert torch.equal(logits(policy), before)
    trained = {name for name, weight in policy.named_parameters() if weight.requires_grad}
    assert trained
    assert all(name.endswith(("lora_A", "lora_B")) for name in trained)
    rows = PackedRows.of([9, 9])
    token_logprobs(policy, IDS_BS.flatten(), rows, rows.position_ids_N > 0).logprobs_N.sum().backward()
    for name, weight in policy.named_parameters():
        assert (weight.grad is not None) == (name in trained)
    assert all(layer.lora_B.grad.any() for layer in adapters(policy).values())  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", POLICIES)
def test_saved_weights_are_merged(kind: str, tmp_path: Path) -> None:
    policy = adapted(kind)
    policies.save(policy, tmp_path)
    merged = policies.load(tmp_path)
    assert not adapters(merged)
    assert (logits(policy) - logits(POLICIES[kind]())).abs().max() > 0.1
    assert torch.allclose(logits(merged), logits(policy), atol=1e-4)


@pytest.mark.parametrize("kind", POLICIES)
def test_decoding_over_the_cache_uses_the_adapters(kind: str) -> None:
    policy = adapted(kind)
    over_cache = policy.project(hidden_over_cache(policy, IDS_BS, num_prefilled=4).flatten(0, 1))
    assert torch.allclose(over_cache.view(2, 9, -1), logits(policy), atol=1e-4)


@pytest.mark.parametrize("kind", POLICIES)
def test_adapters_come_back_from_their_file(kind: str, tmp_path: Path) -> None:
    policy, other = adapted(kind), POLICIES[kind]()
    save_adapters(policy, tmp_path, CONFIG, "base")
    add_adapters(other, CONFIG, seed=5)
    load_adapters(other, tmp_path)
    assert torch.equal(logits(other), logits(policy))


@pytest.mark.peer
@pytest.mark.parametrize("kind", POLICIES)
def test_peft_loads_the_adapters_onto_the_model_in_transformers(kind: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    policies.save(POLICIES[kind](), tmp_path / "base")
    policy = adapted(kind)
    save_adapters(policy, tmp_path / "adapter", CONFIG, str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert (theirs(IDS_BS).logits - logits(policy)).abs().max() < 1e-4


def test_only_the_layers_named_are_adapted() -> None:
    names = adapters(adapted("grouped_query", LoraConfig(target_modules=("q_proj", "down_proj"))))
    assert set(names) == {f"layers.{k}.{name}" for k in range(3) for name in ("self_attn.q_proj", "mlp.down_proj")}


def test_beside_experts_attention_alone_is_adapted() -> None:
    names = adapters(adapted("latent"))
    assert len(names) == 3 * 4
    assert all(".self_attn." in name for name in names)


def test_a_layer_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(LoraError, match=r"query; this model takes down_proj, gate_proj, k_proj.*v_proj"):
        add_adapters(tiny_llama(), LoraConfig(target_modules=("q_proj", "query")), seed=0)


def test_adapters_of_other_layers_or_ranks_are_refused(tmp_path: Path) -> None:
    save_adapters(adapted("latent"), tmp_path, CONFIG, None)
    with pytest.raises(LoraError, match="other layers"):
        load_adapters(adapted("latent", LoraConfig(target_modules=("q_proj",))), tmp_path)
    with pytest.raises(LoraError, match=r"\[3, 32\] there and \[4, 32\] here"):
        load_adapters(adapted("latent", LoraConfig(r=4)), tmp_path)
