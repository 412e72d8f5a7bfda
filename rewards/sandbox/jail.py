"""What a forked process does to itself before it runs a program: the walls, put up in the one order that works."""

from __future__ import annotations

import fcntl
import os
import platform
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from rewards.sandbox import landlock, linux, namespaces, seccomp

MIB = 1 << 20
STACK_BYTES = 64 * MIB
MAX_DESCRIPTORS = 64
MAX_SCRATCH_FILES = 4096
NEIGHBOURS = 4
"""Processes beside a run's that the kernel counts with its threads: the supervisor, the other role, those that wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Walls:
    """What stands around every run of one zygote."""

    namespaces: bool
    """The zygote lives in namespaces of its own, and each run gets a pid and a mount namespace more."""
    counts_threads: bool
    """The kernel's limit of processes counts those of the namespace alone: since Linux 5.14, not before."""
    landlock_abi: int
    """The Landlock version in use; 0: none."""
    seccomp: bool
    """System calls are filtered."""
    drop_user: bool
    """The zygote is root outside any user namespace, and runs become nobody."""
    readable: tuple[str, ...]
    """Files and folders of the runtime."""
    toolchain: tuple[str, ...]
    """Files and folders of a compiled language: to be read, and executed by the `compile` profile."""
    executable: tuple[str, ...]
    """The files that the `exec` profile may execute: an interpreter, and what loads programs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLimits:
    """Limits of one process, in the units the kernel takes."""

    address_space: int
    """Bytes of address space over what the zygote has; 0: unlimited."""
    data: int
    """Bytes of writable private memory, for runtimes that reserve address space freely; 0: unlimited."""
    cpu_s: int
    """Processor seconds."""
    file_bytes: int
    """Largest file, captured output included."""
    disk_bytes: int
    """Total size of the scratch folder."""
    max_threads: int
    """Most threads."""


def prepare_walls(
    walls: Walls, *, scratch: str, disk_bytes: int, places: Sequence[landlock.Rule], parent: int, kept: int
) -> None:
    """Put up the walls that need nothing of the run to come around this freshly forked process.

    `places` are of `open_places`. Of its descriptors `kept` stays, and the first three. OSError naming what failed.
    """
    os.setsid()
    _reset_signals()
    if walls.namespaces:
        namespaces.mount_scratch(disk_bytes, MAX_SCRATCH_FILES)
    os.chdir(scratch)
    ruleset = None
    if walls.landlock_abi:
        ruleset = landlock.make_ruleset([*places, landlock.open_rule(scratch, landlock.WRITE)], walls.landlock_abi)
    if walls.drop_user:
        namespaces.become_unprivileged()
    if sys.platform == "linux":
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() not in (0, parent):
            raise OSError("the supervisor is gone")  # before the signal of its death was asked for
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        linux.drop_capabilities()
    if ruleset is not None:
        landlock.enforce_ruleset(ruleset)
    # While it waits it must not hold open what others take the end of: the trainer's socket, its neighbours'.
    os.closerange(3, kept)
    os.closerange(max(3, kept + 1), _highest_descriptor())


def arrange_descriptors(descriptors: Sequence[int], status: int) -> int:
    """Make `descriptors` 0, 1, 2..., `status` what comes right after them, which is returned; the rest is closed."""
    wanted = [*descriptors, status]
    # First to free numbers above the final ones, so that no descriptor is overwritten before it has been copied.
    high = [fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, len(wanted)) for source in wanted]
    for index, source in enumerate(high):
        os.dup2(source, index, inheritable=index < len(descriptors))
    os.closerange(len(high), _highest_descriptor())
    return len(descriptors)


def finish_walls(walls: Walls, limits: RunLimits, *, profile: seccomp.Profile, base_address_space: int) -> None:
    """Put up the rest, for a run. OSError naming what failed."""
    _set_limits(limits, base_address_space, counts_threads=walls.counts_threads)
    if walls.seccomp:
        seccomp.install_filter(seccomp.assemble_filter(profile, platform.machine()), os.getpid())


def open_places(walls: Walls, profile: seccomp.Profile) -> list[landlock.Rule]:
    """What Landlock lets every run of a profile reach, the scratch folder aside. The caller closes the descriptors."""
    places = [(path, landlock.READ) for path in walls.readable]
    places += [(path, landlock.RUN if profile == "compile" else landlock.READ) for path in walls.toolchain]
    places += [(path, landlock.RUN) for path in walls.executable if profile == "exec"]
    places += [(path, landlock.READ) for path in ("/dev/zero", "/dev/random", "/dev/urandom")]
    places += [("/dev/null", landlock.READ | landlock.WRITE)]
    return [landlock.open_rule(path, rights) for path, rights in places if os.path.exists(path)]


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _highest_descriptor() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # closerange() is one close_range call on Linux; elsewhere it tries each number.
    return soft if sys.platform != "linux" else 1 << 30


def _set_limits(limits: RunLimits, base_address_space: int, *, counts_threads: bool) -> None:
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_FSIZE: limits.file_bytes,
        resource.RLIMIT_NOFILE: MAX_DESCRIPTORS,
        resource.RLIMIT_STACK: STACK_BYTES,
        resource.RLIMIT_MEMLOCK: 0,
    }
    if limits.address_space:
        wanted[resource.RLIMIT_AS] = base_address_space + limits.address_space
    if limits.data:
        wanted[resource.RLIMIT_DATA] = limits.data
    if counts_threads:
        wanted[resource.RLIMIT_NPROC] = limits.max_threads + NEIGHBOURS
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        ceiling = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (ceiling, ceiling))
