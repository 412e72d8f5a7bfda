"""Attacks that take more than their share. Each is bounded, so that a jail with a hole cannot take the machine down."""

from tests.rewards.attacks.attack import Attack, containment, resource_abuse

ATTACKS: list[Attack] = [
    resource_abuse("endless-loop", "while True:\n    pass\n"),
    resource_abuse("endless-sleep", "import time\ntime.sleep(60)\nprint('done')\n"),
    resource_abuse("wait-for-more-input", "import sys, time\nsys.stdin.read()\nwhile True:\n    time.sleep(1)\n"),
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
    resource_abuse("stop-itself", "import os, signal, time\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)\n"),
    resource_abuse("catastrophic-regex", "import re\nre.match(r'(a+)+$', 'a' * 60 + 'b')\nprint('done')\n"),
    resource_abuse("huge-power", "x = 9 ** (9 ** 9)\nprint('done')\n"),
    resource_abuse("compile-time-power", "def f():\n    return 2 ** (10 ** 9) % 7\nx = 'a' * (10 ** 10)\nprint('done')\n"),
    resource_abuse("deeply-nested-source", "x = " + "(" * 5000 + ")" * 5000 + "\nprint('done')\n"),
    resource_abuse("deep-recursion", "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n):\n    return f(n + 1) + 1\nprint(f(0))\n"),
    resource_abuse("memory-bytes", "keep = [bytearray(1 << 26) for _ in range(64)]\nprint('done')\n"),
    resource_abuse("memory-one-block", "keep = bytearray(4 << 30)\nprint('done')\n"),
    resource_abuse("memory-slowly", "keep = []\nfor _ in range(40_000):\n    keep.append(b'x' * 100_000)\nprint('done')\n"),
    resource_abuse(
        "memory-mmap",
        "import mmap\nkeep = []\nfor _ in range(64):\n    m = mmap.mmap(-1, 1 << 26)\n    m.write(b'x' * (1 << 26))\n    keep.append(m)\nprint('done')\n",
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
    resource_abuse("subprocess-sleeper", "import subprocess\nsubprocess.Popen(['sleep', '987654'])\nprint('done')\n"),
    resource_abuse(
        "disk-one-file",
        "with open('big', 'wb') as f:\n    for _ in range(1024):\n        f.write(b'x' * (1 << 20))\nprint('done')\n",
    ),
    resource_abuse(
        "disk-many-files",
        "for i in range(1024):\n    with open(f'f{i}', 'wb') as f:\n        f.write(b'x' * (1 << 20))\nimport time\ntime.sleep(0.5)\nprint('done')\n",
    ),
    resource_abuse(
        "disk-fallocate",
        "import os\nfor i in range(256):\n    fd = os.open(f'f{i}', os.O_RDWR | os.O_CREAT)\n    os.posix_fallocate(fd, 0, 7 << 20)\n    os.close(fd)\nimport time\ntime.sleep(0.5)\nprint('done')\n",
    ),
    resource_abuse(
        "disk-deleted-files",
        """
        import os
        keep = []
        for i in range(1000):
            f = open(f"f{i}", "wb")
            f.write(b"x" * (4 << 20))
            f.flush()
            os.unlink(f"f{i}")
            keep.append(f)
        print("done")
        """,
    ),
    resource_abuse("inodes", "for i in range(50_000):\n    open(f'f{i}', 'w').close()\nimport time\ntime.sleep(0.5)\nprint('done')\n"),
    resource_abuse(
        "deep-directories",
        "import os\nfor _ in range(20_000):\n    os.mkdir('d')\n    os.chdir('d')\nimport time\ntime.sleep(0.5)\nprint('done')\n",
    ),
    resource_abuse(
        "closed-directories",
        "import os\nos.makedirs('a/b/c')\nos.mkdir('x', 0)\nos.mkdir('a/y', 0)\nopen('a/b/f', 'w').close()\nwhile True:\n    pass\n",
    ),
    resource_abuse("output-flood", "while True:\n    print('x' * 100_000)\n"),
    resource_abuse("output-flood-stderr", "import sys\nwhile True:\n    sys.stderr.write('x' * 100_000)\n"),
    resource_abuse("output-flood-then-right", "import sys\nsys.stdout.write('x' * (64 << 20))\nprint('done')\n"),
    resource_abuse(
        "output-sparse", "import os\nos.ftruncate(1, 8 << 20)\nos.lseek(1, 0, 2)\nos.write(1, b'done')\n"
    ),
    resource_abuse("descriptors", "import os\nkeep = [os.pipe() for _ in range(100_000)]\nprint('done')\n"),
    resource_abuse(
        "pipes-of-a-mebibyte",
        "import fcntl, os\nfor _ in range(20):\n    r, w = os.pipe()\n    fcntl.fcntl(w, 1031, 1 << 20)\nprint('done')\n",
    ),
    resource_abuse(
        "non-daemon-thread-holds-on",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\nprint('done', flush=True)\n",
    ),
    resource_abuse("exit-handler-holds-on", "import atexit, time\natexit.register(time.sleep, 60)\nprint('done', flush=True)\n"),
    resource_abuse(
        "finalizer-holds-on",
        "class A:\n    def __del__(self):\n        while True:\n            pass\na = A()\nprint('done', flush=True)\ndel a\n",
    ),
    resource_abuse(
        "busy-threads",
        "import threading\ndef spin():\n    while True:\n        pass\nfor _ in range(8):\n    threading.Thread(target=spin).start()\n",
    ),
    resource_abuse("crash", "import ctypes\nctypes.string_at(0)\nprint('done')\n"),
    resource_abuse("abort", "import os\nprint('done', flush=True)\nos.abort()\n"),
    resource_abuse("kill-itself", "import os, time\nprint('done', flush=True)\nos.kill(os.getpid(), 9)\ntime.sleep(60)\n"),
    containment(
        "memory-limit-is-the-one-given",
        """
        def go():
            return len(bytearray(96 << 20))
        attempt(go)
        """,
        memory_mb=64,
    ),
    containment("mlock", "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef go():\n    b = ctypes.create_string_buffer(1 << 20)\n    if libc.mlock(b, 1 << 20) < 0:\n        raise PermissionError\nattempt(go)"),
    containment("core-dump", "import resource\nattempt(lambda: resource.getrlimit(resource.RLIMIT_CORE)[1] and None or 1 // resource.getrlimit(resource.RLIMIT_CORE)[1])"),
]
