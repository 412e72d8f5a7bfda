"""What one of several ranks holds: the table of docs/scaling.md, launchers' files, and what does not go together.

Bytes that ranks really hold are compared in test_sharding.py.
"""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner

from grpo.cli import app
from grpo.config import ConfigError
from grpo.plan import GIB, Device, estimate
from grpo.plan_changes import suggest
from grpo.shares import BUCKET, Share, Spread, Way, read_launcher_file, share_of
from tests.grpo.rollouts import tiny_config
from tests.grpo.test_plan import QWEN05, STEP, write_model
from tests.policies import tiny_policy
from tests.recipes import write_recipe

ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"
COUNT, ROOT = 494032768, 151936 * 896 + 896
"""Of Qwen2.5-0.5B: parameters, and of them embedding, which is the head, and final norm."""


def share(way: Way, num_processes: int = 8, **changes: Any) -> Share:
    config = tiny_config(**STEP | changes)
    return share_of(config, QWEN05, Spread(way=way, num_processes=num_processes), is_gpu=True)


def test_the_table_of_the_page() -> None:
    """Weights, copy to sample from, gradients, masters, moments; one row or number a tensor may be left over."""
    eighth = COUNT / 8
    for way, weights, sampler, piece in (
        ("whole", 2 * COUNT, 0, COUNT),
        ("zero2", 2 * COUNT, 0, eighth),
        ("fsdp2", 4 * eighth, 2 * COUNT, eighth),
        ("zero3", 2 * eighth, 2 * COUNT, eighth),
    ):
        found = share(way)
        assert (found.weights, found.sampler) == (pytest.approx(weights, rel=1e-4), sampler)
        assert (found.gradients, found.moments) == (
            pytest.approx(4 * piece, rel=1e-4),
            pytest.approx(8 * piece, rel=1e-4),
        )
        assert found.masters == (0 if way == "fsdp2" else pytest.approx(4 * piece, rel=1e-4))
    assert share("whole", 1) == share("whole", 8)
    assert share("fsdp2", 1).weights == 4 * COUNT


def test_what_is_put_together_in_a_pass() -> None:
    block = (COUNT - ROOT) // 24
    assert share("fsdp2").block == share("zero3").block == 2 * block
    assert share("fsdp2").gathered == 2 * (ROOT + 2 * block), "roots, a block, and the next"
    kept = share_of(
        tiny_config(**STEP), QWEN05, Spread(way="fsdp2", num_processes=8, reshard_after_forward=False), is_gpu=True
    )
    assert kept.gathered == share("zero3").gathered == 2 * COUNT, "ZeRO-3 keeps what is asked for again soon"
    assert share("zero2").gathered == share("whole").gathered == share("whole").buffers == 0
    assert share("zero2").buffers > 2 * BUCKET
    assert share("fsdp2").buffers < share("zero3").buffers


def test_references_and_copies() -> None:
    assert share("fsdp2", beta=0.1).reference == pytest.approx(2 * COUNT / 8, rel=1e-4)
    assert share("zero2", beta=0.1).reference == share("zero3", beta=0.1).reference == 2 * COUNT
    served = {"engine": {"kind": "vllm_server"}}
    assert (share("fsdp2", **served).sampler, share("fsdp2", **served).host) == (0, 2 * COUNT)
    nccl = {"engine": {"kind": "vllm_server", "vllm_server": {"weight_transfer": "nccl"}}, "rollout_lag": 1}
    assert share("fsdp2", **nccl).sampler == 2 * share("whole", **nccl).sampler == 4 * COUNT
    adapters = share("zero3", lora={"r": 8})
    assert adapters.moments == 2 * adapters.masters < COUNT / 100
    assert adapters.weights == pytest.approx(2 * COUNT / 8, rel=0.05)


def test_a_rank_of_more_holds_less_and_all_of_it_is_planned() -> None:
    card = Device(name="a card", memory=80 * GIB, is_gpu=True)
    config = tiny_config(**STEP)
    for way in ("fsdp2", "zero2", "zero3"):
        peaks = [
            estimate(config, QWEN05, card, prompt_tokens=64, spread=Spread(way=way, num_processes=n)).update_peak
            for n in (1, 2, 8)
        ]
        assert peaks == sorted(peaks, reverse=True)
        small = Device(name="a small card", memory=16 * GIB, is_gpu=True)
        current = estimate(config, QWEN05, small, prompt_tokens=64, spread=Spread(way=way, num_processes=2))
        changes = {key for one in suggest(current, QWEN05, small, prompt_tokens=64) for key in one.change}
        assert not changes & {"optimizer", "offload_optimizer"}, "which do not go with pieces"


