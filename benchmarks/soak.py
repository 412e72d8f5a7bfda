"""Train for thousands of small steps while things go wrong at random, and watch for what leaks.

A reward misbehaves on one completion in some hundreds: it raises, hangs, dies, forks, writes megabytes, takes all
memory or answers nonsense; another runs programs in the code sandbox. Meanwhile grading processes, the sandbox's among
them, are killed or stopped, and for moments no file can grow. The run must do all its steps, end with
0, leave no process behind, and not grow: memory, open files, threads, processes and disk are read every few seconds.

    python benchmarks/soak.py [a.b=value ...] [--steps 2000] [--every 5] [--seed 0] [--json PATH]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.kill_and_resume import RECIPE, Job, descendants, make_job, read_metrics, write_rows  # noqa: E402

SETTINGS = (
    *("base.max_steps=20", "base.tokens_per_step=512", "prompts_per_step=4", "num_generations=4"),
    *("max_completion_length=24", "evaluation.num_problems=4", "evaluation.k=2", "save_steps=20"),
    *("reward_timeout=2", "reward_memory_mb=1024", "reward_workers=2", "learning_rate=1e-5"),
    *("dynamic_sampling.oversample=1.5", "curriculum.revisit_steps=5", "replay_buffer.max_pass_rate=0.5"),
)
REWARDS = """
import os, sys, time, zlib
from rewards import score_program

def mean(problem, completion):
    draw = zlib.crc32(completion.encode()) % 4000
    if draw == 0: raise RuntimeError("a reward that raises")
    if draw == 1: time.sleep(60)
    if draw == 2: os._exit(3)
    if draw == 3: os.fork()
    if draw == 4: sys.stdout.write("x" * 5_000_000)
    if draw == 5: bytearray(4 << 30)
    if draw == 6: return float("nan")
    if draw == 7: return "nonsense"
    return draw % 2

def program(problem, completion):
    if zlib.crc32(completion.encode()) % 16: return 0.0
    problem = {"style": "stdio", "cases": [{"stdin": "3\\n", "stdout": "9\\n"}]}
    return score_program("print(int(input()) ** 2)", problem).reward
"""


PAUSE_S = 4.0
"""For which a process is stopped; longer than a completion may take to be graded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What the run holds at one moment."""

    step: int
    """Steps done."""
    main_mib: float
    """Memory of the trainer."""
    all_mib: float
    """Memory of it and of all that it started, what they share counted once for each."""
    descriptors: int
    """Open files of the trainer."""
    threads: int
    """Of the trainer."""
    processes: int
    """That it started, and they."""
    disk_mib: float
    """Of the run's folder, but for the rollouts and metrics, which grow by a line a group and a line a step."""


def main() -> None:
    """Run under faults, read, print a table, write JSON if asked. Exits with 1 where something leaked or was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="a.b=value")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between faults, on average")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "odd.py").write_text(REWARDS)
        rewards = [f"rewards=['{place / 'odd.py'}:mean','{place / 'odd.py'}:program']", "reward_weights=null"]
        settings = [str(RECIPE), *SETTINGS, *rewards, f"max_steps={arguments.steps}", *arguments.overrides]
        job = make_job(settings, place, "soak", 1)
        readings, faults, left, code = watch(job, random.Random(arguments.seed), arguments.every)
        steps = len({row["step"] for row in read_metrics(job.folder)})
        if code or not readings:
            sys.exit(
                f"the run ended with {code}:\n{(job.folder.parent / 'log.txt').read_text(errors='replace')[-3000:]}"
            )
    report(readings, faults, steps, left, arguments)


def watch(job: Job, draw: random.Random, every: float) -> tuple[list[Reading], Counter[str], list[str], int]:
    """Start the run, do it harm, read what it holds; gives also the processes left at its end and its exit code."""
    process, faults, readings = job.start(), Counter[str](), list[Reading]()
    next_fault, known = time.monotonic(), set[int]()
    while process.poll() is None:
        time.sleep(0.5)
        known |= set(descendants(process.pid))
        with contextlib.suppress(OSError, ValueError):
            readings.append(read(process.pid, job.folder))
        if time.monotonic() > next_fault and any(reading.step for reading in readings[-1:]):
            with contextlib.suppress(ProcessLookupError):
                faults[harm(process.pid, draw)] += 1
            next_fault = time.monotonic() + draw.expovariate(1 / every)
    time.sleep(1)
    left = [name for pid in sorted(known) if (name := name_of(pid))]
    return [reading for reading in readings if reading.step], faults, left, process.returncode


def name_of(pid: int) -> str | None:
    """A process's number, state and parent; None where it is gone or waits only to be reaped."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
        command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return None
    return None if state == "Z" else f"{pid} ({state}, child of {parent}): {command[:120]}"


