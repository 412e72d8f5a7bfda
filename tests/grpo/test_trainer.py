"""Whole runs of a tiny recipe: what they leave behind, and that a stopped one continues as if it had not been."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
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
from rewards.grader import RewardError
from rollouts import SamplingError
from tests.recipes import TINY, write_recipe

TIMED = ("step_time", "tokens_per_second", "sample/tokens_per_second", "update/tokens_per_second", "update/mfu")
CHANGES = {
    "base": TINY["base"] | {"max_steps": 30, "tokens_per_step": 1024, "learning_rate": 5e-3, "warmup_steps": 5},
    "prompts_per_step": 5,
    "max_completion_length": 40,
    "max_steps": 6,
    "warmup_steps": 2,
    "max_tokens_per_micro_batch": 400,
    "num_iterations": 2,
    "num_minibatches": 2,
    "beta": 0.01,
    "sync_ref_model": True,
    "ref_model_sync_steps": 2,
    "use_adaptive_entropy": True,
    "entropy_coef_delta": 0.01,
    "entropy_target": 5.0,
    "bias_update_rate": 0.001,
    "router_aux_loss_coef": 0.001,
    "freeze_router": False,
    "mtp_weight": 0.1,
    "evaluation": {"num_problems": 10, "k": 2, "batch_size": 4},
    "save_steps": 2,
}
"""A base with something to lose, an odd number of problems, every pass of the update."""
CARRIED = [
    *("dynamic_sampling.oversample=1.7", "dynamic_sampling.max_rounds=3", "curriculum.revisit_steps=2"),
    *("replay_buffer.max_pass_rate=0.5", "length_schedule.start=20", "length_schedule.steps=4"),
]
"""Everything that carries something from step to step."""
STATEFUL = [*CARRIED, "routing_replay=sampler"]
"""And what only the built-in engine records of it."""


LUCKY = """
import zlib

def lucky(problem, completion):
    return float(zlib.crc32(completion.encode()) % 5 == 0)
"""
"""A reward that one completion in five gets, however little the base model knows."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe file whose base model is trained once for all tests here."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "lucky.py").write_text(LUCKY)
    return write_recipe(folder, **CHANGES, rewards=[f"{folder / 'lucky.py'}:lucky", "format"])


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED and not k.startswith("time/")} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "evaluation.json").read_text() == (other / "evaluation.json").read_text()
    assert_same_steps(one, other)


def assert_same_steps(one: Path, other: Path) -> None:
    assert metrics_of(one) == metrics_of(other)
    for a, b in zip(sorted((one / "rollouts").iterdir()), sorted((other / "rollouts").iterdir()), strict=True):
        assert a.read_text() == b.read_text()
    data = "checkpoints/step_000006/data.json"
    assert (one / data).read_text() == (other / data).read_text()
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
    assert {"reward", "entropy", "kl", "grad_norm", "moe/max_load", "rewards/lucky/mean"} <= metrics[0].keys()
    stages = {e["stage"]: e for e in json.loads((uninterrupted / "evaluation.json").read_text())}
    assert stages.keys() == {"base", "final"}
    assert stages["base"]["num_problems"] == 10
    assert stages["base"]["ci95"][0] <= stages["base"]["avg@k"] <= stages["base"]["ci95"][1]
    rollouts = read_rollouts(uninterrupted, 3)
    assert [len(group["completions"]) for group in rollouts] == [4] * 5
    for group in rollouts:
        assert sum(c["advantage"] for c in group["completions"]) == pytest.approx(0, abs=1e-9)
    assert any(c["advantage"] for group in rollouts for c in group["completions"]), "a run that learns nothing"
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


@pytest.mark.parametrize("kind", ["plain", "stateful"])
def test_a_stopped_run_resumes_as_if_it_had_not_been(kind: str, recipe: Path, request: pytest.FixtureRequest) -> None:
    whole = request.getfixturevalue({"plain": "uninterrupted", "stateful": "stateful"}[kind])
    settings = [f"output_dir={recipe.parent}", f"name=pieces_{kind}", *(STATEFUL if kind == "stateful" else [])]
    evaluations = recipe.parent / f"pieces_{kind}" / "evaluation.json"
    for last in (1, 3, 6):
        run(recipe, [*settings, f"max_steps={last}"], resume=True)
        if last < 6:  # an evaluation "final" belongs to the end that was asked for then
            base = [e for e in json.loads(evaluations.read_text()) if e["stage"] == "base"]
            evaluations.write_text(json.dumps(base, indent=2) + "\n")
    assert_same_run(whole, recipe.parent / f"pieces_{kind}")


