"""One update under every choice, on as many ranks as started it; rank 0 writes the gradients to the file named.

accelerate launch --num_processes 2 -m tests.grpo.all_choices gradients.pt
"""

import sys
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor

from grpo.advantages import step_advantages
from grpo.batch import make_minibatches, make_rows
from grpo.distributed import Ranks
from grpo.exchange import gather_groups
from grpo.optimizer import MasterAdamW
from grpo.update import update
from tests.grpo.rollouts import make_groups, tiny_config
from tests.grpo.test_update import CHOICES
from tests.policies import tiny_policy

MORE = [
    {"scale_rewards": "whiten", "num_minibatches": 2},
    {"scale_rewards": "batch", "loss_aggregation": "prompts", "num_minibatches": 2, "num_iterations": 2},
    {"top_entropy_quantile": 0.4, "num_minibatches": 2, "entropy_coef": 0.1, "loss_aggregation": "sequences"},
]


def all_gradients(ranks: Ranks) -> dict[str, Tensor]:
    """By choice and weight; the weights after the step where there are several."""
    found = {}
    for number, choices in enumerate([*CHOICES, *MORE]):
        config = tiny_config(max_grad_norm=0.5, **choices)
        policy = tiny_policy()
        drawn = {key: choices[key] for key in ("temperature", "top_k", "top_p", "min_p") if key in choices}
        sampled = make_groups(policy, num_problems=3, length=8, **drawn)
        first, groups = ranks.share(sampled)
        assert gather_groups(groups, [group.problem for group in sampled], ranks) == sampled
        rewards = ranks.gather([[result.reward for result in group.results] for group in groups])
        advantages = step_advantages(rewards, config)[first : first + len(groups)]
        rows = make_rows(groups, advantages, mask_truncated=False, places=range(first, first + len(groups)))
        optimizer = MasterAdamW(policy, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0)
        minibatches = make_minibatches(rows, config.num_minibatches, 60, ranks)
        update(
            policy, optimizer, minibatches, learning_rate=1e-4, config=config, ranks=ranks,
            entropy_coef=config.entropy_coef,
        )  # fmt: skip
        for name, master in optimizer.masters.items():
            found[f"{number}.{name}"] = optimizer.inner.state[master]["exp_avg"].clone()
    return found


def is_of_numba(frame: FrameType | None) -> bool:
    """Whether numba is reading a kernel that it compiled, from a folder of the package."""
    while frame is not None and frame.f_globals.get("__name__") != "numba.core.caching":
        frame = frame.f_back
    return frame is not None


def note_unpickling(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class" and not is_of_numba(sys._getframe()):
        unpickled.append(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    unpickled: list[object] = []
    sys.addaudithook(note_unpickling)
    here = Ranks(cpu=True)
    gradients = all_gradients(here)
    assert not unpickled, f"ranks exchange objects: {unpickled}"
    if here.is_main:
        torch.save(gradients, Path(sys.argv[1]))
    here.wait()
    here.close()
