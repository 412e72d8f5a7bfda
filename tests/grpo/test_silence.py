"""A first step that earned nothing says why; one that earned something says nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from grpo.run import run
from grpo.silence import explain_silence
from grpo.types import Group
from rewards import RewardResult
from tests.grpo.rollouts import make_groups, tiny_config
from tests.policies import tiny_policy
from tests.recipes import write_recipe

CONFIG = tiny_config(rewards=["math", "format"])


@pytest.fixture(scope="module")
def groups() -> list[Group]:
    return make_groups(tiny_policy(), num_problems=2)


def graded(groups: list[Group], *results: RewardResult) -> list[Group]:
    given = iter(results)
    return [replace(group, results=[next(given) for _ in group.results]) for group in groups]


def test_what_was_wrong_is_counted_and_one_verdict_shown(groups: list[Group]) -> None:
    wrong = RewardResult(reward=0.1, breakdown={"math": 0.0, "format": 1.0}, detail="math: wrong: 3 against 4")
    unread = RewardResult(reward=0.0, breakdown={"math": 0.0}, status="unparsed")
    late = RewardResult(reward=0.0, breakdown={"math": 0.0}, status="timeout")
    goldless = RewardResult(reward=0.1, breakdown={"format": 1.0})
    silent = graded(groups, wrong, unread, unread, late, goldless, wrong)
    told = explain_silence(silent, CONFIG, Path("runs/x/rollouts"))
    assert told is not None
    cut_off = sum(c.finish_reason == "length" for group in groups for c in group.completions)
    for part in (
        "none of 6 completions got anything from the reward 'math'",
        "2 held nothing that could be graded",
        "1 were not graded to an end",
        "1 have nothing that math could compare with",
        f"{cut_off} were cut off at max_completion_length=" if cut_off else "step 1",
        "For instance: math: wrong: 3 against 4. ",
        "runs/x/rollouts",
        "prompt_template",
    ):
        assert part in told


def test_one_right_answer_is_enough_and_so_is_a_problems_own_reward(groups: list[Group]) -> None:
    wrong = RewardResult(reward=1.0, breakdown={"math": 0.0, "format": 1.0})
    right = RewardResult(reward=1.0, breakdown={"math": 1.0})
    assert explain_silence(graded(groups, *[wrong] * 5, right), CONFIG, Path("x")) is None
    own = graded(groups, *[RewardResult(reward=1.0, breakdown={"own": 1.0})] * 6)
    assert explain_silence(own, CONFIG, Path("x")) is not None
    own = [replace(group, problem=replace(group.problem, reward="own")) for group in own]
    assert explain_silence(own, CONFIG, Path("x")) is None
    assert explain_silence([], CONFIG, Path("x")) is None


def test_a_run_says_it_after_its_first_step_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "never.py").write_text("def never(problem, completion):\n    return 0.0\n")
    recipe = write_recipe(
        tmp_path, rewards=[f"{tmp_path / 'never.py'}:never"], max_steps=2, evaluation={"num_problems": 0}
    )
    run(recipe, [], resume=False)
    said = " ".join("".join(capfd.readouterr()).split())
    assert said.count("none of 8 completions got anything from the reward 'never'") == 1
