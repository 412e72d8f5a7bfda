"""Attacks that reach for other processes, the kernel and their own harness."""

import platform

from tests.rewards.attacks.attack import containment, resource_abuse

ATTACKS = [
    containment(
        "process-vm-readv",
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def go():
            class IoVec(ctypes.Structure):
                _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]
            buffer = ctypes.create_string_buffer(8)
            local, remote = IoVec(ctypes.addressof(buffer), 8), IoVec(0x400000, 8)
            for pid in (@TRAINER_PID@, os.getppid(), os.getpid()):
                if libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) >= 0:
                    return "read"
                if ctypes.get_errno() == 14:
                    return "allowed but for the address"
            raise PermissionError
        attempt(go)
        """,
    ),
    containment(
        "ptrace",
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def go(request, pid):
            if libc.ptrace(request, pid, 0, 0) < 0:
                raise PermissionError
        attempt(lambda: go(0, 0))
        attempt(lambda: go(16, @TRAINER_PID@))
        attempt(lambda: go(0x4206, os.getppid()))
        """,
    ),
    containment(
        "signal-trainer",
        """
        import signal
        for number in (0, 15, 9):
            attempt(lambda: os.kill(@TRAINER_PID@, number))
        """,
    ),
    containment("signal-parent", "attempt(lambda: os.kill(os.getppid() or @TRAINER_PID@, 9))"),
    containment(
        "signal-everyone",
        """
        attempt(lambda: os.kill(-1, 9))
        attempt(lambda: os.kill(0, 9))
        """,
    ),
    containment("signal-group", "attempt(lambda: os.killpg(@TRAINER_GROUP@, 15))"),
    containment(
        "signal-by-raw-calls",
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def go(number, *arguments):
            if libc.syscall(number, *arguments) < 0:
                raise PermissionError
        if os.uname().machine == "x86_64":
            attempt(lambda: go(200, @TRAINER_PID@, 9))  # tkill
            attempt(lambda: go(234, @TRAINER_PID@, @TRAINER_PID@, 9))  # tgkill
            attempt(lambda: go(129, @TRAINER_PID@, 9, 0))  # rt_sigqueueinfo
            attempt(lambda: go(424, 0, 9, 0, 0))  # pidfd_send_signal
        """,
    ),
    containment(
        "signal-by-descriptor-owner",
        """
        import fcntl, signal
        def go(pid):
            r, w = os.pipe()
            fcntl.fcntl(r, fcntl.F_SETOWN, pid)
        attempt(lambda: go(@TRAINER_PID@))
        attempt(lambda: fcntl.fcntl(os.pipe()[0], 10, signal.SIGKILL))
        """,
    ),
    containment(
        "pidfd",
        """
        attempt(lambda: os.pidfd_open(@TRAINER_PID@))
        attempt(lambda: os.pidfd_open(os.getpid()))
        """,
    ),
    containment(
        "priority-of-others",
        """
        attempt(lambda: os.setpriority(os.PRIO_USER, 0, 19))
        attempt(lambda: os.nice(5))
        """,
    ),
    containment("affinity-of-others", "attempt(lambda: os.sched_setaffinity(@TRAINER_PID@, {0}))"),
    containment(
        "limits-of-others",
        """
        import resource
        attempt(lambda: resource.prlimit(@TRAINER_PID@, resource.RLIMIT_NOFILE))
        """,
    ),
    containment(
        "raise-own-limits",
        """
        import resource
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CPU):
            attempt(lambda: resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))
        """,
    ),
    containment(
        "subprocess",
        """
        import subprocess
        attempt(lambda: subprocess.run(['/bin/true']))
        """,
    ),
    containment(
        "os-system",
        """
        if os.system('true') == 0:
            escaped.append('shell')
        """,
    ),
    containment(
        "fork",
        """
        attempt(os.fork)
        attempt(os.forkpty)
        """,
    ),
    containment("posix-spawn", "attempt(lambda: os.posix_spawn('/bin/true', ['true'], {}))"),
    containment(
        "exec",
        """
        attempt(lambda: os.execv("/bin/echo", ["echo", "escaped"]))
        attempt(lambda: os.execv(sys.executable or "/usr/bin/python3", ["python3", "-c", "print(1)"]))
        """,
    ),
    containment(
        "exec-from-memory",
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        attempt(lambda: os.memfd_create("x"))
        def go():
            if libc.execveat(1, b"", None, None, 0x1000) < 0:
                raise PermissionError
        attempt(go)
        """,
    ),
    containment(
        "clone-by-raw-call",
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def go(number, *arguments):
            pid = libc.syscall(number, *arguments)
            if pid == 0:
                os._exit(0)
            if pid < 0:
                raise PermissionError
            return pid
        if os.uname().machine == "x86_64":
            attempt(lambda: go(56, 17, 0, 0, 0, 0))  # clone, SIGCHLD
            attempt(lambda: go(58))  # vfork
            attempt(lambda: go(57))  # fork
            attempt(lambda: go(435, ctypes.create_string_buffer(88), 88))  # clone3
        """,
    ),
    containment(
        "new-namespaces",
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def go(call, *arguments):
            if call(*arguments) < 0:
                raise PermissionError
        for kind in (0x10000000, 0x20000, 0x40000000, 0x20000000, 0x2000000):
            attempt(lambda: go(libc.unshare, kind))
        attempt(lambda: go(libc.mount, b"none", b".", b"tmpfs", 0, None))
        attempt(lambda: go(libc.umount2, b"/", 2))
        attempt(lambda: go(libc.chroot, b"."))
        """,
    ),
    containment(
        "become-root",
        """
        attempt(lambda: os.setuid(0) or os.getuid() == 0 and open('/etc/shadow'))
        attempt(lambda: os.setresuid(0, 0, 0))
        attempt(lambda: os.setgroups([0]))
        """,
    ),
    containment(
        "dangerous-calls",
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def go(number, *arguments):
            if libc.syscall(number, *arguments) >= 0:
                return number
            if ctypes.get_errno() not in (1, 38):
                return f"{number}: errno {ctypes.get_errno()}"
            raise PermissionError
        numbers = {
            "io_uring_setup": 425, "bpf": 321, "perf_event_open": 298, "keyctl": 250, "add_key": 248,
            "userfaultfd": 323, "memfd_create": 319, "process_madvise": 440, "kexec_load": 246, "init_module": 175,
            "reboot": 169,
            "swapon": 167, "shmget": 29, "msgget": 68, "semget": 64, "mq_open": 240, "inotify_init1": 294,
            "fanotify_init": 300, "open_by_handle_at": 304, "name_to_handle_at": 303, "kcmp": 312, "quotactl": 179,
            "syslog": 103, "vmsplice": 278, "personality": 135, "iopl": 172, "modify_ldt": 154, "setns": 308,
            "pidfd_getfd": 438, "landlock_restrict_self": 446, "seccomp": 317, "move_pages": 279, "acct": 163,
            "memfd_secret": 447, "io_setup": 206, "sync": 162, "lookup_dcookie": 212, "clock_settime": 227,
        }
        if os.uname().machine == "x86_64":
            for name, number in numbers.items():
                attempt(lambda: go(number, 0, 0, 0, 0, 0))
        """,
    ),
    containment(
        "newer-and-rarer-calls",
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def go(number):
            if libc.syscall(number, 0, 0, 0, 0, 0) >= 0:
                return number
            if ctypes.get_errno() not in (1, 38):
                return f"{number}: errno {ctypes.get_errno()}"
            raise PermissionError
        mounts = [161, 165, 166, 428, 429, 430, 431, 432, 433, 442, 457, 458, 467]
        scheduling = [142, 144, 203, 251, 256, 237, 238, 314, 450]
        signals = [129, 200, 297, 424, 434, 438, 448]
        files = [86, 90, 92, 94, 133, 188, 189, 197, 235, 259, 260, 261, 265, 275, 276, 280, 452, 463, 468, 469]
        kernel = [134, 139, 153, 159, 164, 168, 170, 171, 173, 174, 176, 180, 305, 313, 320, 444, 445, 453, 460]
        if os.uname().machine == "x86_64":
            for number in mounts + scheduling + signals + files + kernel:
                attempt(lambda: go(number))
        """,
    ),
    containment(
        "signals-and-injection-by-ioctl",
        """
        import fcntl
        r, w = os.pipe()
        for descriptor in (0, 1, r):
            for request in (0x5412, 0x541C, 0x5452, 0x8901, 0x8902, 0x40086602, 0x6601, 0xC0185879, 0xAE01):
                attempt(lambda: fcntl.ioctl(descriptor, request, bytes(32)))
        """,
    ),
    containment(
        "undo-own-walls",
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def go(*arguments):
            if libc.prctl(*arguments) < 0:
                raise PermissionError
        attempt(lambda: go(1, 0, 0, 0, 0))  # PR_SET_PDEATHSIG
        attempt(lambda: go(4, 1, 0, 0, 0))  # PR_SET_DUMPABLE
        attempt(lambda: go(36, 1, 0, 0, 0))  # PR_SET_CHILD_SUBREAPER
        attempt(lambda: go(22, 1, 0, 0, 0))  # PR_SET_SECCOMP
        """,
    ),
    containment(
        "leave-session",
        """
        attempt(os.setsid)
        attempt(lambda: os.setpgid(0, 0))
        """,
    ),
    containment(
        "inherited-descriptors",
        """
        for number in range(3, 1024):
            attempt(lambda: os.fstat(number))
        """,
    ),
    containment(
        "standard-streams-are-not-shared",
        """
        import stat
        for number in (0, 1, 2):
            attempt(lambda: [][0] if stat.S_ISREG(os.fstat(number).st_mode) else "not a file of this run's own")
        """,
    ),
    containment(
        "shared-memory",
        """
        from multiprocessing import shared_memory
        attempt(lambda: shared_memory.SharedMemory(create=True, size=100))
        """,
    ),
    containment(
        "multiprocessing",
        """
        import multiprocessing as m
        attempt(lambda: m.get_context('fork').Process(target=print).start())
        """,
    ),
    containment(
        "hostname-change",
        """
        import socket
        attempt(lambda: socket.sethostname('attacked'))
        """,
    ),
    containment(
        "clock-change",
        """
        import time
        attempt(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))
        """,
    ),
    containment(
        "zygote-frames-hold-no-secret",
        """
        frame = sys._getframe()
        found = ""
        while frame:
            found += repr(sorted(frame.f_locals.items(), key=str))
            frame = frame.f_back
        if "GRPO_ATTACK_" + "SECRET_VALUE" in found or "'std" + "out'" in found:
            escaped.append("secret in a frame")
        """,
    ),
    containment(
        "expected-output-not-in-memory",
        """
        import gc
        word = "he" + "ld" + chr(10)
        for item in gc.get_objects():
            if isinstance(item, dict) and item is not globals() and word in map(str, item.values()):
                escaped.append("expected output in memory")
        """,
    ),
    containment(
        "write-through-stdin",
        """
        attempt(lambda: os.lstat('@SECRET_DIR@/x') and 0)
        attempt(lambda: open('@SECRET_DIR@/x', 'x'))
        """,
    ),
    resource_abuse(
        "call-of-another-architecture",
        """
        import ctypes, mmap
        code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        code.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20; int 0x80; ret: getpid of the 32-bit kind
        address = ctypes.addressof(ctypes.c_char.from_buffer(code))
        ctypes.CFUNCTYPE(ctypes.c_int)(address)()
        print("done")
        """,
    ),
    resource_abuse(
        "call-by-x32-number",
        """
        import ctypes
        ctypes.CDLL(None).syscall(0x40000000 + 39)
        print("done")
        """
        if platform.machine() == "x86_64"
        else "pass",
    ),
]
