"""Kill a run with SIGKILL at random moments, resume it each time, and compare it with one that was left alone.

Everything that carries state from step to step is switched on: dynamic sampling with groups left over, a curriculum,
replayed successes, growing completions, two passes over each batch. The two runs must agree to the bit in metrics (but
seconds), rollouts, evaluations, weights, moments and data state, and every question must have met exactly one fate.

    python benchmarks/kill_and_resume.py [a.b=value ...] [--kills 30] [--processes 1] [--seed 0] [--recipe PATH]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "recipes" / "countdown_zero_cpu.yaml"
SMALL = (
    *("base.max_steps=20", "base.tokens_per_step=512", "prompts_per_step=5", "num_generations=4", "max_steps=60"),
    *("max_completion_length=60", "evaluation.num_problems=8", "evaluation.k=2", "evaluation.eval_steps=25"),
)
STATEFUL = (
    *("dynamic_sampling.oversample=1.7", "dynamic_sampling.max_rounds=3", "curriculum.revisit_steps=5"),
    *("replay_buffer.max_pass_rate=0.5", "length_schedule.start=30", "length_schedule.steps=40", "num_iterations=2"),
    "save_steps=2",
)
"""What a resumed run has to take up again."""
LUCKY = """
import zlib

def lucky(problem, completion):
    return float(zlib.crc32(completion.encode()) % 5 == 0)
"""
"""A reward that one completion in five gets, so that there is something to drop, to carry over and to replay."""
MOMENTS = {"while it starts": 0.2, "in a checkpoint": 0.3, "in a step": 0.5}
"""When kills come, with their shares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """How to start the run."""

    command: list[str]
    folder: Path
    """Where it leaves what it does."""

    def start(self) -> subprocess.Popen[bytes]:
        """The run, taken up where it was left; what it says is added to log.txt beside its folder."""
        environment = {"GOMP_SPINCOUNT": "1000"} | os.environ | {"OMP_NUM_THREADS": "1"}
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / "log.txt").open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, env=environment, cwd=ROOT)

    def finish(self) -> None:
        """Run to the end."""
        if self.start().wait() != 0:
            sys.exit(f"the run failed:\n{(self.folder.parent / 'log.txt').read_text(errors='replace')[-3000:]}")


def main() -> None:
    """Run, kill, resume, compare; print a table, write JSON if asked. Exits with 1 where the two runs differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, help="default: the laptop recipe, made small")
    parser.add_argument("overrides", nargs="*", help="a.b=value")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1, help="ranks")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    small = SMALL if arguments.recipe is None else ()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "lucky.py").write_text(LUCKY)
        rewards = [f"rewards=['{place / 'lucky.py'}:lucky']", "reward_weights=null"]
        settings = [str(arguments.recipe or RECIPE), *small, *STATEFUL, *rewards, *arguments.overrides]
        whole, killed = (make_job(settings, place, name, arguments.processes) for name in ("whole", "killed"))
        started = time.monotonic()
        whole.finish()
        seconds = time.monotonic() - started
        step_s = statistics.median(row["step_time"] for row in read_metrics(whole.folder))
        moments = kill_often(killed, arguments.kills, random.Random(arguments.seed), step_s)
        killed.finish()
        resumed_s = time.monotonic() - started - seconds
        differences = compare(whole.folder, killed.folder) + unaccounted(killed.folder)
        steps = len(read_metrics(whole.folder))
    rows = [
        {"name": "kills", "ours": sum(moments.values()), "unit": ", ".join(f"{k} {n}" for k, n in moments.items())},
        {"name": "steps", "ours": steps, "unit": f"on {arguments.processes} process(es)"},
        {"name": "left alone", "ours": round(seconds, 1), "unit": "s"},
        {"name": "killed, resumed", "ours": round(resumed_s, 1), "unit": "s"},
        {"name": "differences", "ours": len(differences), "unit": "files and tensors"},
    ]
    for row in rows:
        print(f"{row['name']:15} {row['ours']:>8}  {row['unit']}")
    for difference in differences:
        print(f"DIFFERS: {difference}")
    if arguments.json:
        write_rows(arguments.json, rows)
    sys.exit(1 if differences else 0)


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Figures without a peer as JSON, with what they were taken on."""
    about = {"peer": None, "ratio": None, "machine": platform.processor() or platform.machine()}
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    file.write_text(json.dumps([row | about | {"versions": versions} for row in rows], indent=2) + "\n")


