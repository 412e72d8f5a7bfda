"""Runs the whole suite in one process, at one level, as whoever started it; prints what came of it as JSON.

python -m tests.rewards.attacks.drive B [NAME...]
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rewards import score_program
from rewards.sandbox.sandbox import Sandbox
from tests.rewards.attacks import answers, disk, files, harness, neighbours, network, processes, resources
from tests.rewards.attacks.attack import Attack
from tests.rewards.attacks.world import World, wait_for_no_descendants

ATTACKS: list[Attack] = [
    attack
    for module in (files, disk, network, processes, neighbours, resources, answers, harness)
    for attack in module.ATTACKS
]


def run_suite(level: str, names: list[str] | None = None) -> dict[str, Any]:
    """Reward, status, detail and seconds of every attack by name; traces in the world; processes left."""
    with World() as world, Sandbox(level=level, minimum_level="D", workers=2) as sandbox:
        in_force = sandbox.level

        def run(attack: Attack) -> dict[str, Any]:
            started = time.monotonic()
            result = score_program(world.fill_in(attack.program), attack.problem, sandbox=sandbox)
            seconds = time.monotonic() - started
            return {"reward": result.reward, "status": result.status, "detail": result.detail, "seconds": seconds}

        chosen = [attack for attack in ATTACKS if not names or attack.name in names]
        with ThreadPoolExecutor(2) as threads:
            outcomes = dict(zip([attack.name for attack in chosen], threads.map(run, chosen), strict=True))
        # One worker at a time, so that the second program meets the very zygote that ran the first.
        for attack in files.PLANT_AND_LOOK * 2:
            outcomes[attack.name] = run(attack)
        traces = world.find_traces()
    return {
        "level": in_force,
        "user": os.geteuid(),
        "outcomes": outcomes,
        "traces": traces,
        "processes": wait_for_no_descendants(),
    }


if __name__ == "__main__":
    # Should a wall be missing, a bomb hits these.
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 << 20, 256 << 20))
    if os.geteuid() != 0:
        resource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))
    json.dump(run_suite(sys.argv[1], sys.argv[2:]), sys.stdout)
