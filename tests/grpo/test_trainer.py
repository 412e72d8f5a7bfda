"""Whole runs of a tiny recipe: what they leave behind, and that a stopped one continues as if it had not been."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import policy as policies
from grpo.config import load_config
from grpo.data import Dataset, read_problems
from grpo.display import Display
from grpo.distributed import Ranks
from grpo.pretrain import base_model
from grpo.record import RunFolder
from grpo.run import run
from grpo.trainer import Trainer
from policy.tokenizer import load_tokenizer
from rewards import Grader

TIMES = ("step_time", "time/sample", "time/grade", "time/update", "tokens_per_second")
RECIPE = {
    "name": "tiny",
    "device": "cpu",
    "base": {
        "shape": {
            "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 16,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "max_position_embeddings": 128,
            "num_nextn_predict_layers": 1, "initializer_range": 0.1,
        },  # fmt: skip
        "attempts": {"max_attempts": 4},
        "max_steps": 30,
        "tokens_per_step": 1024,
        "learning_rate": 5e-3,
        "warmup_steps": 5,
    },
    "dataset": {"countdown": {"high": 7, "operators": "+-"}, "num_problems": 40},
    "prompt_template": "User : {prompt} Assistant :",
    "reward_workers": 0,
    "prompts_per_step": 5,
    "num_generations": 4,
    "max_completion_length": 40,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "max_tokens_per_micro_batch": 400,
    "num_iterations": 2,
    "beta": 0.01,
    "bias_update_rate": 0.001,
    "router_aux_loss_coef": 0.001,
    "mtp_weight": 0.1,
    "evaluation": {"num_problems": 10, "k": 2, "batch_size": 4},
    "save_steps": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file whose base model is trained once for all tests here."""
    folder = tmp_path_factory.mktemp("recipe")
    base = RECIPE["base"] | {"cache_dir": str(folder / "cache")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE | {"base": base}))
    return folder / "tiny.yaml"


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert metrics_of(one) == metrics_of(other)
    for a, b in zip(sorted((one / "rollouts").iterdir()), sorted((other / "rollouts").iterdir()), strict=True):
        assert a.read_text() == b.read_text()
    assert (one / "evaluation.json").read_text() == (other / "evaluation.json").read_text()
    for name in ("model.safetensors", "trainer.safetensors"):
        before, after = (load_file(run / "checkpoints" / "step_000006" / name) for run in (one, other))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path) -> Path:
    run(recipe, [f"output_dir={recipe.parent}", "name=whole"], resume=False)
    return recipe.parent / "whole"


def test_a_run_leaves_everything_behind(uninterrupted: Path) -> None:
    metrics = metrics_of(uninterrupted)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert {"reward", "entropy", "kl", "grad_norm", "moe/max_load", "rewards/countdown/mean"} <= metrics[0].keys()
    stages = {e["stage"]: e for e in json.loads((uninterrupted / "evaluation.json").read_text())}
    assert stages.keys() == {"base", "final"}
    assert stages["base"]["num_problems"] == 10
    assert stages["base"]["ci95"][0] <= stages["base"]["avg@k"] <= stages["base"]["ci95"][1]
    rollouts = [
        json.loads(line) for line in (uninterrupted / "rollouts" / "step_000003.jsonl").read_text().splitlines()
    ]
    assert [len(group["completions"]) for group in rollouts] == [4] * 5
    for group in rollouts:
        assert sum(c["advantage"] for c in group["completions"]) == pytest.approx(0, abs=1e-9)
    assert "<html" in (uninterrupted / "report.html").read_text()
    assert load_config(uninterrupted / "config.yaml").num_iterations == 2
    kept = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    assert kept == ["step_000004", "step_000006"]


