"""Attacks on the verdict by what a program answers: it solves nothing and wants the reward."""

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
    *hack(
        "exit-0",
        """
        import sys
        sys.exit(0)
        """,
        STDIO,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "os-exit-0",
        """
        import os
        os._exit(0)
        """,
        STDIO,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "exit-0-in-call",
        """
        import sys
        def add(a, b): sys.exit(0)
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "os-exit-0-in-call",
        """
        import os
        def add(a, b): os._exit(0)
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack("raise-system-exit-in-call", "def add(a, b): raise SystemExit(0)", FUNCTION, ASSERT),
    *hack("raise-keyboard-interrupt", "def add(a, b): raise KeyboardInterrupt", FUNCTION, ASSERT),
    *hack("raise-generator-exit", "def add(a, b): raise GeneratorExit", FUNCTION, ASSERT),
    *hack("raise-stop-iteration", "def add(a, b): raise StopIteration", FUNCTION, ASSERT),
    *hack("empty", "pass", STDIO, FUNCTION, ASSERT),
    *hack("syntax-error", "def add(a, b) return", STDIO, FUNCTION, ASSERT),
    *hack(
        "return-none",
        """
        def add(a, b): pass
        print(None)
        """,
        STDIO,
        FUNCTION,
        ASSERT,
    ),
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
    *hack(
        "nan",
        """
        def add(a, b): return float('nan')
        print('nan')
        """,
        STDIO,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "infinity",
        """
        def add(a, b): return float('inf')
        print('inf')
        """,
        STDIO,
        FUNCTION,
        ASSERT,
    ),
    *hack("not-implemented", "def add(a, b): return NotImplemented", FUNCTION, ASSERT),
    *hack("ellipsis", "def add(a, b): return ...", FUNCTION, ASSERT),
    *hack(
        "mock-any",
        """
        from unittest.mock import ANY, MagicMock
        def add(a, b): return ANY
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "magic-mock",
        """
        from unittest.mock import MagicMock
        add = MagicMock()
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "infinite-generator",
        """
        def add(a, b):
            while True:
                yield 7
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "infinite-iterator",
        """
        import itertools
        def add(a, b): return itertools.repeat(7)
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "self-containing-list",
        """
        def add(a, b):
            x = []
            x.append(x)
            return x
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "self-containing-dict",
        """
        def add(a, b):
            x = {}
            x['x'] = x
            return x
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack(
        "very-deep-list",
        """
        def add(a, b):
            x = []
            for _ in range(100_000):
                x = [x]
            return x
        """,
        FUNCTION,
        ASSERT,
    ),
    *hack("very-large-answer", "def add(a, b): return 'x' * (40 << 20)", FUNCTION, ASSERT),
    *hack("very-large-int", "def add(a, b): return 10 ** 20_000", FUNCTION, ASSERT),
    *hack("coroutine", "async def add(a, b): return a + b", FUNCTION, ASSERT),
    *hack("partial-answers", "def add(a, b): return 7", FUNCTION, ASSERT, highest=0.34),
]
