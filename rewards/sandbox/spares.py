"""Children forked ahead of the runs they will hold: a run waits neither for the fork nor for most of its walls.

A child is walled in, knows nothing and waits at its end of a socket pair. What makes it a run, limits and descriptors,
comes over that; then the last walls go up, and it is a program's for the rest of its life. None is used twice.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from rewards.sandbox import child, cleanup, jail, linux, namespaces, seccomp
from rewards.sandbox.messages import receive_message, send_message

MAX_SPARES = 2
"""Most children that wait: the tests of an `assert` problem and its program are two."""
WALLS_STAND = b"+"
PROFILES: tuple[seccomp.Profile, ...] = ("threads", "exec", "compile")


@dataclass(frozen=True, slots=True)
class Kind:
    """What a child has to be made for; its other limits are set when its run comes."""

    profile: seccomp.Profile
    """Its system call profile."""
    scratch_bytes: int
    """The size of the scratch folder that it mounts; 0 where the supervisor gives it one."""


@dataclass(kw_only=True, slots=True)
class Child:
    """One forked process: it waits, then it is one role of a run, then it has ended."""

    kind: Kind
    """What it was made for."""
    pid: int
    """Its process id, as the supervisor sees it."""
    channel: socket.socket
    """Carries its run to it, and back that its walls stand or why not."""
    scratch: str
    """Its scratch folder; empty where the namespace gives it one."""
    max_threads: int = 0
    """Most threads, where that is watched here."""
    disk_bytes: int = 0
    """Most bytes in its scratch folder, where that is watched here."""
    wait_status: int | None = None
    """How it ended; None: not yet."""
    cpu_s: float = 0.0
    """Processor seconds it used."""

    def start(self, limits: Mapping[str, int], descriptors: Sequence[int], base_address_space: int) -> None:
        """Make it a run, within `limits` (fields of `jail.RunLimits`). OSError if it is gone."""
        self.max_threads, self.disk_bytes = limits["max_threads"], limits["disk_bytes"]
        send_message(self.channel, {"limits": limits, "base_address_space": base_address_space}, descriptors)

    def reap(self, flags: int = os.WNOHANG) -> bool:
        """Whether it has ended; waits for that if `flags` is 0."""
        if self.wait_status is None:
            pid, status, usage = os.wait4(self.pid, flags)
            if pid:
                self.wait_status = status
                self.cpu_s = usage.ru_utime + usage.ru_stime
        return self.wait_status is not None

    def end(self) -> None:
        """Kill it if it has not ended."""
        if not self.reap():
            os.kill(self.pid, signal.SIGKILL)
            self.reap(0)

    def read_status(self) -> bytes:
        """What it said, once it has ended: `WALLS_STAND`, or why they do not."""
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            return self.channel.recv(4096, socket.MSG_DONTWAIT)
        return b""

    def clean_up(self) -> None:
        """Remove what is left of it, once it has ended. OSError if its scratch folder cannot be removed."""
        self.channel.close()
        if self.scratch:
            cleanup.remove_tree(self.scratch)


class Spares:
    """Makes children, and keeps those that wait."""

    def __init__(self, walls: jail.Walls, proc: int | None, scratch: str) -> None:
        """`proc` is a descriptor of /proc; `scratch` the folder of scratch folders, where no namespace gives them."""
        self._walls = walls
        self._scratch = scratch
        self._made = 0
        self._pid = os.getpid()
        self._waiting: list[Child] = []
        self._places = {profile: jail.open_places(walls, profile) if walls.landlock_abi else [] for profile in PROFILES}
        self._own_pids = None
        if walls.namespaces:
            assert proc is not None, "namespaces without /proc"
            self._own_pids = os.open("self/ns/pid", os.O_RDONLY, dir_fd=proc)

    @property
    def pids(self) -> set[int]:
        """Of the children that wait."""
        return {spare.pid for spare in self._waiting}

    def kind_of(self, role: Mapping[str, Any]) -> Kind:
        """What a role of a request takes."""
        return Kind(role["profile"], role["limits"]["disk_bytes"] if self._walls.namespaces else 0)

    def take(self, role: Mapping[str, Any]) -> Child:
        """A child for this role, one that waits if there is. OSError if none can be made or the disk is full."""
        self.bury()
        if not self._walls.namespaces:
            self._require_room(role["limits"]["disk_bytes"])
        kind = self.kind_of(role)
        spare = next((spare for spare in self._waiting if spare.kind == kind), None)
        if spare is None:
            return self._fork(kind)
        self._waiting.remove(spare)
        return spare

    def stock(self, roles: Sequence[Mapping[str, Any]]) -> None:
        """Let children wait for another request like this one; the oldest make room for them."""
        wanted = Counter(self.kind_of(role) for role in roles) - Counter(spare.kind for spare in self._waiting)
        # Short of processes or of disk, none is kept: the next request makes its own or says why it cannot.
        with contextlib.suppress(OSError):
            for kind in wanted.elements():
                while len(self._waiting) >= MAX_SPARES:
                    self._drop(self._waiting[0])
                self._waiting.append(self._fork(kind))

    def bury(self) -> None:
        """Forget those that were killed while they waited."""
        for spare in [spare for spare in self._waiting if spare.reap()]:
            self._drop(spare)

    def close(self) -> None:
        """End all that wait."""
        while self._waiting:
            self._drop(self._waiting[0])

    def _drop(self, spare: Child) -> None:
        self._waiting.remove(spare)
        spare.end()
        spare.clean_up()

    def _fork(self, kind: Kind) -> Child:
        scratch = "" if self._walls.namespaces else self._make_scratch()
        ours, theirs = socket.socketpair()
        try:
            if self._own_pids is not None:
                namespaces.unshare_pids()
            pid = os.fork()
            if pid == 0:
                self._live(kind, scratch, theirs)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            if self._own_pids is not None:
                linux.call("setns", self._own_pids, linux.CLONE_NEWPID)
        return Child(kind=kind, pid=pid, channel=ours, scratch=scratch)

    def _live(self, kind: Kind, scratch: str, channel: socket.socket) -> NoReturn:
        """In the forked process: walls, a wait, more walls, the program."""
        code = 1
        try:
            home, status = scratch or namespaces.SCRATCH, channel.fileno()
            try:
                jail.prepare_walls(
                    self._walls,
                    scratch=home,
                    disk_bytes=kind.scratch_bytes,
                    places=self._places[kind.profile],
                    parent=self._pid,
                    kept=status,
                )
                child.prepare_process(home)
                request, descriptors = receive_message(channel)
                if request is None:
                    os._exit(0)  # nobody wants it any more
                status = jail.arrange_descriptors(descriptors, status)
                limits, base = jail.RunLimits(**request["limits"]), request["base_address_space"]
                jail.finish_walls(self._walls, limits, profile=kind.profile, base_address_space=base)
            except BaseException as error:  # noqa: BLE001 - said, not swallowed: a run without its walls is refused
                os.write(status, f"{type(error).__name__}: {error}".encode()[:4000])
                os._exit(1)
            os.write(status, WALLS_STAND)
            os.close(status)
            code = child.run_payload()
        finally:
            os._exit(code)

    def _make_scratch(self) -> str:
        self._made += 1
        path = os.path.join(self._scratch, f"run-{self._made}")
        os.mkdir(path, 0o700)
        if self._walls.drop_user:
            os.chown(path, namespaces.UNPRIVILEGED_ID, namespaces.UNPRIVILEGED_ID)
        return path

    def _require_room(self, disk_bytes: int) -> None:
        """A program that may write so much must not fail because others have filled the disk."""
        disk = os.statvfs(self._scratch)
        free = disk.f_bavail * disk.f_frsize
        # A file system without a table of files says that it has none at all.
        if free < disk_bytes or (disk.f_files and disk.f_favail < jail.MAX_SCRATCH_FILES):
            raise OSError(
                errno.ENOSPC,
                f"{self._scratch} has room for {free >> 20} MiB in {disk.f_favail} files, a run may write "
                f"{disk_bytes >> 20} MiB in {jail.MAX_SCRATCH_FILES}; make room there, lower limits.disk_mb or choose "
                "another sandbox.scratch_dir",
            )
