"""The system call filter: an allowlist assembled into classic BPF by hand.

What is not listed fails with EPERM, and the calls the C library probes for fail with ENOSYS so that it takes its older
path. A call from another architecture, or by the x32 numbers of x86_64, kills the process.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import struct
from collections.abc import Mapping, Sequence
from typing import Literal

from rewards.sandbox import linux
from rewards.sandbox.syscalls import AUDIT_ARCH, syscall_number

Profile = Literal["threads", "exec", "compile"]
"""`threads`: no new process and no exec; `exec`: may become another program, as a compiled program's launcher must;
`compile`: a compiler driver, which starts processes of its own."""

ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek close close_range
open openat creat stat fstat lstat newfstatat statx access faccessat faccessat2 readlink readlinkat getdents
getdents64 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 symlink symlinkat umask
ftruncate fallocate fsync fdatasync fadvise64 flock statfs fstatfs sendfile copy_file_range dup dup2 dup3 pipe pipe2
fcntl poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
eventfd eventfd2 timerfd_create timerfd_settime timerfd_gettime ioctl
mmap munmap mprotect mremap msync madvise mincore brk membarrier
futex set_robust_list set_tid_address rseq arch_prctl prctl clone exit exit_group wait4 waitid
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack restart_syscall
kill tgkill pause nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times getitimer setitimer alarm
timer_create timer_settime timer_gettime timer_getoverrun timer_delete
getpid gettid getppid getpgrp getpgid getsid getuid geteuid getgid getegid getgroups getresuid getresgid capget
getrlimit setrlimit prlimit64 getrusage sysinfo uname getcpu getpriority getrandom
sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min
socketpair sendto recvfrom getsockopt getsockname shutdown
""".split()  # noqa: SIM905 - a list of names reads better as text
NOT_IMPLEMENTED = ("clone3", "openat2")
"""Answered ENOSYS: their flags lie behind pointers where no filter can see them, and glibc falls back."""

_CLONE_THREAD, _CLONE_NAMESPACES = 0x0001_0000, 0x7E02_0080
_O_ACCMODE, _O_TRUNC, _O_TMPFILE_BIT = 3, 0x200, 0x40_0000
_FCNTL_DENIED = (8, 10, 15, 1024, 1026, 1031)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals; lease; notify; pipe size
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX
_PRCTL_ALLOWED = (15, 16)  # the name of the thread: set, get
_AF_UNIX = 1

_RET_KILL, _RET_ERRNO, _RET_ALLOW = 0x8000_0000, 0x0005_0000, 0x7FFF_0000
_LOAD, _JEQ, _JGT, _JGE, _JSET, _AND, _RET = 0x20, 0x15, 0x25, 0x35, 0x45, 0x54, 0x06
_OWN_PID = 0x7A5A_5A5A
"""Stands for the process's own id until the filter is installed; larger than any id there can be."""

Instruction = tuple[int, int, int, int]
"""(code, jump if true, jump if false, constant), as in `struct sock_filter`."""


@functools.cache
def assemble_filter(profile: Profile, machine: str) -> bytes:
    """The filter's instructions, 8 bytes each, for any process on `machine`; `install_filter` makes it one process's.

    ValueError for a machine that is neither x86_64 nor aarch64.
    """
    if machine not in AUDIT_ARCH:
        raise ValueError(f"no system call table for {machine!r} (known: {', '.join(AUDIT_ARCH)})")
    program: list[Instruction] = [
        (_LOAD, 0, 0, 4),
        (_JEQ, 1, 0, AUDIT_ARCH[machine]),
        _answer(_RET_KILL),
        (_LOAD, 0, 0, 0),
    ]
    if machine == "x86_64":
        program += [(_JGE, 0, 1, 0x4000_0000), _answer(_RET_KILL)]
    conditions = _conditions(profile)
    allowed = list(ALLOWED)
    if profile != "threads":
        allowed += ["execve", "execveat"]
    if profile == "compile":
        allowed += ["fork", "vfork", "chmod", "fchmod", "fchmodat"]
    numbers = {name: number for name in allowed if (number := syscall_number(name, machine)) is not None}
    for name in NOT_IMPLEMENTED:
        number = syscall_number(name, machine)
        assert number is not None
        program += [(_JEQ, 0, 1, number), _answer(_RET_ERRNO | errno.ENOSYS)]
    for name in sorted(conditions.keys() & numbers.keys()):
        body = conditions[name]
        program += [(_JEQ, 0, len(body), numbers.pop(name)), *body]
    # The kernel walks the filter once per call number when it is installed, so it is kept short: ranges, in order.
    for first, last in _ranges(sorted(numbers.values())):
        program += [(_JGE, 1, 0, first), _DENY, (_JGT, 1, 0, last), _ALLOW]
    program.append(_DENY)
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def install_filter(program: bytes, pid: int) -> None:
    """Put the calling thread, of process `pid` in its own namespace, under an assembled filter.

    no_new_privs must be set. OSError where the kernel has no seccomp.
    """
    program = program.replace(struct.pack("<I", _OWN_PID), struct.pack("<I", pid))
    instructions = ctypes.create_string_buffer(program, len(program))
    fprog = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program) // 8, ctypes.addressof(instructions)), 16)
    linux.call("seccomp", 1, 0, fprog)


