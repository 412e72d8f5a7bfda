"""Attacks that reach for files: secrets, the environment, /proc, the runtime, the next run."""

from tests.rewards.attacks.attack import containment

ATTACKS = [
    containment("read-passwd", "attempt(lambda: open('/etc/passwd').read())"),
    containment("read-shadow", "attempt(lambda: open('/etc/shadow').read())"),
    containment("read-secret-in-home", "attempt(lambda: open('@SECRET_FILE@').read())"),
    containment("read-secret-by-raw-open", "attempt(lambda: os.open('@SECRET_FILE@', os.O_RDONLY))"),
    containment(
        "read-secret-by-path-descriptor", "attempt(lambda: os.open('@SECRET_FILE@', os.O_RDONLY | os.O_NONBLOCK))"
    ),
    containment(
        "read-secret-by-a-descriptor-of-its-path-alone",
        """
        try:
            path = os.open('@SECRET_FILE@', os.O_PATH)
        except OSError:
            path = 3
        attempt(lambda: os.read(path, 1))
        attempt(lambda: os.pread(path, 1, 0))
        attempt(lambda: open(f'/proc/self/fd/{path}').read())
        attempt(lambda: open(f'/dev/fd/{path}').read())
        attempt(lambda: os.sendfile(1, path, 0, 10))
        attempt(lambda: os.copy_file_range(path, 1, 10))
        """,
    ),
    containment(
        "read-secret-by-mapping",
        """
        import mmap
        attempt(lambda: mmap.mmap(os.open('@SECRET_FILE@', os.O_RDONLY), 0, prot=mmap.PROT_READ)[:])
        attempt(lambda: mmap.mmap(os.open('@SECRET_FILE@', os.O_PATH), 1, prot=mmap.PROT_READ)[:])
        """,
    ),
    containment(
        "load-secret-as-code",
        """
        import ctypes, importlib.util, runpy
        attempt(lambda: ctypes.CDLL('@SECRET_DIR@/libattack.so'))
        attempt(lambda: runpy.run_path('@SECRET_FILE@'))
        attempt(lambda: importlib.util.spec_from_file_location('x', '@SECRET_FILE@').loader.get_data('@SECRET_FILE@'))
        attempt(lambda: compile(open('@REPOSITORY@/rewards/types.py').read(), 'x', 'exec'))
        """,
    ),
    containment(
        "odd-names-in-scratch",
        r"""
        for name in (b"\xff\xfe", b"a\nb", b"-rf", b"x" * 255, b"up-0", b"up-1", b"\x1b[2J"):
            open(name, "w").close()
            os.mkdir(b"d" + name[:200])
            os.symlink(b"/etc/passwd", b"l" + name[:200])
        os.symlink("loop", "loop")
        attempt(lambda: open("loop").read())
        attempt(lambda: open(b"lup-0").read())
        """,
    ),
    containment(
        "read-secret-by-symlink",
        """
        def go():
            os.symlink('@SECRET_FILE@', 'link')
            return open('link').read()
        attempt(go)
        """,
    ),
    containment(
        "read-secret-by-directory-symlink",
        """
        def go():
            os.symlink('@SECRET_DIR@', 'dir')
            return os.listdir('dir')
        attempt(go)
        """,
    ),
    containment("read-secret-by-hardlink", "attempt(lambda: os.link('@SECRET_FILE@', 'hard'))"),
    containment(
        "read-secret-by-relative-path",
        "attempt(lambda: open('../' * 20 + '@SECRET_FILE@'.lstrip('/')).read())",
    ),
    containment(
        "read-secret-after-chdir",
        """
        def go():
            os.chdir('@SECRET_DIR@')
            return open(os.path.basename('@SECRET_FILE@')).read()
        attempt(go)
        """,
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
    containment(
        "chmod-inside",
        """
        def go():
            open('f', 'w').close()
            os.chmod('f', 0o4755)
        attempt(go)
        """,
    ),
    containment("chown-outside", "attempt(lambda: os.chown('@WRITABLE_FILE@', os.getuid(), os.getgid()))"),
    containment("utime-outside", "attempt(lambda: os.utime('@WRITABLE_FILE@', (0, 0)))"),
    containment("xattr-outside", "attempt(lambda: os.setxattr('@WRITABLE_FILE@', 'user.attack', b'1'))"),
    containment("write-standard-library", "attempt(lambda: open(os.__file__, 'a'))"),
    containment(
        "plant-standard-library-module",
        "attempt(lambda: open(os.path.join(os.path.dirname(os.__file__), 'grpo_attack.py'), 'w'))",
    ),
    containment(
        "mknod-device",
        """
        import stat
        attempt(lambda: os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(8, 0)))
        """,
    ),
    containment("mkfifo", "attempt(lambda: os.mkfifo('fifo'))"),
    containment(
        "open-raw-disk",
        """
        for name in ('sda', 'vda', 'nvme0n1', 'mem', 'kmsg'):
            attempt(lambda: open('/dev/' + name, 'rb'))
        """,
    ),
    containment(
        "open-terminal",
        """
        attempt(lambda: open('/dev/tty', 'w'))
        attempt(lambda: open('/dev/ptmx', 'rb'))
        """,
    ),
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
        """
        for pid in ('self', os.getppid(), '@TRAINER_PID@', 1):
            attempt(lambda: open(f'/proc/{pid}/environ', 'rb').read())
        """,
    ),
    containment(
        "proc-command-lines",
        """
        attempt(lambda: os.listdir('/proc'))
        attempt(lambda: open('/proc/@TRAINER_PID@/cmdline').read())
        """,
    ),
    containment(
        "proc-own-memory",
        """
        attempt(lambda: open('/proc/self/mem', 'rb'))
        attempt(lambda: open('/proc/self/maps').read())
        """,
    ),
    containment("proc-trainer-memory", "attempt(lambda: open('/proc/@TRAINER_PID@/mem', 'rb'))"),
    containment("proc-trainer-descriptors", "attempt(lambda: os.listdir('/proc/@TRAINER_PID@/fd'))"),
    containment(
        "proc-trainer-root",
        """
        attempt(lambda: os.listdir('/proc/@TRAINER_PID@/root'))
        attempt(lambda: os.listdir('/proc/1/root'))
        """,
    ),
    containment("proc-trainer-cwd-link", "attempt(lambda: os.readlink('/proc/@TRAINER_PID@/cwd'))"),
    containment(
        "sysfs",
        """
        attempt(lambda: os.listdir('/sys'))
        attempt(lambda: open('/sys/kernel/uevent_seqnum').read())
        """,
    ),
    containment("cgroup-files", "attempt(lambda: os.listdir('/sys/fs/cgroup'))"),
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
        sys.planted = [{"planted": "planted-" + "in-memory"}]
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
        import builtins, gc, json
        trace = "-".join(("planted", "in", "memory"))
        for item in gc.get_objects():
            inside = item.values() if isinstance(item, dict) else item if isinstance(item, list | tuple) else ()
            if item is not globals() and any(isinstance(text, str) and text == trace for text in inside):
                escaped.append("the memory of an earlier run")
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
