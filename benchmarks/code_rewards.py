"""How fast programs are judged in the jail, and what is left after many: runs a second, overhead, memory, descriptors.

    python benchmarks/code_rewards.py [--json PATH] [--runs 400] [--endurance 20000]

A run is one call of `score_program`, start to end. The program's own time is what compiling and running the same source
takes in a bare interpreter that is warm: forked, imports done, no jail, input and output in memory files; the fork and
the exit are not counted. The overhead is the difference of the medians, alone on the machine. The peer is what most
harnesses do: a fresh interpreter per program with resource limits, which confines nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rewards import score_program
from rewards.sandbox.sandbox import Sandbox, SandboxUnavailableError

Row = dict[str, Any]

STDIO = {"style": "stdio", "cases": [{"stdin": "3 4\n", "stdout": "7\n"}]}
FUNCTION = {
    "style": "function",
    "entry_point": "add",
    "cases": [{"args": [n, 4], "expected": n + 4} for n in range(10)],
}
ASSERT = {"style": "assert", "entry_point": "add", "tests": "assert add(3, 4) == 7\nassert add('a', 'b') == 'ab'"}
ADD = "def add(a, b):\n    return a + b\n"
WORKLOADS = {
    "stdio": ("print(sum(map(int, input().split())))", STDIO),
    "stdio, numpy": ("import numpy as np\nprint(np.array(input().split(), dtype=int).sum())", STDIO),
    "function, 10 cases": (ADD, FUNCTION),
    "assert, 2 processes": (ADD, ASSERT),
}
USES = {"function": "for n in range(10):\n    add(n, 4)\n", "assert": ASSERT["tests"]}
"""What a program's own process does with it beside running it, by style."""


def measure_level(level: str, runs: int) -> list[Row]:
    """Throughput of two threads and overhead of one, per workload, beside the peer's."""
    rows = []
    with Sandbox(level=level, minimum_level="D", workers=2) as sandbox:
        assert sandbox.level == level
        for name, (program, problem) in WORKLOADS.items():

            def judge(program: str = program, problem: dict[str, Any] = problem) -> None:
                result = score_program(program, problem, sandbox=sandbox)
                assert result.reward == 1.0, result.detail

            has_peer = problem is STDIO
            peer = (lambda program=program: run_fresh_interpreter(program)) if has_peer else None
            ours_s, peer_s = median_s(judge, runs), median_s(peer, runs // 16) if peer else None
            own_s = own_time_s(program + "\n" + USES.get(problem["style"], ""), runs)
            rate, peer_rate = throughput(judge, runs), throughput(peer, runs // 8) if peer else None
            rows.append(row(f"level {level}: {name}: p50 of one run", 1000 * ours_s, peer_s and 1000 * peer_s, "ms"))
            rows.append(row(f"level {level}: {name}: p50 of the program's own time", 1000 * own_s, None, "ms"))
            rows.append(row(f"level {level}: {name}: overhead", 1000 * (ours_s - own_s), None, "ms"))
            rows.append(row(f"level {level}: {name}: two threads", rate, peer_rate, "programs/s"))
    return rows


def median_s(run: Callable[[], None], runs: int) -> float:
    """Median seconds of a run, one at a time."""
    run()
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def own_time_s(program: str, runs: int) -> float:
    """Median seconds of compiling and running a program in forks of a warm interpreter without a jail."""
    environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", _FORK_AND_TIME, str(runs)],
        input=program,
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    return statistics.median(map(float, answer.stdout.split()))


_FORK_AND_TIME = """
import gc, os, sys, time
import numpy

def run(program, report):
    descriptors = [os.memfd_create("input"), os.memfd_create("output")]
    os.write(descriptors[0], b"3 4\\n")
    os.lseek(descriptors[0], 0, os.SEEK_SET)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    sys.stdin, sys.stdout = open(0), open(1, "w")
    started = time.perf_counter()
    exec(compile(program, "solution.py", "exec"), {"__name__": "__main__"})
    sys.stdout.flush()
    os.write(report, str(time.perf_counter() - started).encode())

program, (read, write) = sys.stdin.read(), os.pipe()
gc.collect()
gc.freeze()
for _ in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            run(program, write)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        sys.exit("the program failed")
    print(float(os.read(read, 100)), flush=True)
"""


def throughput(run: Callable[[], None], runs: int) -> float:
    """Runs a second of two threads."""
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: run(), range(4)))
        started = time.perf_counter()
        list(threads.map(lambda _: run(), range(runs)))
    return runs / (time.perf_counter() - started)


