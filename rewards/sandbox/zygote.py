"""The supervisor of the jail: a lean process, started fresh, that forks a child per run and holds no test or answer.

    trainer -- socket --> zygote (warm imports, subreaper, not dumpable) -- fork --> walls, a wait -- program

It obeys one request at a time, `{"roles": [...], "wall_s": ...}` with the descriptors of every role, and answers how
the last role ended. When the socket closes, it ends, and everything under it with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import platform
import re
import select
import signal
import site
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rewards.sandbox import cleanup, jail, landlock, linux, namespaces, seccomp
from rewards.sandbox.messages import receive_message, send_message
from rewards.sandbox.spares import PROFILES, WALLS_STAND, Child, Spares

TICK_S = 0.02
"""How often threads and scratch use are looked at where no namespace limits them, seconds."""
PARENT_CHECK_S = 2.0
"""How often it is checked that the trainer is still there, seconds; its socket may outlive it in a forked worker."""
_M_ARENA_MAX = -8
_WARM = """
abc array bisect calendar cmath collections.abc contextlib copy dataclasses datetime decimal enum fractions functools
hashlib heapq io itertools json math numbers operator os.path random re statistics string struct textwrap threading
time traceback types typing
""".split()  # noqa: SIM905 - a list of names reads better as text


def main(control_number: int) -> int:
    """Serve requests on that descriptor until it closes; its first message is the configuration. The exit status."""
    os.umask(0o022)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=control_number)
    control.set_inheritable(False)
    config, _ = receive_message(control)
    if config is None:
        return 0
    try:
        return _set_up_and_serve(control, config)
    except Exception as error:  # noqa: BLE001 - the trainer must hear why and decides which level to try next
        with contextlib.suppress(OSError):
            send_message(control, {"error": f"{type(error).__name__}: {error}"})
        return 1


def _set_up_and_serve(control: socket.socket, config: Mapping[str, Any]) -> int:
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY) if os.path.isdir("/proc/self") else None
    if config["namespaces"]:
        assert proc is not None, "namespaces without /proc"
        namespaces.enter_namespaces((*config["readable"], *config["toolchain"], *config["executable"]), proc)
        pid = os.fork()
        if pid:
            control.close()
            return _outlive(pid)
    is_root = os.geteuid() == 0
    walls = jail.Walls(
        namespaces=config["namespaces"],
        counts_threads=config["namespaces"] and _linux_version() >= (5, 14),
        landlock_abi=landlock.landlock_abi() if config["landlock"] else 0,
        seccomp=config["seccomp"],
        drop_user=is_root and _can_become_unprivileged(config["readable"]),
        readable=tuple(config["readable"]),
        toolchain=tuple(config["toolchain"]),
        executable=tuple(config["executable"]),
    )
    _settle(walls)
    _warm_up(config)
    supervisor = _Supervisor(control, walls, proc, config["scratch"])
    for profile in PROFILES if walls.seccomp else ():
        seccomp.assemble_filter(profile, platform.machine())
    gc.collect()
    gc.freeze()
    supervisor.serve()
    return 0


def _outlive(supervisor: int) -> int:
    """Outside the pid namespace: wait for the supervisor, and end it if the trainer is gone."""
    trainer = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    while True:
        pid, status = os.waitpid(supervisor, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) & 0xFF
        signal.sigtimedwait([signal.SIGCHLD], PARENT_CHECK_S)
        if os.getppid() != trainer:
            os.kill(supervisor, signal.SIGKILL)


def _can_become_unprivileged(readable: Iterable[str]) -> bool:
    """Whether nobody can read the runtime; an interpreter in root's home is closed to it."""
    pid = os.fork()
    if pid == 0:
        try:
            namespaces.become_unprivileged()
            os._exit(0 if all(os.access(path, os.R_OK) for path in readable) else 1)
        except BaseException:  # noqa: BLE001
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _linux_version() -> tuple[int, int]:
    major, minor = re.findall(r"[0-9]+", platform.release())[:2]
    return int(major), int(minor)


def _settle(walls: jail.Walls) -> None:
    """What the supervisor does to itself, on Linux."""
    if sys.platform != "linux":
        return
    if walls.namespaces:
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        linux.drop_bounding_set()
    linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    linux.prctl(linux.PR_SET_DUMPABLE, 0)
    # Without it every thread of a program would reserve 64 MiB of address space for an arena of its own.
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _warm_up(config: Mapping[str, Any]) -> None:
    sys.path[:] = config["module_path"]
    for name in (*_WARM, *config["packages"]):
        importlib.import_module(name)
    # What `import site` gives a program, without the .pth files that it would run.
    site.setquit()
    site.sethelper()


