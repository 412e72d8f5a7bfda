"""The trainer's side of the jail: levels of isolation, zygotes, and runs handed to them from any number of threads."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rewards.sandbox.cgroups import ControlGroup, make_group
from rewards.sandbox.cleanup import remove_tree
from rewards.sandbox.files import open_anonymous_file, read_tail
from rewards.sandbox.messages import receive_message, send_message
from rewards.sandbox.runtime import Runtime, Toolchain, find_runtime

Level = Literal["A", "B", "C", "D"]

LEVELS: Mapping[Level, Mapping[str, bool]] = {
    "A": {"namespaces": True, "landlock": True, "seccomp": True},
    "B": {"namespaces": False, "landlock": True, "seccomp": True},
    "C": {"namespaces": False, "landlock": False, "seccomp": True},
    "D": {"namespaces": False, "landlock": False, "seccomp": False},
}
"""What each level is made of, beside the resource limits that all have; the strongest first."""

START_S = 60.0
"""Seconds a zygote has to start: it imports numpy, maybe from a cold network disk."""
GRACE_S = 10.0
"""Seconds over a run's own limit after which its zygote is taken for dead."""

_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[2])\n"
    "from rewards.sandbox.zygote import main\n"
    "sys.exit(main(int(sys.argv[1])))"
)
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # the same program gets the same order of sets, hence the same reward, every time
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}


class SandboxError(RuntimeError):
    """A run that could not be made, for a reason that is not the program's."""


class SandboxUnavailableError(SandboxError):
    """This machine does not offer the level of isolation that is asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Role:
    """One process of a run."""

    descriptors: Sequence[int | str]
    """Become its descriptors 0, 1, 2...; number 3 holds its payload. `"0r"` and `"0w"` are the ends of a pipe, pipe 0,
    that exists between the roles alone, so that each sees the other's end of it close."""
    limits: Mapping[str, int]
    """Fields of `jail.RunLimits`."""
    profile: str = "threads"
    """Its system call profile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How the last role of a run ended."""

    exit_code: int | None
    """Exit status, or minus the number of the signal."""
    killed: str | None
    """Why it was killed: `wall`, `threads`, `disk`; None: it ended by itself."""
    wall_s: float
    """Seconds from the request to its end."""
    cpu_s: float
    """Processor seconds of all its processes."""


