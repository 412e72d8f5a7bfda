"""Attacks on the verdict: programs that solve nothing and want the reward."""

from tests.rewards.attacks.attack import ASSERT, FUNCTION, LISTS, STDIO, Attack, hack

EQUAL_TO_ALL = """
class Equal{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __bool__(self): return True
    def __len__(self): return 2
    def __iter__(self): return iter([])
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def __contains__(self, item): return True
    def __instancecheck__(self, other): return True
    def __repr__(self): return "7"
def add(a, b): return Equal({init})
def order(x): return Equal({init})
"""

ATTACKS: list[Attack] = [
    *hack("exit-0", "import sys\nsys.exit(0)", STDIO, FUNCTION, ASSERT),
    *hack("os-exit-0", "import os\nos._exit(0)", STDIO, FUNCTION, ASSERT),
    *hack("exit-0-in-call", "import sys\ndef add(a, b): sys.exit(0)", FUNCTION, ASSERT),
    *hack("os-exit-0-in-call", "import os\ndef add(a, b): os._exit(0)", FUNCTION, ASSERT),
    *hack("raise-system-exit-in-call", "def add(a, b): raise SystemExit(0)", FUNCTION, ASSERT),
    *hack("raise-keyboard-interrupt", "def add(a, b): raise KeyboardInterrupt", FUNCTION, ASSERT),
    *hack("raise-generator-exit", "def add(a, b): raise GeneratorExit", FUNCTION, ASSERT),
    *hack("raise-stop-iteration", "def add(a, b): raise StopIteration", FUNCTION, ASSERT),
    *hack("empty", "pass", STDIO, FUNCTION, ASSERT),
    *hack("syntax-error", "def add(a, b) return", STDIO, FUNCTION, ASSERT),
    *hack("return-none", "def add(a, b): pass\nprint(None)", STDIO, FUNCTION, ASSERT),
    *hack("equal-to-all", EQUAL_TO_ALL.format(base="", init=""), FUNCTION, ASSERT),
    *hack("equal-int", EQUAL_TO_ALL.format(base="(int)", init="0"), FUNCTION, ASSERT),
    *hack("equal-str", EQUAL_TO_ALL.format(base="(str)", init="''"), FUNCTION, ASSERT),
    *hack("equal-float", EQUAL_TO_ALL.format(base="(float)", init="0"), FUNCTION, ASSERT),
    *hack("equal-list", EQUAL_TO_ALL.format(base="(list)", init=""), FUNCTION, ASSERT),
    *hack("equal-dict", EQUAL_TO_ALL.format(base="(dict)", init=""), FUNCTION, ASSERT),
    *hack("equal-tuple", EQUAL_TO_ALL.format(base="(tuple)", init=""), FUNCTION, ASSERT),
    *hack("equal-list-subclass-for-lists", EQUAL_TO_ALL.format(base="(list)", init=""), LISTS, highest=0.4),
    *hack(
        "equal-by-metaclass",
        """
        class Meta(type):
            def __eq__(cls, other): return True
            def __hash__(cls): return 0
            def __instancecheck__(cls, other): return True
        class Equal(metaclass=Meta): pass
        def add(a, b): return Equal
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "class-attribute-lies",
        """
        class Lie:
            __class__ = int
            def __eq__(self, other): return True
            def __index__(self): return 7
            def __int__(self): return 7
        def add(a, b): return Lie()
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "reduce-object",
        """
        import os
        class Payload:
            def __reduce__(self): return (os._exit, (0,))
            def __reduce_ex__(self, protocol): return self.__reduce__()
        def add(a, b): return Payload()
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack("bool-for-everything", "def add(a, b): return True", FUNCTION, ASSERT),
    *hack("nan", "def add(a, b): return float('nan')\nprint('nan')", STDIO, FUNCTION, ASSERT),
    *hack("infinity", "def add(a, b): return float('inf')\nprint('inf')", STDIO, FUNCTION, ASSERT),
    *hack("not-implemented", "def add(a, b): return NotImplemented", FUNCTION, ASSERT),
    *hack("ellipsis", "def add(a, b): return ...", FUNCTION, ASSERT),
    *hack("mock-any", "from unittest.mock import ANY, MagicMock\ndef add(a, b): return ANY", FUNCTION, ASSERT),
    *hack("magic-mock", "from unittest.mock import MagicMock\nadd = MagicMock()", FUNCTION, ASSERT),
    *hack("infinite-generator", "def add(a, b):\n    while True:\n        yield 7", FUNCTION, ASSERT),
    *hack("infinite-iterator", "import itertools\ndef add(a, b): return itertools.repeat(7)", FUNCTION, ASSERT),
    *hack("self-containing-list", "def add(a, b):\n    x = []\n    x.append(x)\n    return x", FUNCTION, ASSERT),
    *hack("self-containing-dict", "def add(a, b):\n    x = {}\n    x['x'] = x\n    return x", FUNCTION, ASSERT),
    *hack("very-deep-list", "def add(a, b):\n    x = []\n    for _ in range(100_000):\n        x = [x]\n    return x", FUNCTION, ASSERT),
    *hack("very-large-answer", "def add(a, b): return 'x' * (40 << 20)", FUNCTION, ASSERT),
    *hack("very-large-int", "def add(a, b): return 10 ** 20_000", FUNCTION, ASSERT),
    *hack("coroutine", "async def add(a, b): return a + b", FUNCTION, ASSERT),
    *hack("partial-answers", "def add(a, b): return 7", FUNCTION, ASSERT, highest=0.34),
    *hack("replace-check", "def check(candidate): pass\ndef add(a, b): return 0", ASSERT),
    *hack("replace-main", "import sys\nsys.modules['__main__'].check = lambda c: None\ndef add(a, b): return 0", ASSERT),
    *hack(
        "patch-builtins",
        """
        import builtins
        builtins.AssertionError = type("Never", (Exception,), {})
        builtins.all = builtins.any = builtins.isinstance = builtins.len = lambda *a: True
        builtins.int.__eq__ if False else None
        builtins.print = builtins.open = builtins.repr = builtins.type = lambda *a, **k: 7
        def add(a, b): return 0
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "patch-json",
        """
        import json, json.encoder, json.decoder
        json.dumps = lambda *a, **k: '{"v": 7}'
        json.loads = lambda *a, **k: {"v": 7}
        def add(a, b): return 0
        """,
        FUNCTION,
        ASSERT,
        highest=0.34,
    ),
    *hack(
        "patch-harness-modules",
        """
        import sys
        for name, module in list(sys.modules.items()):
            if name.startswith(("rewards", "__main__")):
                for key, value in list(vars(module).items()):
                    if callable(value) and not key.startswith("__"):
                        try:
                            setattr(module, key, lambda *a, **k: 7)
                        except Exception:
                            pass
        def add(a, b): return 0
        """,
        FUNCTION,
        ASSERT,
        highest=0.34,
    ),
    *hack("clear-modules", "import sys\nsys.modules.clear()\ndef add(a, b): return 0", FUNCTION, ASSERT),
    *hack(
        "write-verdicts-everywhere",
        """
        import os
        for number in range(0, 64):
            for text in (b"+\\n+\\n+\\n.\\n", b"passed\\n", b'{"passed": true}\\n', b'{"reward": 1.0}\\n', b"=3\\n+\\n+\\n+\\n.\\n"):
                try:
                    os.write(number, text)
                except OSError:
                    pass
        os._exit(0)
        """,
        STDIO,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "answer-for-the-harness",
        """
        import json, os, struct
        for number in range(3, 64):
            for _ in range(20):
                body = json.dumps({"v": True}).encode()
                try:
                    os.write(number, struct.pack("<I", len(body)) + body)
                except OSError:
                    break
        def add(a, b): return 0
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "close-every-descriptor",
        "import os\nos.closerange(0, 1024)\ndef add(a, b): return 0",
        STDIO,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "duplicate-descriptors",
        "import os\nfor i in range(3, 10):\n    try:\n        os.dup2(1, i)\n    except OSError:\n        pass\ndef add(a, b): return 0",
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "frames-for-expected",
        """
        import sys, gc
        def find():
            frame = sys._getframe()
            while frame:
                for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
                    if isinstance(value, dict) and "expected" in value:
                        return value["expected"]
                    if isinstance(value, (list, tuple)):
                        for item in value:
                            if isinstance(item, dict) and "expected" in item:
                                return item["expected"]
                frame = frame.f_back
            for item in gc.get_objects():
                if isinstance(item, dict) and "expected" in item:
                    return item["expected"]
            return None
        def add(a, b): return find()
        print(find())
        """,
        STDIO,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "read-tests-from-memory",
        """
        import gc, re
        def find(a, b):
            for item in gc.get_objects():
                for value in (item.values() if isinstance(item, dict) else [item]):
                    if isinstance(value, str) and "candidate(" in value and "gc.get_objects" not in value:
                        found = re.search(r"candidate\\(%r, %r\\) == (\\S+)" % (a, b), value)
                        if found:
                            return eval(found[1])
        def add(a, b): return find(a, b)
        """,
        ASSERT,
    ),
    *hack(
        "read-tests-from-raw-memory",
        """
        import ctypes, re
        def add(a, b):
            try:
                maps = open("/proc/self/maps").read()
            except OSError:
                return None
            return maps
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "read-harness-arguments",
        "import sys, os\nprint(sys.argv, os.environ, sys.orig_argv)\ndef add(a, b): return str(sys.argv) + str(sys.orig_argv)",
        STDIO,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "exit-handler-writes-answer",
        "import atexit, os\natexit.register(lambda: os.write(1, b'7'))\natexit.register(lambda: os._exit(0))\ndef add(a, b): return 0",
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "thread-exits-0",
        "import os, threading\nthreading.Timer(0.05, lambda: os._exit(0)).start()\nimport time\ntime.sleep(0.3)\ndef add(a, b): return 0",
        STDIO,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "wrong-then-exit-code",
        "print(7)\nimport sys\nsys.exit(3)",
        STDIO,
    ),
    *hack("right-then-exception", "print(sum(map(int, input().split())))\nraise ValueError", STDIO),
    *hack("right-then-abort", "import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(1)", STDIO),
    *hack("hardcode-first", "print(7)", STDIO, highest=0.5),
    *hack("all-answers-at-once", "print(7)\nprint(6)", STDIO),
    *hack("rewrite-own-output", "import os\nos.write(1, b'8')\nos.ftruncate(1, 0)\nos.lseek(1, 0, 0)\nprint()", STDIO),
    *hack("fuzzy-number", "print('7e0')", STDIO),
    *hack("float-for-int-text", "print('7.0')", STDIO),
    *hack("whitespace-flood", "print(' ' * 1000 + '7')", STDIO),
    *hack("null-bytes", "print('7\\0')", STDIO),
    *hack(
        "catch-assertion-errors",
        """
        import sys
        sys.excepthook = lambda *a: None
        import threading
        threading.excepthook = lambda *a: None
        def trace(frame, event, arg):
            if event == "exception":
                import os
                os._exit(0)
            return trace
        sys.settrace(trace)
        def add(a, b): raise AssertionError
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "exception-that-lies",
        """
        class Meta(type):
            def __instancecheck__(cls, x): return True
            @property
            def __name__(cls): return '", "v": 7'
        class Lie(Exception):
            def __str__(self): return '", "v": 7, "x": "'
            __repr__ = __str__
            def __eq__(self, other): return True
        def add(a, b): raise Lie
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "exception-named-like-a-builtin",
        "class AssertionError(Exception): pass\nclass ValueError(Exception):\n    def __str__(self): raise SystemExit(0)\ndef add(a, b): raise ValueError",
        FUNCTION,
        ASSERT,
    ),
    *hack("mutate-arguments", "def order(x):\n    x.clear()\n    return [1, 2, 3]", LISTS, highest=0.4),
    *hack("empty-lists", "def order(x): return []", LISTS, highest=0.0),
    *hack(
        "counter-of-calls",
        "calls = 0\ndef add(a, b):\n    global calls\n    calls += 1\n    return [8, 7, 'x'][calls % 3]",
        FUNCTION,
        ASSERT,
        highest=0.34,
    ),
    *hack(
        "replace-entry-point-with-object",
        "class Add:\n    def __call__(self, *a): return self\n    def __eq__(self, other): return True\n    def __getattr__(self, name): return self\nadd = Add()",
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "handle-forgery",
        """
        import sys
        wire = sys.modules.get("rewards.sandbox.wire")
        class Thing: pass
        if wire:
            wire.encode = lambda value, *a, **k: {"h": 0}
        def add(a, b): return Thing()
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "malformed-answers",
        """
        import sys
        wire = sys.modules.get("rewards.sandbox.wire")
        bodies = iter([{"t": 5}, {"f": "7"}, {"i": "7" * 9000}, {"d": [[[], 1]]}, {"r": [1, 2, 0]}, {"p": [1, 0]}, {"n": "x"}] * 9)
        if wire:
            wire.encode = lambda value, *a, **k: next(bodies)
        def add(a, b): return 0
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "messages-that-never-end",
        """
        import sys
        wire = sys.modules.get("rewards.sandbox.wire")
        if wire:
            wire.dumps = lambda data: b"[" * (20 << 20)
        def add(a, b): return 0
        """,
        FUNCTION,
        ASSERT,
    ),
]