def _conditions(profile: Profile) -> Mapping[str, list[Instruction]]:
    """What a listed call's arguments must be; of these the kernel itself only reads the low 32 bits."""
    open_flags = {name: _deny_open_flags(position) for name, position in (("open", 1), ("openat", 2))}
    own_pid = {name: _require_value(0, (_OWN_PID,)) for name in ("kill", "tgkill")}
    clone = _require_clone() if profile != "compile" else _deny_bits(0, _CLONE_NAMESPACES)
    return {
        **open_flags,
        **own_pid,
        "clone": clone,
        "fcntl": _deny_values(1, _FCNTL_DENIED),
        "ioctl": _require_value(1, _IOCTLS),
        "prctl": _require_value(0, _PRCTL_ALLOWED),
        "prlimit64": _require_value(0, (0, _OWN_PID)),
        "socketpair": _require_value(0, (_AF_UNIX,)),
        # An address would make a connected pair into a socket that reaches others.
        "sendto": _require_null(4),
    }


def _ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted numbers as (first, last) of what follows without a gap."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def _answer(value: int) -> Instruction:
    return (_RET, 0, 0, value)


def _load_argument(position: int, *, high: bool = False) -> Instruction:
    return (_LOAD, 0, 0, 16 + 8 * position + (4 if high else 0))


_DENY, _ALLOW = _answer(_RET_ERRNO | errno.EPERM), _answer(_RET_ALLOW)


def _require_value(position: int, values: Sequence[int]) -> list[Instruction]:
    body = [_load_argument(position)]
    for value in values:
        body += [(_JEQ, 0, 1, value), _ALLOW]
    return [*body, _DENY]


def _deny_values(position: int, values: Sequence[int]) -> list[Instruction]:
    body = [_load_argument(position)]
    for value in values:
        body += [(_JEQ, 0, 1, value), _DENY]
    return [*body, _ALLOW]


def _deny_bits(position: int, bits: int) -> list[Instruction]:
    return [_load_argument(position), (_JSET, 0, 1, bits), _DENY, _ALLOW]


def _require_null(position: int) -> list[Instruction]:
    low, high = _load_argument(position), _load_argument(position, high=True)
    return [low, (_JEQ, 1, 0, 0), _DENY, high, (_JEQ, 1, 0, 0), _DENY, _ALLOW]


def _require_clone() -> list[Instruction]:
    """A thread of this process, in no new namespace."""
    return [_load_argument(0), (_JSET, 1, 0, _CLONE_THREAD), _DENY, (_JSET, 0, 1, _CLONE_NAMESPACES), _DENY, _ALLOW]


def _deny_open_flags(position: int) -> list[Instruction]:
    """No O_TMPFILE (files no directory shows) and no O_TRUNC on a descriptor opened for reading, which Landlock before
    its third version does not see."""
    flags = _load_argument(position)
    return [
        flags,
        (_JSET, 0, 1, _O_TMPFILE_BIT),
        _answer(_RET_ERRNO | errno.EOPNOTSUPP),
        (_AND, 0, 0, _O_ACCMODE | _O_TRUNC),
        (_JEQ, 0, 1, _O_TRUNC),
        _DENY,
        _ALLOW,
    ]
