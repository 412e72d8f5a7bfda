"""Experts that were recorded are those that an update uses, whatever the router would say.

Shapes: N packed tokens, M layers with routed experts, K experts per token.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from grpo.auxiliary import check_auxiliary
from grpo.batch import Row, make_batches
from grpo.config import ConfigError
from grpo.distributed import Ranks
from grpo.memory import halve
from grpo.optimizer import MasterAdamW
from grpo.reference import Reference
from grpo.replay import load_fault, replay, save_fault
from grpo.routing_replay import OWN_CHOICE, differing_tokens, freeze_routers, pack_experts
from grpo.run import run
from grpo.scoring import drawn_with, score
from grpo.state import answer_to_json, read_answer
from grpo.types import Question
from grpo.update import Step, backward, prepare, update
from policy import Policy, cast_weights
from rollouts import Completion
from tests.grpo.answers import make_answer
from tests.grpo.rollouts import make_groups, minibatches_of, rows_of, tiny_config
from tests.grpo.test_update import gradients
from tests.policies import tiny_llama, tiny_policy
from tests.recipes import write_recipe


def recorded_rows(policy: Policy) -> list[Row]:
    return rows_of(make_groups(policy, record_experts=True))


def sent_to(rows: list[Row], experts: list[int]) -> list[Row]:
    """The same rows as if every token had gone to these experts in every layer."""
    changed = []
    for row in rows:
        of_prompt, own = row.completion.prompt_experts_MSK, row.completion.experts_MTK
        assert of_prompt is not None
        assert own is not None
        everywhere = (np.full_like(each, 0) + np.array(experts, dtype=each.dtype) for each in (own, of_prompt))
        experts_MTK, prompt_experts_MSK = everywhere
        completion = replace(row.completion, experts_MTK=experts_MTK, prompt_experts_MSK=prompt_experts_MSK)
        changed.append(replace(row, completion=completion))
    return changed


def confused(policy: Policy) -> None:
    """Its routers now choose others."""
    for layer in policy.moe_layers:
        assert layer.gate.e_score_correction_bias is not None
        layer.gate.e_score_correction_bias.copy_(torch.tensor([9.0, 0.0, 0.0, 9.0]))


def test_packed_by_hand() -> None:
    prompt_MSK = np.array([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], dtype=np.uint8)
    own_MTK = np.array([[[8, 9]], [[10, 255]]], dtype=np.uint8)
    bare = Completion(token_ids=[5, 6], logprobs=[-1.0, -1.0], finish_reason="stop", policy_version=0)
    known = replace(bare, experts_MTK=own_MTK, prompt_experts_MSK=prompt_MSK)
    packed_NMK = pack_experts([(2, known), (1, bare)])
    assert packed_NMK is not None
    assert packed_NMK.dtype == torch.int16
    own = [[OWN_CHOICE] * 2] * 2
    assert packed_NMK.tolist() == [
        [[0, 1], [4, 5]], [[2, 3], [6, 7]], [[8, 9], [10, 255]], own, own, own, own
    ]  # fmt: skip
    assert pack_experts([(2, bare), (1, bare)]) is None


def test_tokens_differ_by_their_sets_in_any_layer_and_not_where_nothing_was_recorded() -> None:
    given_NMK = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[-1, -1], [-1, -1]]], dtype=torch.int16)
    preferred_MNK = torch.tensor([[[1, 0], [0, 1], [5, 6]], [[3, 2], [3, 4], [7, 8]]])
    assert differing_tokens(given_NMK, preferred_MNK).tolist() == [False, True, False]


@pytest.mark.parametrize("choices", [{}, {"num_iterations": 2}, {"top_k": 7}], ids=str)
def test_what_the_sampler_recorded_is_what_the_trainer_would_choose(choices: dict[str, Any]) -> None:
    """In fp32; so replaying it changes nothing."""
    policy, drawn = tiny_policy(), {key: choices[key] for key in ("top_k",) if key in choices}
    plain, before = gradients(policy, minibatches_of(rows_of(make_groups(policy, **drawn))), **choices)
    rows = rows_of(make_groups(policy, record_experts=True, **drawn))
    replayed, after = gradients(policy, minibatches_of(rows), routing_replay="sampler", **choices)
    assert before.experts_differ is None
    assert after.experts_differ == 0.0
    for name, gradient in plain.items():
        assert torch.equal(gradient, replayed[name]), name


@pytest.mark.parametrize("choices", [{}, {"num_iterations": 2, "num_minibatches": 2}], ids=str)
@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_only_the_experts_recorded_are_taught(choices: dict[str, Any], recomputation: Any) -> None:
    policy = tiny_policy()
    policy.recomputation = recomputation
    rows = sent_to(recorded_rows(policy), [2, 0])
    taught, stats = gradients(policy, minibatches_of(rows), routing_replay="sampler", **choices)
    assert stats.experts_differ is not None
    assert 0.5 < stats.experts_differ <= 1
    for name in (name for name in taught if "experts.down_proj" in name and "shared" not in name):
        norms = taught[name].flatten(1).norm(dim=1).tolist()
        assert norms[1] == norms[3] == 0, name
        assert min(norms[0], norms[2]) > 0, name


def test_the_pass_that_gives_the_old_log_probabilities_is_repeated() -> None:
    policy = tiny_policy()
    rows, config = rows_of(make_groups(policy)), tiny_config(num_iterations=2, routing_replay="old_policy")
    [step] = prepare(policy, minibatches_of(rows, 10**6), config, Ranks(cpu=True))
    [plain] = prepare(policy, minibatches_of(rows, 10**6), tiny_config(num_iterations=2), Ranks(cpu=True))
    [batch], [bare] = step.minibatch.batches, plain.minibatch.batches
    assert bare.experts_NMK is None
    assert torch.equal(batch.old_logprobs_N, bare.old_logprobs_N)  # type: ignore[arg-type]
    params = drawn_with(config)
    output = score(policy, bare, params)[1].output
    assert torch.equal(batch.experts_NMK.long(), output.experts_MNK.transpose(0, 1))  # type: ignore[union-attr]
    confused(policy)
    again = score(policy, batch, params)[1]
    assert torch.equal(again.output.experts_MNK, output.experts_MNK)  # type: ignore[arg-type]
    assert torch.equal(again.logprobs_N.detach(), batch.old_logprobs_N)  # type: ignore[arg-type]
    assert not torch.allclose(score(policy, bare, params)[1].logprobs_N, again.logprobs_N, atol=1e-3)
    _, stats = gradients(tiny_policy(), minibatches_of(rows), num_iterations=2, routing_replay="old_policy")
    assert stats.experts_differ is None, "no sampler recorded anything"


def test_the_reference_routes_on_its_own() -> None:
    policy = tiny_policy()
    [batch] = make_batches(sent_to(recorded_rows(policy), [2, 0]), 10**6)
    reference, params = Reference(policy), drawn_with(tiny_config())
    bare = replace(batch, experts_NMK=None)
    assert torch.equal(reference.score(batch, params).logprobs_N, reference.score(bare, params).logprobs_N)
    assert not torch.equal(score(policy, batch, params)[1].logprobs_N, score(policy, bare, params)[1].logprobs_N)


def test_halves_and_faults_on_disk_keep_the_experts(tmp_path: Path) -> None:
    policy, config = tiny_policy(), tiny_config(routing_replay="sampler", num_iterations=2)
    rows = sent_to(recorded_rows(policy), [2, 0])
    [step] = prepare(policy, minibatches_of(rows, 10**6), config, Ranks(cpu=True))
    [batch] = step.minibatch.batches
    for name in ("experts_NMK", "differs_N"):
        parts = [getattr(half, name) for half in halve(batch)]
        assert torch.equal(torch.cat(parts), getattr(batch, name)), name
    wanted = float(backward(policy, batch, step, config).loss.detach())
    save_fault(tmp_path / "step.safetensors", policy=policy, step=step, config=config, number=3)
    _, _, found, _ = load_fault(tmp_path / "step.safetensors")
    [again] = found.minibatch.batches
    assert torch.equal(again.experts_NMK, batch.experts_NMK)  # type: ignore[arg-type]
    done = replay(tmp_path / "step.safetensors")
    assert done.loss == pytest.approx(wanted, rel=1e-6)
    assert not done.faults


def test_a_fault_is_found_among_replayed_tokens(tmp_path: Path) -> None:
    """Rows and tokens are cut out with their experts."""
    healthy, config = tiny_policy(), tiny_config(routing_replay="sampler")
    rows, policy = recorded_rows(healthy), tiny_policy()
    poison = rows[0].completion.token_ids[1]
    with torch.no_grad():
        policy.embed_tokens.weight[poison] = float("nan")
    seen: list[Step] = []
    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0)
    update(
        policy, optimizer, minibatches_of(rows), learning_rate=1e-2, config=config, ranks=Ranks(cpu=True),
        on_fault=seen.append,
    )  # fmt: skip
    save_fault(tmp_path / "step.safetensors", policy=policy, step=seen[0], config=config, number=3)
    assert rows[0].origin in {fault.origin for fault in replay(tmp_path / "step.safetensors").faults}


def test_experts_go_through_a_checkpoint() -> None:
    answer = make_answer(4, [1.0, 0.0, 0.5])
    shared = np.arange(24, dtype=np.int16).reshape(2, 4, 3)
    owns = [np.full((2, 2, 3), g, dtype=np.uint8) for g in range(3)]
    completions = [
        replace(c, experts_MTK=own, prompt_experts_MSK=prompt)
        for c, own, prompt in zip(answer.group.completions, owns, [shared, shared, shared + 1], strict=True)
    ]
    answer = replace(answer, group=replace(answer.group, completions=completions))
    text = json.dumps(answer_to_json(answer))

    def question(number: int, place: int) -> Question:
        return answer.question

    first, second, old = read_answer(json.loads(text), question).group.completions
    assert first.prompt_experts_MSK is second.prompt_experts_MSK
    for found, wanted in zip((first, second, old), completions, strict=True):
        for name in ("experts_MTK", "prompt_experts_MSK"):
            ours, theirs = getattr(found, name), getattr(wanted, name)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs)


def test_frozen_routers_stay_and_all_else_moves() -> None:
    policy = tiny_policy(num_nextn_predict_layers=1)
    freeze_routers(policy)
    before = {name: weight.clone() for name, weight in policy.named_parameters()}
    optimizer = MasterAdamW(policy, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    update(
        policy, optimizer, minibatches_of(rows_of(make_groups(policy))), learning_rate=1e-2,
        config=tiny_config(mtp_weight=0.1), ranks=Ranks(cpu=True),
    )  # fmt: skip
    stayed = {name for name, weight in policy.named_parameters() if torch.equal(weight, before[name])}
    assert stayed == {name for name in before if name.endswith("gate.weight")}
    assert len(stayed) == 3


def test_a_run_replays_what_it_sampled_and_leaves_routers_alone(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, max_steps=1)
    run(recipe, ["routing_replay=sampler", f"output_dir={tmp_path}", "name=replayed"], resume=False)
    [line] = (tmp_path / "replayed" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["sampling/experts_differ"] == 0.0
    [end] = (tmp_path / "replayed" / "checkpoints").glob("step_*")
    masters = load_file(end / "trainer.safetensors").keys()
    assert any(name.startswith("master.") for name in masters)
    assert not any("gate.weight" in name for name in masters)


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"routing_replay: sampler needs engine\.kind builtin .*, got vllm_server"):
        tiny_config(routing_replay="sampler", engine={"kind": "vllm_server"})
    tiny_config(routing_replay="old_policy", engine={"kind": "vllm_server"})
    with pytest.raises(ConfigError, match="no routed experts; set routing_replay: off"):
        check_auxiliary(tiny_config(routing_replay="old_policy"), tiny_llama().config)
    check_auxiliary(tiny_config(routing_replay="old_policy"), tiny_policy().config)
    with pytest.raises(ValueError, match="teach the routers, which freeze_router holds"):
        tiny_config(router_z_loss_coef=0.1)


def test_a_batch_without_records_gives_the_routers_their_way() -> None:
    policy = tiny_policy()
    [batch] = make_batches(rows_of(make_groups(policy)), 10**6)
    assert batch.experts_NMK is None
    assert score(policy, batch, drawn_with(tiny_config()))[1].output.preferred_MNK is None


def test_in_bf16_a_wide_stream_and_replayed_experts_bring_sampler_and_trainer_together() -> None:
    differences = []
    for is_wide, routing_replay in ((True, "sampler"), (False, "sampler"), (True, "off")):
        policy = cast_weights(
            tiny_policy(n_routed_experts=16, num_experts_per_tok=4, num_hidden_layers=6), torch.bfloat16
        )
        policy.residual_in_fp32 = is_wide
        rows = rows_of(make_groups(policy, record_experts=routing_replay == "sampler"))
        _, stats = gradients(policy, minibatches_of(rows), routing_replay=routing_replay)
        assert (stats.experts_differ is not None) == (routing_replay == "sampler")
        differences.append(stats.logp_difference_mean)
    both, narrow, own = differences
    assert 0 < both < narrow
    assert both < 0.8 * own
