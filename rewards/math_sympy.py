"""Persistent worker processes that confirm equality with sympy: warmed, limited in memory, killed at a deadline,
recycled.

The parent uses pipes and `select`, no signals: any thread of any process may ask. A forked child gets workers of its
own.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from rewards.math_ast import Add, Fn, Mul, Node, Num, Pow, Sym, render
from rewards.secrets import without_secrets

Proof = Literal["equal", "unproven", "timeout", "error"]

MAX_QUESTIONS = 500
"""Questions after which a worker is replaced: sympy's caches grow."""
_START_DEADLINE_S = 60.0


def encode(node: Node) -> list[Any]:
    """A scalar tree as nested lists for JSON. What sympy has no part in is a symbol named by its spelling."""
    match node:
        case Num(value):
            return ["num", str(value.numerator), str(value.denominator)]
        case Sym(name):
            return ["sym", name]
        case Add(terms):
            return ["add", *map(encode, terms)]
        case Mul(factors):
            return ["mul", *map(encode, factors)]
        case Pow(base, exponent):
            return ["pow", encode(base), encode(exponent)]
        case Fn(name, args) if ":" not in name:
            return ["fn", name, *map(encode, args)]
        case _:
            return ["sym", render(node, limit=2000)]


class Worker:
    """One child process."""

    def __init__(self, memory_mb: int) -> None:
        root = str(Path(__file__).resolve().parent.parent)
        environment = without_secrets(os.environ) | {"PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])}
        self.memory_mb = memory_mb
        self.questions = 0
        # -P: the package's own folder must not shadow the standard library (rewards/types.py).
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rewards.math_sympy_worker", str(memory_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        self.is_ready = False

    def wait_until_ready(self) -> bool:
        """Waits for the first line, once; loading sympy is no part of any deadline."""
        if not self.is_ready:
            self.is_ready = self._read_line(time.monotonic() + _START_DEADLINE_S) is not None
        return self.is_ready

    def ask(self, left: Node, right: Node, deadline_s: float) -> Proof:
        """Sends one question and waits for its answer; after `timeout` or `error` the worker must be closed."""
        self.questions += 1
        question = json.dumps([encode(left), encode(right)]) + "\n"
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(question.encode())
            self.process.stdin.flush()
        except OSError:
            return "error"
        line = self._read_line(time.monotonic() + deadline_s)
        if line is None:
            return "timeout" if self.process.poll() is None else "error"
        reply = json.loads(line)
        if "error" in reply:
            return "error"
        return "equal" if reply["equal"] else "unproven"

    def _read_line(self, deadline: float) -> bytes | None:
        """One line of the worker's, or None at the deadline or at the worker's end."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        received = b""
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            # poll, not select: file descriptors above 1023 are usual in trainers.
            poller = select.poll()
            poller.register(descriptor, select.POLLIN | select.POLLHUP)
            if left <= 0 or not poller.poll(left * 1000):
                return None
            chunk = os.read(descriptor, 65536)
            if not chunk:
                self.process.wait(timeout=5)
                return None
            received += chunk
        return received

    def close(self) -> None:
        """Kills the process and closes the pipes."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            # A question that the dead process never read is lost with it.
            with suppress(BrokenPipeError):
                pipe.close()


class WorkerPool:
    """Idle workers, handed out one a question. At most `size` run at once; more askers wait their turn."""

    def __init__(self, size: int) -> None:
        self._idle: list[Worker] = []
        self._lock = threading.Lock()
        self._places = threading.Semaphore(size)

    def prove_equal(self, left: Node, right: Node, *, deadline_s: float, memory_mb: int) -> Proof:
        """Whether sympy proves left = right within the deadline."""
        with self._places:
            worker = self._acquire(memory_mb)
            if not worker.wait_until_ready():
                worker.close()
                return "error"
            proof = worker.ask(left, right, deadline_s)
            if proof in ("timeout", "error") or worker.questions >= MAX_QUESTIONS:
                worker.close()
                # The next one starts loading now, so that the next question need not wait for it.
                worker = Worker(memory_mb)
            with self._lock:
                self._idle.append(worker)
            return proof

    def warm(self, memory_mb: int) -> None:
        """Starts a worker if none is idle and waits until it is ready."""
        with self._places:
            worker = self._acquire(memory_mb)
            worker.wait_until_ready()
            with self._lock:
                self._idle.append(worker)

    def close(self) -> None:
        """Ends all idle workers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.close()

    def _acquire(self, memory_mb: int) -> Worker:
        with self._lock:
            for i, worker in enumerate(self._idle):
                if worker.memory_mb == memory_mb:
                    return self._idle.pop(i)
        return Worker(memory_mb)


def worker_pool() -> WorkerPool:
    """The pool of this process; a forked child does not share its parent's."""
    return _pool_of(os.getpid())


@lru_cache(maxsize=1)
def _pool_of(pid: int) -> WorkerPool:
    return WorkerPool(size=max(2, (os.cpu_count() or 2) // 2))
