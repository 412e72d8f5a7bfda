"""What runs inside the jail: a program as `__main__`, its functions called with given arguments, or its tests.

Everything here shares a process with the program, which may rewrite any of it; so it sends values and never verdicts.
The exception is `run_tests`, whose process holds the tests and no program: its calls go to the program's process.
"""

from __future__ import annotations

import atexit
import io
import json
import os
import random
import sys
import threading
import traceback
import types
from collections.abc import Callable, Mapping
from typing import Any

from rewards.sandbox import wire
from rewards.sandbox.assert_runner import run_tests

PAYLOAD, RESULTS, CALL_IN, ANSWER_OUT = 3, 4, 4, 5
MAX_FRAME_BYTES = 16 << 20


def prepare_process(home: str) -> None:
    """Give this process what a program finds in one of its own, as far as that needs nothing of the program."""
    os.environ.clear()
    os.environ.update({"HOME": home, "TMPDIR": home, "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"})
    os.environ["OPENSSL_CONF"] = os.devnull  # node ends where it is forbidden to read the one in /etc
    random.seed()
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    sys.argv = ["solution.py"]
    sys.orig_argv = ["python3", *sys.argv]


def run_payload() -> int:
    """Do what descriptor 3 says, and answer the process's exit status."""
    payload: dict[str, Any] = json.loads(_read_all(PAYLOAD))
    mode = payload["mode"]
    _open_streams()
    # A program may recurse as deep as in an interpreter of its own, where nothing stands below it.
    sys.setrecursionlimit(1000 + _stack_depth())
    if mode in ("exec", "compile"):
        _write_files(payload.get("files", {}))
        return _guarded(lambda: _compile(payload) if mode == "compile" else _become(payload))
    if mode == "stdio":
        os.close(PAYLOAD)
        return _as_main(payload["program"], payload.get("prelude", ""))
    return _MODES[mode](payload)


def _open_streams() -> None:
    stdin = io.BufferedReader(io.FileIO(0, closefd=False))
    sys.stdin = io.TextIOWrapper(stdin, "utf-8", "surrogateescape")
    stdout, stderr = (io.BufferedWriter(io.FileIO(number, "w", closefd=False)) for number in (1, 2))
    sys.stdout = io.TextIOWrapper(stdout, "utf-8", "surrogateescape")
    sys.stderr = io.TextIOWrapper(stderr, "utf-8", "backslashreplace", line_buffering=True)
    vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)


def _stack_depth() -> int:
    depth, frame = 0, sys._getframe()
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    return depth


def _as_main(source: str, prelude: str) -> int:
    """Run a program as the interpreter would: threads joined, exit handlers run, output flushed. Its exit status."""
    status = _guarded(lambda: _execute(source, "__main__", prelude))
    status = _guarded(threading._shutdown) or status  # type: ignore[attr-defined]
    status = _guarded(atexit._run_exitfuncs) or status
    return _guarded(_flush) or status


def _flush() -> None:
    """What the interpreter flushes at its end: what now is stdout, and the stream that was."""
    for stream in (sys.stdout, sys.__stdout__):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()


