"""A world of its own: user, mount, pid, network, IPC and UTS namespaces around the zygote, a private root in them.

The root is a read-only tmpfs that holds bind mounts of the runtime, four devices and an empty folder, where every run
mounts a scratch tmpfs of its own. Everything else of the host is not there to be opened, listed or stat'ed.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from rewards.sandbox import linux

SCRATCH = "/sandbox"
UNPRIVILEGED_ID = 65534
"""Who a program is outside when the trainer is root, and who it believes to be inside."""

_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_STAGES = ("/mnt", "/media", "/srv", "/opt", "/run", "/var")
_LINKS = ("/lib", "/lib64", "/bin", "/usr/bin")


def enter_namespaces(readable: Sequence[str], proc: int) -> None:
    """Move this process (single-threaded, with nothing to lose) into its namespaces; its next child is their pid 1.

    `proc` is a descriptor of /proc. OSError naming the step that this machine does not allow.
    """
    if os.geteuid() == 0:
        # Mounts first: paths that only root may walk (an interpreter under /root) are still reachable.
        _unshare(linux.CLONE_NEWNS)
        _make_root(readable)
        become_unprivileged()
        _enter_user_namespace(proc)
    else:
        _enter_user_namespace(proc)
        _make_root(readable)


def become_unprivileged() -> None:
    """From root to nobody, staying one whose /proc files are its own."""
    os.setgroups([])
    os.setresgid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
    os.setresuid(UNPRIVILEGED_ID, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
    linux.prctl(linux.PR_SET_DUMPABLE, 1)


def mount_scratch(disk_bytes: int, max_files: int) -> None:
    """In a run's process: a mount namespace of its own, with an empty scratch folder of limited size in it."""
    _unshare(linux.CLONE_NEWNS)
    options = f"size={disk_bytes},nr_inodes={max_files},mode=0700,uid={UNPRIVILEGED_ID},gid={UNPRIVILEGED_ID}"
    linux.mount("scratch", SCRATCH, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)


def unshare_pids() -> None:
    """This process's next child is pid 1 of a new namespace. OSError if not allowed."""
    _unshare(linux.CLONE_NEWPID)


def _enter_user_namespace(proc: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    kinds = linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWPID
    _unshare(kinds | linux.CLONE_NEWNET | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{UNPRIVILEGED_ID} {uid} 1"),
        ("gid_map", f"{UNPRIVILEGED_ID} {gid} 1"),
    ):
        descriptor = os.open(f"self/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)


def _unshare(kinds: int) -> None:
    linux.call("unshare", kinds)


def _make_root(readable: Sequence[str]) -> None:
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
    stage = next((s for s in _STAGES if os.path.isdir(s) and not any(_is_inside(p, s) for p in readable)), None)
    if stage is None:
        raise OSError(2, f"no folder to build the root on (tried {', '.join(_STAGES)})")
    linux.mount("root", stage, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,nr_inodes=4096,mode=0755")
    for path in (*readable, *_DEVICES):
        if not any(path != other and _is_inside(path, other) for other in readable):
            _bind(path, stage + path)
    for link in _LINKS:
        if os.path.islink(link) and not os.path.lexists(stage + link):
            os.symlink(os.readlink(link), stage + link)
    os.makedirs(stage + SCRATCH)
    socket.sethostname("sandbox")
    linux.mount(
        None, stage, None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV
    )
    os.chdir(stage)
    linux.call("pivot_root", b".", b".")
    linux.call("umount2", b".", linux.MNT_DETACH)
    os.chdir("/")


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    linux.mount(source, target, None, linux.MS_BIND)
    if source in _DEVICES:
        return
    # A user namespace may not loosen what the host's mount forbids, so its own flags are kept.
    kept = os.statvfs(target).f_flag & (linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC)
    flags = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV | kept
    linux.mount(None, target, None, flags)


def _is_inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")