def run_fresh_interpreter(program: str) -> None:
    """The peer: a new interpreter with resource limits, and nothing else between the program and the machine."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (10, 10))

    answer = subprocess.run(
        [sys.executable, "-c", program], input="3 4\n", capture_output=True, text=True, timeout=10, preexec_fn=limit
    )
    assert answer.stdout == "7\n", answer.stderr


def endure(level: str, runs: int) -> list[Row]:
    """What `runs` runs leave behind: growth of resident memory and descriptors, here and in the supervisors."""
    program, problem = WORKLOADS["stdio"]
    with Sandbox(level=level, minimum_level="D", workers=2) as sandbox, ThreadPoolExecutor(2) as threads:

        def count_wrong(share: int) -> int:
            return sum(score_program(program, problem, sandbox=sandbox).reward != 1.0 for _ in range(share))

        assert sum(threads.map(count_wrong, [500] * 2)) == 0
        before = census()
        started = time.perf_counter()
        wrong = sum(threads.map(count_wrong, [runs // 2] * 2))
        seconds = time.perf_counter() - started
        after = census()
        rows = [
            row(f"level {level}: {runs} runs", runs / seconds, None, "programs/s"),
            row(f"level {level}: wrong scores after {runs} runs", wrong, None, "scores"),
        ]
        rows += [
            row(f"level {level}: growth over {runs} runs: {name}", after[name] - before[name], None, unit)
            for name, unit in (("memory", "KiB"), ("descriptors", "descriptors"), ("processes", "processes"))
        ]
    time.sleep(0.2)
    return [*rows, row(f"level {level}: processes left after closing", census()["processes"] - 1, None, "processes")]


def census() -> dict[str, int]:
    """Resident KiB, descriptors and number of this process and all below it."""
    pids, found = [os.getpid()], {"memory": 0, "descriptors": 0, "processes": 0}
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    for pid in pids:
        pids += [child for child, parent in parents.items() if parent == pid]
        try:
            found["memory"] += (
                int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
            )
            found["descriptors"] += len(os.listdir(f"/proc/{pid}/fd"))
        except PermissionError:
            pass  # a supervisor's descriptors are its own business where we are no root
        found["processes"] += 1
    return found


def row(name: str, ours: float, peer: float | None, unit: str) -> Row:
    """One line of the table; the ratio is how much better ours is."""
    better = None if not peer or not ours else (peer / ours if unit == "ms" else ours / peer)
    return {"name": name, "ours": ours, "peer": peer, "ratio": better, "unit": unit}


def print_table(rows: list[Row]) -> None:
    print(f"{'':64} {'ours':>10} {'peer':>10} {'ratio':>7}")
    for line in rows:
        peer = "" if line["peer"] is None else f"{line['peer']:.1f}"
        ratio = "" if line["ratio"] is None else f"{line['ratio']:.1f}x"
        print(f"{line['name']:64} {line['ours']:10.1f} {peer:>10} {ratio:>7} {line['unit']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="PATH")
    parser.add_argument("--runs", type=int, default=400, help="runs per measurement")
    parser.add_argument("--endurance", type=int, default=0, help="runs of the endurance test; 0: none")
    parser.add_argument("--levels", default="AB")
    options = parser.parse_args()
    rows: list[Row] = []
    for level in options.levels:
        try:
            rows += measure_level(level, options.runs)
            rows += endure(level, options.endurance) if options.endurance else []
        except SandboxUnavailableError as error:
            print(f"level {level}: {error}", file=sys.stderr)
    print_table(rows)
    if options.json:
        about = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
            "versions": {"python": platform.python_version()},
        }
        Path(options.json).write_text(json.dumps([{**line, **about} for line in rows], indent=2) + "\n")


if __name__ == "__main__":
    main()
