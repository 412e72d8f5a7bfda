r"""What each LaTeX command reads: `\frac`, `\sqrt`, `\log_2`, `\sum`, matrices... The parser's table of commands."""

from __future__ import annotations

from rewards.math_ast import HALF, INFINITY, ONE, Fn, Matrix, Node, Pow, Seq, Sym, divide, integer
from rewards.math_notation import FUNCTIONS, GREEK
from rewards.math_numbers import NotMathError
from rewards.math_parser import Parser, plain

_BIG = {r"\sum": "sum", r"\prod": "prod", r"\int": "int", r"\iint": "iint", r"\iiint": "iiint", r"\oint": "oint"}
_ACCENTS = frozenset(
    [r"\hat", r"\bar", r"\tilde", r"\vec", r"\widehat", r"\widetilde", r"\dot", r"\ddot", r"\overrightarrow", r"\check"]
)
_ALPHABETS = {
    r"\mathbb": "bb",
    r"\mathcal": "cal",
    r"\mathfrak": "frak",
    r"\mathscr": "scr",
    r"\Bbb": "bb",
    r"\mathds": "bb",
}
_INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec", "csc": "arccsc",
            "sinh": "arcsinh", "cosh": "arccosh", "tanh": "arctanh"}  # fmt: skip
_ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "asinh": "arcsinh", "acosh": "arccosh",
            "atanh": "arctanh", "log": "ln", "sign": "sgn"}  # fmt: skip
_SEVERAL = frozenset(["max", "min", "gcd", "lcm"])
_MATRICES = frozenset(["pmatrix", "bmatrix", "matrix", "Bmatrix", "smallmatrix", "array", "vmatrix", "Vmatrix"])


def read_command(parser: Parser, name: str) -> Node:
    """The tree of a command whose token was just taken. Raises NotMathError where the command reads as nothing
    known."""
    word = name[1:]
    if name == r"\frac":
        top, bottom = parser.argument(), parser.argument()
        return divide(plain(top), plain(bottom))
    if name == r"\sqrt" or word == "cbrt":
        return _read_root(parser, integer(3) if word == "cbrt" else None)
    if name == r"\binom":
        return Fn("binom", (parser.argument(), parser.argument()))
    if name == r"\pi":
        return Sym("pi")
    if name == r"\infty":
        return INFINITY
    if word in FUNCTIONS:
        return _read_function(parser, word)
    if name in _BIG:
        return _read_big(parser, _BIG[name])
    if name == r"\lim":
        return _read_limit(parser)
    if name in _ALPHABETS:
        letter = parser.subscript_text()
        return parser.symbol(f"{_ALPHABETS[name]}_{letter}")
    if name in _ACCENTS or name == r"\overline":
        return Fn("accent:" + ("overline" if word == "bar" else word), (parser.argument(),))
    if name in (r"\lfloor", r"\lceil"):
        node = parser.isolated_expression()
        parser.expect(r"\r" + word[1:])
        return Fn("floor" if word == "lfloor" else "ceil", (node,))
    if name == r"\langle":
        items = parser.items(r"\rangle")
        parser.expect(r"\rangle")
        return Seq("tuple", items)
    if name == r"\|":
        return parser.bars(r"\|", "norm")
    if name == r"\{":
        items = parser.items(r"\}")
        parser.expect(r"\}")
        return Seq("set", items)
    if name == r"\begin":
        return _read_environment(parser)
    if name == r"\emptyset":
        return Seq("set", ())
    if name in (r"\natural",):
        return Sym("bb_N")
    if word in GREEK or name in (
        r"\partial",
        r"\nabla",
        r"\aleph",
        r"\Box",
        r"\triangle",
        r"\angle",
        r"\imath",
        r"\top",
    ):
        return parser.symbol(word)
    raise NotMathError(f"the command {name} is not known")