def _execute(source: str, name: str, prelude: str) -> Mapping[str, Any]:
    module = types.ModuleType(name)
    module.__dict__.update(__builtins__=__builtins__, __file__="solution.py")
    sys.modules[name] = module
    exec(compile(prelude, "prelude.py", "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - the jail is for this
    exec(compile(source, "solution.py", "exec", dont_inherit=True), module.__dict__)  # noqa: S102 - the jail is for this
    return module.__dict__


def _guarded(action: Callable[[], Any]) -> int:
    """Exit status of an action: 0, that of its SystemExit, or 1 with a traceback on stderr."""
    try:
        action()
    except SystemExit as stop:
        if stop.code is None or type(stop.code) is int:
            return (stop.code or 0) & 0xFF
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001 - as the interpreter does at the top
        traceback.print_exc(limit=-8)
        return 1
    return 0


def _call_function(payload: Mapping[str, Any]) -> int:
    """Call the entry point with each case's arguments: one line of JSON a case, after one that says it loaded."""
    namespace, error = _load_program(payload)
    if namespace is None:
        os.write(RESULTS, wire.dumps({"e": error}) + b"\n")
        return 0
    os.write(RESULTS, wire.dumps({"loaded": True}) + b"\n")
    for case in payload["cases"]:
        line = _answer(lambda case=case: _call(namespace, payload["entry_point"], case), opaque=None)  # type: ignore[misc]
        _write_all(RESULTS, wire.dumps(line) + b"\n")
    return 0


def _serve_calls(payload: Mapping[str, Any]) -> int:
    """Answer the calls that the tests' process makes, until it hangs up."""
    namespace, error = _load_program(payload)
    wire.send_frame(ANSWER_OUT, {"e": error} if namespace is None else {"loaded": True})
    objects: list[Any] = []

    def keep(value: Any) -> Any:
        objects.append(value)
        return {"h": len(objects) - 1}

    while namespace is not None:
        try:
            request = wire.receive_frame(CALL_IN, MAX_FRAME_BYTES)
        except EOFError:
            break
        answer = _answer(lambda request=request: _serve(namespace, objects, request), opaque=keep)  # type: ignore[misc]
        wire.send_frame(ANSWER_OUT, answer)
    return 0


def _serve(namespace: Mapping[str, Any], objects: list[Any], request: Mapping[str, Any]) -> Any:
    if "handle" not in request:
        return _call(namespace, request["name"], request)
    attribute = getattr(objects[request["handle"]], request["name"])
    return _call({"method": attribute}, "method", request) if "args" in request else attribute


def _call(namespace: Mapping[str, Any], name: str, call: Mapping[str, Any]) -> Any:
    arguments, keywords = wire.decode(call["args"]), wire.decode(call["kwargs"])
    answer = _find_entry_point(namespace, name)(*arguments, **keywords)
    if answer is None and call.get("in_place"):
        # What a function that answers nothing did to its arguments is its answer.
        return _InPlace(arguments)
    return answer


class _InPlace:
    """Arguments as a call left them."""

    def __init__(self, arguments: Any) -> None:
        self.arguments = arguments


def _find_entry_point(namespace: Mapping[str, Any], name: str) -> Any:
    """A function by name, `Solution().method`, or a method of `class Solution` where there is no such function."""
    first, _, rest = name.partition(".")
    if rest:
        owner = namespace[first.removesuffix("()")]
        return getattr(owner() if first.endswith("()") else owner, rest)
    if name not in namespace and "Solution" in namespace:
        return getattr(namespace["Solution"](), name)
    if name not in namespace:
        raise NameError(f"the program defines no {name!r}")
    return namespace[name]


def _load_program(payload: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, str]:
    """The program's names, or why it has none; it is imported, so what it does only as `__main__` it does not do."""
    try:
        return _execute(payload["program"], "solution", payload.get("prelude", "")), ""
    except BaseException as error:  # noqa: BLE001 - whatever a program raises, it did not load
        return None, _describe(error)


def _answer(action: Callable[[], Any], opaque: wire.Hook | None) -> dict[str, Any]:
    """The value of an action on the wire, or the name and text of what it raised."""
    try:
        value = action()
        if type(value) is _InPlace:
            return {"v": None, "in_place": wire.encode(value.arguments, opaque)}
        return {"v": wire.encode(value, opaque)}
    except BaseException as error:  # noqa: BLE001 - the caller must hear of it, whatever it is
        return {"e": _describe(error), "kind": type(error).__name__}


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # noqa: BLE001 - a __str__ of the program's own
        return "an exception that cannot be shown"


def _become(payload: Mapping[str, Any]) -> None:
    """Turn into a program of another language."""
    os.execve(payload["executable"], payload["arguments"], os.environ)


def _compile(payload: Mapping[str, Any]) -> None:
    """Run a compiler on the files in scratch and hand out what it wrote, through descriptor 4."""
    arguments = payload["arguments"]
    pid = os.posix_spawn(arguments[0], arguments, os.environ)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status != 0:
        raise SystemExit(status if status > 0 else 1)
    with open(payload["output"], "rb") as file:
        _write_all(RESULTS, file.read())


def _write_files(files: Mapping[str, str]) -> None:
    for name, text in files.items():
        with open(name, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)


def _read_all(descriptor: int) -> bytes:
    parts, offset = [], 0
    while part := os.pread(descriptor, 1 << 20, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _run_tests(payload: Mapping[str, Any]) -> int:
    return run_tests(payload["tests"], payload["entry_point"])


def _pass(payload: Mapping[str, Any]) -> int:
    return 0


_MODES: Mapping[str, Callable[[Mapping[str, Any]], int]] = {
    "function": _call_function,
    "serve": _serve_calls,
    "tests": _run_tests,
    "nothing": _pass,
}
