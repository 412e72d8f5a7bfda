"""Agreement and speed of `verify_math` beside math-verify, on the suites of tests/rewards/data, in one run.

    python benchmarks/math_rewards.py --peer-python /path/to/venv-with-math-verify/bin/python --json out.json

The peer runs in a process of its own (it may need packages of its own), one answer at a time, on the same machine,
with the
timeouts it ships with. Without --peer-python it is this interpreter, and its columns stay empty if it is not installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "rewards" / "data"
SUITES = ("ordinary", "public", "hostile")
_PEER_DEADLINE_S = 10.0
_PEER = """
import json, sys, time
from importlib.metadata import version
from math_verify import parse, verify

def wrap(text):
    # It reads LaTeX only between delimiters: a bare formula gets them.
    is_marked = any(mark in text for mark in ("$", "boxed", chr(92) + "(", chr(92) + "["))
    is_prose = len(text) > 200 or len([w for w in text.split() if w.isalpha() and len(w) > 2]) > 2
    return text if is_marked or is_prose else f"${text}$"

for line in sys.stdin:
    answer, gold = json.loads(line)
    start = time.perf_counter()
    try:
        reward, failure = float(verify(parse(wrap(gold)), parse(wrap(answer)))), ""
    except BaseException as error:
        reward, failure = 0.0, type(error).__name__
    print(json.dumps([reward, time.perf_counter() - start, failure, version("math-verify")]), flush=True)
"""


def load_suite(name: str) -> list[dict[str, Any]]:
    """Rows of a suite whose label is not rejected, repeated texts written out."""
    rows = []
    for line in (DATA / f"math_{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "rejected" in row:
            continue
        if "repeat" in row:
            row["answer"] = row["answer"].replace("@@", row["repeat"][0] * row["repeat"][1])
        rows.append(row)
    return rows


def run_ours(rows: list[dict[str, Any]]) -> list[tuple[float, float, str]]:
    """(reward, seconds, status if not ok) of each row, each seen for the first time."""
    from rewards import verify_math

    out = []
    for row in rows:
        start = time.perf_counter()
        result = verify_math(row["answer"], row["gold"])
        assert result.reward is not None
        out.append((result.reward, time.perf_counter() - start, "" if result.status == "ok" else result.status))
    return out


def run_peer(rows: list[dict[str, Any]], python: str) -> tuple[list[tuple[float, float, str]], str] | None:
    """The same of math-verify, and its version; None if that interpreter does not have it. It is killed after 10 s on
    a row."""
    out: list[tuple[float, float, str]] = []
    version = ""
    process: subprocess.Popen[str] | None = None
    for row in rows:
        if process is None:
            process = subprocess.Popen(
                [python, "-c", _PEER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert process.stdin is not None
        assert process.stdout is not None
        start = time.perf_counter()
        try:
            process.stdin.write(json.dumps([row["answer"], row["gold"]]) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        watch = threading.Timer(_PEER_DEADLINE_S, process.kill)
        watch.start()
        line = process.stdout.readline()
        watch.cancel()
        if not line:
            if not out and time.perf_counter() - start < 0.9 * _PEER_DEADLINE_S:
                return None
            out.append((0.0, time.perf_counter() - start, "killed"))
            process = None
            continue
        reward, seconds, failure, version = json.loads(line)
        out.append((reward, seconds, failure))
    if process is not None:
        process.kill()
    return out, version


def summarize(rows: list[dict[str, Any]], results: list[tuple[float, float, str]]) -> dict[str, float]:
    """Agreement, errors of both kinds, and times in milliseconds."""
    times = sorted(seconds * 1e3 for _, seconds, _ in results)
    wrong = [bool(reward) for row, (reward, _, _) in zip(rows, results, strict=True) if bool(reward) != row["expected"]]
    return {
        "agreement": 100 * (1 - len(wrong) / len(rows)),
        "false positives": sum(wrong),
        "false negatives": len(wrong) - sum(wrong),
        "median": statistics.median(times),
        "p99": times[min(len(times) - 1, int(0.99 * len(times)))],
        "slowest": times[-1],
    }


def time_batch(rows: list[dict[str, Any]]) -> float:
    """Seconds for 256 completions of 32 problems, 8 of each, in long texts; the symbolic worker is warm, the answers
    new."""
    from rewards import verify_math_many

    rng = random.Random(0)
    chosen = rng.sample([row for row in rows if row["expected"]], 32)
    thought = "Let me think about this step by step. " * 200
    completions, golds = [], []
    for row in chosen:
        for k in range(8):
            shown = row["gold"] if k % 2 else row["answer"]
            completions.append(f"<think>{thought}{k}</think> So \\boxed{{{shown}}}" if "boxed" not in shown else shown)
            golds.append(row["gold"])
    start = time.perf_counter()
    verify_math_many(completions, golds)
    return time.perf_counter() - start


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has math-verify")
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=SUITES)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))

    from rewards.math_reward import warm_up

    warm_up()
    versions = {"python": platform.python_version(), "sympy": metadata.version("sympy"), "math-verify": "not installed"}
    units = {
        "agreement": "%",
        "false positives": "cases",
        "false negatives": "cases",
        "median": "ms",
        "p99": "ms",
        "slowest": "ms",
    }
    table: list[dict[str, Any]] = []
    batch = time_batch(load_suite("ordinary"))
    for suite in options.suites:
        rows = load_suite(suite)
        ours = summarize(rows, run_ours(rows))
        answered = run_peer(rows, options.peer_python)
        peer = None
        if answered is not None:
            peer = summarize(rows, answered[0])
            versions["math-verify"] = answered[1]
        for name, value in ours.items():
            other = None if peer is None else peer[name]
            ratio = other / value if other is not None and value and units[name] == "ms" else None
            table.append(
                {
                    "name": f"{suite} ({len(rows)}): {name}",
                    "ours": value,
                    "peer": other,
                    "ratio": ratio,
                    "unit": units[name],
                }
            )
    table.append({"name": "256 completions, warm", "ours": batch * 1e3, "peer": None, "ratio": None, "unit": "ms"})
    machine = f"{platform.machine()}, {platform.system()} {platform.release()}"
    print(f"{'':38} {'ours':>10} {'math-verify':>12} {'ratio':>8}")
    for row in table:
        shown = [f"{row[k]:.3f}" if row[k] is not None else "-" for k in ("ours", "peer", "ratio")]
        print(f"{row['name']:38} {shown[0]:>10} {shown[1]:>12} {shown[2]:>8} {row['unit']}")
    print(f"{machine}; {versions}")
    if options.json:
        for row in table:
            row["machine"], row["versions"] = machine, versions
        options.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
