"""However weights are kept over ranks, they are trained alike, and a checkpoint of one way goes on in another."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from grpo.config import load_config
from grpo.distributed import Ranks
from grpo.pretrain import base_model
from grpo.run import run
from grpo.shares import Spread
from tests.grpo.held_bytes import check_held
from tests.grpo.test_trainer import STATEFUL, metrics_of, read_rollouts, recipe  # noqa: F401
from tests.grpo.three_steps import CASES, three_steps

ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"
LAST = "checkpoints/step_000003"


def launch(folder: Path, name: str, *arguments: str) -> str:
    """Two processes as recipes/accelerate/NAME.yaml has them, but on the CPU; what they printed."""
    file = folder / f"{name}.yaml"
    # With `use_cpu`, accelerate starts a single process of DeepSpeed, which finds by itself that there is no GPU.
    changes = {} if name.startswith("zero") else {"use_cpu": True}
    file.write_text(yaml.safe_dump(yaml.safe_load((ACCELERATE / file.name).read_text()) | changes))
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "-m", *arguments],
        capture_output=True, text=True, timeout=240, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What one process makes of three steps."""
    return three_steps(Ranks(cpu=True), tmp_path_factory.mktemp("one"))


@pytest.mark.multi
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_three_steps_of_two_ranks_are_those_of_one(name: str, one: dict[str, Tensor], tmp_path: Path) -> None:
    """One rank may have nothing to learn from, and fewer micro-batches than the other."""
    output = launch(tmp_path, name, "tests.grpo.three_steps", str(tmp_path))
    assert "FSDP2-wrapped" not in output, "a warning of FSDP2's"
    two = torch.load(tmp_path / "result.pt", weights_only=True)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        # Under ZeRO-3 DeepSpeed's linear layer stands in for torch's, and rounds otherwise in bf16.
        is_rounded = name == "zero3" and "in bf16" in key
        near = {"rtol": 2e-3, "atol": 1e-3} if is_rounded else {"rtol": 1e-5, "atol": 1e-5}
        assert torch.allclose(two[key], tensor, **near), (key, (two[key] - tensor).abs().max())
    for case in CASES:
        skipped = [float(one[f"{case}: step {step}"][-1]) for step in range(3)]
        assert skipped == [0.0, float(CASES[case].broken_step == 1), 0.0]
    if name != "ddp":
        check_held(json.loads((tmp_path / "held.json").read_text()), Spread(way=name, num_processes=2))


@pytest.mark.multi
@pytest.mark.parametrize("pieces", ["fsdp2", pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_other_ranks_under_another_way_of_keeping_weights(
    pieces: str,
    recipe: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Two ranks in pieces equal one that is whole; and each goes on from the other's checkpoint, asking the same."""
    base = base_model(load_config(recipe), Ranks(cpu=True), lambda metrics: None)
    settings = [f"output_dir={tmp_path}", f"model={base}", "max_steps=3", "save_steps=2", *STATEFUL]
    settings += ["bias_update_rate=0", "prompts_per_step=3"]

    def go(name: str, way: str, *, resume: bool = False) -> None:
        arguments = [*settings, f"name={name}"]
        if way == "whole":
            run(recipe, arguments, resume=resume)
        else:
            launch(tmp_path, way, "grpo", "train", str(recipe), *arguments, *(["--resume"] if resume else []))

    go("whole", "whole")
    go("pieces", pieces)
    for name, other_way in (("whole", pieces), ("pieces", "whole")):
        shutil.copytree(tmp_path / name, tmp_path / f"{name}_goes_on")
        shutil.rmtree(tmp_path / f"{name}_goes_on" / LAST)
        go(f"{name}_goes_on", other_way, resume=True)
    whole = tmp_path / "whole"
    for other in (tmp_path / name for name in ("pieces", "whole_goes_on", "pieces_goes_on")):
        for step, (a, b) in enumerate(zip(metrics_of(whole), metrics_of(other), strict=True), start=1):
            assert a.keys() == b.keys()
            assert all(b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5) for key in a.keys() - {"moe/load"}), other
            assert said(whole, step) == said(other, step)
        data = [json.loads((run / LAST / "data.json").read_text()) for run in (whole, other)]
        assert data[0]["stream"] == data[1]["stream"]
        for file in ("model", "trainer", "reference"):
            ours, theirs = (load_file(run / LAST / f"{file}.safetensors") for run in (whole, other))
            assert ours.keys() == theirs.keys()
            assert all(torch.allclose(theirs[key], ours[key], rtol=1e-4, atol=1e-5) for key in ours), (other, file)


def said(run: Path, step: int) -> list[tuple[str, list[str]]]:
    """What was asked in a step, and answered."""
    return [(group["problem"]["id"], [c["text"] for c in group["completions"]]) for group in read_rollouts(run, step)]
