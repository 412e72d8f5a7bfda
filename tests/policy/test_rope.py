"""Rotary embedding against its definitions, spelled out pair by pair and in fp64."""

import math

import pytest
import torch

from policy import PolicyConfig
from policy.rope import attention_scale, rope_frequencies, rotate, rotation_of
from tests.policies import tiny_llama, tiny_policy

WIDTH, THETA, OLD_CONTEXT = 16, 100.0, 64
YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "beta_slow": 1.0,
    "original_max_position_embeddings": OLD_CONTEXT,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": OLD_CONTEXT,
}  # fmt: skip


def grouped(scaling: dict[str, object] | None = None) -> PolicyConfig:
    shape = tiny_llama().config.model_dump() | {"head_dim": WIDTH, "rope_theta": THETA, "rope_scaling": scaling}
    return PolicyConfig.model_validate(shape)


def latent(scaling: dict[str, object] | None = None) -> PolicyConfig:
    shape = {"qk_rope_head_dim": WIDTH, "rope_theta": THETA, "rope_scaling": scaling}
    return PolicyConfig.model_validate(tiny_policy().config.model_dump() | shape)


@pytest.mark.parametrize("family", [grouped, latent])
def test_rotation_is_multiplication_by_a_complex_number(family) -> None:
    config, positions = family(), torch.tensor([0, 1, 7, 100])
    x_NHP = torch.randn(4, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x_NHP.float(), rotation_of(positions, config))
    for n, position in enumerate(positions.tolist()):
        for i in range(WIDTH // 2):
            a, b = (2 * i, 2 * i + 1) if family is latent else (i, i + WIDTH // 2)
            angle = torch.tensor(position * THETA ** (-2 * i / WIDTH), dtype=torch.float64)
            product = torch.complex(x_NHP[n, :, a], x_NHP[n, :, b]) * torch.exp(1j * angle)
            assert torch.allclose(turned[n, :, a], product.real.float(), atol=1e-5)
            assert torch.allclose(turned[n, :, b], product.imag.float(), atol=1e-5)


@pytest.mark.parametrize("family", [grouped, latent])
def test_gradient_turns_back_and_leaves_the_numbers_before_alone(family) -> None:
    config, positions = family(), torch.tensor([0, 1, 7, 100])
    generator = torch.Generator().manual_seed(0)
    x, back = (torch.randn(4, 3, WIDTH + 5, generator=generator) for _ in range(2))
    rotation = rotation_of(positions, config)
    turned = rotate(x.requires_grad_(), rotation)
    turned.backward(back)
    assert torch.equal(turned[..., :5], x[..., :5])
    assert torch.equal(x.grad[..., :5], back[..., :5])
    # A rotation by the gradient's own angle undoes itself: its transpose is its inverse.
    assert torch.allclose(rotate(x.grad, rotation), back, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(rotate(x, rotation), turned)


def test_frequencies_without_and_with_linear_scaling() -> None:
    plain = [THETA ** (-2 * i / WIDTH) for i in range(WIDTH // 2)]
    assert rope_frequencies(grouped()).tolist() == pytest.approx(plain)
    linear = rope_frequencies(grouped({"rope_type": "linear", "factor": 4.0}))
    assert linear.tolist() == pytest.approx([each / 4 for each in plain])


def test_llama3_keeps_fast_pairs_stretches_slow_ones_and_blends_between() -> None:
    """`apply_scaling` of Llama 3.1's reference code (models/llama3/reference_impl/model.py)."""
    wanted, kinds = [], set()
    for i in range(WIDTH // 2):
        frequency = THETA ** (-2 * i / WIDTH)
        wavelength = 2 * math.pi / frequency
        if wavelength < OLD_CONTEXT / 4.0:
            wanted.append(frequency)
            kinds.add("kept")
        elif wavelength > OLD_CONTEXT / 1.0:
            wanted.append(frequency / 8.0)
            kinds.add("stretched")
        else:
            smooth = (OLD_CONTEXT / wavelength - 1.0) / (4.0 - 1.0)
            wanted.append((1 - smooth) * frequency / 8.0 + smooth * frequency)
            kinds.add("blended")
    assert kinds == {"kept", "stretched", "blended"}
    assert rope_frequencies(grouped(LLAMA3)).tolist() == pytest.approx(wanted)


def test_yarn_frequencies_are_those_of_the_official_code() -> None:
    """`precompute_freqs_cis` of DeepSeek-V3's `inference/model.py`, one pair at a time."""

    def correction(turns: float) -> float:
        return WIDTH * math.log(OLD_CONTEXT / (turns * 2 * math.pi)) / (2 * math.log(THETA))

    low, high = max(math.floor(correction(8.0)), 0), min(math.ceil(correction(1.0)), WIDTH - 1)
    assert 0 <= low < high - 1 < WIDTH // 2, "no pair is blended"
    wanted = []
    for i in range(WIDTH // 2):
        frequency = THETA ** (-2 * i / WIDTH)
        smooth = 1 - min(max((i - low) / (high - low), 0), 1)
        wanted.append(frequency / 4.0 * (1 - smooth) + frequency * smooth)
    for family in (grouped, latent):
        assert rope_frequencies(family(YARN)).tolist() == pytest.approx(wanted)


def test_yarn_lets_scores_grow_in_the_rotation_or_in_the_scale() -> None:
    """YaRN, equation 22, for the paper's form; DeepSeek moves `mscale_all_dim` of it into the softmax's scale."""
    growth, position = 0.1 * math.log(4.0) + 1, torch.tensor([0])
    assert float(rotation_of(position, grouped(YARN)).cos[0, 0]) == pytest.approx(growth)
    assert attention_scale(grouped(YARN)) == pytest.approx(WIDTH**-0.5)
    given = rotation_of(position, grouped({**YARN, "attention_factor": 1.5}))
    assert float(given.cos[0, 0]) == pytest.approx(1.5)

    width = latent().qk_head_dim
    assert attention_scale(latent()) == pytest.approx(width**-0.5)
    deepseek = latent({**YARN, "mscale": 1.0, "mscale_all_dim": 1.0})
    assert float(rotation_of(position, deepseek).cos[0, 0]) == pytest.approx(1.0)
    assert attention_scale(deepseek) == pytest.approx(width**-0.5 * growth**2)
    uneven = latent({**YARN, "mscale": 1.0, "mscale_all_dim": 0.5})
    half = 0.05 * math.log(4.0) + 1
    assert float(rotation_of(position, uneven).cos[0, 0]) == pytest.approx(growth / half)
    assert attention_scale(uneven) == pytest.approx(width**-0.5 * half**2)
