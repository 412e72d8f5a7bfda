"""An update in which the last rank is killed, hangs, or runs out of memory in a pass that the others are in too.

accelerate launch --config_file fsdp2.yaml --num_processes 2 -m tests.grpo.rank_lost (killed | hung | memory) FILE

FILE appears at that moment.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from grpo.distributed import Ranks
from grpo.update import update
from grpo.weights import keep_weights
from tests.grpo.rollouts import make_groups, minibatches_of, rows_of, tiny_config
from tests.policies import tiny_policy


def main(how: str, file: Path) -> None:
    """Does not come back."""
    ranks, config, calls = Ranks(cpu=True, timeout_s=15.0), tiny_config(), list[int]()
    weights = keep_weights(tiny_policy(num_hidden_layers=2), config, ranks)
    minibatches = minibatches_of(rows_of(make_groups(tiny_policy()), config), 60)

    def fail(*_: object) -> None:
        calls.append(1)
        if ranks.rank != ranks.size - 1 or len(calls) < 5:
            return
        file.touch()
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hung":
            time.sleep(3600)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    weights.policy.norm.register_forward_hook(fail)
    while True:
        update(weights.policy, weights.optimizer, minibatches, learning_rate=1e-3, config=config, ranks=ranks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