@pytest.mark.parametrize(
    ("name", "spread"),
    [
        ("cpu", Spread(num_processes=2)),
        ("ddp", Spread(num_processes=2)),
        ("multi_node", Spread(num_processes=16)),
        ("fsdp2", Spread(way="fsdp2", num_processes=2)),
        ("zero2", Spread(way="zero2", num_processes=2)),
        ("zero3", Spread(way="zero3", num_processes=2)),
    ],
)
def test_shipped_launcher_files_are_read(name: str, spread: Spread) -> None:
    assert read_launcher_file(ACCELERATE / f"{name}.yaml") == spread


def test_a_launcher_file_that_keeps_blocks_together_is_read_so(tmp_path: Path) -> None:
    values = yaml.safe_load((ACCELERATE / "fsdp2.yaml").read_text())
    values["fsdp_config"]["fsdp_reshard_after_forward"] = False
    (tmp_path / "fsdp2.yaml").write_text(yaml.safe_dump(values))
    assert read_launcher_file(tmp_path / "fsdp2.yaml") == Spread(
        way="fsdp2", num_processes=2, reshard_after_forward=False
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", "needs fsdp_config.fsdp_version: 2"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {zero_stage: 1}", "or deepspeed_config.zero_stage: 2"),
        ("max_steps: 3", "it has no distributed_type); see recipes/accelerate"),
        ("a: [", "cannot be read as accelerate's YAML"),
    ],
)
def test_a_launcher_file_that_cannot_be_planned_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_launcher_file(tmp_path / "file.yaml")
    assert message in str(caught.value)
    with pytest.raises(ConfigError, match="no launcher's file '.*absent.yaml'; see recipes/accelerate"):
        read_launcher_file(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("way", "changes", "message"),
    [
        ("zero2", {"optimizer": "adamw_8bit"}, "set optimizer: adamw"),
        ("fsdp2", {"offload_optimizer": True}, "set offload_optimizer: false"),
        ("fsdp2", {"beta": 0.1, "offload_ref_model": True}, "offload_ref_model must be false"),
        ("zero3", {"activation_recomputation": "selective"}, "set activation_recomputation to none or full"),
    ],
)
def test_what_does_not_go_with_pieces_is_refused(way: Way, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        share(way, **changes)


def test_the_command_says_what_each_rank_holds(tmp_path: Path) -> None:
    changes = {key: value for key, value in STEP.items() if key != "device"}
    recipe = write_recipe(
        tmp_path, base=None, model=str(write_model(tmp_path / "model", QWEN05)), device="auto",
        **changes | {"dataset": {"path": "absent.jsonl"}, "max_completion_length": 64},
    )  # fmt: skip

    def plan(code: int, *options: str) -> str:
        result = CliRunner().invoke(app, ["plan", str(recipe), "--memory-gib", "24", "--prompt-tokens", "64", *options])
        assert result.exit_code == code, result.output
        return result.output

    tiny = "max_tokens_per_micro_batch=1024"
    said = plan(0, "--accelerate", str(ACCELERATE / "fsdp2.yaml"), tiny)
    assert said == plan(0, "--weights", "fsdp2", "--processes", "2", tiny)
    assert "processes: 2, each with its part of the policy (fsdp2); the largest block put together takes" in said
    assert "weights, fp32" in said
    assert "master weights" not in said
    assert "share_prompts: 9" in said
    assert plan(0, "--accelerate", str(ACCELERATE / "fsdp2.yaml"), "--processes", "4", tiny) != said
    tight = plan(1, "--processes", "4", "--memory-gib", "9", tiny)
    assert "processes: 4, each with all of the policy" in tight
    assert [line.split()[1] for line in tight.splitlines() if line.startswith("--weights ")] == list(get_args(Way))[1:]
    assert "--weights must be one of whole, fsdp2, zero2, zero3, got 'ddp'" in plan(2, "--weights", "ddp")
    both = plan(2, "--weights", "fsdp2", "--accelerate", str(ACCELERATE / "fsdp2.yaml"))
    assert "both say how weights are kept; give one" in both


def test_experts_stay_together_under_zero3_unless_blocks_are_made_again() -> None:
    """In bytes of a shape so large that not all of it stays together anyway."""
    shape = tiny_policy().config.model_copy(
        update={"hidden_size": 4096, "moe_intermediate_size": 4096, "n_routed_experts": 64, "num_hidden_layers": 6}
    )
    found = [
        share_of(
            tiny_config(activation_recomputation=kind), shape, Spread(way="zero3", num_processes=8), is_gpu=True
        ).gathered
        for kind in ("none", "full")
    ]
    assert found[0] > found[1]
