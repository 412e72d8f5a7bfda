"""recipes/accelerate/*.yaml are files that accelerate accepts; cpu.yaml and multi_node.yaml start processes that reach
each other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
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


@pytest.mark.multi
def test_a_launcher_on_each_of_two_machines_makes_one_run(tmp_path: Path) -> None:
    """Both on this one."""
    (tmp_path / "probe.py").write_text(PROBE)
    settings = yaml.safe_load((ACCELERATE / "multi_node.yaml").read_text()) | {"use_cpu": True, "num_processes": 2}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "two.yaml")]
    launch += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
    launchers = [
        subprocess.Popen(
            [*launch, "--machine_rank", str(rank), "-m", "probe"],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [launcher.communicate(timeout=120) for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert json.loads(outputs[0][0].splitlines()[-1]) == {"processes": 2, "device": "cpu", "total": 3.0}
    assert "processes" not in outputs[1][0]
