"""However weights are kept over ranks, they are trained alike, and a checkpoint of one way goes on in another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from grpo.distributed import Ranks
from tests.grpo.three_steps import CASES, three_steps

ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"


def launch(folder: Path, name: str, *arguments: str) -> str:
    """Two processes as recipes/accelerate/NAME.yaml has them, but on the CPU; what they printed."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load((ACCELERATE / file.name).read_text()) | {"use_cpu": True}))
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "-m", *arguments],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.multi
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_three_steps_of_two_ranks_are_those_of_one(name: str, tmp_path: Path) -> None:
    """One rank may have nothing to learn from, and fewer micro-batches than the other."""
    output = launch(tmp_path, name, "tests.grpo.three_steps", str(tmp_path / "two.pt"))
    assert "FSDP2-wrapped" not in output, "a warning of FSDP2's"
    one, two = three_steps(Ranks(cpu=True)), torch.load(tmp_path / "two.pt", weights_only=True)
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert torch.allclose(two[key], tensor, rtol=1e-5, atol=1e-5), (key, (two[key] - tensor).abs().max())
    for case in CASES:
        skipped = [float(one[f"{case}: step {step}"][-1]) for step in range(3)]
        assert skipped == [0.0, float(CASES[case].broken_step == 1), 0.0]
