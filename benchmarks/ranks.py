"""A GRPO step on several devices of one machine: every rank whole (ddp) or in pieces (others), beside one device.

Work, lengths and figures are those of benchmarks/grpo_step.py. `one` is one device with the work's prompts; `ddp`,
`fsdp2`, `zero2` and `zero3` (these need DeepSpeed) give each of `--processes` devices as many (weak scaling),
`ddp_strong` shares them out. Peak memory is that of
the device with most; the speed-up is in tokens a second, over `one` where that was measured too.

    python benchmarks/ranks.py [--works cpu_ds | qwen05 dsv3_05] [--ways one ddp fsdp2 zero2 zero3 ddp_strong]
                               [--processes 2] [--json PATH]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)

from benchmarks.grpo_step import STEPS, make_model, make_problems, run_ours  # noqa: E402
from benchmarks.rollouts import machine  # noqa: E402

WAYS = ("one", "ddp", "fsdp2", "zero2", "zero3", "ddp_strong")


def main() -> None:
    """Measure each work in each way, print a table, write JSON if asked."""
    is_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", choices=STEPS, default=["qwen05", "dsv3_05"] if is_gpu else ["cpu_ds"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=("one", "ddp", "fsdp2", "ddp_strong"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--num-new", type=int, help="other lengths of completions, to try the script out")
    parser.add_argument("--prompts", type=int, help="other numbers of prompts, to try the script out")
    parser.add_argument("--layers", type=int, help="fewer layers, to try the script out")
    parser.add_argument("--models", type=Path, help="folder in which models stay for the next time")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--json", type=Path, help="write the rows here")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for work in arguments.works:
            folder = (arguments.models or Path(scratch)) / work
            if not folder.exists():
                make_model(work, arguments.layers, folder)
            for way in arguments.ways:
                rows.append(measure(work, way, folder, Path(scratch), arguments))
                print(rows[-1], flush=True)
    print(f"\n{'work':<22}{'way':<12}{'devices':>8}{'s a step':>10}{'sample':>9}{'update':>9}{'tokens/s':>10}", end="")
    print(f"{'speed-up':>10}{'GiB':>7}")
    for row in rows:
        alone = next((r["tokens_per_s"] for r in rows if (r["work"], r["way"]) == (row["work"], "one")), None)
        row["speed_up"] = round(row["tokens_per_s"] / alone, 2) if alone else None
        print(
            f"{row['name']:<22}{row['way']:<12}{row['devices']:>8}{row['step_s']:>10}{row['sample_s']:>9}"
            f"{row['update_s']:>9}{row['tokens_per_s']:>10.0f}{row['speed_up'] or '':>10}{row['peak_gib'] or '':>7}"
        )
    print(f"{machine()}; torch {importlib.metadata.version('torch')}; medians")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


def measure(work: str, way: str, folder: Path, scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One work in one way, as a row."""
    prompts, group, length = STEPS[work]
    prompts, length = arguments.prompts or prompts, arguments.num_new or length
    devices = 1 if way == "one" else arguments.processes
    if way not in ("one", "ddp_strong"):
        prompts *= devices
    found = run_ours(
        scratch,
        folder,
        make_problems(),
        (prompts, group, length),
        arguments,
        launcher=[sys.executable] if way == "one" else launcher_of(way.removesuffix("_strong"), scratch, devices),
        name=f"{work}_{way}",
    )
    return {
        "name": f"{work}/{prompts}x{group}x{length}",
        "work": work,
        "way": way,
        "devices": devices,
        **{key: None if value is None else round(value, 2) for key, value in found.items()},
        "machine": machine(),
        "versions": {"torch": importlib.metadata.version("torch")},
    }


def launcher_of(way: str, scratch: Path, processes: int) -> Sequence[str]:
    """The start of a command that runs a module as recipes/accelerate/WAY.yaml says, on CPUs where there is no GPU."""
    settings = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{way}.yaml").read_text())
    file = scratch / f"{way}.yaml"
    if not way.startswith("zero"):  # with the key, accelerate starts one process of DeepSpeed
        settings |= {"use_cpu": not torch.cuda.is_available()}
    file.write_text(yaml.safe_dump(settings))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*launch, "--num_processes", str(processes)]


if __name__ == "__main__":
    main()
