"""The filter, run by an interpreter of its own here, says what the tables say; on both machines."""

from __future__ import annotations

import errno
import struct

import pytest

from rewards.sandbox.seccomp import ALLOWED, assemble_filter
from rewards.sandbox.syscalls import AUDIT_ARCH, MACHINES, NUMBERS, syscall_number

ALLOW, KILL = 0x7FFF_0000, 0x8000_0000
OWN_PID = 0x7A5A_5A5A
CONDITIONAL = {
    "open",
    "openat",
    "kill",
    "tgkill",
    "clone",
    "fcntl",
    "ioctl",
    "prctl",
    "prlimit64",
    "socketpair",
    "sendto",
}


def verdict(machine: str, number: int, *arguments: int, profile: str = "threads", arch: int | None = None) -> int:
    """What the kernel would do with this call: runs the classic BPF program on its `struct seccomp_data`."""
    program = assemble_filter(profile, machine)
    data = struct.pack("<IIQ6Q", number, arch or AUDIT_ARCH[machine], 0, *(arguments + (0,) * 6)[:6])
    accumulator, position = 0, 0
    while True:
        code, if_true, if_false, constant = struct.unpack_from("<HBBI", program, 8 * position)
        position += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, constant)
        elif code == 0x54:
            accumulator &= constant
        elif code == 0x06:
            return int(constant)
        else:
            test = {0x15: accumulator == constant, 0x25: accumulator > constant, 0x35: accumulator >= constant}
            is_true = bool(accumulator & constant) if code == 0x45 else test[code]
            position += if_true if is_true else if_false


def call(machine: str, name: str, *arguments: int, profile: str = "threads") -> int:
    number = syscall_number(name, machine)
    assert number is not None
    return verdict(machine, number, *arguments, profile=profile)


def denied(error: int = errno.EPERM) -> int:
    return 0x0005_0000 | error


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("profile", ["threads", "exec", "compile"])
def test_exactly_the_listed_calls_are_allowed(machine: str, profile: str) -> None:
    more = {"threads": set(), "exec": {"execve", "execveat"}}
    more["compile"] = more["exec"] | {"fork", "vfork", "chmod", "fchmod", "fchmodat"}
    free = {syscall_number(name, machine) for name in {*ALLOWED, *more[profile]} - CONDITIONAL}
    special = {syscall_number(name, machine) for name in CONDITIONAL}
    for number in range(600):
        found = verdict(machine, number, profile=profile)
        if number in (435, 437):
            assert found == denied(errno.ENOSYS)
        elif number not in special:
            assert found == (ALLOW if number in free else denied()), number


@pytest.mark.parametrize("machine", MACHINES)
def test_another_architecture_is_killed(machine: str) -> None:
    for arch in (0x4000_0003, *(AUDIT_ARCH[m] for m in MACHINES if m != machine)):
        assert verdict(machine, 1, arch=arch) == KILL


def test_x32_calls_are_killed() -> None:
    for number in (0x4000_0000, 0x4000_0001, 0x4000_0200, 0xFFFF_FFFF):
        assert verdict("x86_64", number) == KILL


@pytest.mark.parametrize("machine", MACHINES)
def test_arguments_decide(machine: str) -> None:
    thread = 0x0001_0000 | 0x100 | 0x200 | 0x400 | 0x800
    assert call(machine, "clone", thread) == ALLOW
    assert call(machine, "clone", 17) == denied()
    assert call(machine, "clone", thread | 0x1000_0000) == denied()
    assert call(machine, "clone", 17, profile="compile") == ALLOW
    assert call(machine, "clone", 17 | 0x2000_0000, profile="compile") == denied()
    assert call(machine, "kill", OWN_PID, 6) == ALLOW
    assert (
        call(machine, "kill", 1, 9)
        == call(machine, "kill", 0, 9)
        == call(machine, "kill", (1 << 32) - 1, 9)
        == denied()
    )
    assert call(machine, "tgkill", OWN_PID, 5, 6) == ALLOW
    assert call(machine, "tgkill", 5, 5, 6) == denied()
    assert call(machine, "prlimit64", 0, 7, 0) == call(machine, "prlimit64", OWN_PID, 7, 0) == ALLOW
    assert call(machine, "prlimit64", 1, 7, 0) == denied()
    assert call(machine, "fcntl", 3, 1030) == ALLOW
    assert [call(machine, "fcntl", 3, command) for command in (8, 10, 15, 1024, 1026, 1031)] == [denied()] * 6
    assert call(machine, "ioctl", 0, 0x5401) == ALLOW
    assert call(machine, "ioctl", 0, 0x5412) == denied()
    assert call(machine, "prctl", 15) == ALLOW
    assert [call(machine, "prctl", option) for option in (1, 4, 22, 23, 36, 38)] == [denied()] * 6
    assert call(machine, "socketpair", 1, 1, 0) == ALLOW
    assert call(machine, "socketpair", 2, 1, 0) == denied()
    assert call(machine, "sendto", 3, 4, 5, 0, 0, 0) == ALLOW
    assert call(machine, "sendto", 3, 4, 5, 0, 1, 16) == call(machine, "sendto", 3, 4, 5, 0, 1 << 40, 16) == denied()
    assert call(machine, "openat", 3, 4, 0o1 | 0o100 | 0o1000) == ALLOW
    assert call(machine, "openat", 3, 4, 0) == ALLOW
    assert call(machine, "openat", 3, 4, 0o1000) == denied()
    assert call(machine, "openat", 3, 4, 0o20000000 | 0o2) == denied(errno.EOPNOTSUPP)


def test_no_dangerous_call_is_listed() -> None:
    dangerous = """
    socket connect bind listen accept sendmsg recvmsg ptrace process_vm_readv memfd_create userfaultfd io_uring_setup
    bpf perf_event_open keyctl unshare setns mount umount2 pivot_root seccomp chmod fchmod fchmodat execve execveat
    fork vfork capset sched_setaffinity mlock truncate link linkat mknod chown utimensat setxattr setsid setpgid
    """.split()  # noqa: SIM905 - a list of names reads better as text
    assert set(dangerous).isdisjoint(ALLOWED)
    assert set(ALLOWED) <= NUMBERS.keys()


def test_an_unknown_machine_is_refused() -> None:
    with pytest.raises(ValueError, match="riscv64"):
        assemble_filter("threads", "riscv64")