def harm(pid: int, draw: random.Random) -> str:
    """Do one thing to a run; gives its name."""
    fault = draw.choice(["killed", "stopped", "no room"])
    if fault == "no room":
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, hard))
        time.sleep(draw.uniform(0.1, 1.0))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
        return fault
    started = descendants(pid)
    if not started:
        return "none there"
    victim = draw.choice(started)
    os.kill(victim, signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    if fault == "stopped":
        time.sleep(PAUSE_S)
        os.kill(victim, signal.SIGCONT)
    return fault


def read(pid: int, folder: Path) -> Reading:
    """What a run holds now."""
    metrics = folder / "metrics.jsonl"
    steps = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    started = descendants(pid)
    main_mib = memory_mib(pid)
    files = [file for file in folder.rglob("*") if file.is_file() and file != metrics]
    return Reading(
        step=steps,
        main_mib=main_mib,
        all_mib=main_mib + sum(memory_mib(child) for child in started),
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        threads=len(os.listdir(f"/proc/{pid}/task")),
        processes=len(started),
        disk_mib=sum(file.stat().st_size for file in files if file.parent.name != "rollouts") / 2**20,
    )


def memory_mib(pid: int) -> float:
    """Resident memory; 0 of a process that is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * resource.getpagesize() / 2**20


def report(
    readings: Sequence[Reading], faults: Counter[str], steps: int, left: Sequence[str], arguments: argparse.Namespace
) -> None:
    """The table; what a run holds is compared between the second and the last tenth of it."""
    tenth = max(1, len(readings) // 10)
    early, late = readings[tenth : 2 * tenth], readings[-tenth:]
    rows: list[dict[str, Any]] = [
        {"name": "steps", "ours": steps, "unit": f"of {arguments.steps}"},
        {"name": "faults", "ours": sum(faults.values()), "unit": ", ".join(f"{k} {n}" for k, n in faults.items())},
        {"name": "processes left", "ours": len(left), "unit": "at the end"},
    ]
    grown = []
    for name, unit, slack in (
        ("main_mib", "MiB", 32.0), ("all_mib", "MiB", 256.0), ("descriptors", "open files", 8),
        ("threads", "threads", 4), ("processes", "processes", 16), ("disk_mib", "MiB", 24.0),
    ):  # fmt: skip
        before, after = (statistics.median(getattr(reading, name) for reading in part) for part in (early, late))
        rows.append({"name": name, "ours": round(after, 1), "unit": f"{unit} at the end, {before:.1f} near the start"})
        if after > before + slack:
            grown.append(f"{name} grew from {before:.1f} to {after:.1f}")
    for row in rows:
        print(f"{row['name']:15} {row['ours']:>9}  {row['unit']}")
    if arguments.json:
        write_rows(arguments.json, rows)
    # A line of metrics may have met a disk without room: the step was done all the same.
    if left:
        grown.append(f"processes left: {left}")
    if steps < 0.9 * arguments.steps:
        grown.append(f"only {steps} steps are in metrics.jsonl")
    for line in grown:
        print(f"LEAK: {line}")
    sys.exit(1 if grown else 0)


if __name__ == "__main__":
    main()
