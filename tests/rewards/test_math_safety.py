"""No hang, no crash, bounded memory: in threads, in processes, after a fork; injected text is never evaluated."""

import multiprocessing
import os
import resource
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from rewards import MathPolicy, verify_math
from rewards.math_ast import Add, Fn, Mul, Num, Pow, Sym, integer
from rewards.math_sympy import Worker, WorkerPool, encode, worker_pool

CASES = [
    (r"\boxed{10^{10^{10}}}", "5", 0.0),
    (r"\boxed{9^{9^{9^{9}}}}", "9", 0.0),
    ("1000000!", "1", 0.0),
    (r"\boxed{" + r"\sqrt{" * 400 + "2" + "}" * 400 + "}", "2", 0.0),
    ("{" * 200_000, "2", 0.0),
    (r"\sum_{n=1}^{\infty}\frac{1}{n^2}", "2", 0.0),
    (r"2\arctan\frac13", r"\arctan\frac34", 1.0),
    ("x" * 1_000_000, "x", 0.0),
]


def grade_all(_=None):
    # A deadline for busy machines: the point here is who may ask, not how fast.
    return [verify_math(answer, gold, policy=MathPolicy(deadline_s=30)).reward for answer, gold, _ in CASES]


EXPECTED = [expected for _, _, expected in CASES]


def test_in_threads():
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(grade_all, range(16))) == [EXPECTED] * 16
    assert threading.active_count() < 12


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_processes(method):
    assert grade_all() == EXPECTED  # the parent has workers that a forked child must not share
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(grade_all, range(4)) == [EXPECTED] * 4


def test_the_symbolic_stage_ends_at_its_deadline_as_a_timeout():
    x = Sym("x")
    heavy = Pow(Add(tuple(Pow(Fn("sin", (Mul((integer(k), x)),)), integer(7)) for k in range(1, 9))), integer(9))
    pool = WorkerPool(size=1)
    pool.warm(512)
    start = time.monotonic()
    assert pool.prove_equal(heavy, Mul((x, heavy)), deadline_s=0.3, memory_mb=512) == "timeout"
    assert time.monotonic() - start < 2.0
    # The killed worker is replaced, and the next question is answered.
    assert pool.prove_equal(Add((x, x)), Mul((integer(2), x)), deadline_s=5.0, memory_mb=512) == "equal"
    pool.close()


def test_a_verdict_that_needs_more_time_is_a_timeout_and_not_remembered():
    answer, gold = r"2\arctan\frac{1}{2}", r"\arctan\frac{4}{3}"
    assert verify_math(answer, gold, policy=MathPolicy(deadline_s=1e-6)).status == "timeout"
    assert verify_math(answer, gold, policy=MathPolicy(deadline_s=20)).reward == 1.0
    assert verify_math(answer, gold, policy=MathPolicy(use_sympy=False)).reward == 0.0


def test_a_worker_has_its_address_space_limited():
    pool = WorkerPool(size=1)
    big = Pow(Add(tuple(Sym(f"x{i}") for i in range(40))), integer(9))
    assert pool.prove_equal(big, Add((big, integer(1))), deadline_s=30.0, memory_mb=320) in (
        "error",
        "timeout",
        "unproven",
    )
    assert pool.prove_equal(Sym("x"), Sym("x"), deadline_s=10.0, memory_mb=320) == "equal"
    pool.close()


def test_a_worker_that_dies_is_an_error_and_is_replaced():
    worker = Worker(512)
    assert worker.wait_until_ready()
    worker.process.kill()
    worker.process.wait()
    assert worker.ask(Sym("x"), Sym("x"), 1.0) == "error"
    worker.close()


def test_trees_travel_as_plain_lists():
    tree = Add((Num(Fraction(1, 3)), Mul((Sym("x"), Pow(Sym("e"), integer(2)))), Fn("call:f", (Sym("x"),))))
    assert encode(tree) == [
        "add",
        ["num", "1", "3"],
        ["mul", ["sym", "x"], ["pow", ["sym", "e"], ["num", "2", "1"]]],
        ["sym", "call:f(x)"],
    ]


def test_injected_code_is_never_run(tmp_path):
    target = tmp_path / "touched"
    for text in (
        f"__import__('os').system('touch {target}')",
        f"\\boxed{{__import__('os').mkdir('{target}')}}",
        f"\\boxed{{\\text{{exec(open('{target}','w'))}}}}",
        f"\\immediate\\write18{{touch {target}}}",
        "().__class__.__mro__[1].__subclasses__()",
    ):
        assert verify_math(text, "0").reward == 0.0
    assert not target.exists()


def test_no_child_is_left_and_memory_stays_bounded():
    script = textwrap.dedent(
        """
        import resource, json, sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[2])
        from rewards import verify_math
        for line in Path(sys.argv[1]).read_text().splitlines():
            row = json.loads(line)
            answer = row["answer"]
            if "repeat" in row:
                answer = answer.replace("@@", row["repeat"][0] * row["repeat"][1])
            verify_math(answer, row["gold"])
        from rewards.math_sympy import worker_pool
        worker_pool().close()
        # Not ru_maxrss, which takes over the peak of the process that forked this one.
        own = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        print(own // 1024, children // 1024)
        """
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    data = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "math_hostile.jsonl")
    done = subprocess.run(
        [sys.executable, "-c", script, data, root], capture_output=True, text=True, timeout=170, check=True
    )
    own_mb, children_mb = map(int, done.stdout.split())
    assert own_mb < 512
    assert children_mb < 512


def test_importing_rewards_loads_neither_sympy_nor_torch():
    script = "import rewards, sys; rewards.verify_math; print(sorted({'sympy', 'torch', 'mpmath'} & set(sys.modules)))"
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=root, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_pool_belongs_to_the_process():
    assert worker_pool() is worker_pool()
    assert resource.getrlimit(resource.RLIMIT_AS)[0] in (
        resource.RLIM_INFINITY,
        resource.getrlimit(resource.RLIMIT_AS)[1],
    )
