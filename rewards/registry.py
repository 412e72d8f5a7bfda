"""Reward functions by name: the built-in table, `module:function`, and `path/to/file.py:function`.

`verl:NAME` and `openrlhf:NAME` give a function written for verl or OpenRLHF (see `rewards.adapters`).
The table maps names to `module:function`, so that importing `rewards` imports none of them.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

BUILT_IN: Mapping[str, str] = {
    "accuracy": "rewards.math_reward:math_reward",
    "boxed": "rewards.shaping:boxed_reward",
    "code": "rewards.code_reward:code_reward",
    "code_fraction": "rewards.code_reward:code_fraction_reward",
    "cosine_length": "rewards.shaping:cosine_length_reward",
    "countdown": "rewards.countdown:countdown_reward",
    "format": "rewards.format_reward:format_reward",
    "format_open": "rewards.format_reward:format_open_reward",
    "math": "rewards.math_reward:math_reward",
    "overlong": "rewards.shaping:overlong_reward",
    "repetition": "rewards.shaping:repetition_reward",
    "tag_count": "rewards.shaping:tag_count_reward",
}
"""Name -> `module:function` of the rewards that come with the package."""

ADAPTERS: Mapping[str, str] = {
    "verl": "rewards.adapters:adapt_verl",
    "openrlhf": "rewards.adapters:adapt_openrlhf",
}
"""Prefix of a name -> `module:function` that turns a function of that framework into one of ours."""

RewardFunction = Callable[..., Any]
"""Either kind that `takes_one_completion` tells apart, `def` or `async def`:
`f(problem: Problem, completion: str) -> float | RewardResult | None`, or as TRL calls it
`f(prompts, completions, completion_ids, **columns) -> list[float | None]`."""


class RewardNotFoundError(LookupError):
    """No such reward; the message says what was given and what is allowed."""


class RewardSignatureError(TypeError):
    """The thing named is not a function of one of the two kinds; the message says what it takes and what is allowed."""


def resolve_reward(name: str) -> RewardFunction:
    """The function behind a built-in name, `module:function` or `path/to/file.py:function`.

    A file is executed once per process, as a module is. Raises RewardNotFoundError if there is no such function;
    whatever importing the user's own module raises passes through.
    """
    prefix, _, rest = name.partition(":")
    if prefix in ADAPTERS and ":" in rest:
        adapt: Callable[[RewardFunction], RewardFunction] = resolve_reward(ADAPTERS[prefix])
        return adapt(resolve_reward(rest))
    target = BUILT_IN.get(name, name)
    module_name, colon, function_name = target.rpartition(":")
    if not colon or not module_name or not function_name:
        raise RewardNotFoundError(
            f"no reward is called {name!r}{_hint(name)} "
            f"(built-in: {', '.join(sorted(BUILT_IN))}; your own: 'module:function' or 'path/to/file.py:function')"
        )
    module = _load_file(Path(module_name), name) if module_name.endswith(".py") else _load_module(module_name, name)
    function = getattr(module, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, [key for key in vars(module) if not key.startswith("_")], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise RewardNotFoundError(f"{module_name!r} has no function {function_name!r} (reward {name!r}){hint}")
    return function  # type: ignore[no-any-return]


def takes_one_completion(function: RewardFunction) -> bool:
    """True for `f(problem, completion)`, False for TRL's `f(prompts, completions, completion_ids, **columns)`.

    Arguments are passed by keyword, so only their names count. Raises RewardSignatureError for anything else.
    """
    if inspect.isclass(function):
        raise RewardSignatureError(f"{function.__name__!r} is a class; name a function")
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:
        raise RewardSignatureError(f"{function!r} has no signature that can be read; wrap it in a def") from error
    if "completion" in parameters and "problem" in parameters:
        return True
    if "completions" in parameters:
        return False
    hint = ""
    if "solution_str" in parameters:
        hint = "; this looks like verl's compute_score: name it 'verl:module:function'"
    elif "queries" in parameters:
        hint = "; this looks like OpenRLHF's reward_func: name it 'openrlhf:module:function'"
    raise RewardSignatureError(
        f"a reward takes (problem, completion) or (completions, **columns) by these names, "
        f"this one takes ({', '.join(parameters)}){hint}"
    )


def reward_name(name: str) -> str:
    """The short name used in metrics: the function's own name for `module:function`."""
    return name if name in BUILT_IN else name.rpartition(":")[2]


def _hint(name: str) -> str:
    if near := difflib.get_close_matches(name, BUILT_IN, n=1):
        return f"; did you mean {near[0]!r}?"
    if name.endswith(".py"):
        return f"; which function of the file? {name + ':function'!r}"
    module_name, dot, function_name = name.rpartition(".")
    if dot and module_name:
        return f"; did you mean {module_name + ':' + function_name!r}?"
    return ""


def _load_module(module_name: str, reward: str) -> Any:
    if module_name == "__main__":
        raise RewardNotFoundError(
            f"reward {reward!r}: workers cannot import the running script; give it as 'path/to/script.py:function', "
            'with its own work under `if __name__ == "__main__":`'
        )
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, something that it imports is not
        raise RewardNotFoundError(
            f"reward {reward!r}: no module {error.name!r} can be imported from here; "
            "install it, or give the file as 'path/to/file.py:function'"
        ) from error


def _load_file(path: Path, reward: str) -> Any:
    path = path.expanduser()
    if not path.is_file():
        raise RewardNotFoundError(f"reward {reward!r}: no file {path} (looked from {Path.cwd()})")
    path = path.resolve()
    module_name = f"reward_file_{path.stem}_{zlib.crc32(bytes(path)):08x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with contextlib.ExitStack() as undo:
        sys.modules[module_name] = module  # dataclasses and typing look a module up by its name while it is executed
        undo.callback(sys.modules.pop, module_name)
        spec.loader.exec_module(module)
        undo.pop_all()
    return module