@pytest.fixture(scope="module")
def stateful(recipe: Path) -> Path:
    run(recipe, [f"output_dir={recipe.parent}", "name=stateful", *STATEFUL], resume=False)
    return recipe.parent / "stateful"


def test_every_question_is_accounted_for(stateful: Path) -> None:
    metrics, numbers, helped = metrics_of(stateful), list[int](), 0
    for line in metrics:
        records = read_rollouts(stateful, line["step"])
        trained = [record for record in records if record["is_trained"]]
        assert len(trained) == 5
        assert len(records) - 5 == line["dynamic/dropped"]
        numbers += [record["number"] for record in records]
        versions = [[c["policy_version"] for c in record["completions"][:4]] for record in trained]
        assert sum(v[0] < line["step"] - 1 for v in versions) == line["dynamic/carried"]
        helped += sum(len(record["completions"]) == 5 for record in records)
    data = json.loads((stateful / "checkpoints" / "step_000006" / "data.json").read_text())
    numbers += [answer["number"] for answer in data["pending"]]
    helped += sum(len(answer["completions"]) == 5 for answer in data["pending"])
    assert helped == sum(line["replay/added"] for line in metrics)
    assert sorted(numbers) == list(range(sum(line["dynamic/asked"] for line in metrics)))
    assert [line["completions/max_allowed_length"] for line in metrics] == [20, 25, 30, 35, 40, 40]
    for key in ("dynamic/carried", "dynamic/dropped", "replay/stored"):
        assert any(line[key] for line in metrics), f"a test without {key} shows little"


