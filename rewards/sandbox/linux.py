"""The few Linux calls the jail needs that Python's `os` does not have, by ctypes. Importing it does nothing."""

from __future__ import annotations

import ctypes
import functools
import os
import platform

from rewards.sandbox.syscalls import syscall_number

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x0002_0000, 0x0400_0000, 0x0800_0000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x1000_0000, 0x2000_0000, 0x4000_0000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 36, 38, 47, 4


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """Make a system call by name.

    Raises OSError with the call's name if it fails or if this machine's number for it is not known.
    """
    number = syscall_number(name)
    if number is None:
        raise OSError(38, f"{name}: not known on {platform.machine()}")
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    # libc's syscall() takes six words whatever the call; zeros spare the kernel what the stack happens to hold.
    words += [ctypes.c_long(0)] * (6 - len(words))
    answer: int = _libc().syscall(ctypes.c_long(number), *words)
    if answer < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return answer


def prctl(option: int, value: int = 0, third: int = 0) -> int:
    """`prctl(2)`; OSError if it fails."""
    return call("prctl", option, value, third)


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """`mount(2)`; OSError naming the target if it fails."""
    try:
        call("mount", _text(source), _text(target), _text(kind), flags, _text(data))
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} (on {target})") from error


def drop_capabilities() -> None:
    """Give up every capability of this process, for good once no_new_privs is set."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    header = ctypes.create_string_buffer((0x2008_0522).to_bytes(4, "little") + bytes(4), 8)
    call("capset", header, ctypes.create_string_buffer(24))


def drop_bounding_set() -> None:
    """Empty the capability bounding set where this process may; where it may not there is nothing to lose."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            return


def _text(value: str | None) -> bytes | None:
    return None if value is None else value.encode()
