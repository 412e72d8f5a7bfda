"""However weights are kept over ranks, they are trained alike, and a checkpoint of one way goes on in another."""

import json
import os
import re
import shutil
import signal
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
from tests.grpo.test_trainer import STATEFUL, metrics_of, read_rollouts, recipe, wait_for  # noqa: F401
from tests.grpo.three_steps import CASES, three_steps

ACCELERATE = Path(__file__).parents[2] / "recipes" / "accelerate"
LAST = "checkpoints/step_000003"


def start(folder: Path, name: str, *arguments: str, processes: int = 2, is_gpu: bool = False) -> subprocess.Popen:
    """Processes as recipes/accelerate/NAME.yaml has them, but on the CPU unless `is_gpu`."""
    file = folder / f"{name}.yaml"
    # With `use_cpu`, accelerate starts a single process of DeepSpeed, which finds by itself that there is no GPU.
    changes = {} if is_gpu or name.startswith("zero") else {"use_cpu": True}
    file.write_text(yaml.safe_dump(yaml.safe_load((ACCELERATE / file.name).read_text()) | changes))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return subprocess.Popen(
        [*command, "--num_processes", str(processes), "-m", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | ({} if is_gpu else {"DS_ACCELERATOR": "cpu"}),
    )  # fmt: skip


def launch(folder: Path, name: str, *arguments: str, processes: int = 2, is_gpu: bool = False) -> str:
    """What `start` printed, once it is done."""
    with start(folder, name, *arguments, processes=processes, is_gpu=is_gpu) as process:
        output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    return output


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
        assert torch.allclose(two[key], tensor, rtol=1e-5, atol=1e-5), (key, (two[key] - tensor).abs().max())
    for case in CASES:
        skipped = [float(one[f"{case}: step {step}"][-1]) for step in range(3)]
        assert skipped == [0.0, float(CASES[case].broken_step == 1), 0.0]
    if name != "ddp":
        check_held(json.loads((tmp_path / "held.json").read_text()), Spread(way=name, num_processes=2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_three_steps_of_two_ranks_on_one_gpu_are_those_of_one(name: str, tmp_path: Path) -> None:
    """Over gloo, which more ranks than GPUs get."""
    (tmp_path / "one").mkdir()
    subprocess.run([sys.executable, "-m", "tests.grpo.three_steps", str(tmp_path / "one"), "gpu"], check=True)
    launch(tmp_path, name, "tests.grpo.three_steps", str(tmp_path), "gpu", is_gpu=True)
    one, two = (torch.load(folder / "result.pt", weights_only=True) for folder in (tmp_path / "one", tmp_path))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        close = 2e-2 if "bf16" in key else 1e-4
        assert torch.allclose(two[key], tensor, rtol=close, atol=close), (key, (two[key] - tensor).abs().max())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_a_trial_takes_the_memory_of_the_pass_that_it_stands_for(name: str, tmp_path: Path) -> None:
    """And where there is less, micro-batches are halved beforehand, and the step is the same."""
    if name.startswith("zero"):
        pytest.importorskip("deepspeed")
    launch(tmp_path, name, "tests.grpo.trial_memory", str(tmp_path / "found.json"), processes=1, is_gpu=True)
    steps = json.loads((tmp_path / "found.json").read_text())["steps"]
    assert all(step["done"] <= step["tried"] <= 1.3 * step["done"] for step in steps[:2]), steps
    assert [step["halvings"] > 0 for step in steps] == [False, False, True, True]
    assert [step["loss"] for step in steps] == pytest.approx([steps[0]["loss"]] * 4, rel=1e-3)


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
    for other in ("pieces", "whole_goes_on", "pieces_goes_on"):
        assert_same_run(tmp_path / "whole", tmp_path / other)


SLOW = """
import json
import os
import time
from pathlib import Path

HERE = Path(__file__).parent


def slow(problem, completion):
    beat = HERE / "pieces" / "heartbeat_rank1.json"
    if os.environ.get("RANK") == "1" and json.loads(beat.read_text())["step"] == 3:
        (HERE / "waiting").touch()
        time.sleep(60)
    return float(len(completion) % 3)
"""


@pytest.mark.multi
@pytest.mark.parametrize("way", ["fsdp2", *(pytest.param(way, marks=pytest.mark.slow) for way in ("zero2", "zero3"))])
def test_a_step_given_up_at_sigterm_loses_none_before_it(
    way: str,
    recipe: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """One rank hangs in a reward, the other waits for its answers: both give the step up, and save together."""
    base = base_model(load_config(recipe), Ranks(cpu=True), lambda metrics: None)
    (tmp_path / "slow.py").write_text(SLOW)
    settings = [f"output_dir={tmp_path}", f"model={base}", "max_steps=3", "save_steps=0", *STATEFUL]
    settings += ["bias_update_rate=0", "prompts_per_step=3", f"rewards=[{tmp_path / 'slow.py'}:slow]"]
    settings += ["reward_timeout=90", "stop_timeout=0.3", "evaluation.num_problems=0"]
    process = start(tmp_path, way, "grpo", "train", str(recipe), *settings, "name=pieces")
    for _ in wait_for(tmp_path / "waiting", process):
        pass
    process.send_signal(signal.SIGTERM)  # to the launcher, which passes it on
    output, _ = process.communicate(timeout=60)
    assert "step 3 was given up, 0.3 s after SIGTERM; what was saved stays" in output
    assert "another rank gave the step up; saving what was before it" in output, "the first rank, which waited"
    assert {file.name for file in (tmp_path / "pieces" / "checkpoints").iterdir()} == {"step_000002"}
    run(recipe, [*settings, "name=pieces"], resume=True)
    run(recipe, [*settings, "name=whole"], resume=False)
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.multi
@pytest.mark.parametrize(
    ("way", "how", "words"),
    [
        ("fsdp2", "memory", r"DeviceMemoryError: rank 1: out of memory .* set max_tokens_per_micro_batch: \d+ or"),
        *(
            pytest.param(way, how, words, marks=pytest.mark.slow)
            for way in ("ddp", "fsdp2", "zero2", "zero3")
            for how, words in (("killed", r"Signal 9 \(SIGKILL\)"), ("hung", "Timed out waiting 15000ms"))
        ),
    ],
)
def test_all_ranks_end_within_a_minute_of_one_that_is_lost_in_an_update(
    way: str, how: str, words: str, tmp_path: Path
) -> None:
    lost = tmp_path / "lost"
    process = start(tmp_path, way, "tests.grpo.rank_lost", how, str(lost))
    for _ in wait_for(lost, process):
        pass
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search(words, output), output


def assert_same_run(whole: Path, other: Path) -> None:
    """Three steps: metrics, what was asked and answered, and all of the last checkpoint."""
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
