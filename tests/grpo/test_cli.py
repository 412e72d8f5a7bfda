"""The command: what a person can mend is one line with the remedy, exit code 2, and nothing is lost."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import policy as policies
from grpo.checkpoint import find_checkpoint
from grpo.cli import app
from grpo.config import load_config
from grpo.record import RunFolder
from policy.checkpoint import CONFIG
from policy.tokenizer import load_tokenizer
from tests.full_disk import files_at_most
from tests.recipes import TINY, write_recipe

ROOT = Path(__file__).resolve().parents[2]
REWARDS = """
import math

def returns_nan(problem, completion):
    return math.nan

def too_few(completions, **columns):
    return [1.0]

def raises(problem, completion):
    return completion.gold
"""


def invoke(*arguments: object) -> tuple[int, str]:
    """Exit code and output of `grpo ARGUMENTS`; an error that the command did not foresee passes through."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    return result.exit_code, result.output


def run(*arguments: object) -> str:
    code, output = invoke(*arguments)
    assert code == 0, output
    return output


def refusal(*arguments: object) -> str:
    """The one line that the command refuses with; before it only notes of what was done so far."""
    code, output = invoke(*arguments)
    assert code == 2, output
    *_, last = output.splitlines()
    assert last.startswith("error: ")
    assert output.count("error: ") == 1
    assert "Traceback" not in output
    return last.removeprefix("error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_of(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a recipe that was run to its end."""
    folder = tmp_path_factory.mktemp("finished")
    output = run("train", write_recipe(folder))
    assert f"report: {folder / 'runs' / 'tiny' / 'report.html'}" in output
    return folder


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, whose recipe and base model are its own."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    write_recipe(tmp_path)
    edit = tmp_path / "runs" / "tiny" / "config.yaml"
    edit.write_text(edit.read_text().replace(str(finished), str(tmp_path)))
    return tmp_path


# --- train and resume --------------------------------------------------------------------------------------------


def test_a_run_leaves_its_folder_and_says_before_and_after(done: Path) -> None:
    files = {path.name for path in (done / "runs" / "tiny").iterdir()}
    assert {"config.yaml", "metrics.jsonl", "rollouts", "evaluation.json", "checkpoints", "report.html"} <= files
    assert steps_of(done / "runs" / "tiny") == [1, 2, 3]
    output = run("train", done / "tiny.yaml", "--resume")
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}
    assert rows["base"] == ["final"]
    assert [len(rows[name]) >= 2 for name in ("greedy", "avg@2", "tokens")] == [True] * 3


def test_a_folder_that_holds_a_run_is_refused_untouched(done: Path) -> None:
    before = contents(done)
    assert "already holds a run; continue it with --resume, or choose another name" in refusal(
        "train", done / "tiny.yaml"
    )
    message = refusal("train", done / "tiny.yaml", "learning_rate=0.5", "--resume")
    assert (
        "holds a run with other settings (learning_rate: 0.001 there, 0.5 here); resume it with its own recipe"
        in message
    )
    assert contents(done) == before


def test_a_folder_in_use_is_refused_untouched(done: Path) -> None:
    config = load_config(done / "tiny.yaml")
    owner = RunFolder(config.run_dir, print)
    owner.open(config, resume=True)
    before = contents(done)
    assert "another process is running in" in refusal("train", done / "tiny.yaml", "--resume")
    assert contents(done) == before
    owner.close()


