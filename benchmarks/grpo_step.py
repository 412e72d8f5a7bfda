"""One GRPO step end to end, ours beside TRL's: same shape, prompts, group, lengths, reward and precision.

Random weights of real shapes; a step samples P x G completions of fixed length, grades them, and takes one optimizer
step. Ours is `grpo train` with everything that it writes; the peer is TRL's `GRPOTrainer`, in an interpreter of its own
named by `--trl-python`. The first two steps of each are not counted.

On a GPU it also prints what `grpo plan` says of each half of the step beside what was allocated.

    python benchmarks/grpo_step.py [--works cpu_ds | qwen05 dsv3_05 qwen05_16k] [--ranks N]
                                   [--trl-python PYTHON [--trl-modes hf vllm liger]] [--set KEY=VALUE ...] [--json PATH]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)

import policy as policies  # noqa: E402
from benchmarks.rollouts import WORKS, machine  # noqa: E402
from grpo.config import load_config  # noqa: E402
from grpo.plan import Device, estimate  # noqa: E402
from policy import Policy  # noqa: E402
from policy.checkpoint import resolve_shape  # noqa: E402

STEPS = {"cpu_ds": (16, 8, 64), "qwen05": (16, 16, 512), "dsv3_05": (16, 16, 512), "qwen05_16k": (1, 8, 16384)}
"""Prompts, completions of each, tokens of a completion."""

REWARD = """
def distinct(problem, completion):
    return float(len(set(completion)) % 7)
"""

TRL_SCRIPT = """
import json, statistics, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

