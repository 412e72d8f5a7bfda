"""Programs are scored right: honest ones by every style, languages beside Python, HumanEval whole."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rewards import Problem, resolve_reward, score_program
from rewards.code_reward import extract_program, make_code_reward, score_completion
from rewards.sandbox.sandbox import Sandbox, SandboxUnavailableError

ROOT = Path(__file__).resolve().parents[2]
HUMANEVAL = ROOT.parent / "shared" / "data" / "HumanEval.jsonl.gz"


@pytest.fixture(scope="module", params=["A", "B"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with Sandbox(level=request.param) as made:
        try:
            assert made.level == request.param
        except SandboxUnavailableError as error:
            pytest.skip(str(error))
        yield made


def stdio(*pairs: tuple[str, str], **limits: Any) -> dict[str, Any]:
    return {
        "style": "stdio",
        "cases": [{"stdin": i, "stdout": o} for i, o in pairs],
        "limits": {"wall_s": 10, **limits},
    }


def function(entry_point: str, *cases: tuple[list[Any], Any], **limits: Any) -> dict[str, Any]:
    listed = [{"args": args, "kwargs": {}, "expected": expected} for args, expected in cases]
    return {"style": "function", "entry_point": entry_point, "cases": listed, "limits": {"wall_s": 10, **limits}}


def asserts(entry_point: str, source: str, **limits: Any) -> dict[str, Any]:
    return {"style": "assert", "entry_point": entry_point, "tests": source, "limits": {"wall_s": 10, **limits}}


NESTED: list[Any] = []
for _ in range(3000):
    NESTED = [NESTED]
CALL = {"style": "function", "entry_point": "f"}
SUM = stdio(("3 4\n", "7\n"), ("10 -4", "6"))


@pytest.mark.parametrize(
    "program",
    [
        "a, b = map(int, input().split())\nprint(a + b)",
        "import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))",
        "import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.buffer.read().split()))))",
        "print(sum(map(int, open(0).read().split())))",
        "def main():\n    print(sum(map(int, input().split())))\nif __name__ == '__main__':\n    main()",
        "import atexit\nx = input()\natexit.register(lambda: print(sum(map(int, x.split()))))",
        "import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()",
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n"
        "def f(n):\n    return 0 if n == 0 else f(n - 1)\ndef main():\n    f(50_000)\n"
        "    print(sum(map(int, input().split())))\nt = threading.Thread(target=main)\nt.start()\nt.join()",
        "import os\nos.write(1, str(sum(map(int, os.read(0, 100).split()))).encode())",
        "print(sum(map(int, input().split())))\nexit()",
        "import sys\nprint(sum(map(int, input().split())))\nsys.exit(0)",
        "import tempfile\nwith tempfile.TemporaryFile('w+') as f:\n    f.write(input())\n    f.seek(0)\n"
        "    print(sum(map(int, f.read().split())))",
        "open('x', 'w').write(input())\nprint(sum(map(int, open('x').read().split())))",
        "import asyncio\nasync def main():\n    print(sum(map(int, input().split())))\nasyncio.run(main())",
        "from concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(4) as e:\n"
        "    print(sum(e.map(int, input().split())))",
        "import numpy as np\nprint(np.array(input().split(), dtype=np.int64).sum())",
        "from decimal import Decimal\nfrom fractions import Fraction\nprint(sum(map(int, input().split())))",
        "import datetime, time, random, uuid, hashlib, sqlite3, zoneinfo\ntime.localtime()\nzoneinfo.ZoneInfo('UTC')\n"
        "print(sum(map(int, input().split())))",
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nprint(sum(map(int, input().split())))",
        "import sys\nprint(sum(map(int, input().split())))\nsys.stdout.flush()\nsys.stdout.close()",
        "import io, sys\nprint(sum(map(int, input().split())))\nsys.stdout = io.StringIO()\nprint('lost')",
        "import pickle, sys\nclass A: pass\npickle.loads(pickle.dumps(A()))\nprint(sum(map(int, input().split())))",
    ],
)
def test_honest_programs_pass(sandbox: Sandbox, program: str) -> None:
    if "numpy" in program:
        pytest.importorskip("numpy")
    result = score_program(program, SUM, sandbox=sandbox)
    assert result.reward == 1.0, result.detail


def test_the_reward_is_the_share_of_cases_passed(sandbox: Sandbox) -> None:
    result = score_program("print(7)", SUM, sandbox=sandbox)
    assert (result.reward, result.status) == (0.5, "ok")
    assert result.detail == r"1 of 2 tests passed; case 1: printed '7\n', expected '6'"
    assert score_program("print(8)", SUM, sandbox=sandbox, stop_at_failure=True).reward == 0.0


def test_a_failed_exit_fails_the_case(sandbox: Sandbox) -> None:
    program = "print(sum(map(int, input().split())))\nraise ValueError('late')"
    result = score_program(program, SUM, sandbox=sandbox)
    assert result.reward == 0.0
    assert "exit status 1 ValueError: late" in result.detail


def test_two_runs_share_nothing(sandbox: Sandbox) -> None:
    program = "import os\nprint(len(os.listdir('.')))\nopen('left', 'w').write('x')\nos.mkdir('also')"
    assert score_program(program, stdio(*[("", "0")] * 6), sandbox=sandbox).reward == 1.0


def test_the_same_program_prints_the_same(sandbox: Sandbox) -> None:
    program = "print({'a', 'b', 'c', 'd', 'e', 'f'}, hash('x'))"
    seen = set()
    for _ in range(3):
        result = score_program(program, stdio(("", "?")), sandbox=sandbox)
        seen.add(result.detail)
    assert len(seen) == 1


def test_random_numbers_differ_between_runs(sandbox: Sandbox) -> None:
    program = "import random\nprint(random.getrandbits(200))"
    details = {score_program(program, stdio(("", "?")), sandbox=sandbox).detail for _ in range(3)}
    assert len(details) == 3


@pytest.mark.parametrize(
    ("program", "problem", "reward"),
    [
        ("def f(a, b): return a + b", function("f", ([1, 2], 3), (["x", "y"], "xy"), ([[1], [2]], [1, 2])), 1.0),
        ("class Solution:\n    def f(self, a): return a * 2", function("f", ([2], 4)), 1.0),
        ("def f(a): return (a, a)", function("f", ([1], [1, 1])), 1.0),
        ("def f(a): return a > 0", function("f", ([1], True), ([-1], False)), 1.0),
        ("def f(a): return int(a > 0)", function("f", ([1], True), ([-1], False)), 0.0),
        ("def f(a): return 0.1 + 0.2", function("f", ([1], 0.3)), 1.0),
        ("def f(a): return {'x': {1: None}}", function("f", ([1], {"x": {"1": None}})), 1.0),
        (
            "from collections import Counter\ndef f(a): return Counter(a)",
            function("f", (["aab"], {"a": 2, "b": 1})),
            1.0,
        ),
        ("def f(a):\n    print('noise')\n    return a", function("f", ([1], 1)), 1.0),
        ("def f(a): return 10 ** a", function("f", ([4000], 10**4000)), 1.0),
        ("def f(a):\n    if a: raise KeyError\n    return None", function("f", ([0], None), ([1], None)), 0.5),
        (
            "def f(a):\n    import os\n    if a == 1: os._exit(0)\n    return a",
            function("f", ([0], 0), ([1], 1), ([2], 2)),
            2 / 3,
        ),
        (
            "def f(a):\n    while a == 1: pass\n    return a",
            function("f", ([0], 0), ([1], 1), ([2], 2), wall_s=0.4),
            2 / 3,
        ),
        (
            "import time\ndef f(a):\n    time.sleep(0.25)\n    return a",
            function("f", *[([n], n) for n in range(5)], wall_s=0.7),
            1.0,
        ),
        ("def g(a): return a", function("f", ([1], 1)), 0.0),
        ("def f(a): return a\nimport sys\nsys.exit(0)", function("f", ([1], 1)), 0.0),
        (
            "import functools\n@functools.cache\ndef f(n): return n if n < 2 else f(n - 1) + f(n - 2)",
            function("f", ([80], 23416728348467685)),
            1.0,
        ),
    ],
)
def test_functions_are_called(sandbox: Sandbox, program: str, problem: dict[str, Any], reward: float) -> None:
    result = score_program(program, problem, sandbox=sandbox)
    assert result.reward == pytest.approx(reward), result.detail


def test_keyword_arguments_and_alternatives(sandbox: Sandbox) -> None:
    cases = [{"args": [1], "kwargs": {"b": 2}, "expected": 3}, {"args": [1], "expected_any": [[5], 1], "expected": [5]}]
    problem = {"style": "function", "entry_point": "f", "cases": cases}
    assert score_program("def f(a, b=0): return a + b", problem, sandbox=sandbox).reward == 1.0


@pytest.mark.parametrize(
    ("program", "problem", "reward"),
    [
        ("def f(a): return a", asserts("f", "assert f(1) == 1\nassert f((1, 2)) == (1, 2)\nassert f({1}) == {1}"), 1.0),
        ("def f(a): return list(a)", asserts("f", "assert f((1, 2)) == (1, 2)\nassert f([1]) == [1]"), 0.5),
        ("def f(a): return a", asserts("f", "def check(candidate):\n    assert candidate(1) == 1\n"), 1.0),
        ("def f(a): return a", asserts("f", "def check(candidate):\n    assert candidate(1) == 2\ncheck(f)"), 0.0),
        (
            "def f(a): return a",
            asserts("f", "import math\nassert math.isclose(f(1.5), 1.5)\nassert set(f([1, 1])) == {1}"),
            1.0,
        ),
        (
            "def f(a): return a",
            asserts("f", "def test_one():\n    assert f(1) == 1\ndef test_two():\n    assert f(2) == 3"),
            0.5,
        ),
        (
            "def f(a): raise ValueError('no')",
            asserts("f", "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass\nassert 1"),
            1.0,
        ),
        ("def f(a):\n    for x in a:\n        yield x * 2", asserts("f", "assert list(f([1, 2])) == [2, 4]"), 1.0),
        ("def f(a): a.sort()", asserts("f", "x = [3, 1]\nf(x)\nassert x == [1, 3]"), 1.0),
        (
            "class A:\n    def __init__(self, n): self.n = n\n    def twice(self): return self.n * 2",
            asserts("A", "assert A(4).twice() == 8"),
            1.0,
        ),
        (
            "class Solution:\n    def f(self, x): return x",
            asserts("Solution().f", "def check(candidate):\n    assert candidate(x=3) == 3"),
            1.0,
        ),
        ("def f(a): return a", asserts("", "assert f(1) == 1"), 1.0),
        ("def f(a): return a", asserts("f", "pass"), 0.0),
        ("def f(a): return a", asserts("f", "for x in []:\n    assert f(x)"), 0.0),
        (
            "def f(a):\n    while a == 2: pass\n    return a",
            asserts("f", "assert f(1) == 1\nassert f(2) == 2\nassert f(3) == 3", wall_s=0.6),
            1 / 3,
        ),
    ],
)
def test_tests_are_run(sandbox: Sandbox, program: str, problem: dict[str, Any], reward: float) -> None:
    result = score_program(program, problem, sandbox=sandbox)
    assert result.reward == pytest.approx(reward), result.detail


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({}, "style must be one of stdio, function, assert, got None"),
        ({"style": "stdio", "cases": []}, "needs cases, a list that is not empty"),
        ({"style": "stdio", "cases": [{"stdin": "x"}]}, "case 0 of a stdio problem lacks stdout"),
        ({"style": "function", "cases": [{"expected": 1}]}, "needs entry_point"),
        ({"style": "assert", "entry_point": "f", "tests": " "}, "needs tests"),
        ({**SUM, "limits": {"wall": 1}}, "unknown key 'wall'"),
        ({**SUM, "limits": {"wall_s": -1}}, "wall_s must be a positive number, at most .*; got -1"),
        ({**SUM, "limits": {"wall_s": 1e18}}, "wall_s must be a positive number, at most 1e.06; got 1e.18"),
        ({**SUM, "limits": {"memory_mb": 10**400}}, "memory_mb must be .*; got an int of 1329 bits"),
        ({**SUM, "limits": {"threads": 1.5}}, "threads must be a positive whole number, at most 1e.06; got 1.5"),
        ({**SUM, "limits": [1]}, r"limits: must be a mapping of wall_s, .*, got \[1\]"),
        ({**SUM, "language": "cobol"}, "language must be python, cpp or javascript, got 'cobol'"),
        ({**SUM, "language": ["python"]}, "language must be python, cpp or javascript, got "),
        (None, "problem: must be a mapping, got NoneType"),
        ({**SUM, "prelude": 3}, "prelude must be text, got int"),
        (stdio((None, "7")), "case 0: stdin must be text, got NoneType"),  # type: ignore[arg-type]
        (stdio(("", "7"), ("", 7)), "case 1: stdout must be text, got int"),  # type: ignore[arg-type]
        (stdio(("\ud800", "7")), "case 0: stdin cannot be written as UTF-8"),
        (function("", ([1], 1)), "needs entry_point"),
        (function("f", (3, 1)), "case 0: args must be a list, got 3"),  # type: ignore[arg-type]
        (function("f", ([1], object())), "case 0: expected holds a value of type object"),
        (function("f", ([1], NESTED)), "case 0: expected holds data nested deeper than 200"),
        ({**CALL, "cases": [{"kwargs": {1: 2}, "expected": 1}]}, "case 0: kwargs must map names to values, got {1: 2}"),
        (
            {**CALL, "cases": [{"expected": 1, "expected_any": []}]},
            "case 0: expected_any must be a list that is not empty",
        ),
        (asserts(5, "assert f() == 1"), "entry_point must be a function's name, got 5"),  # type: ignore[arg-type]
    ],
)
def test_a_malformed_problem_is_named(problem: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_program("pass", problem)


@pytest.mark.parametrize("tests", ["assert (", "return f() == 1", "assert f() == '\ud800'", "assert " + "(" * 999])
def test_tests_that_are_no_source_are_not_the_programs_failure(sandbox: Sandbox, tests: str) -> None:
    with pytest.raises(ValueError, match="problem: tests cannot be compiled: "):
        score_program("def f(): return 1", asserts("f", tests), sandbox=sandbox)


def test_no_program_is_no_answer() -> None:
    for program in ("", "  \n", None):
        result = score_program(program, SUM)  # type: ignore[arg-type]
        assert (result.reward, result.status) == (0.0, "unparsed")


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("```python\nold\n```\ntext\n```python\nnew\n```\nbye", "new\n"),
        ("```python\ncode\n```\n```text\nout\n```", "code\n"),
        ("```\nplain\n```", "plain\n"),
        ("```text\na\n```\n```\nb\n```", "b\n"),
        ("~~~py\nx\n~~~", "x\n"),
        ("````python\n```\ninner\n```\n````", "```\ninner\n```\n"),
        ("```python\nx = 1\n", None),
        ("```python\ndone\n```\n```python\ncut off", "done\n"),
        ("print(1)", None),
        ("", None),
        ("```python\n```", ""),
    ],
)
def test_the_last_closed_block_is_the_program(completion: str, program: str | None) -> None:
    assert extract_program(completion) == program


def test_the_registry_has_the_reward(sandbox: Sandbox) -> None:
    problem = Problem(id="p", prompt="", tests=SUM)
    code, fraction = resolve_reward("code"), resolve_reward("code_fraction")
    half, whole = "```python\nprint(7)\n```", "```python\nprint(sum(map(int, input().split())))\n```"
    assert [code(problem, half).reward, code(problem, whole).reward] == [0.0, 1.0]
    assert [fraction(problem, half).reward, fraction(problem, whole).reward] == [0.5, 1.0]
    assert make_code_reward(scoring="fractional")(problem, half).reward == 0.5
    assert code(problem, "no code").status == "unparsed"
    with pytest.raises(ValueError, match="scoring must be 'binary' or 'fractional'"):
        score_completion(whole, problem, scoring="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="problem q .* has no tests"):
        code(Problem(id="q", prompt=""), whole)


def test_importing_rewards_starts_and_loads_nothing() -> None:
    source = "import sys, rewards; print({'torch', 'sympy', 'numpy', 'subprocess'} & sys.modules.keys())"
    answer = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "set()"


CPP = {**SUM, "language": "cpp", "limits": {"wall_s": 10}}


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("program", "reward", "detail"),
    [
        ("#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }", 1.0, ""),
        ("int main() { return 1 }", 0.0, "the compiler refused it"),
        ('#include "/etc/passwd"\nint main() {}', 0.0, "compilation terminated"),
        ("#include <unistd.h>\nint main() { if (fork() < 0) return 9; return 0; }", 0.0, "exit status 9"),
        ('#include <fstream>\nint main() { return std::ifstream("/etc/passwd") ? 0 : 8; }', 0.0, "exit status 8"),
        ('#include <unistd.h>\nint main() { execl("/bin/echo", "echo", "7", nullptr); return 5; }', 0.0, "status 5"),
        ("#include <vector>\nint main() { std::vector<char> v(4ull << 30, 1); return v[9]; }", 0.0, "bad_alloc"),
    ],
)  # fmt: skip
def test_cpp_is_compiled_and_jailed(sandbox: Sandbox, program: str, reward: float, detail: str) -> None:
    result = score_program(program, CPP, sandbox=sandbox)
    assert result.reward == reward, result.detail
    assert detail in result.detail


@pytest.mark.skipif(shutil.which("node") is None, reason="no node")
@pytest.mark.parametrize(
    ("program", "reward"),
    [
        ("const [a, b] = require('fs').readFileSync(0, 'utf8').split(/\\s+/).map(Number);\nconsole.log(a + b);", 1.0),
        ("console.log(require('fs').readFileSync('/etc/passwd', 'utf8'));", 0.0),
        ("require('child_process').execSync('true'); console.log(7);", 0.0),
        ("require('net').connect(80, '127.0.0.1').on('error', () => process.exit(3));", 0.0),
    ],
)
def test_javascript_is_run_and_jailed(sandbox: Sandbox, program: str, reward: float) -> None:
    problem = {**SUM, "language": "javascript", "limits": {"wall_s": 20}}
    result = score_program(program, problem, sandbox=sandbox)
    assert result.reward == reward, result.detail


def read_humaneval() -> list[dict[str, str]]:
    if not HUMANEVAL.exists():
        pytest.skip(f"no {HUMANEVAL}")
    with gzip.open(HUMANEVAL, "rt") as file:
        return [json.loads(line) for line in file]


def test_humaneval_solutions_pass_and_broken_ones_do_not(sandbox: Sandbox) -> None:
    rows = read_humaneval()

    def score(row: dict[str, str], *, is_broken: bool) -> float | None:
        name = row["entry_point"]
        program = row["prompt"] + row["canonical_solution"]
        if is_broken:
            program += f"\n_right = {name}\ndef {name}(*a, **k):\n    return (_right(*a, **k), 'broken')\n"
        problem = {"style": "assert", "entry_point": name, "tests": row["test"], "limits": {"wall_s": 20}}
        return score_program(program, problem, sandbox=sandbox).reward

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        right = list(threads.map(lambda row: score(row, is_broken=False), rows))
        broken = list(threads.map(lambda row: score(row, is_broken=True), rows))
    assert len(rows) == 164
    assert right == [1.0] * 164
    assert all(reward is not None and reward < 1 for reward in broken)


def test_a_program_recurses_as_deep_as_in_an_interpreter_of_its_own(sandbox: Sandbox) -> None:
    deepest = "def f(n):\n    return 0 if n == 0 else f(n - 1)\n"
    assert score_program(deepest + "print(f(990))", stdio(("", "0")), sandbox=sandbox).reward == 1.0
    assert score_program(deepest + "print(f(1010))", stdio(("", "0")), sandbox=sandbox).reward == 0.0


def test_a_main_guard_runs_only_where_the_program_is_main(sandbox: Sandbox) -> None:
    program = "def f(a): return a\nif __name__ == '__main__':\n    print(sum(map(int, input().split())))"
    assert score_program(program, SUM, sandbox=sandbox).reward == 1.0
    assert score_program(program, function("f", ([1], 1)), sandbox=sandbox).reward == 1.0
    assert score_program(program, asserts("f", "assert f(1) == 1"), sandbox=sandbox).reward == 1.0


def test_a_prelude_runs_before_the_program(sandbox: Sandbox) -> None:
    problem = {**function("f", ([[1]], 1)), "prelude": "from typing import *"}
    assert score_program("def f(a: List[int]): return a[0]", problem, sandbox=sandbox).reward == 1.0


def test_very_many_assertions_are_all_counted(sandbox: Sandbox) -> None:
    source = "for n in range(150_000):\n    assert n >= 0\nassert f(1) == 1\n"
    right = score_program("def f(a): return a", asserts("f", source, wall_s=20), sandbox=sandbox)
    assert (right.reward, right.detail) == (1.0, "150001 of 150001 tests passed")
    assert score_program("def f(a): return 2", asserts("f", source, wall_s=20), sandbox=sandbox).reward < 1.0


def test_patience_ends_after_timeouts_and_never_for_slow_but_right_programs(sandbox: Sandbox) -> None:
    slow = stdio(*[("3 4", "7")] * 8, wall_s=2, patience_s=0.1)
    assert score_program("import time\ntime.sleep(0.1)\nprint(7)", slow, sandbox=sandbox).reward == 1.0
    stuck = stdio(*[("3 4", "7")] * 50, wall_s=0.2)
    result = score_program("while True: pass", stuck, sandbox=sandbox)
    assert (result.reward, result.status) == (0.0, "timeout")
    assert result.elapsed_s < 8
    calls = function("f", *[([n], n) for n in range(50)], wall_s=0.2)
    result = score_program("def f(n):\n    while n: pass\n    return n", calls, sandbox=sandbox)
    assert (result.reward, result.status) == (1 / 50, "timeout")
    assert result.elapsed_s < 8
