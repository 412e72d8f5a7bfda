"""recipes/accelerate/*.yaml are files that accelerate accepts, and cpu.yaml starts processes that reach each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

ACCELERATE = Path(__file__).resolve().parent.parent / "recipes" / "accelerate"

PROBE = """
import json
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
total = accelerator.reduce(torch.tensor([accelerator.process_index + 1.0]), "sum").item()
if accelerator.is_main_process:
    print(json.dumps({"processes": accelerator.num_processes, "device": accelerator.device.type, "total": total}))
accelerator.end_training()
"""


@pytest.mark.parametrize("path", sorted(ACCELERATE.glob("*.yaml")), ids=lambda path: path.name)
def test_accelerate_knows_every_key(path: Path) -> None:
    load_config_from_file(str(path))


@pytest.mark.multi
@pytest.mark.parametrize("processes", [1, 2])
def test_cpu_launch_starts_processes_that_add_up(processes: int, tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE / "cpu.yaml")]
    command = [*launch, "--num_processes", str(processes), "-m", "probe"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    answer = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    expected = {"processes": processes, "device": "cpu", "total": sum(range(1, processes + 1))}
    assert json.loads(answer.stdout.splitlines()[-1]) == expected