class _Supervisor:
    """Serves requests, one at a time."""

    def __init__(self, control: socket.socket, walls: jail.Walls, proc: int | None, scratch: str) -> None:
        self._control = control
        self._walls = walls
        self._scratch = scratch
        self._spares = Spares(walls, proc, scratch)
        self._proc = proc
        self._statm = None if proc is None else os.open("self/statm", os.O_RDONLY, dir_fd=proc)
        self._wake, wake_write = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake_write, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(control, select.POLLIN)

    def serve(self) -> None:
        """Say that it is ready, and answer requests until the trainer hangs up or is gone."""
        send_message(self._control, {})
        trainer = os.getppid()
        while True:
            ready = {descriptor for descriptor, _ in self._poll.poll(PARENT_CHECK_S * 1000)}
            self._drain_wake()
            self._spares.bury()
            if not self._walls.namespaces and os.getppid() != trainer:
                break
            if self._control.fileno() not in ready:
                continue
            request, descriptors = receive_message(self._control)
            if request is None:
                break
            try:
                reply = self._run(request, descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)
            if reply is None:
                break
            try:
                send_message(self._control, reply)
            except OSError:
                break
        self._spares.close()
        if self._scratch:
            cleanup.remove_tree(self._scratch)

    def _run(self, request: Mapping[str, Any], descriptors: list[int]) -> dict[str, Any] | None:
        """Make children the roles, wait for the last one, end them all. None: the trainer hung up meanwhile."""
        started = time.monotonic()
        runs: list[Child] = []
        killed: str | None = "hung up"
        error: str | None = None
        try:
            roles = _connect(request["roles"], descriptors)
            for role in roles:
                runs.append(self._spares.take(role))
                given = [descriptors[index] for index in role["descriptors"]]
                runs[-1].start(role["limits"], given, self._address_space())
            # The roles have their own copies now. A pipe must not stay open here when one of them ends, and nothing
            # of this run may be open in the children that are forked for the next one, while this one is under way.
            while descriptors:
                os.close(descriptors.pop())
            self._spares.stock(roles)
            killed = self._wait(runs, started + request["wall_s"])
        except OSError as failure:
            error = f"{type(failure).__name__}: {failure}"
        wall_s = time.monotonic() - started
        for run in runs:
            run.end()
        self._end_orphans()
        if killed == "hung up" and error is None:
            return None
        for run in runs:
            error = error or _explain_status(run, killed)
            run.clean_up()
        last = runs[-1] if runs else None
        code = None if last is None or last.wait_status is None else os.waitstatus_to_exitcode(last.wait_status)
        return {
            "error": error,
            "killed": killed,
            "exit": code,
            "wall_s": wall_s,
            "cpu_s": sum(run.cpu_s for run in runs),
        }

    def _address_space(self) -> int:
        if self._statm is None:
            return 0
        return int(os.pread(self._statm, 100, 0).split()[0]) * os.sysconf("SC_PAGE_SIZE")

    def _wait(self, runs: list[Child], deadline: float) -> str | None:
        """Until the last role ends. Why it has to be killed, or None: it ended by itself."""
        is_watched = not self._walls.namespaces
        while True:
            for run in runs:
                run.reap()
            if runs[-1].wait_status is not None:
                return None
            left = deadline - time.monotonic()
            if left <= 0:
                return "wall"
            ready = {fd for fd, _ in self._poll.poll(1000 * min(left, TICK_S) + 1 if is_watched else 1000 * left + 1)}
            self._drain_wake()
            # The trainer sends nothing while a run is under way: readable means closed.
            if self._control.fileno() in ready:
                return "hung up"
            if is_watched and (excess := self._find_excess(runs)):
                return excess

    def _find_excess(self, runs: list[Child]) -> str | None:
        for run in runs:
            if run.wait_status is not None:
                continue
            if _count_threads(run.pid) > run.max_threads:
                return "threads"
            if cleanup.is_tree_larger(run.scratch, most_bytes=run.disk_bytes, most_entries=jail.MAX_SCRATCH_FILES):
                return "disk"
        return None

    def _end_orphans(self) -> None:
        """Processes that a compiler left behind come to this subreaper; a pid namespace takes them with it instead."""
        if self._proc is None or self._walls.namespaces:
            return
        listing = f"/proc/self/task/{os.getpid()}/children"
        while True:
            try:
                with open(listing, "rb") as file:
                    orphans = {int(pid) for pid in file.read().split()} - self._spares.pids
            except FileNotFoundError:
                return
            if not orphans:
                return
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake, 512):
                pass


def _explain_status(run: Child, killed: str | None) -> str | None:
    """Why the walls of a run that has ended did not stand, if they did not."""
    said = run.read_status()
    if said == WALLS_STAND or (not said and killed):
        return None
    return said.decode("utf-8", "replace") or f"a run ended with status {run.wait_status} before its walls stood"


def _connect(roles: Iterable[Mapping[str, Any]], descriptors: list[int]) -> list[dict[str, Any]]:
    """The roles with the pipes between them made and added to `descriptors`."""
    ends: dict[str, int] = {}
    connected = []
    for role in roles:
        indices = []
        for wanted in role["descriptors"]:
            if isinstance(wanted, str) and wanted not in ends:
                ends[f"{wanted[:-1]}r"], ends[f"{wanted[:-1]}w"] = len(descriptors), len(descriptors) + 1
                descriptors.extend(os.pipe())
            indices.append(ends[wanted] if isinstance(wanted, str) else wanted)
        connected.append({**role, "descriptors": indices})
    return connected


def _count_threads(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command's name, in parentheses, may hold anything; the thread count is the 18th field after it.
            return int(file.read().rpartition(b")")[2].split()[17])
    except (OSError, IndexError):
        return 0