def _read_root(parser: Parser, degree: Node | None) -> Node:
    if degree is None and parser.accept("["):
        degree = parser.expression()
        parser.expect("]")
    if parser.peek().value == "(":
        parser.take()
        radicand = parser.isolated_expression()
        parser.expect(")")
    else:
        radicand = parser.argument(whole_number=True)
    return Pow(plain(radicand), HALF if degree is None else divide(ONE, degree))


def _read_function(parser: Parser, word: str) -> Node:
    word = _ALIASES.get(word, word)
    power: Node | None = None
    base: Node | None = None
    while parser.peek().value in ("^", "_"):
        if parser.take().value == "^":
            power = parser.exponent()
        else:
            base = parser.argument(whole_number=True)
    if power == integer(-1) and word in _INVERSE:
        word, power = _INVERSE[word], None
    node: Node
    if parser.peek().value == "(":
        parser.take()
        args = parser.items(")")
        parser.expect(")")
        if len(args) != 1 and word not in _SEVERAL:
            raise NotMathError(f"{word} of {len(args)} values")
    elif word in _SEVERAL and parser.accept(r"\{"):
        args = parser.items(r"\}")
        parser.expect(r"\}")
    else:
        args = (parser.bare_argument(),)
    args = tuple(plain(a) for a in args)
    if word == "exp":
        node = Pow(Sym("e"), args[0])
    elif word == "sqrt":
        node = Pow(args[0], HALF)
    elif word == "lg":
        node = Fn("log", (args[0], integer(10)))
    elif word == "ln" and base is not None:
        node = Fn("log", (args[0], base))
    elif base is not None:
        raise NotMathError(f"{word} with an index")
    else:
        node = Fn(word, args)
    return node if power is None else Pow(node, power)


def _read_big(parser: Parser, word: str) -> Node:
    """A sum, product or integral with its bounds; the body goes to the end of the product."""
    low: Node = Sym("")
    high: Node = Sym("")
    index: Node = Sym("")
    while parser.peek().value in ("^", "_"):
        if parser.take().value == "^":
            if high != Sym(""):
                raise NotMathError("two upper bounds")
            high = parser.exponent()
        elif parser.accept("{"):
            low = parser.expression()
            if parser.accept("="):
                index, low = low, parser.expression()
            elif parser.peek().value != "}":
                raise NotMathError("a bound that is no expression")
            parser.expect("}")
        else:
            low = parser.argument(whole_number=True)
    return Fn(word, (parser.product(), index, low, high))


def _read_limit(parser: Parser) -> Node:
    if not parser.accept("_") or not parser.accept("{"):
        raise NotMathError("a limit without its point")
    variable = parser.expression()
    parser.expect(r"\to")
    point = parser.expression()
    side = parser.peek().value if parser.peek().value in ("^",) else ""
    if side:
        parser.take()
        point = Fn("side", (point, Sym(parser.take().value)))
    parser.expect("}")
    return Fn("lim", (parser.product(), variable, point))


def _read_environment(parser: Parser) -> Node:
    environment = parser.subscript_text()
    if environment not in _MATRICES:
        raise NotMathError(f"the environment {environment} is not known")
    if environment == "array" and parser.peek().value == "{":
        parser.subscript_text()
    rows: list[tuple[Node, ...]] = []
    row: list[Node] = []
    while not parser.accept(r"\end"):
        if parser.peek().kind == "end":
            raise NotMathError("a matrix that does not end")
        if parser.accept(r"\hline"):
            continue
        if parser.accept(r"\\"):
            rows.append(tuple(row))
            row = []
        elif not parser.accept("&"):
            row.append(plain(parser.isolated_expression()))
    if parser.subscript_text() != environment:
        raise NotMathError("a matrix that ends as something else")
    if row:
        rows.append(tuple(row))
    if not rows or any(len(r) != len(rows[0]) for r in rows):
        raise NotMathError("a matrix with uneven rows")
    if environment in ("vmatrix",):
        return Fn("det", (Matrix(tuple(rows)),))
    return Matrix(tuple(rows))
