"""Rows of the code datasets people have, read into problems of `score_program`.

| layout | datasets |
| --- | --- |
| humaneval | openai/openai_humaneval, and HumanEval+ in its layout |
| mbpp | google-research-datasets/mbpp, full and sanitized |
| apps | codeparrot/apps, BAAI/TACO: `input_output` |
| livecodebench | livecodebench/code_generation: `public_test_cases`, `private_test_cases` |
| open_r1 | open-r1's `verification_info` |
| prime | PRIME-RL/Eurus-2-RL-Data and what verl makes of it: `reward_model.ground_truth` |

A row without a test, or with one that says neither what goes in nor what comes out, raises ValueError.
"""

from __future__ import annotations

import ast
import base64
import builtins
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
CodeProblem = dict[str, Any]

PRELUDE = """
from math import *
from operator import *
from string import *
from itertools import *
from functools import *
from collections import *
from heapq import *
from bisect import *
from builtins import *
from typing import *
import sys, os, math, cmath, re, string, random, itertools, functools, collections, heapq, bisect, operator, copy, json
"""
"""What the sites of functional problems import for a program; LeetCode's signatures need `List` at least."""

MAX_CASES_BYTES = 256 << 20
"""Largest unpacked set of private cases; the largest of LiveCodeBench is near 100 MiB."""


def read_code_problem(row: Row, layout: str) -> CodeProblem:
    """The problem in a row of a dataset of this layout. ValueError for an unknown layout or an unreadable row."""
    reader = LAYOUTS.get(layout)
    if reader is None:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    try:
        return reader(row)
    except KeyError as error:
        raise ValueError(f"a row of layout {layout} needs {error}; this one has {', '.join(map(str, row))}") from error


def read_humaneval(row: Row) -> CodeProblem:
    """`prompt`, `test`, `entry_point`. What else the prompt defines is the tests' own then, not the program's."""
    entry_point = row["entry_point"]
    prelude = ast.parse(row["prompt"])
    prelude.body = [n for n in prelude.body if not (isinstance(n, ast.FunctionDef) and n.name == entry_point)]
    tests = f"{ast.unparse(prelude)}\n\n{row['test']}\n\ncheck({entry_point})\n"
    return {"style": "assert", "entry_point": entry_point, "tests": tests}


def read_mbpp(row: Row) -> CodeProblem:
    """`test_list` with `test_setup_code` or `test_imports`; the function under test is found in the first test."""
    setup = [row["test_setup_code"]] if row.get("test_setup_code") else list(row.get("test_imports") or [])
    tests = list(row["test_list"])
    if not tests:
        raise ValueError("an mbpp row has an empty test_list")
    return {
        "style": "assert",
        "entry_point": _find_tested_function(tests[0], row.get("code") or ""),
        "tests": "\n".join([*setup, *tests]) + "\n",
    }


def read_apps(row: Row) -> CodeProblem:
    """`input_output`, a JSON text or mapping of `inputs`, `outputs` and maybe `fn_name`."""
    return _read_inputs_outputs(row["input_output"])


def read_prime(row: Row) -> CodeProblem:
    """verl's `reward_model.ground_truth`, laid out as `input_output` is."""
    return _read_inputs_outputs(row["reward_model"]["ground_truth"])


def read_livecodebench(row: Row) -> CodeProblem:
    """`public_test_cases` and `private_test_cases`; functional ones name their function in `metadata`."""
    cases = [*_json(row["public_test_cases"]), *_read_private_cases(row.get("private_test_cases") or "[]")]
    if not cases:
        raise ValueError("a livecodebench row has no test case")
    if cases[0].get("testtype") == "functional":
        name = _json(row["metadata"])["func_name"]
        return _function_problem(name, [(case["input"], case["output"]) for case in cases])
    return _stdio_problem([(case["input"], case["output"]) for case in cases])


