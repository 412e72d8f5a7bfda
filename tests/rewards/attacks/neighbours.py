"""Attacks on what else the supervisor has made: children that wait for the next run, their folders, its own objects."""

from tests.rewards.attacks.attack import containment

ATTACKS = [
    containment(
        "neighbours-by-signal",
        """
        own = os.getpid()
        for pid in [*range(max(2, own - 20), own), *range(own + 1, own + 40)]:
            attempt(lambda: os.kill(pid, 0))
            attempt(lambda: os.kill(pid, 9))
            attempt(lambda: os.killpg(pid, 9))
        """,
    ),
    containment(
        "neighbours-by-trace-and-memory",
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def go(call, *arguments):
            if call(*arguments) < 0:
                raise PermissionError
        own = os.getpid()
        for pid in range(own + 1, own + 20):
            attempt(lambda: go(libc.ptrace, 16, pid, 0, 0))
            attempt(lambda: go(libc.ptrace, 0x4206, pid, 0, 0))
            attempt(lambda: open(f"/proc/{pid}/mem", "r+b"))
            attempt(lambda: os.listdir(f"/proc/{pid}/fd"))
            attempt(lambda: os.readlink(f"/proc/{pid}/cwd"))
        """,
    ),
    containment(
        "neighbours-by-limits-and-scheduling",
        """
        import resource
        own = os.getpid()
        for pid in range(own + 1, own + 20):
            attempt(lambda: resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1)))
            attempt(lambda: os.sched_setaffinity(pid, {0}))
            attempt(lambda: os.setpriority(os.PRIO_PROCESS, pid, 19))
            attempt(lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)))
        """,
    ),
    containment(
        "neighbours-scratch-folders",
        """
        above = os.path.dirname(os.getcwd())
        own = os.path.basename(os.getcwd())
        attempt(lambda: os.listdir(above) if above != "/" else 1 // 0)
        number = int(own.rpartition("-")[2]) if own.startswith("run-") else 0
        for other in range(number + 1, number + 20):
            for start in (above, ".."):
                attempt(lambda: open(f"{start}/run-{other}/planted", "w"))
                attempt(lambda: os.listdir(f"{start}/run-{other}"))
                attempt(lambda: os.rmdir(f"{start}/run-{other}"))
                attempt(lambda: os.rename(f"{start}/run-{other}", "mine"))
                attempt(lambda: os.rename(".", f"{start}/run-{other}/inside"))
                attempt(lambda: os.mkdir(f"{start}/run-{other}"))
                attempt(lambda: os.symlink("/etc", f"{start}/run-{other}"))
        """,
    ),
    containment(
        "own-folder-is-not-replaced",
        """
        own = os.getcwd()
        attempt(lambda: os.rmdir(own))
        attempt(lambda: os.rename(own, own + "-moved"))
        attempt(lambda: os.symlink("/etc", own + "-link"))
        """,
    ),
    containment(
        "sockets-left-in-memory",
        """
        import gc, socket, struct
        message = b'{"error": null, "killed": null, "exit": 0, "wall_s": 0, "cpu_s": 0}'
        for item in gc.get_objects():
            if isinstance(item, socket.socket):
                attempt(lambda: item.send(struct.pack("<I", len(message)) + message))
                attempt(lambda: item.recv(1))
                attempt(lambda: socket.send_fds(item, [b"x"], [1]))
        for number in range(3, 200):
            attempt(lambda: os.write(number, struct.pack("<I", len(message)) + message))
            attempt(lambda: os.read(number, 1))
        """,
    ),
    containment(
        "supervisor-objects-left-in-memory",
        """
        frame, found = sys._getframe(), []
        while frame:
            found += [value for value in frame.f_locals.values() if type(value).__module__.startswith("rewards.")]
            frame = frame.f_back
        for item in found:
            for name in ("close", "bury", "end", "clean_up", "_end_orphans"):
                method = getattr(item, name, None)
                for pid in getattr(item, "pids", ()):
                    attempt(lambda: os.kill(pid, 9))
            attempt(lambda: item.take({"profile": "compile", "limits": {"disk_bytes": 1 << 40}}))
            attempt(lambda: item._fork(("compile", 0)))
            attempt(lambda: item._control.send(b"x"))
            attempt(lambda: item.channel.send(b"x"))
        """,
    ),
    containment(
        "nothing-of-a-problem-in-memory",
        """
        import gc
        for item in gc.get_objects():
            if isinstance(item, dict) and any(key in item for key in ("cas" + "es", "expec" + "ted", "te" + "sts")):
                escaped.append(f"a problem: {str(item)[:100]}")
        """,
    ),
]
"""Each would reach past its own run to the next one's process or to the supervisor they share."""