@pytest.mark.parametrize("file", ["trainer.safetensors", "model.safetensors", "manifest.json"])
def test_a_half_written_checkpoint_gives_way_to_the_one_before_and_is_made_again(file: str, done: Path) -> None:
    checkpoints = done / "runs" / "tiny" / "checkpoints"
    whole = contents(checkpoints / "step_000003")
    torn = checkpoints / "step_000003" / file
    torn.write_bytes(torn.read_bytes()[: torn.stat().st_size // 2])
    output = run("train", done / "tiny.yaml", "--resume")
    assert "step_000003 is damaged" in output
    assert "the one before is taken" in output
    assert contents(checkpoints / "step_000003") == whole
    assert steps_of(done / "runs" / "tiny") == [1, 2, 3]


def test_a_run_of_another_version_goes_on_and_says_so(done: Path) -> None:
    folder, wanted = done / "runs" / "tiny", (done / "runs" / "tiny" / "metrics.jsonl").read_text()
    checkpoint = folder / "checkpoints" / "step_000002"
    shutil.rmtree(folder / "checkpoints" / "step_000003")
    state = json.loads((checkpoint / "state.json").read_text())
    del state["versions"]  # as those before there was such a record
    (checkpoint / "state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["state.json"] = hashlib.sha256((checkpoint / "state.json").read_bytes()).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    del saved["share_prompts"]
    (folder / "config.yaml").write_text(yaml.safe_dump(saved))
    output = " ".join(run("train", done / "tiny.yaml", "--resume").split())
    assert output.count("the run began before these keys were there, and goes on as it was: share_prompts: true") == 1
    assert output.count("the checkpoint is of an older version, which left no name; this is grpo-reasoning") == 1
    assert "freeze_router" not in output
    assert steps_of(folder) == [1, 2, 3]
    assert [json.loads(line)["reward"] for line in wanted.splitlines()] == [
        json.loads(line)["reward"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert run("train", done / "tiny.yaml", "--resume").count("older version") == 0


def test_no_whole_checkpoint_left_is_an_error_that_removes_nothing(done: Path) -> None:
    for checkpoint in (done / "runs" / "tiny" / "checkpoints").iterdir():
        (checkpoint / "model.safetensors").write_bytes(b"")
    before = contents(done)
    message = refusal("train", done / "tiny.yaml", "--resume")
    assert "model.safetensors is not what was written" in message
    assert "there is no other; remove it to start anew" in message
    assert contents(done) == before


def test_a_checkpoint_of_another_shape_is_refused(done: Path) -> None:
    [base] = (done / "cache").iterdir()
    recipe = write_recipe(done, name="other", base=None, model=str(base))
    run("train", recipe, "max_steps=1")
    policy, tokenizer = policies.load(base), load_tokenizer(base)
    wider = policies.Policy(policy.config.model_copy(update={"moe_intermediate_size": 12}))
    policies.initialise(wider, 0)
    policies.save(wider, base)
    tokenizer.save(base)
    before = contents(done / "runs")
    message = refusal("train", recipe, "max_steps=2", "--resume")
    assert "step_000001 is of another shape (moe_intermediate_size is 8 there and 12 here)" in message
    assert {name: data for name, data in contents(done / "runs").items() if not name.endswith("config.yaml")} == {
        name: data for name, data in before.items() if not name.endswith("config.yaml")
    }


def test_a_disk_without_room_for_a_checkpoint_does_not_stop_the_run(done: Path) -> None:
    run_dir = done / "runs" / "tiny"
    assert (run_dir / "checkpoints" / "step_000003" / "trainer.safetensors").stat().st_size > 100_000
    with files_at_most(100_000):
        output = run("train", done / "tiny.yaml", "max_steps=5", "--resume")
    for step in (4, 5):
        assert f"checkpoint of step {step} not written (" in output
    assert "the run goes on, the last one stays" in output
    assert steps_of(run_dir) == [1, 2, 3, 4, 5]
    found = find_checkpoint(run_dir / "checkpoints")
    assert found is not None
    assert (found.step, found.damaged) == (3, ())
    run("train", done / "tiny.yaml", "max_steps=5", "--resume")
    found = find_checkpoint(run_dir / "checkpoints")
    assert found is not None
    assert found.step == 5


def test_a_disk_without_room_for_a_report_says_how_to_write_it(done: Path) -> None:
    run_dir = done / "runs" / "tiny"
    with files_at_most(20_000):
        output = run("train", done / "tiny.yaml", "--resume")
    assert f"report.html not written ([Errno 27] File too large); `grpo report {run_dir}` writes it anew" in output
    assert f"wrote {run_dir / 'report.html'}" in run("report", run_dir)


# --- recipes, data, prompts, rewards -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_step=3", "unknown key 'max_step'; did you mean 'max_steps'?"),
        ("engine.kind=vlm", "engine.kind: Input should be 'builtin', 'vllm_colocate' or 'vllm_server', got 'vlm'"),
        ("learning_rate=fast", "learning_rate: Input should be a valid number"),
        ("reward_weights=[1]", "reward_weights has 1 numbers for 2 rewards"),
        ("prompt_template=solve", "prompt_template must be r1_zero, chat, or a text with {prompt} in it"),
        ("base.shape.hiden_size=8", "unknown key 'base.shape.hiden_size'; did you mean 'base.shape.hidden_size'?"),
        ("base.shape.qk_rope_head_dim=3", "qk_rope_head_dim must be even"),
        ("dataset={path: gone.jsonl}", "`base` writes text for generated problems"),
        ("dataset.countdown.low=30", "needs low <= high <= max_value"),
        ("evaluation.num_problems=100000", "different problems to hold out, 100000 are asked for"),
        ("max_completion_length=60", "the prompt has 14 tokens; with max_completion_length=60 that exceeds"),
        ("rewards=[countdwn]", "no reward is called 'countdwn'; did you mean 'countdown'?"),
        ("rewards=[gone_module:f]", "no module 'gone_module' can be imported"),
        ("base.learning_rate=1e38", "lower base.learning_rate"),
    ],
)
def test_a_recipe_that_cannot_be_run_is_one_line(override: str, message: str, tmp_path: Path) -> None:
    assert message in refusal("train", write_recipe(tmp_path), override)


def test_a_missing_recipe_is_one_line(tmp_path: Path) -> None:
    assert refusal("train", tmp_path / "gone.yaml").startswith(f"no recipe {str(tmp_path / 'gone.yaml')!r}")


def test_a_mended_recipe_runs_under_the_same_name(tmp_path: Path) -> None:
    """What was refused before it left anything does not stand in its own way."""
    recipe = write_recipe(tmp_path)
    assert "did you mean 'countdown'?" in refusal("train", recipe, "rewards=[countdwn]")
    assert "the prompt has 14 tokens" in refusal("train", recipe, "max_completion_length=60")
    run("train", recipe, "max_steps=1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no dataset file"),
        ("", "is empty; nothing can be asked"),
        ('{"nums": [1, 2], "target": 3}\n{"nums": "1 2", "target": 3}\n', "data.jsonl:2: column 'nums' must be"),
        ('{"nums": [1, 2], "target": 3}\n{"nums": [1, 2', "data.jsonl:2: not valid JSON"),
        ('{"question": "?"}\n', "data.jsonl:1: column 'prompt' must hold a question"),
        ('{"prompt": "make 1000 ."}\n', "data.jsonl:1: the tokenizer has no word for '1000'"),
        ('{"prompt": "%s"}\n' % ("make " * 60), "data.jsonl:1: the prompt has 64 tokens"),
        ('{"prompt": "make 3 .", "reward": "countdwn"}\n', "data.jsonl:1: no reward is called 'countdwn'"),
    ],
    ids=["missing", "empty", "bad row", "cut off", "column", "unknown word", "too long", "reward"],
)
def test_a_dataset_that_cannot_be_used_is_one_line(
    content: str | None, message: str, finished: Path, tmp_path: Path
) -> None:
    [base] = (finished / "cache").iterdir()
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_text(content)
    settings: dict[str, Any] = {
        "base": None,
        "model": str(base),
        "evaluation": {"num_problems": 0},
        "rewards": ["format"],
    }
    recipe = write_recipe(tmp_path, dataset={"path": str(file)}, **settings)
    answer = refusal("train", recipe)
    assert message in answer
    assert str(file) in answer


def test_a_held_out_file_that_cannot_be_used_is_one_line(finished: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base=TINY["base"] | {"cache_dir": str(finished / "cache")})
    message = refusal("train", recipe, f"evaluation.path={tmp_path / 'gone.parquet'}")
    assert message.startswith(f"no dataset file '{tmp_path / 'gone.parquet'}'")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("returns_nan", "returned nan, not a finite number"),
        ("too_few", "returned 1 values for"),
        ("raises", "AttributeError"),
        ("gone", "has no function 'gone'"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_that_only_fails_is_one_line(
    function: str, message: str, workers: int, finished: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(REWARDS)
    recipe = write_recipe(tmp_path, base=TINY["base"] | {"cache_dir": str(finished / "cache")}, reward_workers=workers)
    answer = refusal("train", recipe, f"rewards=[{tmp_path / 'mine.py'}:{function}]")
    assert message in answer
    assert function in answer


# --- models ------------------------------------------------------------------------------------------------------


def broken(folder: Path, base: Path, how: str) -> Path:
    shutil.copytree(base, folder)
    if how == "another architecture":
        (folder / CONFIG).write_text('{"model_type": "gpt2"}')
    elif how == "no config":
        (folder / CONFIG).unlink()
    elif how == "half the weights":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif how == "another shape":
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(values | {"kv_lora_rank": 12}))
    elif how == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("another architecture", "model_type 'gpt2' is not supported (supported: deepseek_v3, deepseek_v2, llama,"),
        ("no config", "has no config.json"),
        ("half the weights", "is damaged or half-written"),
        ("another shape", "has shape"),
        ("no tokenizer", "no tokenizer can be read from"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line(how: str, message: str, finished: Path, tmp_path: Path) -> None:
    [base] = (finished / "cache").iterdir()
    model = broken(tmp_path / "model", base, how)
    recipe = write_recipe(tmp_path, base=None, model=str(model))
    for answer in (refusal("train", recipe), refusal("eval", recipe, "--model", model)):
        assert message in answer
        assert str(model) in answer or how == "another architecture"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("../gone", "no folder '../gone'; give a folder with a config.json, or a hub id"),
        (
            "no-such-owner-2f9c/no-such-model-2f9c",
            "no folder 'no-such-owner-2f9c/no-such-model-2f9c' here, and the hub",
        ),
        ("no such/i d", "no folder 'no such/i d' here, and no id of the hub either: Repo id must use"),
    ],
)
def test_a_missing_model_is_one_line(model: str, message: str, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, base=None, model=model)
    for answer in (refusal("train", recipe), refusal("eval", recipe, "--model", model)):
        assert message in answer


# --- eval, sample, report ----------------------------------------------------------------------------------------


def test_eval_prints_the_figures_of_the_last_checkpoint(done: Path) -> None:
    output = run("eval", done / "tiny.yaml")
    evaluation = json.loads(output[output.index("{") :])
    final = json.loads((done / "runs" / "tiny" / "evaluation.json").read_text())[-1]
    assert final["stage"] == "final"
    assert evaluation == final | {"stage": "last checkpoint"}


def test_eval_of_a_named_model_and_of_a_run_that_has_none(finished: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert "holds no checkpoint; train first, or give --model FOLDER" in refusal("eval", recipe)
    [base] = (finished / "cache").iterdir()
    output = run("eval", recipe, "--model", base)
    before = json.loads((finished / "runs" / "tiny" / "evaluation.json").read_text())[0]
    assert json.loads(output[output.index("{") :]) == before | {"stage": str(base)}
    assert not (tmp_path / "runs").exists()


def test_eval_of_no_problems_is_one_line(done: Path) -> None:
    assert refusal("eval", done / "tiny.yaml", "evaluation.num_problems=0") == (
        "evaluation.num_problems is 0: there is nothing to evaluate"
    )


def test_sample_shows_completions_with_their_rewards(done: Path) -> None:
    output = run("sample", done / "tiny.yaml", "--num", 3)
    assert output.startswith("User : Using the numbers ")
    assert sum(line.startswith("[0.") or line.startswith("[1.") for line in output.splitlines()) == 3


def test_sample_of_a_question_of_ones_own(done: Path) -> None:
    output = run("sample", done / "tiny.yaml", "--prompt", "make 3 .", "--num", 2)
    assert output.startswith("User : make 3 . Assistant :\n")
    assert "[" not in output
    message = refusal("sample", done / "tiny.yaml", "--prompt", "sing")
    assert message == "--prompt: the tokenizer has no word for 'sing'"
    assert "give --prompt TEXT" in refusal("sample", done / "tiny.yaml", "evaluation.num_problems=0")


def test_options_out_of_range_are_refused(done: Path) -> None:
    code, output = invoke("sample", done / "tiny.yaml", "--num", 0)
    assert code == 2
    assert "--num" in output


def test_report_needs_a_run(done: Path, tmp_path: Path) -> None:
    assert "holds no run (it has no config.yaml)" in refusal("report", tmp_path / "gone")
    report = done / "runs" / "tiny" / "report.html"
    report.unlink()
    assert run("report", done / "runs" / "tiny").strip() == f"wrote {report}"
    assert report.read_text().startswith("<!doctype html>")


def test_as_a_program_it_writes_one_line_to_stderr_and_gives_two() -> None:
    command = [sys.executable, "-m", "grpo", "train", "gone.yaml"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == f"error: no recipe 'gone.yaml' (looked from {ROOT})\n"