def read_open_r1(row: Row) -> CodeProblem:
    """`verification_info`: `test_cases` of `input`, `output`, `type` and maybe `fn_name`; and `language`."""
    info = _json(row["verification_info"])
    cases = info["test_cases"]
    if not cases:
        raise ValueError("an open_r1 row has no test case")
    pairs = [(case["input"], case["output"]) for case in cases]
    if cases[0].get("fn_name"):
        return _function_problem(cases[0]["fn_name"], pairs)
    problem = _stdio_problem(pairs)
    language = str(info.get("language") or "python").lower()
    return problem if language in ("python", "python3") else {**problem, "language": language}


LAYOUTS: Mapping[str, Callable[[Row], CodeProblem]] = {
    "humaneval": read_humaneval,
    "mbpp": read_mbpp,
    "apps": read_apps,
    "livecodebench": read_livecodebench,
    "open_r1": read_open_r1,
    "prime": read_prime,
}


def _read_inputs_outputs(text: Any) -> CodeProblem:
    found = _json(text)
    inputs, outputs = found["inputs"], found["outputs"]
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    pairs = list(zip(inputs, outputs, strict=True))
    return _function_problem(found["fn_name"], pairs) if found.get("fn_name") else _stdio_problem(pairs)


def _stdio_problem(pairs: Sequence[tuple[Any, Any]]) -> CodeProblem:
    return {"style": "stdio", "cases": [{"stdin": _text(given), "stdout": _text(wanted)} for given, wanted in pairs]}


def _function_problem(name: str, pairs: Sequence[tuple[Any, Any]]) -> CodeProblem:
    """Arguments are a list, or a JSON value a line; results values, or JSON; APPS often wraps them in a list of one."""
    cases = []
    for given, wanted in pairs:
        arguments = [json.loads(line) for line in given.splitlines() if line] if isinstance(given, str) else list(given)
        expected = json.loads(wanted) if isinstance(given, str) and isinstance(wanted, str) else wanted
        case = {"args": arguments, "expected": expected}
        if isinstance(expected, list) and len(expected) == 1 and not isinstance(given, str):
            case["expected_any"] = [expected, expected[0]]
        cases.append(case)
    return {"style": "function", "entry_point": name, "prelude": PRELUDE, "cases": cases}


def _text(value: Any) -> str:
    """Text as it is; a list is its lines."""
    return value if isinstance(value, str) else "\n".join(map(str, value)) + "\n"


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def _find_tested_function(test: str, code: str) -> str:
    """The name that a test calls and the reference defines; without a reference, the first that is no builtin's."""
    calls = [node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
    called = [function.id for function in calls if isinstance(function, ast.Name)]
    defined = {n.name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef)}
    names = [name for name in called if name in defined] or [name for name in called if name not in vars(builtins)]
    if not names:
        raise ValueError(f"no function is called in {test!r}")
    return names[0]


def _read_private_cases(text: str) -> Any:
    """JSON, or as the dataset ships it: JSON in a pickled string, compressed, in base 64. Nothing is unpickled."""
    if text.lstrip().startswith("["):
        return json.loads(text)
    unpacker = zlib.decompressobj()
    data = unpacker.decompress(base64.b64decode(text), MAX_CASES_BYTES)
    if unpacker.unconsumed_tail:
        raise ValueError(f"private_test_cases unpacks to more than {MAX_CASES_BYTES} bytes")
    return json.loads(_read_pickled_string(data))


def _read_pickled_string(data: bytes) -> str:
    """The one string that a pickle holds, read by hand; ValueError if it holds anything else."""
    position = 0
    if data[:1] == b"\x80":  # protocol
        position = 2
    if data[position : position + 1] == b"\x95":  # frame
        position += 9
    width = {b"\x8c": 1, b"X": 4, b"\x8d": 8}.get(data[position : position + 1])
    if width is None:
        raise ValueError("private_test_cases holds a pickle of something other than a string")
    start = position + 1 + width
    end = start + int.from_bytes(data[position + 1 : start], "little")
    if data[end:] not in (b"\x94.", b"q\x00.", b"."):
        raise ValueError("private_test_cases holds a pickle of more than a string")
    return data[start:end].decode()
