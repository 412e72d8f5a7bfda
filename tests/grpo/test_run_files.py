"""Reading run folders as they are found: whole, half-written, damaged."""

import json
import math

import pytest

from grpo.run_files import MAX_COMPLETIONS, MAX_GROUPS, MAX_TEXT, as_number, read_run, spread


def write_lines(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_group(problem_id="p", num_completions=2, text="<answer>1</answer>"):
    completion = {"text": text, "reward": 1.0, "advantage": 0.5, "breakdown": {"countdown": 1.0}, "status": "ok"}
    problem = {"id": problem_id, "prompt": "make 1", "answer": "1", "source": "train.jsonl:1"}
    return {"step": 1, "problem": problem, "prompt_text": "User: make 1", "completions": [completion] * num_completions}


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_without_a_run_is_named_with_the_remedy(tmp_path, exists):
    folder = tmp_path / "elsewhere"
    if exists:
        folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"elsewhere is not a run folder.*runs/<name>"):
        read_run(folder)


def test_each_file_alone_makes_a_run(tmp_path):
    for name, content in (("config.yaml", "seed: 1"), ("metrics.jsonl", '{"step": 1}'), ("evaluation.json", "[]")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(content)
        assert read_run(folder).warnings == []


def test_metrics_are_in_order_and_a_resumed_step_counts_once(tmp_path):
    write_lines(tmp_path / "metrics.jsonl", *({"step": s, "reward": s / 10} for s in (1, 2, 3)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "reward": 0.9}\n[1, 2]\n\n{"no": "step"}\n{"step": 4, "rew')
    run = read_run(tmp_path)
    assert [(row["step"], row["reward"]) for row in run.metrics] == [(1, 0.1), (2, 0.9), (3, 0.3)]
    assert run.warnings == ["metrics.jsonl: 2 unreadable lines skipped"]


@pytest.mark.parametrize(
    "value", [None, math.nan, math.inf, -math.inf, 1e200, 10**400, True, "1", [1], {}], ids=lambda v: str(v)[:9]
)
def test_what_cannot_be_drawn_is_no_number(value):
    assert as_number(value) is None


def test_intervals_are_read_both_ways_and_stages_are_ordered(tmp_path):
    base = {"stage": "base", "task": "c", "num_problems": 512, "k": 8, "greedy": 0.3, "avg@k": 0.25, "mean_length": 60}
    entries = [
        {**base, "stage": "final", "avg@k": 0.7, "ci95": 0.05},
        {**base, "stage": 200, "ci95": None},
        {**base, "stage": 100, "ci95": [0.2, math.nan], "greedy": math.nan},
        {**base, "avg@k": 0.1},
        {**base, "ci95": [0.2, 0.3]},
        "not an entry",
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps(entries))
    evaluations = read_run(tmp_path).evaluations
    assert [e.stage for e in evaluations] == ["base", 100, 200, "final"]
    assert [e.interval for e in evaluations] == [(0.2, 0.3), None, None, pytest.approx((0.65, 0.75))]
    assert evaluations[0].average == 0.25, "of one stage made twice the later counts"
    assert evaluations[1].greedy is None


def test_a_half_width_stays_a_share(tmp_path):
    entry = {"stage": "base", "task": "c", "avg@k": 0.99, "ci95": 0.05}
    (tmp_path / "evaluation.json").write_text(json.dumps([entry]))
    assert read_run(tmp_path).evaluations[0].interval == pytest.approx((0.94, 1.0))


@pytest.mark.parametrize("content", ["", "{", '{"stage": "base"}', "null"])
def test_a_damaged_evaluation_is_said(tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    run = read_run(tmp_path)
    assert run.evaluations == []
    assert run.warnings == ["evaluation.json is not a JSON list"]


def test_settings_are_found_at_any_depth_the_shallowest_first(tmp_path):
    (tmp_path / "config.yaml").write_text("base:\n  max_steps: 900\n  deep: {beta: 0.1}\nmax_steps: 400\n")
    run = read_run(tmp_path)
    assert run.find_setting("max_steps") == 400
    assert run.find_setting("beta") == 0.1
    assert run.find_setting("gamma") is None


@pytest.mark.parametrize("content", ["a: [", "just text", "- 1", "d: 2024-13-45", "!!python/object/apply:os.getcwd []"])
def test_a_strange_configuration_is_shown_and_not_obeyed(tmp_path, content):
    (tmp_path / "config.yaml").write_text(content)
    run = read_run(tmp_path)
    assert run.config == {}
    assert run.config_text == content


def test_spread_keeps_both_ends():
    assert spread(range(300), 4) == [0, 100, 199, 299]
    assert spread([1, 2], 4) == [1, 2]
    assert spread(range(9), 1) == [0]


def test_groups_are_spread_over_the_steps_and_bounded(tmp_path):
    for step in range(1, 301):
        rows = [make_group(f"{step}-{i}", num_completions=20) for i in range(5)]
        write_lines(tmp_path / f"rollouts/step_{step:06d}.jsonl", *rows)
    run = read_run(tmp_path)
    steps = sorted({group["step"] for group in run.groups})
    assert len(run.groups) == MAX_GROUPS
    assert len(steps) == 20
    assert (steps[0], steps[-1]) == (1, 300)
    assert run.groups[0]["id"] == "1-0"
    assert len(run.groups[0]["completions"]) == MAX_COMPLETIONS
    assert run.groups[0]["left_out"] == 20 - MAX_COMPLETIONS
    assert run.groups_note == "60 groups: the first 3, at most, of 20 steps, spread evenly over the 300 recorded."


def test_files_of_other_names_and_damaged_lines_are_no_groups(tmp_path):
    write_lines(tmp_path / "rollouts/step_last.jsonl", make_group())
    write_lines(tmp_path / "rollouts/step_000002.jsonl", {"completions": None}, make_group("kept"))
    with (tmp_path / "rollouts/step_000002.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"problem"')
    run = read_run(tmp_path)
    assert [group["id"] for group in run.groups] == ["kept"]
    assert run.warnings == ["step_000002.jsonl: 1 unreadable line skipped"]


def test_long_texts_lose_their_middle_and_keep_the_answer(tmp_path):
    text = "start " + "x" * MAX_TEXT + " <answer>7</answer>"
    write_lines(tmp_path / "rollouts/step_000001.jsonl", make_group(text=text, num_completions=4))
    (group,) = read_run(tmp_path).groups
    shown = [completion["text"] for completion in group["completions"]]
    assert sum(map(len, shown)) <= MAX_TEXT + 4 * 100
    assert all(s.startswith("start ") and s.endswith("<answer>7</answer>") for s in shown)
    assert "characters left out" in shown[0]


def test_groups_survive_missing_fields_and_strange_values(tmp_path):
    strange = {"text": None, "reward": math.nan, "breakdown": {"a": math.inf, "b": 1}, "advantage": "high"}
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "make 1"}]
    rows = [{"completions": [strange, "text"]}, {"completions": [], "problem": {"prompt": messages}}]
    write_lines(tmp_path / "rollouts/step_000001.jsonl", *rows)
    first, second = read_run(tmp_path).groups
    (completion,) = first["completions"]
    assert completion["text"] == ""
    assert completion["reward"] is None
    assert completion["advantage"] is None
    assert completion["breakdown"] == {"a": None, "b": 1.0}
    assert second["prompt"] == "system: be brief\n\nuser: make 1"
    assert second["prompt_text"] == ""
