"""An update that is not finite is kept, and done again it says what is at fault."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from grpo.cli import app
from grpo.distributed import Ranks
from grpo.optimizer import MasterAdamW
from grpo.replay import NonFiniteError, ReplayError, load_fault, replay, save_fault
from grpo.run import run
from grpo.types import Origin
from grpo.update import Step, UpdateStats, prepare, update
from policy import Policy
from tests.full_disk import files_at_most
from tests.grpo.rollouts import make_groups, minibatches_of, rows_of, tiny_config
from tests.policies import tiny_policy
from tests.recipes import write_recipe

POISON = 50


def poisoned_policy() -> Policy:
    """After token 50 it can think of nothing but nan."""
    policy = tiny_policy()
    with torch.no_grad():
        policy.embed_tokens.weight[POISON] = math.nan
    return policy


def skipped_update(policy: Policy, file: Path, **choices: object) -> UpdateStats:
    """One update of `policy` on completions of a policy without the poison."""
    config = tiny_config(**choices)
    rows = rows_of(make_groups(tiny_policy(), num_problems=6), config)
    assert 0 < sum(POISON in row.completion.token_ids for row in rows) < len(rows)

    def keep(step: Step) -> None:
        save_fault(file, policy=policy, step=step, config=config, number=7)

    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    minibatches = minibatches_of(rows, num_minibatches=config.num_minibatches)
    return update(
        policy, optimizer, minibatches, learning_rate=1e-2, config=config, ranks=Ranks(cpu=True), on_fault=keep
    )


def test_a_step_that_is_not_finite_is_not_taken() -> None:
    policy = poisoned_policy()
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    seen = []
    rows = rows_of(make_groups(tiny_policy(), num_problems=6))
    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    stats = update(
        policy, optimizer, minibatches_of(rows), learning_rate=1e-2, config=tiny_config(), ranks=Ranks(cpu=True),
        on_fault=seen.append,
    )  # fmt: skip
    assert (stats.num_skipped, len(seen)) == (1, 1)
    assert math.isnan(stats.loss)
    assert not math.isfinite(stats.grad_norm)
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, before[name]) or name == "embed_tokens.weight"
    assert not optimizer.inner.state


def test_replay_names_rows_and_tokens(tmp_path: Path) -> None:
    file = tmp_path / "skipped" / "step.safetensors"
    skipped_update(poisoned_policy(), file)
    found = replay(file)
    assert (found.number, math.isnan(found.loss)) == (7, True)
    rows = rows_of(make_groups(tiny_policy(), num_problems=6))
    expected = {row.origin: ids.index(POISON) for row in rows if POISON in (ids := list(row.completion.token_ids)[:-1])}
    assert expected
    assert {fault.origin: fault.token for fault in found.faults} == expected
    assert {(fault.token_id, fault.what) for fault in found.faults} == {(POISON, "log-probability under the policy")}


def test_replay_finds_the_same_under_truncated_sampling(tmp_path: Path) -> None:
    choices = {"top_k": 40, "num_iterations": 2, "beta": 0.0}
    skipped_update(poisoned_policy(), tmp_path / "a.safetensors", **choices)
    assert {fault.token_id for fault in replay(tmp_path / "a.safetensors").faults} == {POISON}


def test_replay_names_an_input_that_is_not_finite(tmp_path: Path) -> None:
    policy, config = tiny_policy(), tiny_config()
    [minibatch] = minibatches_of(rows_of(make_groups(policy)), 10**6)
    batch = minibatch.batches[0]
    place = int(batch.completion_mask_N.nonzero()[4])
    batch.advantages_N[place] = math.inf
    step = Step(minibatch=minibatch, num_kept=minibatch.counts.tokens, entropy_coef=0.0)
    save_fault(tmp_path / "a.safetensors", policy=policy, step=step, config=config, number=1)
    [fault] = replay(tmp_path / "a.safetensors").faults
    row = int(torch.tensor(batch.rows.lengths).cumsum(0).gt(place).nonzero()[0])
    assert (fault.origin, fault.what) == (batch.origins[row], "given advantages")
    assert fault.token_id == int(batch.token_ids_N[place])


def test_a_finite_update_replays_to_the_same_loss_and_gradient(tmp_path: Path) -> None:
    policy, config = tiny_policy(), tiny_config(max_grad_norm=1e9, top_p=0.8, num_iterations=2)
    rows = rows_of(make_groups(policy, top_p=0.8))
    steps = prepare(policy, minibatches_of(rows), config, Ranks(cpu=True))
    save_fault(tmp_path / "a.safetensors", policy=policy, step=steps[0], config=config, number=1)
    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    single = config.model_copy(update={"num_iterations": 1})
    stats = update(policy, optimizer, minibatches_of(rows), learning_rate=0.0, config=single, ranks=Ranks(cpu=True))
    found = replay(tmp_path / "a.safetensors")
    assert found.faults == []
    assert found.loss == pytest.approx(stats.loss, abs=1e-6)
    assert found.grad_norm == pytest.approx(stats.grad_norm, rel=1e-4)
    _, _, step, again = load_fault(tmp_path / "a.safetensors")
    assert again == config
    assert step.minibatch.counts == steps[0].minibatch.counts
    assert isinstance(step.minibatch.batches[0].origins[0], Origin)
    for ours, theirs in zip(step.minibatch.batches, steps[0].minibatch.batches, strict=True):
        assert ours.rows.shared is not None
        assert theirs.rows.shared is not None
        assert torch.equal(ours.rows.shared.place_N, theirs.rows.shared.place_N)


@pytest.mark.parametrize("content", [b"", b"not a file of ours", b"PK\x03\x04"])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ReplayError, match="cannot be read"):
        replay(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(ReplayError, match="no skipped update of this version"):
        replay(tmp_path / "y.safetensors")
    with pytest.raises(ReplayError, match="cannot be read"):
        replay(tmp_path / "none.safetensors")


def test_a_run_stops_after_so_many_skipped_updates_with_all_saved(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin.py"
    plugin.write_text("def huge(problem, completion):\n    return 1e30 * len(completion)\n")
    recipe = write_recipe(tmp_path, rewards=[f"{plugin}:huge"], scale_rewards="none", max_steps=9, max_skipped_steps=2)
    with pytest.raises(NonFiniteError, match=r"2 updates were not finite \(max_skipped_steps: 2\)"):
        run(recipe, [], resume=False)
    folder = tmp_path / "runs" / "tiny"
    files = sorted((folder / "skipped").iterdir())
    assert [file.name for file in files] == ["step_000001_rank0.safetensors", "step_000002_rank0.safetensors"]
    assert (folder / "checkpoints" / "step_000002" / "manifest.json").is_file()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["update/skipped"], line["update/skipped_total"]) for line in lines] == [(1, 1), (1, 2)]
    found = replay(files[1])
    assert (found.number, math.isinf(found.grad_norm), found.faults) == (2, True, [])  # each row alone is finite
    answer = CliRunner().invoke(app, ["replay", str(files[0])])
    assert answer.exit_code == 0
    assert "gradient norm inf" in answer.output
    with pytest.raises(NonFiniteError, match="3 updates"):
        run(recipe, ["max_skipped_steps=3"], resume=True)


def test_the_command_says_what_it_cannot_replay(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["replay", str(tmp_path / "none.safetensors")])
    assert answer.exit_code == 2
    assert "cannot be read as a skipped update" in answer.output


def test_a_full_disk_is_an_os_error_and_leaves_no_half_file(tmp_path: Path) -> None:
    policy, config = tiny_policy(tie_word_embeddings=True), tiny_config()
    [step] = prepare(policy, minibatches_of(rows_of(make_groups(policy))), config, Ranks(cpu=True))
    with files_at_most(1000), pytest.raises(OSError, match=r"(?i)too large|os error 27"):
        save_fault(tmp_path / "skipped" / "a.safetensors", policy=policy, step=step, config=config, number=1)
    assert not list((tmp_path / "skipped").iterdir())
    save_fault(tmp_path / "skipped" / "a.safetensors", policy=policy, step=step, config=config, number=1)
    assert replay(tmp_path / "skipped" / "a.safetensors").faults == []
