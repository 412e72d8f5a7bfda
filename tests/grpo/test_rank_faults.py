"""A rank that fails ends the run on all of them, soon, with its own words; nobody waits for it."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grpo.config import load_config
from grpo.distributed import Ranks
from grpo.pretrain import base_model
from tests.grpo.test_distributed import CPU
from tests.recipes import TINY, write_recipe

REWARDS = """
import os
import signal
import threading
from pathlib import Path


def raises(problem, completion):
    if os.environ["RANK"] == "1":
        Path(__file__).with_name("failed").touch()
        raise ValueError("no verdict here")
    return 0.5


def dies(problem, completion, calls=[]):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) > 20:
        Path(__file__).with_name("failed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 0.5


def hangs(problem, completion, calls=[]):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) > 20:
        Path(__file__).with_name("failed").touch()
        threading.Event().wait()
    return 0.5
"""
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU), "-m", "grpo", "train"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two problems a step, one a rank, and a base model that is there."""
    folder = tmp_path_factory.mktemp("ranks")
    file = write_recipe(folder, evaluation={"num_problems": 0})
    base = base_model(load_config(file), Ranks(cpu=True), lambda metrics: None)
    (folder / "mine.py").write_text(REWARDS)
    return write_recipe(
        folder, base=None, model=str(base), dataset=TINY["dataset"], evaluation={"num_problems": 0}, max_steps=1000
    )


def output_of(*arguments: str, failed: Path | None = None) -> str:
    """Of a run of two ranks that fails; within a minute of the moment when `failed` appears."""
    process = subprocess.Popen(
        [*LAUNCH, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        until = time.monotonic() + 180
        while failed is not None and not failed.exists() and process.poll() is None:
            assert time.monotonic() < until, "too slow"
            time.sleep(0.05)
        output, _ = process.communicate(timeout=180 if failed is None else 60)
    finally:
        process.terminate()  # which the launcher passes on
    assert process.returncode != 0
    return output


@pytest.mark.multi
@pytest.mark.parametrize(("function", "words"), [("raises", "no verdict here"), ("dies", "SIGKILL")])
def test_all_ranks_end_within_a_minute_of_one_that_fails(function: str, words: str, recipe: Path) -> None:
    failed = recipe.parent / "failed"
    failed.unlink(missing_ok=True)
    rewards = f"rewards=['{recipe.parent / 'mine.py'}:{function}']"
    assert words in output_of(str(recipe), f"name={function}", rewards, failed=failed)
    assert failed.exists()


@pytest.mark.multi
@pytest.mark.slow
def test_all_ranks_end_where_one_hangs_and_leave_their_stacks(recipe: Path) -> None:
    """Within `ddp_timeout` of the moment when the other begins to wait, and what the launcher grants after SIGTERM."""
    failed, run = recipe.parent / "failed", recipe.parent / "runs" / "hangs"
    failed.unlink(missing_ok=True)
    rewards = f"rewards=['{recipe.parent / 'mine.py'}:hangs']"
    output = output_of(str(recipe), "name=hangs", rewards, "ddp_timeout=8", "stop_timeout=1", failed=failed)
    assert failed.exists()
    assert "rank 0 of 2 stops: another rank has kept it waiting for 8 s (ddp_timeout" in output
    assert "in hangs" in (run / "stacks_rank1.txt").read_text()
    assert "in gather_groups" in (run / "stacks_rank0.txt").read_text()


@pytest.mark.multi
def test_a_prompt_that_only_one_rank_cannot_ask_ends_both(recipe: Path) -> None:
    data = recipe.parent / "data.jsonl"
    data.write_text('{"prompt": "make 3 ."}\n{"prompt": "%s"}\n' % ("make " * 60))
    output = output_of(str(recipe), "name=prompt", f"dataset={{path: {data}}}", "rewards=[format]")
    assert output.count("error: ") == 2
    assert "data.jsonl:2: the prompt has 64 tokens" in output
    assert "stops: another rank ended" in output


@pytest.mark.multi
def test_a_folder_that_the_first_rank_refuses_ends_the_other_too(recipe: Path) -> None:
    folder = recipe.parent / "runs" / "taken"
    (folder / "rollouts").mkdir(parents=True)
    assert f"error: {folder} already holds a run" in output_of(str(recipe), "name=taken")
