"""Tokens to a tree: a Pratt parser for expressions. Bounded in depth and in nodes; it never evaluates anything large.

What joins expressions into answers (lists, relations, sets, units) is in `math_answer`.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from rewards.latex import Token
from rewards.math_ast import (
    ONE,
    Fn,
    Interval,
    Mul,
    Node,
    Num,
    Pow,
    Quantity,
    Seq,
    Sym,
    add,
    divide,
    integer,
    multiply,
    negate,
)  # fmt: skip
from rewards.math_notation import GREEK, NO_FACTORS
from rewards.math_numbers import NotMathError, read_number
from rewards.math_token_reader import TokenReader

MAX_DEPTH = 60
_BARRIER = frozenset([")", "]", "}", r"\}", ",", ";", "&", r"\\", r"\rangle", r"\rfloor", r"\rceil", r"\end", ":"])
_APPLIED = frozenset(["f", "g", "h", "F", "G", "phi", "psi", "Gamma", "zeta", "Phi", "Psi", "varphi", "W", "P", "E"])


class Parser(TokenReader):
    """`expression` reads as far as an expression goes."""

    def __init__(self, tokens: list[Token], read_command: Callable[[Parser, str], Node]) -> None:
        super().__init__(tokens)
        self.read_command = read_command
        self.depth = 0
        self.open_bars: list[str] = []

    # Sums, products, powers

    def expression(self) -> Node:
        """A sum of products."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMathError(f"nested deeper than {MAX_DEPTH}")
        left = self._leading_sign()
        while (value := self.peek().value) in ("+", "-", r"\pm", r"\mp") and self.peek().kind in ("op", "cmd"):
            self.take()
            right = self.product()
            left = _join(left, right, value)
            self.count(left)
        self.depth -= 1
        return left

    def _leading_sign(self) -> Node:
        if self.accept("+"):
            return self._leading_sign_limited()
        if self.accept("-"):
            return negate(self.product())
        for sign in (r"\pm", r"\mp"):
            if self.accept(sign):
                return Fn(sign[1:], (self.product(),))
        return self.product()

    def _leading_sign_limited(self) -> Node:
        return negate(self.product()) if self.accept("-") else self.product()

    def product(self) -> Node:
        left = self._signed_factor()
        while True:
            token = self.peek()
            if token.value in ("*", r"\cdot", r"\times") and token.kind in ("op", "cmd"):
                self.take()
                right = self._signed_factor()
                if isinstance(right, Quantity) or isinstance(left, Quantity):
                    left, right = plain(left), plain(right)
                left = multiply(left, right)
            elif token.value in ("/", r"\div"):
                self.take()
                left = divide(plain(left), plain(self._signed_factor()))
            elif self._starts_factor(left):
                left = multiply(plain(left), plain(self._factor()))
            else:
                return left
            self.count(left)

    def _signed_factor(self) -> Node:
        if self.accept("-"):
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise NotMathError(f"nested deeper than {MAX_DEPTH}")
            result = negate(self._signed_factor())
            self.depth -= 1
            return result
        self.accept("+")
        return self._factor()

    def _starts_factor(self, left: Node) -> bool:
        """Whether a factor follows without a sign of multiplication."""
        token = self.peek()
        match token.kind:
            case "sym":
                return True
            case "num":
                # "2 3" is no product; "2^6 3^5" and "x 3" are. "(2)3" is written by nobody who means it.
                last = left.factors[-1] if isinstance(left, Mul) else left
                return not isinstance(last, Num)
            case "op":
                if token.value == "|":
                    return "|" not in self.open_bars
                return token.value in ("(", "{")
            case "cmd":
                name = token.value
                if name == r"\|":
                    return r"\|" not in self.open_bars
                return name[1:].isalpha() and name not in NO_FACTORS
            case _:
                return False

    def _factor(self) -> Node:
        """An atom with its postfixes and its power."""
        node = self._atom()
        while True:
            token = self.peek()
            if token.value == "!" and token.kind == "op":
                self.take()
                node = Fn("fact2" if self.accept("!") else "fact", (node,))
            elif token.value == "'" and isinstance(node, Sym):
                self.take()
                node = Sym(node.name + "'")
                if self.peek().value == "(" or self.peek().value == "'":
                    node = self._maybe_call(node.name) if self.peek().value == "(" else node
            elif token.value == "^":
                self.take()
                if self._is_degree_sign():
                    node = Quantity(node, "deg")
                    continue
                if self.peek().value in (r"\top", r"\intercal") or (
                    self.peek().value == "{" and self.peek(1).value == r"\top"
                ):
                    self.argument()
                    node = Fn("transpose", (node,))
                    continue
                primes = 0
                while self.accept(r"\prime"):
                    primes += 1
                if primes and isinstance(node, Sym):
                    node = Sym(node.name + "'" * primes)
                    continue
                exponent = self.exponent()
                if exponent == Sym("T") and _is_capital(node):
                    node = Fn("transpose", (node,))
                elif (
                    exponent == integer(-1)
                    and isinstance(node, Sym)
                    and node.name in _APPLIED
                    and self.peek().value == "("
                ):
                    node = self._maybe_call(node.name + "^-1")
                elif exponent == ONE and isinstance(node, Sym) and (node.name.isupper() or "_" in node.name):
                    # S^1 is the circle, not S.
                    node = Sym(node.name + "^1")
                else:
                    node = Pow(node, exponent)
            elif token.value == r"\circ" and isinstance(node, Num):
                self.take()
                node = Quantity(node, "deg")
            elif token.value == "%":
                self.take()
                node = Quantity(node, "%")
            elif token.value == "_" and isinstance(node, Num):
                self.take()
                node = Fn("based", (node, self.argument()))
            else:
                return self.count(node)

    def _is_degree_sign(self) -> bool:
        if self.peek().value in (r"\circ", "o") and self.peek().kind in ("cmd",):
            self.take()
            return True
        if self.peek().value == "{" and self.peek(1).value == r"\circ" and self.peek(2).value == "}":
            self.position += 3
            return True
        return False

    def exponent(self) -> Node:
        """What stands after ^: a group, a signed atom, or (right associative) another power."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NotMathError(f"nested deeper than {MAX_DEPTH}")
        negative = self.accept("-")
        self.accept("+")
        if self.peek().value == "*" or self.peek().value == r"\ast":
            self.take()
            node: Node = Sym("*")
        else:
            is_group = self.peek().value == "{"
            node = self.argument(whole_number=True)
            if is_group and self.peek().value == "^":
                raise NotMathError("two exponents")
        if self.accept("^"):
            node = Pow(node, self.exponent())
        self.depth -= 1
        return negate(node) if negative else node

    def argument(self, *, whole_number: bool = False) -> Node:
        r"""The argument of a command: a group, or one token (of a number only its first digit: \frac12)."""
        if self.accept("{"):
            node = self.expression()
            self.expect("}")
            return node
        token = self.peek()
        if token.kind == "num" and not whole_number and len(token.value) > 1 and token.value.isdigit():
            self.tokens[self.position] = Token("num", token.value[1:])
            return integer(int(token.value[0]))
        return self._atom()

    # Atoms

    def _atom(self) -> Node:
        token = self.take()
        match token.kind:
            case "num":
                return read_number(self, token)
            case "sym":
                return self.symbol(token.value)
            case "cmd":
                return self._command(token.value)
            case "op" if token.value == "{":
                node = self.expression()
                if self.accept(r"\choose"):
                    node = Fn("binom", (node, self.expression()))
                self.expect("}")
                return node
            case "op" if token.value in ("(", "["):
                return self._bracket(token.value)
            case "op" if token.value == "|":
                return self.bars("|", "abs")
            case _:
                raise NotMathError(f"no expression starts with {token.value!r}")

    def symbol(self, name: str) -> Node:
        if self.peek().value == "_":
            self.take()
            name = f"{name}_{self._subscript()}"
            if self.peek().value == "'" or self.peek().value == "^":
                return Sym(name)
        return self._maybe_call(name)

    def _subscript(self) -> str:
        start = self.position
        if self.accept("{"):
            depth = 1
            while depth and self.peek().kind != "end":
                value = self.take().value
                depth += {"{": 1, "}": -1}.get(value, 0)
            return "".join(t.value for t in self.tokens[start + 1 : self.position - 1])
        return self.take().value

    def _maybe_call(self, name: str) -> Node:
        """`f(x)`: a call if the letter is used for functions, or if the brackets hold several values."""
        if self.peek().value != "(" or self.peek().kind != "op":
            return Sym(name)
        letter = name.split("_")[0].split("^")[0].rstrip("'")
        start, bars = self.position, list(self.open_bars)
        self.take()
        if letter in _APPLIED or "'" in name or self._holds_comma() or self._is_definition():
            args = self.items(")")
            self.expect(")")
            return Fn("call:" + name, args)
        self.position, self.open_bars = start, bars
        return Sym(name)

    def _is_definition(self) -> bool:
        """Whether `x) =` follows: p(x) = ... defines a function."""
        return self.peek().kind == "sym" and self.peek(1).value == ")" and self.peek(2).value == "="

    def _holds_comma(self) -> bool:
        depth = 0
        for token in self.tokens[self.position :]:
            if token.value in ("(", "[", r"\{", "{"):
                depth += 1
            elif token.value in (")", "]", r"\}", "}"):
                if depth == 0:
                    return False
                depth -= 1
            elif token.value == "," and depth == 0:
                return True
        return False

    def items(self, closer: str) -> tuple[Node, ...]:
        bars, self.open_bars = self.open_bars, []
        items: list[Node] = []
        while self.peek().value != closer:
            if self.accept(r"\ldots"):
                items.append(Sym("..."))
            else:
                items.append(self.expression())
            if not (self.accept(",") or self.accept(";") or self.accept("|")):
                break
        self.open_bars = bars
        return tuple(items)

    def _bracket(self, opener: str) -> Node:
        """Parentheses around one value, a tuple, an interval, a bracketed list, a ratio in parentheses."""
        bars, self.open_bars = self.open_bars, []
        closer = ")" if opener == "(" else "]"
        items = [self.expression()]
        is_ratio = self.peek().value == ":"
        while self.accept(":" if is_ratio else ",") or (not is_ratio and self.accept(";")):
            items.append(Sym("...") if self.accept(r"\ldots") else self.expression())
        self.open_bars = bars
        if self.accept(closer):
            if is_ratio:
                return Seq("ratio", tuple(items))
            if len(items) == 1:
                return items[0] if opener == "(" else Seq("bracket", tuple(items)) if self._ends_here() else items[0]
            return Seq("tuple" if opener == "(" else "bracket", tuple(items))
        other = "]" if closer == ")" else ")"
        if len(items) == 2 and not is_ratio and self.accept(other):
            return Interval(items[0], items[1], opener == "[", other == "]")
        raise NotMathError(f"{opener!r} does not close")

    def _ends_here(self) -> bool:
        return self.peek().kind in ("end", "text") or self.peek().value in _BARRIER

    def bars(self, mark: str, name: str) -> Node:
        self.open_bars.append(mark)
        node = self.expression()
        if not self.open_bars or self.open_bars.pop() != mark:
            raise NotMathError("unbalanced bars")
        self.expect(mark)
        return Fn(name, (node,))

    def isolated_expression(self) -> Node:
        """An expression inside a bracket of its own: bars that are open outside do not close in it."""
        bars, self.open_bars = self.open_bars, []
        node = self.expression()
        self.open_bars = bars
        return node

    def bare_argument(self) -> Node:
        """The argument of a function written without brackets: `2x` of `sin 2x cos y`."""
        factors = [self._signed_factor()]
        while True:
            token = self.peek()
            is_factor = (
                token.kind in ("sym", "num") or token.value in (r"\pi", r"\frac", r"\sqrt") or token.value[1:] in GREEK
            )
            if not is_factor or not self._starts_factor(factors[-1]) or not _extends(factors[-1]):
                return multiply(*(plain(f) for f in factors)) if len(factors) > 1 else factors[0]
            factors.append(self._factor())

    def subscript_text(self) -> str:
        """The raw text of a group or of one token."""
        return self._subscript()

    def _command(self, name: str) -> Node:
        return self.read_command(self, name)


def _is_capital(node: Node) -> bool:
    """A capital letter other than T, or a product of such: what may be transposed."""
    factors = node.factors if isinstance(node, Mul) else (node,)
    return all(isinstance(f, Sym) and f.name[0].isupper() and f.name != "T" for f in factors)


def _join(left: Node, right: Node, sign: str) -> Node:
    """left sign right; two quantities of one unit add up to a quantity, others as plain values."""
    if isinstance(left, Quantity) and isinstance(right, Quantity) and left.unit == right.unit:
        return Quantity(_join(left.value, right.value, sign), left.unit)
    left, right = plain(left), plain(right)
    if sign in (r"\pm", r"\mp"):
        return Fn(sign[1:], (left, right))
    return add(left, negate(right) if sign == "-" else right)


def _extends(factor: Node) -> bool:
    """Whether an argument without brackets may go on after this factor: not after a bracket or a call."""
    return isinstance(factor, Num | Sym | Pow)


def plain(node: Node) -> Node:
    """A quantity inside an expression as its value: a percent is a hundredth, a degree pi/180; other units do not
    occur."""
    if not isinstance(node, Quantity):
        return node
    if node.unit == "%":
        return multiply(node.value, Num(Fraction(1, 100)))
    if node.unit == "deg":
        return multiply(node.value, Num(Fraction(1, 180)), Sym("pi"))
    raise NotMathError(f"unit {node.unit!r} inside an expression")