class Sandbox:
    """Runs programs at one level of isolation; safe to use from many threads, and from a process forked later.

    Raises SandboxUnavailableError at the first run if this machine offers less than `minimum_level`.
    """

    def __init__(
        self,
        *,
        minimum_level: Level = "B",
        level: Level | None = None,
        packages: Sequence[str] = ("numpy",),
        toolchain: Toolchain | None = None,
        workers: int | None = None,
        scratch_dir: str | None = None,
    ) -> None:
        """`level`: use this one, not the strongest there is. `packages`: importable by programs, if installed.

        `toolchain`: of a language beside Python. `workers`: runs at a time, one a core by default. `scratch_dir`: where
        scratch folders go at levels B to D (default: the temporary folder).
        """
        for name, value in (("minimum_level", minimum_level), ("level", level)):
            if value is not None and value not in LEVELS:
                raise ValueError(f"sandbox.{name} must be one of {', '.join(LEVELS)}, got {value!r}")
        self._candidates: list[Level] = [level] if level else [name for name in LEVELS if name <= minimum_level]
        if level and level > minimum_level:
            raise SandboxUnavailableError(
                f"sandbox.level is {level}, below sandbox.minimum_level {minimum_level}; lower the latter to allow it"
            )
        self._minimum_level: Level = minimum_level
        self._forced_level = level
        self._packages = tuple(packages)
        self._toolchain = toolchain or Toolchain()
        self._workers = workers or len(
            os.sched_getaffinity(0) if sys.platform == "linux" else range(os.cpu_count() or 1)
        )
        self._scratch_dir = scratch_dir
        self._level: Level | None = None
        self._toolchains: dict[Toolchain, Sandbox] = {}
        self._reasons: dict[Level, str] = {}
        self._is_closed = False
        self._reset()

    def _reset(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._start_lock = threading.Lock()
        self._free = threading.Semaphore(self._workers)
        self._idle: list[Zygote] = []
        self._busy: set[Zygote] = set()

    @property
    def level(self) -> Level:
        """The level in force; starts a zygote to find out. SandboxUnavailableError if it is below the minimum."""
        if self._level is None:
            with self._zygote():
                pass
        assert self._level is not None
        return self._level

    @property
    def reasons(self) -> Mapping[Level, str]:
        """Why stronger levels are not in force, by level."""
        return dict(self._reasons)

    def with_toolchain(self, toolchain: Toolchain) -> Sandbox:
        """A sandbox like this one, closed with it, for programs of another language."""
        with self._lock:
            if toolchain not in self._toolchains:
                self._toolchains[toolchain] = Sandbox(
                    minimum_level=self._minimum_level,
                    level=self._forced_level,
                    packages=(),
                    toolchain=toolchain,
                    workers=self._workers,
                    scratch_dir=self._scratch_dir,
                )
            return self._toolchains[toolchain]

    def run(self, roles: Sequence[Role], wall_s: float) -> Outcome:
        """Run the roles side by side until the last of them ends or `wall_s` seconds are over, then end them all.

        SandboxError if the sandbox itself failed. The descriptors stay the caller's.
        """
        flat: list[int] = []
        described = []
        for role in roles:
            indices: list[int | str] = []
            for descriptor in role.descriptors:
                indices.append(descriptor if isinstance(descriptor, str) else len(flat))
                flat += [] if isinstance(descriptor, str) else [descriptor]
            described.append({"descriptors": indices, "limits": dict(role.limits), "profile": role.profile})
        with self._zygote() as zygote:
            reply = zygote.request({"roles": described, "wall_s": wall_s}, flat, wall_s + GRACE_S)
        if reply["error"]:
            raise SandboxError(f"the jail could not be set up at level {self._level}: {reply['error']}")
        return Outcome(exit_code=reply["exit"], killed=reply["killed"], wall_s=reply["wall_s"], cpu_s=reply["cpu_s"])

    def close(self) -> None:
        """End all zygotes, and what runs in them, and start no more: every later run raises SandboxError."""
        self._disown_parents()
        with self._lock:
            self._is_closed = True
            zygotes = [*self._idle, *self._busy]
            self._idle.clear()
            toolchains = list(self._toolchains.values())
        for zygote in zygotes:
            zygote.close()
        for toolchain in toolchains:
            toolchain.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @contextlib.contextmanager
    def _zygote(self) -> Iterator[Zygote]:
        """A zygote for one run; one that fails is not used again."""
        self._disown_parents()
        with self._free:
            with self._lock:
                zygote = self._idle.pop() if self._idle else None
            if zygote is None:
                self._require_open()
                zygote = self._start()
            is_well = False
            with self._lock:
                self._busy.add(zygote)
            try:
                self._require_open()  # it may have been closed while this one was starting
                yield zygote
                is_well = True
            finally:
                with self._lock:
                    self._busy.discard(zygote)
                    is_well = is_well and not self._is_closed
                    if is_well:
                        self._idle.append(zygote)
                if not is_well:
                    zygote.close()

    def _disown_parents(self) -> None:
        """A forked worker must not share its parent's zygotes: it would read the other's answers, or end them."""
        if self._owner != os.getpid():
            self._reset()

    def _require_open(self) -> None:
        if self._is_closed:
            raise SandboxError("the sandbox is closed")

    def _start(self) -> Zygote:
        with self._start_lock:
            candidates = [self._level] if self._level else self._candidates
            for level in candidates:
                try:
                    zygote = Zygote(level, self._runtime, self._toolchain, self._scratch_dir)
                except SandboxError as error:
                    self._reasons[level] = str(error)
                    continue
                self._level = level
                return zygote
        told = "; ".join(f"{level}: {reason}" for level, reason in self._reasons.items())
        raise SandboxUnavailableError(
            f"no sandbox at level {' or '.join(candidates)} on this machine ({told}). "
            "sandbox.minimum_level lowers what is accepted; `grpo sandbox` tells what this machine offers"
        )

    @functools.cached_property
    def _runtime(self) -> Runtime:
        return find_runtime(self._packages)


class Zygote:
    """The trainer's handle on one supervisor process."""

    def __init__(self, level: Level, runtime: Runtime, toolchain: Toolchain, scratch_dir: str | None) -> None:
        """Start it and run nothing in it once, to see that every wall stands. SandboxError if one does not."""
        features = LEVELS[level]
        self._scratch = "" if features["namespaces"] else _make_scratch_dir(scratch_dir)
        self._close_lock = threading.Lock()
        try:
            self._socket, theirs = socket.socketpair()
            self._errors = open_anonymous_file()
        except OSError as error:
            raise SandboxError(f"no descriptors for a supervisor: {error}") from error
        number = theirs.fileno()
        package_root = str(Path(__file__).resolve().parents[2])
        command = [runtime.executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", _BOOT, str(number), package_root]
        self._process: subprocess.Popen[bytes] | None = None
        self._group: ControlGroup | None = None
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    env=_ENVIRONMENT,
                    cwd="/",
                    pass_fds=(number,),
                    start_new_session=True,
                )
            config = {
                **features,
                "scratch": self._scratch,
                "readable": runtime.readable,
                "toolchain": toolchain.folders,
                "executable": toolchain.executables,
                "module_path": runtime.module_path,
                "packages": runtime.packages,
            }
            # It waits for its configuration, so all that it will start will be in the group.
            self._group = make_group(self._process.pid)
            hello = self.request(config, (), START_S)
            if "error" in hello:
                raise SandboxError(hello["error"])
            self._try_walls()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise SandboxError(f"{runtime.executable} cannot be started here: {error}") from error
            raise

    def request(self, message: Mapping[str, Any], descriptors: Sequence[int], timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for its answer. SandboxError if the zygote is gone or silent."""
        self._socket.settimeout(timeout_s)
        try:
            if self._group is not None and "roles" in message:
                self._group.limit([role["limits"] for role in message["roles"]])
            send_message(self._socket, dict(message), descriptors)
            reply, strays = receive_message(self._socket)
        except TimeoutError:
            raise SandboxError(f"the sandbox's supervisor did not answer within {timeout_s:g} s") from None
        except OSError as error:
            raise SandboxError(f"the sandbox's supervisor is gone ({error}){self._last_words()}") from error
        for stray in strays:
            os.close(stray)
        if reply is None:
            raise SandboxError(f"the sandbox's supervisor is gone{self._last_words()}")
        return reply

    def close(self) -> None:
        """End it and all that runs under it, and remove its scratch folder. Safe while a thread waits for an answer."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes that thread, as closing would not
        with self._close_lock:
            self._socket.close()
            if self._process is not None:
                try:
                    self._process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    self._process.kill()
                    self._process.wait()
            if self._group is not None:
                self._group.remove()
                self._group = None
            if self._errors >= 0:
                os.close(self._errors)
                self._errors = -1
            if self._scratch:
                with contextlib.suppress(OSError):
                    remove_tree(self._scratch)

    def _try_walls(self) -> None:
        payload = open_anonymous_file(b'{"mode": "nothing"}')
        try:
            limits = {"address_space": 0, "data": 0, "cpu_s": 10, "file_bytes": 1 << 20, "disk_bytes": 1 << 20}
            role = {"descriptors": [0, 0, 0, 0], "limits": {**limits, "max_threads": 64}, "profile": "threads"}
            reply = self.request({"roles": [role], "wall_s": 30.0}, [payload], 30.0 + GRACE_S)
        finally:
            os.close(payload)
        if reply["error"] or reply["exit"] != 0:
            raise SandboxError(reply["error"] or f"a trial run ended with {reply['exit']} ({reply['killed']})")

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):  # it has been closed by another thread
            words = read_tail(self._errors, 500).decode("utf-8", "replace").strip()
            return f": {words}" if words else ""
        return ""


def _make_scratch_dir(parent: str | None) -> str:
    try:
        path = tempfile.mkdtemp(prefix="grpo-sandbox-", dir=parent)
        os.chmod(path, 0o711)  # a program that is nobody must be able to reach its own folder in it
    except OSError as error:
        where = parent or "the temporary folder"
        raise SandboxError(
            f"no scratch folder can be made in {where}: {error}; sandbox.scratch_dir chooses another"
        ) from error
    return path