folder, rows, (prompts, group, length), steps, mode, output = json.loads(sys.argv[1])
is_gpu = torch.cuda.is_available()
rows_at_once = 32 if is_gpu else prompts * group
choices = {"hf": {}, "vllm": {"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3}}
choices["liger"] = {**choices["vllm"], "use_liger_kernel": True}
times = []

class Clock(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        is_gpu and torch.cuda.synchronize()
        self.start = time.time()

    def on_step_end(self, *args, **kwargs):
        is_gpu and torch.cuda.synchronize()
        times.append(time.time() - self.start)

def distinct(completions, **columns):
    return [float(len(set(completion)) % 7) for completion in completions]

if __name__ == "__main__":
    arguments = GRPOConfig(
        output_dir=output, per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=prompts * group // rows_at_once, num_generations=group,
        max_completion_length=length, learning_rate=1e-6, beta=0.0, bf16=is_gpu, use_cpu=not is_gpu, max_steps=steps,
        logging_steps=1, report_to=[], gradient_checkpointing=False, save_strategy="no", temperature=1.0,
        **choices[mode],
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if is_gpu else torch.float32)
    trainer = GRPOTrainer(
        model=model, reward_funcs=distinct, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder), callbacks=[Clock()],
    )
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if is_gpu else None
    print("RESULT " + json.dumps({"step_s": statistics.median(times[2:]), "peak_gib": peak}), flush=True)
"""


def main() -> None:
    """Measure each work on both sides, print a table, write JSON if asked."""
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=STEPS, default=["qwen05", "dsv3_05"] if is_gpu else ["cpu_ds"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--num-new", type=int, help="other lengths of completions, to try the script out")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    parser.add_argument("--ranks", type=int, default=1, help="processes of ours, on a CPU, of one thread each")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of our recipe")
    parser.add_argument("--trl-python", help="interpreter that has TRL")
    parser.add_argument("--trl-modes", nargs="+", default=["hf"], choices=["hf", "vllm", "liger"])
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.works:
        rows += compare(name, arguments)
    print(f"\n{'work':<24}{'peer':<12}{'ours':>9}{'peer':>9}{'ratio':>8}  unit")
    for row in rows:
        peer, ratio = row["peer"] if row["peer"] is not None else "", row["ratio"] or ""
        print(f"{row['name']:<24}{row['peer_name']:<12}{row['ours']:>9}{peer:>9}{ratio:>8}  {row['unit']}")
    print(f"{machine()}; torch {importlib.metadata.version('torch')}; medians")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def compare(name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Both sides of one work, as rows."""
    prompts, group, length = STEPS[name]
    length = arguments.num_new or length
    problems = make_problems()
    with tempfile.TemporaryDirectory() as scratch:
        folder, scratch_path = Path(scratch) / "model", Path(scratch)
        make_model(name, arguments.layers, folder, length + 512)
        launcher, num_threads = [sys.executable], None
        if arguments.ranks > 1:
            file, num_threads = ROOT / "recipes/accelerate/cpu.yaml", 1
            launcher += ["-m", "accelerate.commands.launch", "--config_file", str(file)]
            launcher += ["--num_processes", str(arguments.ranks)]
        ours = run_ours(
            scratch_path,
            folder,
            problems,
            (prompts, group, length),
            arguments,
            launcher=launcher,
            num_threads=num_threads,
        )
        peers = {}
        for mode in arguments.trl_modes if arguments.trl_python else []:
            peers[f"TRL {mode}"] = run_trl(scratch_path, folder, problems, (prompts, group, length), mode, arguments)
    rows = []
    for peer_name, theirs in (peers or {"none": {}}).items():
        for key, unit in (("step_s", "s a step"), ("peak_gib", "GiB at most")):
            if ours[key] is None:
                continue
            peer = theirs.get(key)
            rows.append(
                {
                    "name": f"{name}/{prompts}x{group}x{length}",
                    "peer_name": peer_name,
                    "ours": round(ours[key], 2),
                    "peer": None if peer is None else round(peer, 2),
                    "ratio": None if peer is None else round(peer / ours[key], 2),
                    "unit": unit,
                    "machine": machine(),
                    "versions": {"torch": importlib.metadata.version("torch")},
                }
            )
    return rows


def make_problems() -> list[dict[str, str]]:
    """Prompts of about the same length."""
    return [
        {
            "prompt": f"Using the numbers {i}, {i + 3}, {2 * i + 1}, make an equation that equals {3 * i + 7}. ",
            "answer": "",
        }
        for i in range(512)
    ]


def make_model(name: str, layers: int | None, folder: Path, context: int = 0) -> None:
    """Random weights of a work's shape, with fewer layers and a wider context if so asked, and a tokenizer."""
    shape = WORKS[name.removesuffix("_16k")].shape
    shape = shape.model_copy(update={"max_position_embeddings": max(shape.max_position_embeddings, context)})
    if layers:
        shape = shape.model_copy(update={"num_hidden_layers": layers})
    policy = Policy(shape)
    policies.initialise(policy, seed=0)
    policies.cast_weights(policy, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    policies.save(policy, folder)
    character_tokenizer().save_pretrained(folder)


def run_ours(
    scratch: Path,
    folder: Path,
    problems: list[dict[str, str]],
    size: tuple[int, int, int],
    arguments: argparse.Namespace,
    *,
    launcher: Sequence[str] = (sys.executable,),
    num_threads: int | None = None,
    name: str = "step",
) -> dict[str, Any]:
    """Medians of a step of `grpo train`, its phases and tokens a second, and peak memory; prints the phases."""
    is_gpu = torch.cuda.is_available()
    prompts, group, length = size
    (scratch / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    (scratch / "reward.py").write_text(REWARD)
    recipe = {
        "name": name, "output_dir": str(scratch / "runs"), "model": str(folder),
        "dtype": "bfloat16" if is_gpu else "float32",
        "dataset": {"path": str(scratch / "problems.jsonl")}, "prompt_template": "{prompt}",
        "rewards": [f"{scratch / 'reward.py'}:distinct"],
        "prompts_per_step": prompts, "num_generations": group, "max_completion_length": length,
        "max_steps": arguments.steps, "learning_rate": 1e-6, "evaluation": {"num_problems": 0}, "save_steps": 0,
        "max_tokens_per_micro_batch": 16384 if is_gpu else 2048,
    }  # fmt: skip
    threads = {}
    if num_threads is not None:
        recipe["num_threads"], threads = num_threads, {"OMP_NUM_THREADS": str(num_threads)}
    (scratch / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [*launcher, "-m", "grpo", "train", str(scratch / f"{name}.yaml"), *arguments.set],
        cwd=ROOT,
        env={**os.environ, **threads, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"our step failed:\n{(done.stdout + done.stderr)[-3000:]}")
    steps = [json.loads(line) for line in (scratch / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    for step in steps:
        print({key: round(step[key], 3) for key in step if key == "step_time" or key.startswith("time/")}, flush=True)
    if is_gpu:
        compare_with_plan(scratch / f"{name}.yaml", arguments.set, steps[-1], prompts * group)
    count = statistics.median(prompts * group * step["completions/mean_length"] for step in steps[2:])
    medians = {
        key: statistics.median(step[key] for step in steps[2:])
        for key in ("step_time", "time/sample", "time/update", "sampling/logp_difference_mean")
    }
    print(f"ours: {medians}; {count:.0f} tokens a step, {count / medians['step_time']:.0f} tokens/s", flush=True)
    return {
        "step_s": medians["step_time"],
        "sample_s": medians["time/sample"],
        "update_s": medians["time/update"],
        "tokens_per_s": count / medians["step_time"],
        "peak_gib": max(step.get("memory/peak_gib") or 0.0 for step in steps) or None,
    }


def compare_with_plan(recipe: Path, overrides: list[str], step: dict[str, Any], num_rows: int) -> None:
    """Print what the plan says beside what torch allocated, GiB."""
    config = load_config(recipe, overrides)
    assert config.model is not None
    prompt_tokens = round(step["num_tokens"] / num_rows - step["completions/mean_length"])
    device = Device.detect(is_gpu=True)
    said = estimate(config, resolve_shape(config.model), device, prompt_tokens=prompt_tokens)
    for half, ours in (("sample", said.sampling_peak), ("update", said.update_peak)):
        measured = step[f"memory/{half}_peak_gib"]
        print(f"memory, {half}: planned {ours / 2**30:.2f}, measured {measured:.2f} GiB", flush=True)


def run_trl(
    scratch: Path,
    folder: Path,
    problems: list[dict[str, str]],
    size: tuple[int, int, int],
    mode: str,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Median seconds of a step and peak memory of TRL's trainer."""
    script = scratch / "run_trl.py"
    script.write_text(TRL_SCRIPT)
    request = [str(folder), problems, size, arguments.steps, mode, str(scratch / "trl")]
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    done = subprocess.run(
        [arguments.trl_python, str(script), json.dumps(request)],
        env={**variables, **os.environ},
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"TRL ({mode}) failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    print(f"TRL {mode}: {result}", flush=True)
    return result


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character: enough for random weights."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


if __name__ == "__main__":
    main()
