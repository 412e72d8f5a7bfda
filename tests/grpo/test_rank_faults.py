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
from pathlib import Path


class Broken(BaseException):
    pass


def on_second_rank(fail, calls):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) > 40:
        Path(__file__).with_name("failed").touch()
        fail()
    return 0.5


def raises(problem, completion):
    if os.environ["RANK"] == "1":
        Path(__file__).with_name("failed").touch()
        raise ValueError("no verdict here")
    return 0.5


def breaks(problem, completion, calls=[]):
    def fail():
        raise Broken("what nobody foresaw")

    return on_second_rank(fail, calls)


def dies(problem, completion, calls=[]):
    return on_second_rank(lambda: os.kill(os.getpid(), signal.SIGKILL), calls)
"""


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


@pytest.mark.multi
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", "no verdict here"),
        ("breaks", "Broken: what nobody foresaw"),
        ("dies", "SIGKILL"),
    ],
)
def test_all_ranks_end_within_a_minute_of_one_that_fails(function: str, words: str, recipe: Path) -> None:
    plugin, failed = recipe.parent / "mine.py", recipe.parent / "failed"
    failed.unlink(missing_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU), "-m", "grpo", "train"]
    process = subprocess.Popen(
        [*command, str(recipe), f"name={function}", f"rewards=['{plugin}:{function}']"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    until = time.monotonic() + 120
    while not failed.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, "too slow"
        time.sleep(0.05)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert words in output


@pytest.mark.multi
def test_a_folder_that_the_first_rank_refuses_ends_the_others_too(recipe: Path) -> None:
    folder = recipe.parent / "runs" / "taken"
    (folder / "rollouts").mkdir(parents=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU), "-m", "grpo", "train"]
    done = subprocess.run(
        [*command, str(recipe), "name=taken"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert f"error: {folder} already holds a run" in done.stderr
