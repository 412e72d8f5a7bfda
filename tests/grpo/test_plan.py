"""The plan: its figures against a real update's, its suggestions against themselves, and the command."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from grpo.batch import make_batches, make_rows
from grpo.cli import app
from grpo.config import Config, ConfigError
from grpo.distributed import Ranks
from grpo.optimizers import make_optimizer
from grpo.plan import (
    CONTEXT_BYTES,
    Device,
    Estimate,
    estimate,
    micro_batches,
)
from grpo.plan_changes import largest_micro_batch, suggest
from grpo.plan_text import plan_recipe
from grpo.types import Batch, Group
from grpo.update import update
from policy import Policy, PolicyConfig, cast_weights
from policy.lora import add_adapters
from rewards import Problem, RewardResult
from rollouts import Completion
from tests.grpo.rollouts import minibatches_of, tiny_config
from tests.live_memory import LiveBytes
from tests.policies import tiny_llama, tiny_policy
from tests.recipes import write_recipe

GIB = 2**30
PROMPT, LENGTH = 8, 24
QWEN05 = PolicyConfig(
    model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
    num_attention_heads=14, num_key_value_heads=2, head_dim=64, max_position_embeddings=32768, tie_word_embeddings=True,
)  # fmt: skip
STEP: dict[str, Any] = {
    "dtype": "bfloat16", "device": "auto", "prompts_per_step": 16, "num_generations": 16,
    "max_completion_length": 512, "max_tokens_per_micro_batch": 32768, "evaluation": {"num_problems": 0},
}  # fmt: skip
CARD = Device(name="a card", memory=80 * GIB, is_gpu=True)


def full_groups() -> list[Group]:
    """Two problems, eight completions each, of full length or a little less, drawn at random."""
    generator = torch.Generator().manual_seed(0)

    def completion(length: int) -> Completion:
        ids = torch.randint(3, 61, (length,), generator=generator).tolist()
        return Completion(token_ids=ids, logprobs=[-4.0] * length, finish_reason="length", policy_version=0)

    return [
        Group(
            problem=Problem(id=str(p), prompt="?"),
            prompt_ids=list(range(3, 3 + PROMPT)),
            completions=[completion(LENGTH - less) for less in (2, 1, 1, 0, 0, 0, 0, 0)],
            texts=[""] * 8,
            results=[RewardResult(reward=float(g % 2), breakdown={}) for g in range(8)],
        )
        for p in range(2)
    ]


UPDATES: dict[str, tuple[Policy, dict[str, Any]]] = {
    "llama": (tiny_llama(hidden_size=64, intermediate_size=160, num_hidden_layers=2), {}),
    "deepseek, bf16": (tiny_policy(hidden_size=64, num_hidden_layers=2), {"dtype": "bfloat16"}),
    "one micro-batch": (
        tiny_llama(hidden_size=64, intermediate_size=160, num_hidden_layers=2),
        {"max_tokens_per_micro_batch": 4096},
    ),
    "full recomputation": (tiny_llama(hidden_size=64, num_hidden_layers=2), {"activation_recomputation": "full"}),
    "8 bits": (tiny_llama(hidden_size=128, num_hidden_layers=2), {"optimizer": "adamw_8bit", "dtype": "bfloat16"}),
    "adapters": (tiny_llama(hidden_size=64, num_hidden_layers=2), {"lora": {"r": 4}}),
}


def measure_update(case: str, *, share_prompts: bool) -> tuple[int, Estimate, list[Batch]]:
    """Most bytes held in an update beside the weights, what the plan says, and the micro-batches."""
    policy, changes = UPDATES[case]
    config = tiny_config(
        **{
            "prompts_per_step": 2,
            "num_generations": 8,
            "max_completion_length": LENGTH,
            "max_tokens_per_micro_batch": 130,
            "share_prompts": share_prompts,
        }
        | changes
    )
    policy = cast_weights(copy.deepcopy(policy), getattr(torch, config.dtype))
    policy.recomputation = config.activation_recomputation
    if config.lora is not None:
        add_adapters(policy, config.lora, seed=0)
    groups = full_groups()
    rows = make_rows(groups, [[1.0, -1.0] * 4] * 2, mask_truncated=False)
    minibatches = minibatches_of(rows, config.max_tokens_per_micro_batch, share_prompts=share_prompts)

    def two_steps() -> None:
        optimizer = make_optimizer(policy, config)
        for _ in range(2):  # in the second there are moments
            update(policy, optimizer, minibatches, learning_rate=1e-3, config=config, ranks=Ranks(cpu=True))

    measured = LiveBytes().measure(two_steps).peak
    device = Device(name="here", memory=8 * GIB, is_gpu=False)
    return measured, estimate(config, policy.config, device, prompt_tokens=PROMPT), list(minibatches[0].batches)


@pytest.mark.parametrize("case", UPDATES)
def test_a_real_update_takes_what_is_said(case: str) -> None:
    measured, said, batches = measure_update(case, share_prompts=False)
    assert said.micro_batches.count == len(batches)
    assert said.micro_batches.tokens == max(len(batch.rows.lengths) * batch.rows.longest for batch in batches)
    # Weights were there before; nothing was sampled.
    assert said.update_peak - said.share.weights - said.cache == pytest.approx(measured, rel=0.1)


def test_an_update_that_shares_prompts_takes_less_than_is_said() -> None:
    measured, said, batches = measure_update("one micro-batch", share_prompts=True)
    assert all(batch.rows.shared is not None for batch in batches)
    room = said.update_peak - said.share.weights - said.cache
    assert 0.7 * room < measured < room


def plan_of(device: Device = CARD, **changes: Any) -> Estimate:
    return estimate(tiny_config(**STEP | changes), QWEN05, device, prompt_tokens=64)


def test_what_a_weight_takes() -> None:
    count = 494032768  # Qwen2.5-0.5B's
    plain = plan_of()
    assert plain.parameters.total == count
    assert (plain.share.weights, plain.share.masters, plain.share.moments, plain.share.gradients) == (
        2 * count,
        4 * count,
        8 * count,
        4 * count,
    )
    fp32 = plan_of(dtype="float32")
    assert (fp32.share.weights, fp32.share.masters, fp32.share.moments) == (4 * count, 0, 8 * count)
    assert plan_of(optimizer="adamw_8bit").share.moments == pytest.approx(2.03125 * count)
    offloaded = plan_of(offload_optimizer=True)
    assert (offloaded.share.masters, offloaded.share.moments, offloaded.share.host) == (0, 0, 12 * count)
    assert (plan_of(beta=0.1).share.reference, plan_of(beta=0.1, offload_ref_model=True).share.reference) == (
        2 * count,
        0,
    )
    adapters = plan_of(lora={"r": 8, "target_modules": ["q_proj"]}, beta=0.1)
    assert adapters.parameters.trained == 24 * 8 * (896 + 896)
    assert (adapters.share.masters, adapters.share.reference) == (4 * 24 * 8 * (896 + 896), 0)


def test_the_cache_is_the_engines() -> None:
    # 256 sequences and 16 prompts of 36 blocks and one to spare, a quarter more; 2 bytes of 256 numbers in 24 layers.
    assert plan_of().cache == 272 * 37 * 5 // 4 * 16 * 2 * 256 * 24
    assert plan_of(engine={"cache_gib": 0.5}).cache == GIB // 2
    small = Device(name="small", memory=8 * GIB + CONTEXT_BYTES, is_gpu=True)
    assert plan_of(small, max_completion_length=4096).cache == int(0.4 * (8 * GIB - 14 * 494032768))


@pytest.mark.parametrize(
    ("shape_changes", "bar_gib"),
    [
        (
            {
                "max_tokens_per_micro_batch": 16384,
                "activation_recomputation": "selective",
                "residual_in_fp32": False,  # which takes 1.3 GiB
            },
            22.9,
        ),
        ({"max_tokens_per_micro_batch": 8192}, 22.9),
        ({"prompts_per_step": 1, "num_generations": 8, "max_completion_length": 16384}, 40.0),
    ],
)
def test_the_shapes_that_must_fit_do(shape_changes: dict[str, Any], bar_gib: float) -> None:
    assert plan_of(**shape_changes).peak / GIB < bar_gib


def test_micro_batches_are_cut_as_the_update_cuts_them() -> None:
    config = tiny_config(**STEP)
    assert (micro_batches(config, 64).rows, micro_batches(config, 64).count) == (56, 5)
    assert micro_batches(config, 64, num_processes=4).count == 2
    long = tiny_config(**STEP | {"max_completion_length": 40000})
    assert (micro_batches(long, 64).rows, micro_batches(long, 64).count) == (1, 256)


def test_prompts_are_shared_as_the_update_shares_them() -> None:
    """Groups of full completions: the micro-batches and tokens of `make_batches`."""
    config = tiny_config(prompts_per_step=2, num_generations=8, max_completion_length=LENGTH)
    groups = [replace(group, completions=[group.completions[-1]] * 8) for group in full_groups()]
    rows = make_rows(groups, [[1.0] * 8] * 2, mask_truncated=False)
    for most in (130, 300, 4096):
        said = estimate(
            config.model_copy(update={"max_tokens_per_micro_batch": most}), tiny_llama().config,
            Device(name="here", memory=8 * GIB, is_gpu=False), prompt_tokens=PROMPT,
        )  # fmt: skip
        shared = [batch.rows.shared for batch in make_batches(rows, most)]
        assert said.sharing is not None
        assert (said.sharing.count, said.sharing.alone) == (len(shared), 16 * (PROMPT + LENGTH))
        assert said.sharing.tokens == sum(len(one.token_U) for one in shared if one is not None)
    assert said.sharing.activations < said.pass_peak.activations, "one micro-batch, of fewer tokens"
    assert plan_of().sharing is None, "a GPU gains nothing by prompts of 64 tokens before 512"
    assert plan_of(max_completion_length=64).sharing is not None
    assert plan_of(max_completion_length=64, share_prompts=False).sharing is None


@pytest.mark.parametrize("memory_gib", [12, 16, 24, 40])
def test_suggestions_lead_to_what_fits(memory_gib: int) -> None:
    device = Device(name="a card", memory=memory_gib * GIB, is_gpu=True)
    current = plan_of(device)
    assert not device.fits(current.peak)
    suggestions = suggest(current, QWEN05, device, prompt_tokens=64)
    assert device.fits(suggestions[-1].together.peak)
    peaks = [current.peak, *(one.together.peak for one in suggestions)]
    assert peaks == sorted(peaks, reverse=True)
    assert not any(device.fits(one.together.peak) for one in suggestions[:-1])


def test_the_largest_micro_batch_fits_and_one_row_more_does_not() -> None:
    device = Device(name="a card", memory=24 * GIB, is_gpu=True)
    current = plan_of(device)
    most = largest_micro_batch(current, QWEN05, device, prompt_tokens=64)
    assert most is not None
    for rows, fits in ((most.rows, True), (most.rows + 1, False)):
        assert device.fits(plan_of(device, max_tokens_per_micro_batch=rows * 576).peak) is fits
    tiny = Device(name="a small card", memory=8 * GIB, is_gpu=True)
    assert largest_micro_batch(plan_of(tiny), QWEN05, tiny, prompt_tokens=64) is None


def test_a_gpu_that_is_not_here_needs_its_size() -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(ConfigError, match="--memory-gib"):
        Device.detect(is_gpu=True)
    assert Device.detect(is_gpu=False).memory > GIB


def write_model(folder: Path, shape: PolicyConfig) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape.to_hf()))
    return folder


def test_the_command_needs_a_config_json_and_no_weights(tmp_path: Path) -> None:
    changes = {key: value for key, value in STEP.items() if key != "device"}
    recipe = write_recipe(
        tmp_path, base=None, model=str(write_model(tmp_path / "model", QWEN05)), device="auto",
        **changes | {"dataset": {"path": "absent.jsonl"}},
    )  # fmt: skip
    arguments = ["plan", str(recipe), "--memory-gib", "24", "--device-name", "RTX", "--prompt-tokens", "64"]
    tight = CliRunner().invoke(app, arguments)
    assert tight.exit_code == 1, tight.output
    assert "RTX, 24.0 GiB" in tight.output
    assert "parameters: 494.0 M" in tight.output
    assert "does not fit" in tight.output
    assert "max_tokens_per_micro_batch=8064" in tight.output
    assert tight.output.rstrip().endswith("fits")
    roomy = CliRunner().invoke(app, [*arguments, "max_tokens_per_micro_batch=4096"])
    assert roomy.exit_code == 0, roomy.output
    assert "fits: " in roomy.output


def test_a_base_model_is_planned_with_its_own_prompts(tmp_path: Path) -> None:
    told = plan_recipe(write_recipe(tmp_path), [])
    assert told.fits
    assert "rough" in told.text
    assert "2 rows x" not in told.text
    assert "1 of at most 8 rows x" in told.text


@pytest.mark.parametrize(
    ("override", "message"),
    [("lora={target_modules: [nothing]}", "lora.target_modules names nothing"), ("nmae=x", "unknown key")],
)
def test_what_cannot_be_planned_is_one_line(override: str, message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", str(write_recipe(tmp_path)), override])
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_offloading_goes_with_adamw_alone() -> None:
    with pytest.raises(ValueError, match="offload_optimizer goes with optimizer: adamw"):
        Config.model_validate(tiny_config().model_dump() | {"optimizer": "adamw_8bit", "offload_optimizer": True})
