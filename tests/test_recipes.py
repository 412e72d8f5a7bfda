"""The recipes for models that people have: their memory is as docs/recipes.md says, an answer in the form that a prompt
asks for scores, and each runs from start to end with a tiny model in place of its own."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from typer.testing import CliRunner

import policy as policies
from grpo.cli import app
from grpo.code_data import convert
from grpo.config import Config, DatasetConfig, load_config
from grpo.data import DatasetError, read_problems
from grpo.plan_text import plan_recipe
from grpo.prompts import render_prompt
from grpo.run import run
from policy.tokenizer import Tokenizer
from rewards import Grader, Problem
from tests.policies import tiny_llama
from tests.tokenizer_kinds import byte_tokenizer

ROOT = Path(__file__).resolve().parents[1]
QWEN = {
    "model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "hidden_act": "silu", "num_key_value_heads": 2,
    "use_sliding_window": False,
}  # fmt: skip
QWEN_05 = QWEN | {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
QWEN_15 = QWEN | {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
SMOLLM2 = {
    "model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192, "rope_theta": 1e5,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "silu", "hidden_size": 576,
    "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
"""What config.json of Qwen2.5-0.5B, Qwen2.5-1.5B and SmolLM2-135M says of their shapes."""

GSM8K = [
    {"question": f"A crate holds {n} jars. How many jars do {n + 1} crates hold?",
     "answer": f"That is {n} * {n + 1} = <<{n}*{n + 1}={n * (n + 1)}>>{n * (n + 1)} jars.\n#### {n * (n + 1)}"}
    for n in range(3, 19)
]  # fmt: skip
ASDIV = [{"question": row["question"], "result": row["answer"].split()[-1]} for row in GSM8K]
MBPP = [
    {"task_id": n, "text": f"Write a function to add {n} to a number.", "code": f"def add(x):\n    return x + {n}",
     "test_list": [f"assert add(1) == {n + 1}", f"assert add(-{n}) == 0"], "test_setup_code": ""}
    for n in range(1, 17)
]  # fmt: skip
"""Made up, in the columns of the datasets that the recipes name."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A recipe with what it is tried on."""

    shape: dict[str, Any]
    """Of the model it names."""
    memory_gib: float
    """Of the device that the page promises it for."""
    rows: list[dict[str, Any]]
    """In the columns of its dataset."""
    right: str
    """A completion that answers the first row in the form asked for."""


RIGHT_BOX, RIGHT_CODE = r"3 times 4 is \boxed{12}", "Here.\n\n```python\ndef add(x):\n    return x + 1\n```\n"
CASES = {
    "gsm8k_zero_qwen05": Case(
        shape=QWEN_05, memory_gib=24, rows=GSM8K, right="<think>3 * 4</think> <answer>12</answer>"
    ),
    "gsm8k_lora_qwen15": Case(shape=QWEN_15, memory_gib=24, rows=GSM8K, right=RIGHT_BOX),
    "mbpp_full_qwen05": Case(shape=QWEN_05, memory_gib=24, rows=MBPP, right=RIGHT_CODE),
    "mbpp_lora_qwen15": Case(shape=QWEN_15, memory_gib=24, rows=MBPP, right=RIGHT_CODE),
    "asdiv_smollm2_cpu": Case(shape=SMOLLM2, memory_gib=8, rows=ASDIV, right=" 3 * 4 = 12. The answer is 12."),
}


