"""Two ranks are one: the same rollouts, losses and weights as one process on the same recipe."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grpo.config import ConfigError, load_config
from grpo.distributed import Ranks, share_gpus
from grpo.pretrain import base_model
from tests.grpo.all_choices import all_gradients
from tests.grpo.test_trainer import STATEFUL, metrics_of, recipe  # noqa: F401

CPU = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"


def launch(processes: int, *arguments: str) -> None:
    launch_module(processes, "grpo", "train", *arguments)


def launch_module(processes: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU)]
    done = subprocess.run(
        [*command, "--num_processes", str(processes), "-m", *arguments],
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


def test_items_are_dealt_by_size_and_none_is_lost() -> None:
    ranks, sizes = Ranks(cpu=True), [5, 1, 9, 3, 3, 2]
    assert ranks.deal(sizes) == list(range(6)), "one rank has all, in order"
    ranks.size, dealt = 2, []
    for ranks.rank in range(2):
        dealt.append(ranks.deal(sizes))
    assert dealt == [[1, 2, 5], [0, 3, 4]]
    assert [sum(sizes[place] for place in places) for places in dealt] == [12, 11]
    assert ranks.deal([]) == []
    ranks.size, ranks.rank = 8, 7
    assert ranks.deal(sizes) == [], "more ranks than items"


def test_pieces_of_a_tensor_are_those_of_torch_chunk() -> None:
    ranks, whole = Ranks(cpu=True), torch.arange(14).view(7, 2)
    for ranks.size in (1, 2, 3, 4, 9):
        pieces = []
        for rank in range(ranks.size):
            ranks.rank = rank
            pieces.append(ranks.cut(whole))
        chunks = list(whole.chunk(ranks.size))
        assert [len(piece) for piece in pieces] == [len(chunk) for chunk in chunks] + [0] * (ranks.size - len(chunks))
        assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("FSDP_VERSION", "1", "fsdp_version: 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "activation_recomputation"),
    ],
)
def test_what_is_not_done_of_fsdp_is_refused(
    variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, setting in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2"), (variable, value)):
        monkeypatch.setenv(name, setting)
    with pytest.raises(ConfigError, match=words):
        Ranks(cpu=True)


@pytest.mark.multi
def test_every_choice_has_the_gradient_of_one_rank_on_two(tmp_path: Path) -> None:
    """Clipped after the sum: the norm is bounded, and one message carries what each step needs."""
    launch_module(2, "tests.grpo.all_choices", str(tmp_path / "two.pt"))
    two, one = torch.load(tmp_path / "two.pt", weights_only=True), all_gradients(Ranks(cpu=True))
    assert two.keys() == one.keys()
    for name, gradient in one.items():
        assert torch.allclose(two[name], gradient, atol=1e-6), name


@pytest.mark.multi
def test_two_ranks_equal_one(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    """Of three problems the first rank has one, and none where one is asked in the place of another."""
    base = base_model(load_config(recipe), Ranks(cpu=True), lambda metrics: None)
    settings = [str(recipe), f"output_dir={tmp_path}", f"model={base}", "max_steps=3", "save_steps=0"]
    # A bias moves by the sign of a load's distance from the mean, so that one token routed otherwise would show.
    settings += ["router_aux_loss_coef=0.01", "router_z_loss_coef=0.001", "bias_update_rate=0"]
    settings += [*STATEFUL, "prompts_per_step=3"]
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


def test_ranks_share_a_gpu_but_under_deepspeed() -> None:
    assert not share_gpus(2, 2, "zero3")
    assert not share_gpus(1, 1, None)
    assert share_gpus(1, 2, "fsdp2")
    with pytest.raises(ConfigError, match="2 processes have 1 here; start with --num_processes 1"):
        share_gpus(1, 2, "zero2")


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
    assert all((ours[name] - theirs[name]).abs().max() < 0.02 for name in ours)