def read_rollouts(folder: Path, step: int) -> list[dict]:
    lines = (folder / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_that_drafts_and_ends_completions_at_stop_strings(recipe: Path) -> None:
    settings = [
        "engine.speculative.num_speculative_tokens=1",
        "stop_strings=['- ', '= 4']",
        "evaluation.num_problems=0",
    ]
    run(recipe, [f"output_dir={recipe.parent}", "name=drafts", "max_steps=1", *settings], resume=False)
    [metrics] = metrics_of(recipe.parent / "drafts")
    assert 0 <= metrics["sampling/acceptance_rate"] <= 1
    assert metrics["sampling/drafted"] > 0
    lines = (recipe.parent / "drafts" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    ends = set()
    for completion in (c for line in lines for c in json.loads(line)["completions"]):
        before, stop, after = re.fullmatch(r"(.*?)(- |= 4|$)(.*)", completion["text"]).groups()  # type: ignore[union-attr]
        assert " " not in after
        ends.add((bool(stop), completion["finish_reason"]))
    assert (True, "stop") in ends
    assert (True, "length") not in ends


def test_weights_are_evaluated_once_where_eval_steps_ends_with_the_run(recipe: Path) -> None:
    plugin = recipe.parent / "counted.py"
    plugin.write_text(
        "from pathlib import Path\n\ndef counted(problem, completion):\n"
        f"    with Path({str(recipe.parent / 'counted.txt')!r}).open('a') as file:\n"
        "        file.write('x')\n"
        "    return float(len(completion) % 2)\n"
    )
    settings = [f"output_dir={recipe.parent}", f"rewards=['{plugin}:counted']", "evaluation.eval_steps=1"]
    run(recipe, [*settings, "name=evaluated", "max_steps=2"], resume=False)
    evaluations = json.loads((recipe.parent / "evaluated" / "evaluation.json").read_text())
    assert [e["stage"] for e in evaluations] == ["base", 1, 2, "final"]
    assert evaluations[3] == evaluations[2] | {"stage": "final"}
    per_evaluation, per_step = 10 * (2 + 1), 5 * 4
    assert len((recipe.parent / "counted.txt").read_text()) == 3 * per_evaluation + 2 * per_step
    # Stopped before the end it was evaluated at step 1 alone; going on it evaluates as the whole run did.
    run(recipe, [*settings, "name=evaluated_again", "max_steps=1"], resume=False)
    run(recipe, [*settings, "name=evaluated_again", "max_steps=2"], resume=True)
    assert json.loads((recipe.parent / "evaluated_again" / "evaluation.json").read_text()) == evaluations


def test_stop_strings_that_the_tokenizer_cannot_spell_end_a_run_before_it_begins(recipe: Path) -> None:
    settings = [f"output_dir={recipe.parent}", "name=unspelled", "stop_strings=['</answer>', 'stop here']"]
    with pytest.raises(SamplingError, match="stop_strings: no tokens of the tokenizer spell 'stop here'"):
        run(recipe, settings, resume=False)


def test_a_list_reward_of_the_wrong_count_ends_the_run_even_if_evaluation_cannot_tell(recipe: Path) -> None:
    plugin = recipe.parent / "one_score.py"
    plugin.write_text("def one_score(completions, **columns):\n    return [1.0]\n")
    settings = [f"output_dir={recipe.parent}", "name=one_score", f"rewards=['{plugin}:one_score']", "evaluation.k=1"]
    with pytest.raises(RewardError, match="returned 1 values for 4 completions"):
        run(recipe, settings, resume=False)


def test_a_run_of_adapters_moves_these_alone_and_recomputing_changes_nothing(recipe: Path) -> None:
    off = ["bias_update_rate=0", "mtp_weight=0", "sync_ref_model=false"]
    shared = [f"output_dir={recipe.parent}", "lora={r: 4}", "save_steps=1", *off]
    run(recipe, [*shared, "name=adapters", "max_steps=2", "activation_recomputation=full"], resume=False)
    run(recipe, [*shared, "name=adapters_again", "max_steps=1"], resume=False)
    run(recipe, [*shared, "name=adapters_again", "max_steps=2"], resume=True)
    ends = [recipe.parent / name / "checkpoints" / "step_000002" for name in ("adapters", "adapters_again")]
    one, other = (load_file(end / "trainer.safetensors") for end in ends)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert all(name.endswith(("lora_A", "lora_B")) for name in one)
    before = load_file(next((recipe.parent / "cache").glob("*/model.safetensors")))
    after = load_file(ends[0] / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(".self_attn." in name and name.endswith("_proj.weight") or "_mqa" in name for name in moved)
    assert len(load_file(ends[0] / "adapter" / "adapter_model.safetensors")) == 2 * 2 * 4


@pytest.mark.multi
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_run_resumes_as_if_it_had_not_been(processes: int, recipe: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "kill_and_resume.py"
    command = [sys.executable, str(script), "max_steps=20", "--recipe", str(recipe)]
    command += ["--kills", "1", "--processes", str(processes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^differences +0 ", done.stdout, re.MULTILINE)


@pytest.mark.multi
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
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
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)])
def test_a_signal_before_the_first_step_says_how_to_go_on(recipe: Path, number: signal.Signals, code: int) -> None:
    settings = [f"output_dir={recipe.parent}", f"name=early{number.value}", "base.max_steps=100000", "seed=7"]
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo", "train", str(recipe), *settings],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("base model"):
            break
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert "Traceback" not in output
    assert "--resume" in output.splitlines()[-1]


SLOW = """
import time
from pathlib import Path

def slow(problem, completion):
    if Path(__file__).with_name("wait").exists():
        Path(__file__).with_name("waiting").touch()
        time.sleep(30)
    return float(len(completion) % 3)
"""


@pytest.mark.multi
def test_a_step_that_would_miss_the_deadline_is_given_up_and_asked_again(recipe: Path, tmp_path: Path) -> None:
    """SIGTERM while a reward hangs: the steps before are saved, not the questions of the one in hand."""
    (tmp_path / "slow.py").write_text(SLOW)
    settings = [f"output_dir={tmp_path}", f"rewards=[{tmp_path / 'slow.py'}:slow]", "evaluation.num_problems=0"]
    settings += ["save_steps=0", "reward_timeout=60", "stop_timeout=0.2", *STATEFUL]
    run(recipe, [*settings, "name=whole"], resume=False)
    run(recipe, [*settings, "name=pieces", "max_steps=2"], resume=False)
    (tmp_path / "wait").touch()
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo", "train", str(recipe), *settings, "name=pieces", "--resume"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for _ in wait_for(tmp_path / "waiting", process):
        pass
    (tmp_path / "wait").unlink()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=25)
    assert process.returncode == 0, output
    assert "step 3 was given up, 0.2 s after SIGTERM; saving what was before it" in output
    assert "--resume" in output.splitlines()[-1]
    run(recipe, [*settings, "name=pieces"], resume=True)
    assert_same_steps(tmp_path / "whole", tmp_path / "pieces")


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
    more = ["save_steps=0", "num_iterations=1", "num_minibatches=1", "learning_rate=3e-3", "evaluation.num_problems=0"]
    more += ["beta=0", "sync_ref_model=false", "use_adaptive_entropy=false"]
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
