"""The process that holds the tests: they run here, and what they call runs in the program's process, across a pipe.

Only plain data comes back, so no object of the program is ever compared, iterated or printed by a test.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

from rewards.sandbox import wire

RESULTS, CALL_OUT, ANSWER_IN = 4, 5, 6
MAX_FRAME_BYTES = 16 << 20
_COMMON_MODULES = """
math random re string copy collections itertools functools operator heapq bisect datetime json sys typing cmath
statistics decimal fractions
""".split()  # noqa: SIM905 - a list of names reads better as text
_TYPING_NAMES = ("List", "Tuple", "Dict", "Set", "Optional", "Any", "Union", "Iterable", "Callable")


class ProgramError(Exception):
    """The program raised something of its own kind."""


class _ProgramGone(BaseException):
    """The program's process ended, or answered what is no answer; not for a test to catch."""


class _Connection:
    """The calls to the program's process."""

    def __init__(self) -> None:
        self.is_broken = False

    def receive(self) -> dict[str, Any]:
        try:
            answer = wire.receive_frame(ANSWER_IN, MAX_FRAME_BYTES)
        except (EOFError, OSError, wire.WireError) as error:
            self.is_broken = True
            raise _ProgramGone(f"the program's process is gone ({error})") from None
        if type(answer) is not dict:
            self.is_broken = True
            raise _ProgramGone("the program's process answered something that is no answer")
        return answer

    def call(self, request: dict[str, Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """Call across. Raises what the program raised if it is a common builtin exception, else ProgramError."""
        if self.is_broken:
            raise _ProgramGone("the program's process is gone")
        body = {"args": wire.encode(list(arguments), _outgoing), "kwargs": wire.encode(keywords, _outgoing)}
        try:
            wire.send_frame(CALL_OUT, {**request, **body, "in_place": True})
        except OSError:
            self.is_broken = True
            raise _ProgramGone("the program's process is gone") from None
        answer = self.receive()
        try:
            if "v" in answer:
                value = wire.decode(answer["v"], self.proxy)
                # Beside a value it is forged: the program would empty the list that its answer is held against.
                if value is None and "in_place" in answer:
                    _update(list(arguments), wire.decode(answer["in_place"], self.proxy))
                return value
        except wire.WireError as error:
            raise ProgramError(str(error)) from None
        raise _exception(answer)

    def proxy(self, handle: Any) -> Any:
        """What stands here for an object that stays with the program: its public methods and attributes."""
        if type(handle) is not int:
            raise wire.WireError("not a handle")
        return _Proxy(self, handle)


class _Proxy:
    """An object of the program's, equal to nothing but itself."""

    def __init__(self, connection: _Connection, handle: int) -> None:
        self._connection = connection
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def method(*arguments: Any, **keywords: Any) -> Any:
            return self._connection.call({"handle": self._handle, "name": name}, arguments, keywords)

        return method


def run_tests(source: str, entry_point: str) -> int:
    """Run the tests and write what came of them: the static count, `+` or `-why` per assertion, `.` at the very end.

    Of very many that hold, `+1000` stands for so many. `!why` alone: they are no Python source.
    """
    connection = _Connection()
    record = _Recorder()
    try:
        tree = ast.parse(source)
        _append_check_call(tree, entry_point)
        counter = _Instrument()
        tree = ast.fix_missing_locations(counter.visit(tree))
        code = compile(tree, "tests.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        record.write(f"!{type(error).__name__}: {error}"[:300])
        return 0
    try:
        record.write(f"={counter.count}")
        hello = connection.receive()
        if "loaded" not in hello:
            raise _ProgramGone(str(hello.get("e"))[:300])
        names = _Namespace(connection, entry_point)
        names["__case__"] = record.case
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        exec(code, names)  # noqa: S102 - the jail is for this
    except BaseException as error:  # noqa: BLE001 - whatever ends the tests is what came of them
        record.write(f"-{type(error).__name__}: {error}"[:300])
        return 0
    record.flush()
    if not connection.is_broken:
        record.write(".")
    return 0


class _Recorder:
    """Writes the events."""

    def __init__(self) -> None:
        self._passed = 0
        self._written = 0

    def write(self, line: str) -> None:
        os.write(RESULTS, line.replace("\n", " ").encode("utf-8", "backslashreplace") + b"\n")

    def flush(self) -> None:
        """Write the assertions that held since the last time."""
        if self._passed > self._written:
            self.write(f"+{self._passed - self._written}")
            self._written = self._passed

    def case(self, test: Callable[[], Any], text: str) -> None:
        """One assertion: passed, failed, or raised. A lost program ends the tests."""
        try:
            if test():
                self._passed += 1
                if self._passed <= 1000 or self._passed - self._written == 1000:
                    self.flush()
            else:
                self.write(f"-assert {text}")
        except Exception as error:  # noqa: BLE001 - a test that raises has failed, whatever it raised
            self.write(f"-{type(error).__name__} in assert {text}: {error}"[:300])


class _Instrument(ast.NodeTransformer):
    """Turns each assertion that no handler could be waiting for into one that is counted and does not stop the rest."""

    def __init__(self) -> None:
        self.count = 0
        self.depth = 0

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        # A walrus or an await would bind its name in the lambda; such an assertion stays as it is.
        if any(isinstance(n, ast.NamedExpr | ast.Await | ast.Yield) for n in ast.walk(node.test)):
            return node
        self.count += 1
        test = ast.Lambda(args=_no_arguments(), body=node.test)
        call = ast.Call(ast.Name("__case__", ast.Load()), [test, ast.Constant(ast.unparse(node.test)[:200])], [])
        return ast.copy_location(ast.Expr(call), node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        # Only `check` and unnested test functions: another function's assertion may be meant for its caller.
        if self.depth == 0 and (node.name == "check" or node.name.startswith("test")):
            self.depth += 1
            self.generic_visit(node)
            self.depth -= 1
        return node

    def _leave_alone(self, node: ast.AST) -> ast.AST:
        return node

    visit_Try = visit_TryStar = visit_With = visit_ClassDef = visit_AsyncFunctionDef = visit_Lambda = _leave_alone


class _Namespace(dict[str, Any]):
    """The tests' globals. A name they do not define is a common module, or the program's own."""

    def __init__(self, connection: _Connection, entry_point: str) -> None:
        super().__init__(__name__="__main__", __builtins__=builtins)
        self._connection = connection
        if entry_point:
            self[entry_point] = self["candidate"] = self._stub(entry_point)

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or name in vars(builtins):
            raise KeyError(name)
        if name in _COMMON_MODULES:
            return importlib.import_module(name)
        if name in _TYPING_NAMES:
            return getattr(importlib.import_module("typing"), name)
        return self._stub(name)

    def _stub(self, name: str) -> Callable[..., Any]:
        def stub(*arguments: Any, **keywords: Any) -> Any:
            return self._connection.call({"name": name}, arguments, keywords)

        stub.__name__ = stub.__qualname__ = name
        return stub


def _append_check_call(tree: ast.Module, entry_point: str) -> None:
    """HumanEval's tests define `check(candidate)` and leave the call to the harness; others define `test_...` alone."""
    defined = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    called = {
        n.func.id
        for statement in tree.body
        if not isinstance(statement, ast.FunctionDef)
        for n in ast.walk(statement)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
    }
    if "check" in defined and "check" not in called:
        tree.body += ast.parse("check(candidate)").body
        return
    for name in defined:
        if name.startswith("test") and name not in called:
            tree.body += ast.parse(f"{name}()").body


def _no_arguments() -> ast.arguments:
    return ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])


def _exception(answer: dict[str, Any]) -> Exception:
    kind, text = answer.get("kind"), str(answer.get("e"))[:300]
    if type(kind) is str and kind in EXPECTED_ERRORS:
        error: Exception = EXPECTED_ERRORS[kind](text)
        return error
    return ProgramError(text)


EXPECTED_ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        ZeroDivisionError,
        OverflowError,
        ArithmeticError,
        LookupError,
        AttributeError,
        NotImplementedError,
        RuntimeError,
        RecursionError,
        NameError,
        OSError,
        FileNotFoundError,
    )
}
"""Exceptions of a program that tests may expect; any other reaches them as ProgramError."""


def _outgoing(value: Any) -> Any:
    if type(value) is _Proxy:
        raise wire.WireError("an object of the program's cannot be handed back to it")
    raise wire.WireError(f"a test cannot pass a value of type {type(value).__name__} across the jail's wall")


def _update(targets: Sequence[Any], values: Any) -> None:
    """Give the tests' own lists, dicts and sets the contents that the program's copies were left with."""
    if type(values) is not list:
        return
    for target, value in zip(targets, values, strict=False):
        if type(target) is not type(value):
            continue
        if type(target) is list:
            target[:] = value
        elif type(target) is dict or type(target) is set:
            target.clear()
            target.update(value)
