"""A step for which memory runs out is done again in halves, and comes to the same."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import policy as policies
from grpo.config import load_config
from grpo.data import Dataset, read_problems
from grpo.display import Display
from grpo.distributed import Ranks
from grpo.memory import DeviceMemoryError, do_in_memory, halve
from grpo.pretrain import base_model
from grpo.record import RunFolder
from grpo.trainer import Trainer
from grpo.update import prepare
from policy.tokenizer import load_tokenizer
from rewards import Grader
from tests.grpo.rollouts import make_groups, minibatches_of, rows_of, tiny_config
from tests.grpo.test_trainer import metrics_of, recipe  # noqa: F401
from tests.grpo.test_update import gradients
from tests.policies import tiny_policy
from tests.small_memory import room_for

CHOICES: list[dict[str, Any]] = [
    {},
    {"num_iterations": 2},
    {"router_aux_loss_coef": 0.01, "freeze_router": False, "mtp_weight": 0.1, "beta": 0.1},
    {"top_entropy_quantile": 0.3, "top_k": 7, "num_iterations": 2},
]


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("choices", CHOICES, ids=str)
def test_halves_give_the_gradient_of_the_whole(choices: dict[str, Any], in_backward: bool) -> None:
    policy = tiny_policy(num_nextn_predict_layers=1)
    rows = rows_of(make_groups(policy), tiny_config(**choices))
    reference = tiny_policy(seed=1) if "beta" in choices else None
    whole, before = gradients(policy, minibatches_of(rows, 10**6, 2), reference, **choices)
    with room_for(policy, 60, in_backward=in_backward) as refused:
        halved, after = gradients(policy, minibatches_of(rows, 10**6, 2), reference, **choices)
    assert len(refused) >= 2
    assert (before.num_halvings, after.num_halvings > 0) == (0, True)
    for name in whole:
        assert torch.allclose(whole[name], halved[name], atol=1e-6), name
    for key in ("loss", "kl", "entropy", "entropy_kept", "clipped_low", "sampler_ratio_mean", "grad_norm"):
        assert getattr(after, key) == pytest.approx(getattr(before, key), rel=1e-5, abs=1e-6), key
    assert after.auxiliary.mtp_loss == pytest.approx(before.auxiliary.mtp_loss)
    assert after.auxiliary.routers is not None
    assert after.auxiliary.routers.load_ME == before.auxiliary.routers.load_ME  # type: ignore[union-attr]


def test_halves_hold_every_row_once_with_all_that_belongs_to_it() -> None:
    policy, config = tiny_policy(), tiny_config(top_k=7, num_iterations=2)
    [step] = prepare(policy, minibatches_of(rows_of(make_groups(policy), config), 10**6), config, Ranks(cpu=True))
    [batch] = step.minibatch.batches
    halves = halve(batch)
    assert [len(half.rows.lengths) for half in halves] == [6, 6]
    for name in ("token_ids_N", "completion_mask_N", "old_logprobs_N", "advantages_N", "prompt_tokens_B"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(batch, name)), name
    assert sum((half.origins for half in halves), ()) == batch.origins
    assert batch.rows.shared is not None
    prompts = [batch.rows.shared.prefix_rows.lengths[prefix] for prefix in batch.rows.shared.prefix_of_row]
    for half, wanted in zip(halves, (prompts[:6], prompts[6:]), strict=True):
        shared = half.rows.shared
        assert shared is not None
        assert [shared.prefix_rows.lengths[prefix] for prefix in shared.prefix_of_row] == wanted
    supports = [half.support for half in halves]
    assert batch.support is not None
    for name in ("token_ids_K", "counts_W"):
        assert torch.equal(torch.cat([getattr(support, name) for support in supports]), getattr(batch.support, name))
    for half in halves:
        assert half.support is not None
        assert len(half.support.counts_W) == int(half.completion_mask_N.sum())


def test_one_row_that_does_not_fit_is_an_error_that_names_the_remedy() -> None:
    policy = tiny_policy()
    [minibatch] = minibatches_of(rows_of(make_groups(policy)), 10**6)

    def attempt(batches: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    with pytest.raises(DeviceMemoryError, match=r"on one row .* \(CUDA out of memory\.\); set activation"):
        do_in_memory(attempt, minibatch.batches)


def test_a_run_goes_on_in_smaller_micro_batches(recipe: Path, tmp_path: Path) -> None:  # noqa: F811
    more = ["max_steps=2", "rewards=[format]", "evaluation.num_problems=0", "max_tokens_per_micro_batch=4000"]
    config = load_config(recipe, [f"output_dir={tmp_path}", "name=small", *more])
    ranks, folder, notes = Ranks(cpu=True), RunFolder(tmp_path / "small", print), []
    start = base_model(config, ranks, lambda metrics: None)
    folder.open(config, resume=False)
    policy = policies.load(start)

    class Notes(Display):
        def note(self, text: str) -> None:
            notes.append(text)

    problems = read_problems(config.dataset, seed=0, split="train", count=10)
    with Grader(["format"], num_workers=0) as grader, room_for(policy, 200, in_backward=True) as refused:
        trainer = Trainer(
            config=config, policy=policy, tokenizer=load_tokenizer(start), dataset=Dataset(problems, 0), held_out=[],
            grader=grader, ranks=ranks, folder=folder, display=Notes(rank=1),
        )  # fmt: skip
        assert trainer.train() == 2
    folder.close()
    assert refused
    assert trainer.max_tokens < 4000
    assert any(f"of at most {trainer.max_tokens} tokens from now on" in note for note in notes)
    assert metrics_of(tmp_path / "small")[0]["update/halvings"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("kind", "words"), [("update", "done again in smaller micro-batches"), ("sampling", "out of memory while sampling")]
)
def test_a_run_goes_on_where_a_gpu_has_too_little(kind: str, words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.grpo.less_memory", kind, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    output = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 0, output
    assert words in output
    assert len(metrics_of(tmp_path / "less")) == 2
