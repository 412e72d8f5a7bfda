"""What looks like a secret stays out of the processes that run others' code."""

from pathlib import Path

import pytest

from rewards import Grader, Problem
from rewards.secrets import is_secret, is_secret_name, without_secrets

REWARD = """
import os

def says_what_it_sees(problem, completion):
    print(os.environ)
    raise RuntimeError(" ".join(f"{name}={value}" for name, value in os.environ.items() if "CANARY" in value))
"""


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "db_password", "SSH_AUTH_SOCK"],
)
def test_names_of_secrets(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["PATH", "TOKENIZERS_PARALLELISM", "KEYBOARD", "OMP_NUM_THREADS", "MONKEY", "PATTERN"])
def test_other_names(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    "value",
    [
        "hf_abcdefghijklmnopqrstuvwxyz",
        "sk-proj-abcdefghijklmnop",
        "ghp_abcdefghijklmnopqrstuvwxyz012345",
        "AKIAIOSFODNN7EXAMPLE",
        "http://user:word@proxy:3128",
        "postgres://me:word@db/x?y=1",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.abc",
        " hf_abcdefghijklmnopqrstuvwxyz\n",
    ],
)
def test_values_of_secrets(value: str) -> None:
    assert is_secret(value)


@pytest.mark.parametrize(
    "value",
    ["", "1", "http://proxy:3128", "skip-this-one", "owner/model", "hf_hub", "User : {prompt} Assistant :", "a@b:c@d"],
)
def test_other_values(value: str) -> None:
    assert not is_secret(value)


def test_only_what_is_named_is_kept() -> None:
    environment = {"PATH": "/bin", "HF_TOKEN": "x", "JUDGE_API_KEY": "y", "PROXY": "http://me:word@proxy"}
    assert without_secrets(environment) == {"PATH": "/bin"}
    assert without_secrets(environment, ("JUDGE_API_KEY",)) == {"PATH": "/bin", "JUDGE_API_KEY": "y"}


def test_a_grading_process_has_no_secrets_but_those_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "CANARY-token")
    monkeypatch.setenv("JUDGE_API_KEY", "CANARY-judge")
    monkeypatch.setenv("ORDINARY", "CANARY-seen")
    (tmp_path / "mine.py").write_text(REWARD)
    problem = Problem(id="1", prompt="?")
    details = []
    for pass_env in ((), ("JUDGE_API_KEY",)):
        with Grader([f"{tmp_path / 'mine.py'}:says_what_it_sees"], strict=False, pass_env=pass_env) as grader:
            details.append(grader.grade([problem], ["a"])[0].detail)
    assert "CANARY-seen" in details[0]
    assert "CANARY-token" not in details[0] + details[1]
    assert ["CANARY-judge" in detail for detail in details] == [False, True]