def make_job(settings: list[str], place: Path, name: str, processes: int) -> Job:
    """One of the two runs; they share the base model."""
    launch = [sys.executable, "-m"]
    if processes > 1:
        config = ROOT / "recipes" / "accelerate" / "cpu.yaml"
        launch += ["accelerate.commands.launch", "--config_file", str(config), "--num_processes", str(processes), "-m"]
    where = [f"output_dir={place / name}", f"name={name}", f"base.cache_dir={place / 'cache'}"]
    return Job(command=[*launch, "grpo", "train", *settings, *where, "--resume"], folder=place / name / name)


def kill_often(job: Job, kills: int, draw: random.Random, step_s: float) -> Counter[str]:
    """Start and kill it so often; gives how many kills came when. A run that ends by itself is an error."""
    moments = Counter[str]()
    for _ in range(kills):
        before, process = find_metrics(job.folder), job.start()
        [moment] = draw.choices(list(MOMENTS), list(MOMENTS.values()))
        until = time.monotonic() + draw.uniform(0, 8) if moment == "while it starts" else None
        while process.poll() is None and (until is None or time.monotonic() < until):
            # One that goes on rewrites the file before its first step; of the next steps every second one saves.
            is_going = find_metrics(job.folder) not in (None, before) and bool(read_metrics(job.folder))
            if moment == "in a checkpoint" and is_going and is_saving(job.folder):
                time.sleep(draw.uniform(0, 0.02))
                break
            if moment == "in a step" and is_going and until is None:
                until = time.monotonic() + draw.uniform(0, 6 * step_s)
            time.sleep(0.001)
        if process.poll() is not None:
            sys.exit(f"the run ended before it was killed {kills} times (exit code {process.poll()}); raise max_steps")
        kill_tree(process)
        if moment != "while it starts":
            moment = "in a checkpoint" if is_saving(job.folder) else "in a step"
        moments[moment] += 1
    return moments


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint is half-written."""
    return any((folder / "checkpoints").glob(".step_*.partial"))


def find_metrics(folder: Path) -> int | None:
    """Which file metrics.jsonl is, by its number in the file system."""
    try:
        return (folder / "metrics.jsonl").stat().st_ino
    except FileNotFoundError:
        return None


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and all that it started; a launcher is stopped first, so that it can start no more."""
    os.kill(process.pid, signal.SIGSTOP)
    for pid in [*descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Processes that this one and its children started."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [each for child in children for each in (child, *descendants(child))]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    """What two equal runs have in common."""
    timed = ("step_time", "tokens_per_second", "mfu")
    return {key: value for key, value in row.items() if key.split("/")[-1] not in timed and not key.startswith("time/")}


def compare(one: Path, other: Path) -> list[str]:
    """What is not the same in two runs, a line each."""
    metrics = [[without_seconds(row) for row in read_metrics(run)] for run in (one, other)]
    found = [] if metrics[0] == metrics[1] else ["metrics.jsonl"]
    files = ["evaluation.json", *(f"rollouts/{path.name}" for path in sorted((one / "rollouts").iterdir()))]
    last = max(path.name for path in (one / "checkpoints").iterdir())
    files.append(f"checkpoints/{last}/data.json")
    for name in files:
        if not (other / name).is_file() or (one / name).read_bytes() != (other / name).read_bytes():
            found.append(name)
    for name in ("model.safetensors", "trainer.safetensors"):
        before, after = (load_file(run / "checkpoints" / last / name) for run in (one, other))
        found += [f"{name}: {key}" for key in before if not torch.equal(before[key], after[key])]
    return found


def unaccounted(folder: Path) -> list[str]:
    """Questions that were lost, or met two fates: trained on, dropped, or pending at the end."""
    records = [json.loads(line) for path in (folder / "rollouts").iterdir() for line in path.read_text().splitlines()]
    last = max(path.name for path in (folder / "checkpoints").iterdir())
    data = json.loads((folder / "checkpoints" / last / "data.json").read_text())
    fates = Counter(row["number"] for row in [*records, *data["pending"]])
    asked = range(data["stream"]["number"])
    return [f"question {n} met {fates[n]} fates" for n in sorted({*asked, *fates}) if fates[n] != 1 or n not in asked]


if __name__ == "__main__":
    main()