def recipe_of(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.yaml"


def chat_tokenizer() -> Tokenizer:
    """Bytes, and the marks of a conversation as tokens of their own."""
    inner = byte_tokenizer().inner.__class__(
        tokenizer_object=byte_tokenizer().inner.backend_tokenizer, pad_token="<pad>", eos_token="<eos>"
    )
    inner.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_start|>"), AddedToken("<|im_end|>")]})
    inner.chat_template = CHATML
    return Tokenizer(inner)


def data_settings(name: str, folder: Path) -> list[str]:
    """The case's rows as files, and the settings that put them in the place of what the recipe names."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CASES[name].rows))
    config = load_config(recipe_of(name))
    if "code" in config.rewards:
        problems = folder / "problems.jsonl"
        assert convert(DatasetConfig(path=str(file)), "mbpp", problems).num_written == len(MBPP)
        return [f"dataset.path={problems}", f"evaluation.path={problems}"]
    return [f"dataset.path={file}", "dataset.config_name=null", "dataset.split=train"]


def first_problem(config: Config) -> Problem:
    return read_problems(config.dataset, seed=0, split="all", count=1)[0]


@pytest.mark.parametrize("name", CASES)
def test_memory_is_what_the_page_says_and_fits(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CASES[name].shape))
    told = plan_recipe(recipe_of(name), [f"model={tmp_path}"], memory_gib=CASES[name].memory_gib)
    assert told.fits, told.text
    taken = re.search(r"with what lies unused, and the context +([\d.]+ GiB)", told.text)
    assert taken is not None
    page = (ROOT / "docs" / "recipes.md").read_text().splitlines()
    [line] = [line for line in page if line.startswith(f"| `{name}.yaml`")]
    assert f"{taken[1]} of {CASES[name].memory_gib:g}" in line


@pytest.mark.parametrize("name", CASES)
def test_an_answer_in_the_form_asked_for_scores_and_another_does_not(name: str, tmp_path: Path) -> None:
    config = load_config(recipe_of(name), data_settings(name, tmp_path))
    problem, right = first_problem(config), CASES[name].right
    with Grader(config.rewards, weights=config.reward_weights, num_workers=0) as grader:
        good, bad = grader.grade([problem] * 2, [right, right.replace("12", "13").replace("x + 1", "x + 2")])
    first = config.rewards[0]
    assert (good.breakdown[first], bad.breakdown[first]) == (1.0, 0.0)
    assert good.reward == sum(config.reward_weights or [1.0])


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_those_of_the_models_own_template(name: str, tmp_path: Path) -> None:
    config = load_config(recipe_of(name), data_settings(name, tmp_path))
    problem, tokenizer = first_problem(config), chat_tokenizer()
    prompt = render_prompt(problem, config.prompt_template, tokenizer)
    if config.stop_strings:  # no turns, whose mark would end a completion
        assert tokenizer.inner.convert_tokens_to_ids("<|im_start|>") not in prompt
        shown = tokenizer.decode(prompt)
        if config.prompt_template == "r1_zero":
            assert config.stop_strings == ("</answer>",)
            assert "Instruct" not in (config.model or "")
        else:
            assert config.stop_strings == ("\n",)
            assert shown.endswith(f"Question: {problem.prompt}\nAnswer:")
        return
    assert "Instruct" in (config.model or "")
    user = {"role": "user", "content": problem.prompt}
    system = {"role": "system", "content": r"Please reason step by step, and put your final answer within \boxed{}."}
    turns = [user] if config.prompt_template == "chat" else [system, user]
    assert prompt == tokenizer.render_chat(turns)
    assert tokenizer.inner.convert_tokens_to_ids("<|im_start|>") in prompt


@pytest.mark.parametrize("name", CASES)
def test_it_runs_from_start_to_end(name: str, tmp_path: Path) -> None:
    model, tokenizer = tmp_path / "model", chat_tokenizer()
    tiny = tiny_llama(
        model_type=CASES[name].shape["model_type"], vocab_size=len(tokenizer), max_position_embeddings=1024
    )
    policies.save(tiny, model)
    tokenizer.save(model)
    small = ["prompts_per_step=2", "num_generations=2", "max_completion_length=8", "max_steps=1", "reward_workers=0"]
    held_out = ["evaluation.num_problems=2", "evaluation.k=2", "device=cpu", f"output_dir={tmp_path}"]
    run(recipe_of(name), [f"model={model}", *small, *held_out, *data_settings(name, tmp_path)], resume=False)
    folder = tmp_path / name
    [metrics] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert f"rewards/{load_config(recipe_of(name)).rewards[0]}/mean" in metrics
    assert metrics["grading/error"] == metrics["grading/timeout"] == 0
    stages = {entry["stage"]: entry for entry in json.loads((folder / "evaluation.json").read_text())}
    assert stages.keys() == {"base", "final"}
    assert all(0 <= entry["avg@k"] <= entry["pass@k"] <= 1 for entry in stages.values())
    policies.load(folder / "checkpoints" / "step_000001")


def test_the_command_says_what_it_wrote_and_what_it_left_out(tmp_path: Path) -> None:
    source, out = tmp_path / "rows.json", tmp_path / "problems.jsonl"
    source.write_text(json.dumps([*MBPP, {"text": "?"}]))
    done = CliRunner().invoke(app, ["code-data", str(source), str(out), "--layout", "mbpp"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert f"wrote 16 problems to {out}" in done.output
    assert f"left out 1 rows; the first: {source}:17: a row of layout mbpp needs 'test_list'" in done.output
    refused = CliRunner().invoke(app, ["code-data", "no.jsonl", str(out), "--layout", "mbpp"], catch_exceptions=False)
    assert refused.exit_code == 2
    assert "error: no dataset file 'no.jsonl'" in refused.output


def test_rows_that_are_no_problem_are_counted_and_the_rest_written(tmp_path: Path) -> None:
    source, out = tmp_path / "rows.json", tmp_path / "new" / "problems.jsonl"
    source.write_text(json.dumps([MBPP[0], {"task_id": 7, "text": "?"}, "row", MBPP[1] | {"test_list": ["assert ("]}]))
    done = convert(DatasetConfig(path=str(source)), "mbpp", out)
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["1"]
    assert done.num_written == 1
    assert [reason.split(":")[1] for reason in done.refused] == ["2", "3", "4"]
    problem = read_problems(DatasetConfig(path=str(out)), seed=0, split="all", count=9)[0]
    assert "add(-1)" not in problem.prompt
    assert "add(-1)" in problem.tests["tests"]  # type: ignore[index]
    kept = out.read_text()
    source.write_text(json.dumps([{"text": "?"}]))
    with pytest.raises(
        DatasetError, match="none of 1 rows is a problem of layout mbpp; the first: .*needs 'test_list'"
    ):
        convert(DatasetConfig(path=str(source)), "mbpp", out)
    assert out.read_text() == kept
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    for arguments, message in ((("mbpb", out), "--layout"), (("mbpp", tmp_path / "x.txt"), "must end in .jsonl")):
        with pytest.raises(DatasetError, match=message):
            convert(DatasetConfig(path=str(source)), *arguments)
