"""Attacks that reach for what is outside: files, network, processes, memory, the next run."""

from tests.rewards.attacks.attack import containment

ATTACKS = [
    containment("read-passwd", "attempt(lambda: open('/etc/passwd').read())"),
    containment("read-shadow", "attempt(lambda: open('/etc/shadow').read())"),
    containment("read-secret-in-home", "attempt(lambda: open('@SECRET_FILE@').read())"),
    containment("read-secret-by-raw-open", "attempt(lambda: os.open('@SECRET_FILE@', os.O_RDONLY))"),
    containment("read-secret-by-path-descriptor", "attempt(lambda: os.open('@SECRET_FILE@', os.O_RDONLY | os.O_NONBLOCK))"),
    containment(
        "read-secret-by-symlink",
        "def go():\n    os.symlink('@SECRET_FILE@', 'link')\n    return open('link').read()\nattempt(go)",
    ),
    containment(
        "read-secret-by-directory-symlink",
        "def go():\n    os.symlink('@SECRET_DIR@', 'dir')\n    return os.listdir('dir')\nattempt(go)",
    ),
    containment("read-secret-by-hardlink", "attempt(lambda: os.link('@SECRET_FILE@', 'hard'))"),
    containment(
        "read-secret-by-relative-path",
        "attempt(lambda: open('../' * 20 + '@SECRET_FILE@'.lstrip('/')).read())",
    ),
    containment(
        "read-secret-after-chdir",
        "def go():\n    os.chdir('@SECRET_DIR@')\n    return open(os.path.basename('@SECRET_FILE@')).read()\nattempt(go)",
    ),
    containment("list-root", "attempt(lambda: os.listdir('/'))"),
    containment("list-home", "attempt(lambda: os.listdir('@HOME@'))"),
    containment("list-tmp", "attempt(lambda: os.listdir('/tmp'))"),
    containment("read-repository", "attempt(lambda: open('@REPOSITORY@/rewards/registry.py').read())"),
    containment("import-trainer-package", "attempt(lambda: open('@REPOSITORY@/rewards/code_reward.py').read())"),
    containment("write-tmp", "attempt(lambda: open('/tmp/grpo-attack-was-here', 'w'))"),
    containment("write-dev-shm", "attempt(lambda: open('/dev/shm/grpo-attack-was-here', 'w'))"),
    containment("write-var-tmp", "attempt(lambda: open('/var/tmp/grpo-attack-was-here', 'w'))"),
    containment("overwrite-world-writable", "attempt(lambda: open('@WRITABLE_FILE@', 'w'))"),
    containment("append-world-writable", "attempt(lambda: open('@WRITABLE_FILE@', 'a'))"),
    containment("truncate-world-writable", "attempt(lambda: os.truncate('@WRITABLE_FILE@', 0))"),
    containment("truncate-by-read-open", "attempt(lambda: os.open('@WRITABLE_FILE@', os.O_RDONLY | os.O_TRUNC))"),
    containment("unlink-outside", "attempt(lambda: os.unlink('@WRITABLE_FILE@'))"),
    containment("rename-outside", "attempt(lambda: os.rename('@WRITABLE_FILE@', '@WRITABLE_FILE@.moved'))"),
    containment("rename-into-scratch", "attempt(lambda: os.rename('@WRITABLE_FILE@', 'mine'))"),
    containment("mkdir-outside", "attempt(lambda: os.mkdir('@SECRET_DIR@/new'))"),
    containment("chmod-outside", "attempt(lambda: os.chmod('@WRITABLE_FILE@', 0o600))"),
    containment("chmod-inside", "def go():\n    open('f', 'w').close()\n    os.chmod('f', 0o4755)\nattempt(go)"),
    containment("chown-outside", "attempt(lambda: os.chown('@WRITABLE_FILE@', os.getuid(), os.getgid()))"),
    containment("utime-outside", "attempt(lambda: os.utime('@WRITABLE_FILE@', (0, 0)))"),
    containment(
        "xattr-outside", "attempt(lambda: os.setxattr('@WRITABLE_FILE@', 'user.attack', b'1'))"
    ),
    containment("write-standard-library", "attempt(lambda: open(os.__file__, 'a'))"),
    containment(
        "plant-standard-library-module",
        "attempt(lambda: open(os.path.join(os.path.dirname(os.__file__), 'grpo_attack.py'), 'w'))",
    ),
    containment("mknod-device", "import stat\nattempt(lambda: os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(8, 0)))"),
    containment("mkfifo", "attempt(lambda: os.mkfifo('fifo'))"),
    containment("open-raw-disk", "for name in ('sda', 'vda', 'nvme0n1', 'mem', 'kmsg'):\n    attempt(lambda: open('/dev/' + name, 'rb'))"),
    containment("open-terminal", "attempt(lambda: open('/dev/tty', 'w'))\nattempt(lambda: open('/dev/ptmx', 'rb'))"),
    containment("environment-secret", "attempt(lambda: os.environ['GRPO_ATTACK_SECRET'])"),
    containment(
        "environment-by-libc",
        """
        import ctypes
        libc = ctypes.CDLL(None)
        libc.getenv.restype = ctypes.c_char_p
        def go():
            if libc.getenv(b"GRPO_ATTACK_SECRET") is None:
                raise KeyError
        attempt(go)
        """,
    ),
    containment(
        "environment-of-parent",
        "for pid in ('self', os.getppid(), '@TRAINER_PID@', 1):\n    attempt(lambda: open(f'/proc/{pid}/environ', 'rb').read())",
    ),
    containment("proc-command-lines", "attempt(lambda: os.listdir('/proc'))\nattempt(lambda: open('/proc/@TRAINER_PID@/cmdline').read())"),
    containment("proc-own-memory", "attempt(lambda: open('/proc/self/mem', 'rb'))\nattempt(lambda: open('/proc/self/maps').read())"),
    containment("proc-trainer-memory", "attempt(lambda: open('/proc/@TRAINER_PID@/mem', 'rb'))"),
    containment("proc-trainer-descriptors", "attempt(lambda: os.listdir('/proc/@TRAINER_PID@/fd'))"),
    containment("proc-trainer-root", "attempt(lambda: os.listdir('/proc/@TRAINER_PID@/root'))\nattempt(lambda: os.listdir('/proc/1/root'))"),
    containment("proc-trainer-cwd-link", "attempt(lambda: os.readlink('/proc/@TRAINER_PID@/cwd'))"),
    containment("sysfs", "attempt(lambda: os.listdir('/sys'))\nattempt(lambda: open('/sys/kernel/uevent_seqnum').read())"),
    containment("cgroup-files", "attempt(lambda: os.listdir('/sys/fs/cgroup'))"),
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
    containment("signal-trainer", "import signal\nfor number in (0, 15, 9):\n    attempt(lambda: os.kill(@TRAINER_PID@, number))"),
    containment("signal-parent", "attempt(lambda: os.kill(os.getppid() or @TRAINER_PID@, 9))"),
    containment("signal-everyone", "attempt(lambda: os.kill(-1, 9))\nattempt(lambda: os.kill(0, 9))"),
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
    containment("pidfd", "attempt(lambda: os.pidfd_open(@TRAINER_PID@))\nattempt(lambda: os.pidfd_open(os.getpid()))"),
    containment("priority-of-others", "attempt(lambda: os.setpriority(os.PRIO_USER, 0, 19))\nattempt(lambda: os.nice(5))"),
    containment("affinity-of-others", "attempt(lambda: os.sched_setaffinity(@TRAINER_PID@, {0}))"),
    containment("limits-of-others", "import resource\nattempt(lambda: resource.prlimit(@TRAINER_PID@, resource.RLIMIT_NOFILE))"),
    containment(
        "raise-own-limits",
        """
        import resource
        for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CPU):
            attempt(lambda: resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)))
        """,
    ),
    containment(
        "tcp-connect", "import socket\nattempt(lambda: socket.create_connection(('127.0.0.1', @PORT@), 1))"
    ),
    containment(
        "tcp-listen",
        """
        import socket
        def go():
            s = socket.socket()
            s.bind(("127.0.0.1", 0))
            s.listen()
        attempt(go)
        """,
    ),
    containment("udp", "import socket\nattempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@)))"),
    containment("ipv6", "import socket\nattempt(lambda: socket.socket(socket.AF_INET6))"),
    containment("raw-socket", "import socket\nattempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))"),
    containment("packet-socket", "import socket\nattempt(lambda: socket.socket(17, socket.SOCK_RAW))"),
    containment("netlink-socket", "import socket\nattempt(lambda: socket.socket(16, socket.SOCK_RAW))"),
    containment("vsock", "import socket\nattempt(lambda: socket.socket(40, socket.SOCK_STREAM))"),
    containment(
        "unix-socket",
        """
        import socket
        def go():
            s = socket.socket(socket.AF_UNIX)
            s.connect("@UNIX_SOCKET@")
        attempt(go)
        """,
    ),
    containment(
        "abstract-socket",
        r"""
        import socket
        def go():
            s = socket.socket(socket.AF_UNIX)
            s.connect("\0@ABSTRACT_SOCKET@")
        attempt(go)
        """,
    ),
    containment(
        "socketpair-turned-outwards",
        r"""
        import socket
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        attempt(lambda: a.connect("\0@ABSTRACT_SOCKET@"))
        attempt(lambda: a.sendto(b"x", "\0@ABSTRACT_SOCKET@"))
        attempt(lambda: a.sendmsg([b"x"], [], 0, "\0@ABSTRACT_SOCKET@"))
        attempt(lambda: a.bind("here"))
        """,
    ),
    containment("name-resolution", "import socket\nattempt(lambda: socket.getaddrinfo('example.com', 80))"),
    containment("subprocess", "import subprocess\nattempt(lambda: subprocess.run(['/bin/true']))"),
    containment("os-system", "if os.system('true') == 0:\n    escaped.append('shell')"),
    containment("fork", "attempt(os.fork)\nattempt(os.forkpty)"),
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
        "attempt(lambda: os.setuid(0) or os.getuid() == 0 and open('/etc/shadow'))\nattempt(lambda: os.setresuid(0, 0, 0))\nattempt(lambda: os.setgroups([0]))",
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
            "io_uring_setup": 425, "bpf": 321, "perf_event_open": 298, "keyctl": 250, "add_key": 248, "userfaultfd": 323,
            "memfd_create": 319, "process_madvise": 440, "kexec_load": 246, "init_module": 175, "reboot": 169,
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
    containment("leave-session", "attempt(os.setsid)\nattempt(lambda: os.setpgid(0, 0))"),
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
    containment("multiprocessing", "import multiprocessing as m\nattempt(lambda: m.get_context('fork').Process(target=print).start())"),
    containment("hostname-change", "import socket\nattempt(lambda: socket.sethostname('attacked'))"),
    containment("clock-change", "import time\nattempt(lambda: time.clock_settime(time.CLOCK_REALTIME, 0))"),
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
            if isinstance(item, dict) and any(value == word for value in list(item.values()) if type(value) is str and item is not globals()):
                escaped.append("expected output in memory")
        """,
    ),
    containment("write-through-stdin", "attempt(lambda: os.lstat('@SECRET_DIR@/x') and 0)\nattempt(lambda: open('@SECRET_DIR@/x', 'x'))"),
]

PLANT_AND_LOOK = (
    containment(
        "persistence-plant",
        """
        import builtins, json, random
        open("planted", "w").write("1")
        os.mkdir("planted-dir")
        os.umask(0)
        json.planted = builtins.planted = os.environ["PLANTED"] = "1"
        sys.path.insert(0, os.getcwd())
        for folder in ("/sandbox", "/tmp", os.path.dirname(os.getcwd()), os.path.dirname(os.__file__)):
            try:
                open(os.path.join(folder, "planted-outside"), "w").write("1")
            except OSError:
                continue
            if folder not in (os.getcwd(),):
                escaped.append(folder)
        """,
    ),
    containment(
        "persistence-look",
        """
        import builtins, json
        if os.path.exists("planted") or os.path.exists("planted-dir") or os.listdir("."):
            escaped.append("a file of an earlier run")
        if getattr(json, "planted", "") or getattr(builtins, "planted", "") or "PLANTED" in os.environ:
            escaped.append("an object of an earlier run")
        for folder in ("/sandbox", "/tmp", os.path.dirname(os.getcwd()), os.path.dirname(os.__file__)):
            if os.path.exists(os.path.join(folder, "planted-outside")):
                escaped.append("a file of an earlier run outside")
        """,
    ),
)
"""One after the other in the same sandbox: the second finds nothing of the first."""
