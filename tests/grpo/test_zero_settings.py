"""What DeepSpeed is told: the launcher's file, the recipe where both have a word for it, no silent mix of the two."""

import json
import re
from pathlib import Path

import pytest
import yaml
from accelerate.utils import DeepSpeedPlugin

from grpo.config import ConfigError
from grpo.distributed import Ranks
from grpo.layout import Whole
from grpo.optimizers import make_optimizer
from grpo.zero_settings import settings_of
from tests.grpo.rollouts import tiny_config
from tests.policies import tiny_policy

ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"
ZERO = {"zero_optimization": {"stage": 3}}


@pytest.mark.parametrize("stage", [2, 3])
def test_our_files_leave_to_the_recipe_what_is_its(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    file = yaml.safe_load((ACCELERATE / f"zero{stage}.yaml").read_text())
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(file["deepspeed_config"]["zero_stage"]))
    settings = settings_of(DeepSpeedPlugin().deepspeed_config, tiny_config(max_grad_norm=0.5, dtype="bfloat16"))
    assert settings["zero_optimization"]["stage"] == stage
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"]["enabled"] is True
    assert "auto" not in json.dumps(settings)


def test_a_file_of_deepspeeds_own_settings_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = {"stage": 3, "stage3_prefetch_bucket_size": 12_345, "reduce_bucket_size": "auto"}
    given = {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "prescale_gradients": True,
    }
    (tmp_path / "ds.json").write_text(json.dumps(given | {"train_batch_size": 64}))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    settings = settings_of(DeepSpeedPlugin().deepspeed_config, tiny_config())
    assert settings["zero_optimization"]["stage3_prefetch_bucket_size"] == 12_345
    assert settings["prescale_gradients"] is True
    assert settings["train_micro_batch_size_per_gpu"] == settings["gradient_accumulation_steps"] == 1
    assert not {"train_batch_size", "reduce_bucket_size"} & {*settings, *settings["zero_optimization"]}
    assert settings["bf16"]["enabled"] is False


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({"optimizer": {"type": "Lion"}}, {}, "DeepSpeed's optimizer: leave it out; learning_rate and the adam_ keys"),
        ({"gradient_clipping": 0.1}, {}, "gradient_clipping: leave it out; max_grad_norm in the recipe says it"),
        ({"fp16": {"enabled": True}}, {}, "fp16: leave it out; dtype in the recipe says it"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            {},
            "offload_optimizer_device must be none in the launcher's file, got cpu",
        ),
        ({}, {"activation_recomputation": "selective"}, "set activation_recomputation to none or full, got selective"),
        ({}, {"optimizer": "adamw_8bit"}, "in fp32 on the device; set optimizer: adamw"),
        ({}, {"offload_optimizer": True}, "in fp32 on the device; set offload_optimizer: false"),
    ],
)
def test_what_the_recipe_says_or_nobody_does_is_refused(given: dict, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings_of(ZERO | given, tiny_config(**changes))


def test_an_optimizer_over_pieces_is_the_plain_one() -> None:
    with pytest.raises(ConfigError, match="set optimizer: adamw"):
        make_optimizer(tiny_policy(), tiny_config(optimizer="adamw_8bit"), Whole())


def test_zero_2_makes_single_outputs_again() -> None:
    config = tiny_config(activation_recomputation="selective")
    assert settings_of({"zero_optimization": {"stage": 2}}, config)["zero_optimization"] == {"stage": 2}


def test_another_stage_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "1")
    with pytest.raises(ConfigError, match=r"zero_stage must be 2 or 3 in the launcher's file, got 1"):
        Ranks(cpu=True)
