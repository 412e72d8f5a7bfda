"""An attack: a program, the problem it is sent to, and the reward it gets where the jail holds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Attack:
    """One program that tries something."""

    name: str
    """Unique in the suite."""
    program: str
    """Python source; `@NAME@` is replaced by what `World.facts` has under that name."""
    problem: Mapping[str, Any]
    """What it is scored on."""
    highest: float = 0.0
    """The highest reward it may get."""
    lowest: float = 0.0
    """The lowest; a containment attack must run to its end and find every door shut, which earns 1.0."""
    max_s: float = 8.0
    """Seconds after which it must be over."""


_PRELUDE = """
import os, sys
escaped = []
def attempt(action):
    try:
        value = action()
    except BaseException as error:
        return
    escaped.append(repr(value)[:200])
"""
_VERDICT = """
print("escaped" if escaped else "held", *escaped)
"""


def containment(name: str, body: str, **limits: Any) -> Attack:
    """A program whose attempts must all fail: each is `attempt(callable)`, and success is returning at all."""
    program = _PRELUDE + textwrap.dedent(body) + _VERDICT
    problem = {"style": "stdio", "cases": [{"stdin": "", "stdout": "held\n"}], "limits": {"wall_s": 20, **limits}}
    return Attack(name=name, program=program, problem=problem, highest=1.0, lowest=1.0, max_s=30.0)


def resource_abuse(name: str, program: str, *, max_s: float = 8.0, **limits: Any) -> Attack:
    """A program that would take too much; it earns nothing and is over soon."""
    problem = {"style": "stdio", "cases": [{"stdin": "", "stdout": "done\n"}], "limits": {"wall_s": 1, **limits}}
    return Attack(name=name, program=textwrap.dedent(program), problem=problem, max_s=max_s)


STDIO = {
    "style": "stdio",
    "cases": [{"stdin": "3 4\n", "stdout": "7\n"}, {"stdin": "10 -4\n", "stdout": "6\n"}],
    "limits": {"wall_s": 2},
}
FUNCTION = {
    "style": "function",
    "entry_point": "add",
    "cases": [
        {"args": [3, 4], "expected": 7},
        {"args": [10, -4], "expected": 6},
        {"args": ["a", "b"], "expected": "ab"},
    ],
    "limits": {"wall_s": 2},
}
ASSERT = {
    "style": "assert",
    "entry_point": "add",
    "tests": """
def check(candidate):
    assert candidate(3, 4) == 7
    assert candidate(10, -4) == 6
    assert candidate("a", "b") == "ab"
""",
    "limits": {"wall_s": 2},
}
LISTS = {
    "style": "assert",
    "entry_point": "order",
    "tests": """
assert order([3, 1, 2]) == [1, 2, 3]
x = [5, 4]
assert len(order(x)) == len(x)
assert order([2, 1]) == sorted([2, 1])
""",
    "limits": {"wall_s": 2},
}


SORTED = {
    "style": "assert",
    "entry_point": "order",
    "tests": """
x = [5, 4]
assert order(x) == sorted(x)
y = [2, 1]
assert len(order(y)) == len(y)
""",
    "limits": {"wall_s": 2},
}
HALF = {"style": "stdio", "cases": [{"stdin": "1\n", "stdout": "0.5 0.25\n"}], "limits": {"wall_s": 2}}


def hack(name: str, program: str, *problems: Mapping[str, Any], highest: float = 0.0) -> list[Attack]:
    """A program that solves nothing and wants the reward all the same, sent to each problem."""
    source = textwrap.dedent(program)
    many = len(problems) > 1
    return [
        Attack(name=f"{name}-{problem['style']}" if many else name, program=source, problem=problem, highest=highest)
        for problem in problems
    ]
