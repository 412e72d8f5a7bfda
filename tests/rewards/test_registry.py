import functools
import subprocess
import sys
from pathlib import Path

import pytest

from rewards.registry import (
    BUILT_IN,
    RewardNotFoundError,
    RewardSignatureError,
    resolve_reward,
    reward_name,
    takes_one_completion,
)

PLUGINS = str(Path(__file__).with_name("plugins.py"))


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_built_in_names_resolve(name: str) -> None:
    assert isinstance(takes_one_completion(resolve_reward(name)), bool)
    assert reward_name(name) == name


def test_module_and_file_names_resolve() -> None:
    assert resolve_reward("rewards.countdown:countdown_reward") is resolve_reward("countdown")
    assert resolve_reward(f"{PLUGINS}:length")(None, "abc") == 3
    assert reward_name(f"{PLUGINS}:length") == "length"
    assert reward_name(f"verl:{PLUGINS}:compute_score") == "compute_score"


def test_file_is_executed_once() -> None:
    assert resolve_reward(f"{PLUGINS}:length").__globals__ is resolve_reward(f"{PLUGINS}:raises").__globals__


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(f"def f(problem, completion):\n    return {value}\n")
    values = [resolve_reward(f"{tmp_path / folder / 'mine.py'}:f")(None, "") for folder in ("a", "b")]
    assert values == [1, 2]


def test_file_that_failed_is_executed_again(tmp_path: Path) -> None:
    path = tmp_path / "late.py"
    path.write_text("raise OSError('not yet')")
    with pytest.raises(OSError, match="not yet"):
        resolve_reward(f"{path}:f")
    path.write_text("def f(problem, completion):\n    return 1.0  # longer than before\n")
    assert resolve_reward(f"{path}:f")(None, "") == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("countdwn", "did you mean 'countdown'"),
        ("nothing_like_it", "built-in: accuracy, boxed"),
        ("my_package.rewards.score", "did you mean 'my_package.rewards:score'"),
        ("my_rewards.py", "which function of the file"),
        ("", "no reward is called ''"),
        (":", "no reward is called ':'"),
        ("rewards.countdown:", "no reward is called"),
        ("rewards.countdown:countdown_rewrd", "did you mean 'countdown_reward'"),
        (f"{PLUGINS}:not_a_function", "has no function 'not_a_function'"),
        ("no_such_package.module:f", "no module 'no_such_package'"),
        ("rewards.no_such_module:f", "no module 'rewards.no_such_module'"),
        ("no/such/file.py:f", "no file no/such/file.py"),
        ("__main__:f", "path/to/script.py:function"),
        ("verl:no_such_package:f", "no module 'no_such_package'"),
    ],
)
def test_names_that_are_not_there(name: str, message: str) -> None:
    with pytest.raises(RewardNotFoundError) as caught:
        resolve_reward(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_import_error_inside_a_plugin_passes_through(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_dependency\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        resolve_reward(f"{tmp_path / 'broken.py'}:f")


def test_missing_dependency_whose_name_begins_the_module_s_passes_through(tmp_path: Path) -> None:
    (tmp_path / "nosuchdep_rewards.py").write_text("import nosuchdep\n")
    script = (
        f"import sys; sys.path.append({str(tmp_path)!r}); import rewards; rewards.resolve_reward('nosuchdep_rewards:f')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'nosuchdep'"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("length", True),
        ("length_reversed", True),
        ("length_async", True),
        ("batch_length", False),
        ("batch_nan", False),
    ],
)
def test_kinds_are_told_apart_by_the_names_of_the_arguments(name: str, expected: bool) -> None:
    assert takes_one_completion(resolve_reward(f"{PLUGINS}:{name}")) is expected


def test_partial_counts_as_function() -> None:
    assert takes_one_completion(functools.partial(resolve_reward(f"{PLUGINS}:length_reversed"), scale=2.0))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("misnamed", "this one takes (prompt, text)"),
        ("Judge", "is a class"),
        ("compute_score", "name it 'verl:module:function'"),
        ("reward_func", "name it 'openrlhf:module:function'"),
    ],
)
def test_other_signatures_are_refused(name: str, message: str) -> None:
    with pytest.raises(RewardSignatureError) as caught:
        takes_one_completion(resolve_reward(f"{PLUGINS}:{name}"))
    assert message in str(caught.value)


def test_importing_rewards_is_light() -> None:
    script = "import sys, rewards; print(sorted({'torch', 'sympy', 'numpy', 'rewards.grader'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
