"""Attacks that take more than their share. Each is bounded, so that a jail with a hole cannot take the machine down."""

from tests.rewards.attacks.attack import Attack, containment, resource_abuse

ATTACKS: list[Attack] = [
    resource_abuse(
        "endless-loop",
        """
        while True:
            pass
        """,
    ),
    resource_abuse(
        "endless-sleep",
        """
        import time
        time.sleep(60)
        print('done')
        """,
    ),
    resource_abuse(
        "wait-for-more-input",
        """
        import sys, time
        sys.stdin.read()
        while True:
            time.sleep(1)
        """,
    ),
    resource_abuse(
        "ignore-every-signal",
        """
        import signal, time
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            try:
                time.sleep(1)
            except BaseException:
                pass
        """,
    ),
    resource_abuse(
        "stop-itself",
        """
        import os, signal, time
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
        """,
    ),
    resource_abuse(
        "catastrophic-regex",
        """
        import re
        re.match(r'(a+)+$', 'a' * 60 + 'b')
        print('done')
        """,
    ),
    resource_abuse(
        "huge-power",
        """
        x = 9 ** (9 ** 9)
        print('done')
        """,
    ),
    resource_abuse(
        "compile-time-power",
        """
        def f():
            return 2 ** (10 ** 9) % 7
        x = 'a' * (10 ** 10)
        print('done')
        """,
    ),
    resource_abuse("deeply-nested-source", "x = " + "(" * 5000 + ")" * 5000 + "\nprint('done')\n"),
    resource_abuse(
        "deep-recursion",
        """
        import sys
        sys.setrecursionlimit(10 ** 9)
        def f(n):
            return f(n + 1) + 1
        print(f(0))
        """,
    ),
    resource_abuse(
        "memory-bytes",
        """
        keep = [bytearray(1 << 26) for _ in range(64)]
        print('done')
        """,
    ),
    resource_abuse(
        "memory-one-block",
        """
        keep = bytearray(4 << 30)
        print('done')
        """,
    ),
    resource_abuse(
        "memory-slowly",
        """
        keep = []
        for _ in range(40_000):
            keep.append(b'x' * 100_000)
        print('done')
        """,
    ),
    resource_abuse(
        "memory-mmap",
        """
        import mmap
        keep = []
        for _ in range(64):
            m = mmap.mmap(-1, 1 << 26)
            m.write(b'x' * (1 << 26))
            keep.append(m)
        print('done')
        """,
    ),
    resource_abuse(
        "memory-shared-mmap-of-files",
        """
        import mmap, os
        keep = []
        for i in range(512):
            fd = os.open(f"f{i}", os.O_RDWR | os.O_CREAT)
            os.ftruncate(fd, 8 << 20)
            m = mmap.mmap(fd, 8 << 20)
            m.write(b"x" * (8 << 20))
            os.close(fd)
            keep.append(m)
        print("done")
        """,
    ),
    resource_abuse(
        "memory-many-threads",
        """
        import threading, time
        threading.stack_size(32 << 20)
        def hold():
            keep = bytearray(64 << 20)
            time.sleep(60)
        for _ in range(200):
            threading.Thread(target=hold, daemon=True).start()
        time.sleep(0.5)
        print("done")
        """,
    ),
    resource_abuse(
        "thread-bomb",
        """
        import threading, time
        threading.stack_size(32 << 10)
        def wait():
            time.sleep(60)
        for _ in range(3000):
            threading.Thread(target=wait, daemon=True).start()
        print("done")
        """,
    ),
    resource_abuse(
        "fork-bomb",
        """
        import os, time
        for _ in range(200):
            if os.fork() == 0:
                time.sleep(60)
        print("done")
        """,
    ),
    resource_abuse(
        "subprocess-sleeper",
        """
        import subprocess
        subprocess.Popen(['sleep', '987654'])
        print('done')
        """,
    ),
    resource_abuse(
        "output-flood",
        """
        while True:
            print('x' * 100_000)
        """,
    ),
    resource_abuse(
        "output-flood-stderr",
        """
        import sys
        while True:
            sys.stderr.write('x' * 100_000)
        """,
    ),
    resource_abuse(
        "output-flood-then-right",
        """
        import sys
        sys.stdout.write('x' * (64 << 20))
        print('done')
        """,
    ),
    resource_abuse(
        "output-sparse",
        """
        import os
        os.ftruncate(1, 8 << 20)
        os.lseek(1, 0, 2)
        os.write(1, b'done')
        """,
    ),
    resource_abuse(
        "descriptors",
        """
        import os
        keep = [os.pipe() for _ in range(100_000)]
        print('done')
        """,
    ),
    resource_abuse(
        "pipes-of-a-mebibyte",
        """
        import fcntl, os
        for _ in range(20):
            r, w = os.pipe()
            fcntl.fcntl(w, 1031, 1 << 20)
        print('done')
        """,
    ),
    resource_abuse(
        "non-daemon-thread-holds-on",
        """
        import threading, time
        threading.Thread(target=time.sleep, args=(60,)).start()
        print('done', flush=True)
        """,
    ),
    resource_abuse(
        "exit-handler-holds-on",
        """
        import atexit, time
        atexit.register(time.sleep, 60)
        print('done', flush=True)
        """,
    ),
    resource_abuse(
        "finalizer-holds-on",
        """
        class A:
            def __del__(self):
                while True:
                    pass
        a = A()
        print('done', flush=True)
        del a
        """,
    ),
    resource_abuse(
        "busy-threads",
        """
        import threading
        def spin():
            while True:
                pass
        for _ in range(8):
            threading.Thread(target=spin).start()
        """,
    ),
    resource_abuse(
        "crash",
        """
        import ctypes
        ctypes.string_at(0)
        print('done')
        """,
    ),
    resource_abuse(
        "abort",
        """
        import os
        print('done', flush=True)
        os.abort()
        """,
    ),
    resource_abuse(
        "kill-itself",
        """
        import os, time
        print('done', flush=True)
        os.kill(os.getpid(), 9)
        time.sleep(60)
        """,
    ),
    resource_abuse(
        "huge-exception-message",
        """
        class Loud(Exception):
            def __str__(self):
                return "x" * (256 << 20)
        raise Loud
        """,
    ),
    resource_abuse(
        "exit-status-with-a-method",
        """
        class Status:
            def __str__(self):
                while True:
                    pass
        raise SystemExit(Status())
        """,
    ),
    resource_abuse(
        "timers-and-queues",
        """
        import ctypes, select
        libc = ctypes.CDLL(None)
        spot = ctypes.c_void_p()
        for _ in range(200_000):
            libc.timer_create(0, None, ctypes.byref(spot))
        keep = [select.epoll() for _ in range(1000)]
        print("done")
        """,
    ),
    resource_abuse(
        "output-of-many-tokens",
        """
        import os
        os.write(1, b"1 " * (4 << 20))
        """,
    ),
    containment(
        "memory-limit-is-the-one-given",
        """
        def go():
            return len(bytearray(96 << 20))
        attempt(go)
        """,
        memory_mb=64,
    ),
    containment(
        "mlock",
        """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        def go():
            b = ctypes.create_string_buffer(1 << 20)
            if libc.mlock(b, 1 << 20) < 0:
                raise PermissionError
        attempt(go)
        """,
    ),
    containment(
        "core-dump",
        """
        import resource
        attempt(lambda: 1 // resource.getrlimit(resource.RLIMIT_CORE)[1])
        """,
    ),
]
