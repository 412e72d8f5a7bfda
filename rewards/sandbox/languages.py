"""Languages beside Python: how a source file becomes something to execute, in the same jail. One row each."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rewards.sandbox.files import open_anonymous_file, read_tail
from rewards.sandbox.limits import Limits
from rewards.sandbox.runtime import Toolchain, find_toolchain
from rewards.sandbox.sandbox import Role, Sandbox, SandboxError

COMPILE_S = 30.0
"""Seconds a compiler may take."""
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Language:
    """How programs of one language are run."""

    tags: tuple[str, ...]
    """What a fenced block may be labelled."""
    source: str
    """Name of the source file."""
    compiler: str | None
    """The compiler's command; None: an interpreter runs the source."""
    options: tuple[str, ...]
    """The compiler's or interpreter's options."""
    interpreter: str | None = None
    """The interpreter's command."""

    @property
    def command(self) -> str:
        """The real path of the compiler or interpreter. SandboxError if it is not installed."""
        name = self.compiler or self.interpreter
        assert name is not None
        path = shutil.which(name)
        if path is None:
            raise SandboxError(f"{name} is not installed, which {self.source} needs")
        return os.path.realpath(path)

    @property
    def toolchain(self) -> Toolchain:
        """What its programs need. SandboxError if it is not installed."""
        return find_toolchain(self.command)


LANGUAGES: Mapping[str, Language] = {
    "cpp": Language(
        tags=("cpp", "c++", "cc"), source="main.cpp", compiler="g++", options=("-O2", "-std=c++17", "-pipe")
    ),
    "javascript": Language(
        tags=("javascript", "js", "node"), source="main.js", compiler=None, interpreter="node", options=()
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """Something to execute, once per case."""

    payload: Mapping[str, Any]
    """An `exec` payload."""
    descriptors: Sequence[int] = ()
    """Its descriptors 4 and up."""
    error: str | None = None
    """The compiler's last words, if it refused."""

    def close(self) -> None:
        """Close its descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def find_language(name: str) -> Language:
    """A row of the table. ValueError for a language that is not in it."""
    if not isinstance(name, str) or name not in LANGUAGES:
        raise ValueError(f"problem: language must be python, {' or '.join(LANGUAGES)}, got {name!r}")
    return LANGUAGES[name]


def compile_program(sandbox: Sandbox, name: str, program: str, limits: Limits) -> Compiled:
    """Compile once, in the jail, what will run per case; an interpreted program is only packed up.

    The caller closes the answer. SandboxError if the sandbox fails or the toolchain is missing.
    """
    language = find_language(name)
    if language.compiler is None:
        heap = [f"--max-old-space-size={math.ceil(limits.memory_mb)}"] if language.interpreter == "node" else []
        arguments = [language.command, *heap, *language.options, language.source]
        files = {language.source: program}
        return Compiled(
            payload={"mode": "exec", "executable": language.command, "arguments": arguments, "files": files}
        )
    payload = {
        "mode": "compile",
        "arguments": [language.command, *language.options, "-o", "main", language.source],
        "files": {language.source: program},
        "output": "main",
    }
    source, errors, binary = (open_anonymous_file(data) for data in (json.dumps(payload).encode(), b"", b""))
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        role = Role(descriptors=(null, null, errors, source, binary), limits=_COMPILER_LIMITS, profile="compile")
        outcome = sandbox.run([role], COMPILE_S)
        if outcome.exit_code != 0:
            said = read_tail(errors, 500).decode("utf-8", "replace").strip()
            why = "the compiler took too long" if outcome.killed == "wall" else f"the compiler refused it: {said}"
            return Compiled(payload={}, error=why)
        # A file that someone could still write is not executed: the descriptor that runs is one for reading alone.
        read_only = os.open(f"/proc/self/fd/{binary}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for descriptor in (source, errors, binary, null):
            os.close(descriptor)
    return Compiled(payload={"mode": "exec", "executable": 4, "arguments": ["main"]}, descriptors=(read_only,))


_COMPILER_LIMITS: Mapping[str, int] = {
    "address_space": 2048 * MIB,
    "data": 0,
    "cpu_s": int(COMPILE_S),
    "file_bytes": 64 * MIB,
    "disk_bytes": 128 * MIB,
    "max_threads": 64,
}
