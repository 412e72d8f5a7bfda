"""Two ranks are one: the same rollouts, losses and weights as one process on the same recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo.config import load_config
from grpo.distributed import Ranks
from grpo.pretrain import base_model
from tests.grpo.test_trainer import RECIPE, metrics_of, recipe  # noqa: F401

CPU = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"


def launch(processes: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU)]
    done = subprocess.run(
        [*command, "--num_processes", str(processes), "-m", "grpo", "train", *arguments],
        capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_share_of_a_list_is_contiguous_and_complete() -> None:
    ranks = Ranks(cpu=True)
    assert ranks.share(list(range(5))) == (0, [0, 1, 2, 3, 4])
    shares = []
    for rank in range(3):
        ranks.rank, ranks.size = rank, 3
        shares.append(ranks.share(list(range(5))))
    assert shares == [(0, [0]), (1, [1, 2]), (3, [3, 4])]


@pytest.mark.multi
def test_two_ranks_equal_one(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    base = base_model(load_config(recipe), Ranks(cpu=True), lambda metrics: None)
    settings = [str(recipe), f"output_dir={tmp_path}", f"model={base}", "max_steps=3", "save_steps=0"]
    # A bias moves by the sign of a load's distance from the mean, so that one token routed otherwise would show.
    settings += ["router_aux_loss_coef=0.01", "router_z_loss_coef=0.001", "bias_update_rate=0"]
    for processes in (1, 2):
        launch(processes, *settings, f"name=ranks{processes}")
    one, two = tmp_path / "ranks1", tmp_path / "ranks2"
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        for key in a.keys() - {"moe/load"}:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=2e-5), (a["step"], key)
    assert (one / "rollouts" / "step_000001.jsonl").read_text() == (two / "rollouts" / "step_000001.jsonl").read_text()
    evaluations = [json.loads((run / "evaluation.json").read_text()) for run in (one, two)]
    assert evaluations[0][0] == evaluations[1][0]
    before, after = (load_file(run / "checkpoints" / "step_000003" / "model.safetensors") for run in (one, two))
    assert all(torch.allclose(before[name], after[name], atol=1e-4) for name in before)


@pytest.mark.multi
def test_two_ranks_train_a_base_together(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    settings = [
        f"output_dir={tmp_path}",
        f"base.cache_dir={tmp_path}/cache",
        "max_steps=1",
        "evaluation.num_problems=0",
    ]
    launch(2, str(recipe), *settings)
    [together] = (tmp_path / "cache").glob("base-*")
    alone = base_model(load_config(recipe), Ranks(cpu=True), lambda metrics: None)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (together, alone))
    assert RECIPE["base"]["max_steps"] == 30
    assert all((ours[name] - theirs[name]).abs().max() < 0.02 for name in ours)