def test_a_checkpoint_is_a_model_that_transformers_loads(uninterrupted: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = uninterrupted / "checkpoints" / "step_000006"
    theirs, ours = AutoModelForCausalLM.from_pretrained(folder).eval(), policies.load(folder)
    token_ids = torch.tensor([load_tokenizer(folder).encode("User : Using the numbers 1 2 3 , make 4 . Assistant :")])
    with torch.no_grad():
        assert (theirs(token_ids).logits - ours.logits(token_ids)).abs().max() < 1e-4


def test_the_same_recipe_gives_the_same_run(recipe: Path, uninterrupted: Path) -> None:
    run(recipe, [f"output_dir={recipe.parent}", "name=again"], resume=False)
    assert_same_run(uninterrupted, recipe.parent / "again")


def test_a_stopped_run_resumes_as_if_it_had_not_been(recipe: Path, uninterrupted: Path) -> None:
    for last in (1, 3, 6):
        run(recipe, [f"output_dir={recipe.parent}", "name=pieces", f"max_steps={last}"], resume=True)
        if last < 6:  # an evaluation "final" belongs to the end that was asked for then
            (recipe.parent / "pieces" / "evaluation.json").write_text(
                json.dumps(
                    [
                        e
                        for e in json.loads((recipe.parent / "pieces" / "evaluation.json").read_text())
                        if e["stage"] == "base"
                    ],
                    indent=2,
                )
                + "\n"
            )
    assert_same_run(uninterrupted, recipe.parent / "pieces")


@pytest.mark.multi
def test_a_killed_run_resumes_as_if_it_had_not_been(recipe: Path, uninterrupted: Path) -> None:
    folder = recipe.parent / "killed"
    command = [sys.executable, "-m", "grpo", "train", str(recipe), f"output_dir={recipe.parent}", "name=killed"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    for _ in wait_for(folder / "rollouts" / "step_000003.jsonl", process):
        pass
    process.kill()
    process.wait()
    assert not (folder / "checkpoints" / "step_000006").exists()
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert_same_run(uninterrupted, folder)


@pytest.mark.multi
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(recipe: Path, number: signal.Signals) -> None:
    name = f"signal{number.value}"
    folder = recipe.parent / name
    settings = [f"output_dir={recipe.parent}", f"name={name}", "max_steps=10000", "save_steps=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo", "train", str(recipe), *settings],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for _ in wait_for(folder / "rollouts" / "step_000002.jsonl", process):
        pass
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    steps = len(metrics_of(folder))
    assert (folder / "checkpoints" / f"step_{steps:06d}" / "manifest.json").is_file()
    assert f"continue with: grpo train {recipe}" in output.replace("\n", " ")
    assert "--resume" in output
    assert (folder / "report.html").is_file()


@pytest.mark.multi
def test_an_interrupt_before_the_first_step_says_how_to_go_on(recipe: Path) -> None:
    settings = [f"output_dir={recipe.parent}", "name=early", "base.max_steps=100000", "seed=7"]
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo", "train", str(recipe), *settings],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("base model"):
            break
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "--resume" in output.splitlines()[-1]


def wait_for(file: Path, process: subprocess.Popen, seconds: float = 90) -> Iterator[None]:
    """Until a file is there; fails where the process ends or time runs out first."""
    import time

    end = time.monotonic() + seconds
    while not file.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "too slow"
        time.sleep(0.02)
        yield


def test_learning_raises_the_reward(recipe: Path) -> None:
    plugin = recipe.parent / "plugin.py"
    plugin.write_text("def short(problem, completion):\n    return 1 / (1 + len(completion.split()) / 10)\n")
    settings = [f"output_dir={recipe.parent}", "name=learns", f"rewards=['{plugin}:short']", "max_steps=40"]
    more = ["save_steps=0", "num_iterations=1", "beta=0", "learning_rate=3e-3", "evaluation.num_problems=0"]
    run(recipe, [*settings, *more], resume=False)
    rewards = [line["reward"] for line in metrics_of(recipe.parent / "learns")]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:10]) / 10 + 0.1


def test_a_trainer_can_be_made_by_hand(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, [f"output_dir={tmp_path}", "max_steps=1", "rewards=[format]"])
    ranks, folder = Ranks(cpu=True), RunFolder(tmp_path / "by_hand", print)
    start = base_model(config, ranks, lambda metrics: None)
    folder.open(config, resume=False)
    problems = read_problems(config.dataset, seed=0, split="train", count=10)
    with Grader(["format"], num_workers=0) as grader:
        trainer = Trainer(
            config=config,
            policy=policies.load(start),
            tokenizer=load_tokenizer(start),
            dataset=Dataset(problems, 0),
            held_out=[],
            grader=grader,
            ranks=ranks,
            folder=folder,
            display=Display(rank=1),
        )
        assert trainer.train() == 1
    folder.close()
    assert len(metrics_of(tmp_path / "by_hand")) == 1
