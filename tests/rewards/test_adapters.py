from pathlib import Path

import pytest

from rewards import Problem
from rewards.grader import Grader, RewardError
from rewards.registry import RewardSignatureError, resolve_reward

PLUGINS = str(Path(__file__).with_name("plugins.py"))
VERL_ROW = {
    "data_source": "gsm8k",
    "reward_model": {"style": "rule", "ground_truth": "72"},
    "extra_info": {"split": "train"},
}


@pytest.mark.parametrize("name", ["compute_score", "compute_score_lean", "compute_score_async"])
def test_verl_reads_its_own_layout(name: str) -> None:
    problem = Problem(id="1", prompt="?", answer="other", columns=VERL_ROW)
    with Grader([f"verl:{PLUGINS}:{name}"], num_workers=0) as grader:
        results = grader.grade([problem] * 2, ["72", "71"])
    assert [result.breakdown for result in results] == [{name: 1.0}, {name: 0.0}]
    assert {result.status for result in results} == {"ok"}


def test_verl_falls_back_on_the_answer() -> None:
    score = resolve_reward(f"verl:{PLUGINS}:compute_score")
    assert score(problem=Problem(id="1", prompt="?", answer="5"), completion="5") == 1.0
    assert score(problem=Problem(id="1", prompt="?", answer="5"), completion="6") == 0.0


def test_verl_dict_without_score_is_named() -> None:
    with (
        Grader([f"verl:{PLUGINS}:compute_score_keyless"], num_workers=0) as grader,
        pytest.raises(RewardError, match="returned a dict without 'score': its keys are 'acc'"),
    ):
        grader.grade([Problem(id="1", prompt="?")], ["a"])


@pytest.mark.parametrize("prompt", ["What is 2+3? ", [{"role": "user", "content": "What is 2+3? "}]])
def test_openrlhf_gets_queries_prompts_and_labels(prompt: object) -> None:
    problem = Problem(id="1", prompt=prompt, answer="5")  # type: ignore[arg-type]
    with Grader([f"openrlhf:{PLUGINS}:reward_func"], num_workers=0) as grader:
        assert [result.reward for result in grader.grade([problem] * 3, ["is 5", "is 6", "5"])] == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("prefix", ["verl", "openrlhf"])
def test_other_functions_are_refused(prefix: str) -> None:
    with pytest.raises(RewardSignatureError, match="no argument"):
        resolve_reward(f"{prefix}:{PLUGINS}:misnamed")
