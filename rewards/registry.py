"""Reward functions by name: the built-in table, `module:function`, and `path/to/file.py:function`.

The table maps names to `module:function`, so that importing `rewards` imports none of them.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BUILT_IN: Mapping[str, str] = {
    "code": "rewards.code_reward:code_reward",
    "code_fraction": "rewards.code_reward:code_fraction_reward",
    "countdown": "rewards.countdown:countdown_reward",
    "format": "rewards.format_reward:format_reward",
}
"""Name -> `module:function` of the rewards that come with the package."""

RewardFunction = Callable[..., Any]
"""Either kind that `takes_one_completion` tells apart:
`f(problem: Problem, completion: str) -> float | RewardResult | None`, or as TRL calls it
`f(prompts, completions, completion_ids, **columns) -> list[float | None]`."""


class RewardNotFoundError(LookupError):
    """No such reward; the message says what was given and what is allowed."""


def resolve_reward(name: str) -> RewardFunction:
    """The function behind a built-in name, `module:function` or `path/to/file.py:function`.

    Raises RewardNotFoundError if there is none; whatever importing the user's own module raises passes through.
    """
    target = BUILT_IN.get(name, name)
    module_name, colon, function_name = target.rpartition(":")
    if not colon or not module_name or not function_name:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RewardNotFoundError(
            f"no reward is called {name!r}{hint} "
            f"(built-in: {', '.join(sorted(BUILT_IN))}; your own: 'module:function' or 'path/to/file.py:function')"
        )
    module = _load_file(Path(module_name)) if module_name.endswith(".py") else _load_module(module_name, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise RewardNotFoundError(f"{module_name!r} has no function {function_name!r} (reward {name!r})")
    return function  # type: ignore[no-any-return]


def takes_one_completion(function: RewardFunction) -> bool:
    """True for `f(problem, completion)`, False for TRL's `f(prompts, completions, completion_ids, **columns)`."""
    names = list(inspect.signature(function).parameters)
    return names[:2] == ["problem", "completion"]


def reward_name(name: str) -> str:
    """The short name used in metrics: the function's own name for `module:function`."""
    return name if name in BUILT_IN else name.rpartition(":")[2]


def _load_module(module_name: str, reward: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise RewardNotFoundError(
            f"reward {reward!r}: no module {error.name!r} can be imported from here; "
            "install it, or give the file as 'path/to/file.py:function'"
        ) from error


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise RewardNotFoundError(f"no file {path} (looked from {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
