"""From the text of one answer to its tree: lists, relations, sets, units, choices and words around expressions.

What the grammar does not know is kept as words (`Text`), equal only to the same words, so that every gold equals
itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from rewards.latex import MAX_ANSWER_CHARS, Token, fold_unicode, tokenize
from rewards.math_ast import (
    Choice,
    Fn,
    Interval,
    Matrix,
    Node,
    Quantity,
    Rel,
    Seq,
    SetOp,
    Sym,
    Text,
    contains,
    depth,
    integer,
    multiply,
)
from rewards.math_commands import read_command
from rewards.math_notation import CONNECTIVES
from rewards.math_numbers import NotMathError
from rewards.math_parser import Parser, plain
from rewards.math_units import SCALES, canonical_unit
from rewards.math_wrappers import strip_wrappers

_RELATIONS = {
    "=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\approx": "~", r"\sim": "~",
    r"\cong": "cong",
    r"\in": "in", r"\equiv": "equiv", r"\subset": "subset", r"\subseteq": "subseteq", r"\notin": "notin", r"\to": "to",
    r"\propto": "propto", r"\mapsto": "to", r"\parallel": "parallel", r"\perp": "perp", ":=": "=", r"\ll": "ll",
    r"\Rightarrow": "implies", r"\implies": "implies", r"\Leftrightarrow": "iff", r"\supset": "supset",
}  # fmt: skip
_SET_OPERATORS = {r"\cup": "union", r"\cap": "intersection", r"\setminus": "minus"}
_CURRENCY = frozenset(["$", "€", "£", "¢"])
_CHOICE = re.compile(r"\(?\s*(?P<letter>[A-Ja-j])\s*(?P<close>[).:])\s*(?P<text>.*)$", re.DOTALL)
_TEXT_COMMAND = re.compile(r"\\(?:text|mbox|textbf|mathrm|mathbf|textit|textrm|bf|rm)\s*\{([^{}]*)\}")
_SET_BUILDER = re.compile(
    r"\\\{\s*[A-Za-z]\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?(?:\\mid|\\vert|\||:|\\colon)\s*(?P<condition>.*)\\\}$",
    re.DOTALL,
)
_APPROXIMATE_WORDS = frozenset(["about", "approximately", "roughly", "around", "approx", "nearly"])
MAX_TREE_DEPTH = 120
"""Trees are compared and hashed recursively."""
_ARTICLES = frozenset(["a", "an", "the"])


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer as it was read."""

    text: str
    """The answer's text, stripped of wrappers."""
    node: Node
    """The tree; `Text` where the grammar does not know the notation."""
    is_decimal: bool
    """The whole answer is written as one decimal number."""
    alternatives: tuple[tuple[str, Node], ...] = ()
    """Other readings of ambiguous notation, each with the kind of gold it is for: `list`, `decimal`, `unit`."""
    rounded: Node | None = None
    """What followed an approximation sign."""


@lru_cache(maxsize=8192)
def read_answer(text: str) -> Reading:
    """The tree of an answer's text. Never raises: unknown notation becomes `Text`."""
    text = strip_wrappers(fold_unicode(text[: MAX_ANSWER_CHARS + 1]))
    if len(text) > MAX_ANSWER_CHARS:
        return Reading(text=text[:100], node=Text(f"<{len(text)} characters or more>"), is_decimal=False)
    built = _SET_BUILDER.match(text)
    if built is not None:
        inner = read_answer(built["condition"]).node
        if is_inequality(inner) or isinstance(inner, SetOp):
            return Reading(text=text, node=inner, is_decimal=False)
    choice = _read_choice(text)
    if choice is not None:
        return Reading(text=text, node=choice, is_decimal=False)
    tokens = tokenize(text)
    rounded: Node | None = None
    try:
        node = _read_tokens(list(tokens))
        if depth(node) > MAX_TREE_DEPTH:
            raise NotMathError(f"a tree deeper than {MAX_TREE_DEPTH}")
        node, rounded = split_rounded(node)
    except (NotMathError, RecursionError):
        node = Text(canonical_words(text, tokens))
    is_decimal = re.fullmatch(r"[-+]?[\d,]*\.\d+", text) is not None
    return Reading(text=text, node=node, is_decimal=is_decimal, alternatives=_alternatives(text), rounded=rounded)


def canonical_words(text: str, tokens: list[Token]) -> str:
    """Words without case, articles and punctuation; other notation token by token, its case kept."""
    bare = _TEXT_COMMAND.sub(r" \1 ", text)
    if re.fullmatch(r"\s*[A-Za-z][A-Za-z\s.,'’\-]*", bare):
        words = re.sub(r"[.,'’\-]", " ", bare).lower().split()
        kept = [w for w in words if w not in _ARTICLES] if len(words) > 1 else words
        return " ".join(kept)
    return " ".join(t.value.lower() if t.kind == "text" else t.value for t in tokens)


def split_rounded(node: Node) -> tuple[Node, Node | None]:
    """`exact ~ rounded` as its exact part and the rounded one; `x ~ 11` as x = 11."""
    if not isinstance(node, Rel) or "~" not in node.ops:
        return node, None
    first = node.ops.index("~")
    exact = node.parts[: first + 1]
    if (first == 0 and isinstance(exact[0], Sym | Text)) or (first == 0 and _is_call(exact[0])):
        return Rel(("=",), (exact[0], node.parts[1])), None
    kept: Node = exact[0] if first == 0 else Rel(node.ops[:first], exact)
    return kept, node.parts[-1]


def _is_call(node: Node) -> bool:
    return isinstance(node, Fn) and node.name.startswith("call:")


def _read_choice(text: str) -> Choice | None:
    """`(C)`, `C.`, `C) 12`, `\textbf{(C)} 12`; not `c`, not `C` alone (which may be a variable: compared as a
    letter)."""
    bare = _TEXT_COMMAND.sub(r"\1", text).strip() if "\\" in text else text
    match = _CHOICE.match(bare)
    if match is None:
        return None
    letter, close, rest = match["letter"], match["close"], strip_wrappers(match["text"])
    has_open = bare.lstrip().startswith("(")
    if (close == ")") != has_open and close != ")":
        return None if has_open else _choice_after_dot(letter, close, rest)
    if letter.islower() and not (has_open and not rest):
        return None
    if re.match(r"(?:or|and)\b|\\text\s*\{\s*(?:or|and)\b", rest):
        return None
    if rest and rest[0] in "+-*/^=<>_!" + ("(" if has_open else ""):
        return None
    if rest.startswith("\\") and re.match(r"\\(cdot|times|cup|cap|le|ge|ne|in|equiv|to|pm|div|approx)\b", rest):
        return None
    return Choice(letter.upper(), read_answer(rest).node if rest else None)


def _choice_after_dot(letter: str, close: str, rest: str) -> Choice | None:
    if not letter.isupper() or (close == ":" and re.match(r"[\w]", rest or "x") and not rest):
        return None
    if close == ":" and len(rest) <= 2:
        return None
    return Choice(letter, read_answer(rest).node if rest else None)


_LETTER_UNIT = re.compile(r"(?P<value>.*[\d)}])(?:\s+|\\[,;: ])(?P<unit>[mgshlLJNWVK](?:\s*\^\s*\{?[23]\}?)?)$")
_SQUARE_METRES = re.compile(r"(?P<value>[\d.,\s]+)(?P<unit>m\^\{?[23]\}?)$")


def _alternatives(text: str) -> tuple[tuple[str, Node], ...]:
    """Other readings: of commas between digits, of a single letter after a number as a unit."""
    unit = _LETTER_UNIT.match(text) or _SQUARE_METRES.match(text)
    if unit is not None:
        value = read_answer(unit["value"]).node
        return (("unit", Quantity(value, re.sub(r"[\s{}]", "", unit["unit"]).lower())),)
    if "," not in text:
        return ()
    bare = re.sub(r"[\s$]|\\\$|€", "", text)
    if re.fullmatch(r"-?\d{1,3}(,\d{3})+", bare):
        return (("list", Seq("list", tuple(read_answer(part).node for part in bare.split(",")))),)
    if re.fullmatch(r"-?\d+,\d+", bare) and not re.search(r",\s", text):
        return (("decimal", read_answer(bare.replace(",", ".")).node),)
    return ()


# The structure above expressions


def _read_tokens(tokens: list[Token]) -> Node:
    if not tokens:
        raise NotMathError("empty")
    for i in range(1, len(tokens) - 1):
        between = tokens[i - 1].value in (")", "]") and tokens[i + 1].value in ("(", "[")
        if tokens[i].value in ("U", "u") and between:
            tokens[i] = Token("cmd", r"\cup")
    parser = Parser(tokens, read_command)
    node = _read_list(parser)
    if parser.peek().kind != "end":
        raise NotMathError(f"{parser.peek().value!r} is left over")
    return node


def _connective(parser: Parser) -> str:
    """Steps over `,` `;` `and` `or` and combinations; the strongest word found, or the empty string."""
    found = ""
    while True:
        token = parser.peek()
        word = token.value.lower() if token.kind == "text" else ""
        if token.value in (",", ";") and token.kind == "op":
            found = found or ","
        elif word in CONNECTIVES or token.value in (r"\and", r"\or"):
            found = word or token.value[1:]
        elif token.value == "&" and found == "" and token.kind == "op":
            found = "and"
        else:
            return found
        parser.take()


def _read_list(parser: Parser) -> Node:
    items = [_read_clause(parser)]
    joined: list[str] = []
    while (word := _connective(parser)) and parser.peek().kind != "end":
        joined.append(word)
        items.append(Sym("...") if parser.accept(r"\ldots") else _read_clause(parser))
    if len(items) == 1:
        return items[0]
    if all(is_inequality(item) or (isinstance(item, Rel) and item.ops == ("in",)) for item in items):
        # "x < 1 or x > 2" is a union; "x > 1, x < 3" and "x > 1 and x < 3" hold together.
        return SetOp("union" if "or" in joined else "intersection", tuple(items))
    if all(isinstance(item, Interval) for item in items) and "or" in joined:
        return SetOp("union", tuple(items))
    items = [
        part for item in items for part in (item.items if isinstance(item, Seq) and item.kind == "list" else (item,))
    ]
    units = {item.unit for item in items if isinstance(item, Quantity)}
    if len(units) == 1 and isinstance(items[-1], Quantity):
        # "3, 4 and 5 cm": the unit is of all.
        unit = units.pop()
        items = [item if isinstance(item, Quantity | Rel) else Quantity(item, unit) for item in items]
    return Seq("list", tuple(items))


def is_inequality(node: Node) -> bool:
    """A chain of < <= > >= (or a single !=)."""
    if not isinstance(node, Rel):
        return False
    return all(op in ("<", "<=", ">", ">=") for op in node.ops) or node.ops == ("!=",)


def _read_clause(parser: Parser) -> Node:
    if parser.peek().kind == "text" and parser.peek().value.lower() in _APPROXIMATE_WORDS:
        parser.take()
    if parser.peek().value in ("=", r"\approx", r"\sim", ":"):
        parser.take()
    label = _read_label(parser)
    parts: list[Node] = [] if label is None else [label]
    ops: list[str] = []
    if label is None:
        parts.append(_read_operand(parser))
    while (op := _RELATIONS.get(parser.peek().value)) is not None and parser.peek().kind in ("op", "cmd"):
        parser.take()
        if op == "<" and parser.accept("="):
            op = "<="
        if op == ">" and parser.accept("="):
            op = ">="
        if parser.peek().kind == "text" and parser.peek().value.lower() in _APPROXIMATE_WORDS:
            parser.take()
        ops.append(op)
        parts.append(_read_operand(parser))
    if parser.peek().value in (r"\pmod", r"\bmod", r"\mod") and ops:
        parser.take()
        parts[-1] = Fn("mod", (parts[-1], parser.argument()))
    return Rel(tuple(ops), tuple(parts)) if ops else parts[0]


def _read_label(parser: Parser) -> Node | None:
    r"""Words before an equals sign: `\text{Area} = 5`."""
    ahead = 0
    while parser.peek(ahead).kind == "text" and parser.peek(ahead).value.lower() not in CONNECTIVES:
        ahead += 1
    if ahead and parser.peek(ahead).value in ("=", r"\approx", ":"):
        words = " ".join(parser.take().value.lower() for _ in range(ahead))
        if parser.peek().value == ":":
            parser.tokens[parser.position] = Token("op", "=")
        return Text(words)
    return None


def _read_operand(parser: Parser) -> Node:
    """An expression with its currency and unit, a set expression, a ratio, or words."""
    if parser.peek().kind == "text":
        words = _read_unit(parser)
        if parser.peek().value in _RELATIONS:
            raise NotMathError("a relation in prose")
        if len(words) == 1:
            return Sym(words)
        kept = [w for w in words.lower().split() if w not in _ARTICLES]
        return Text(" ".join(kept) or words.lower())
    sign = -1 if parser.peek().value == "-" and parser.peek(1).value in _CURRENCY else 1
    if sign < 0:
        parser.take()
    currency = parser.take().value if parser.peek().value in _CURRENCY else ""
    node = _read_set_expression(parser)
    if sign < 0:
        node = multiply(integer(-1), node)
    if parser.peek().value == ":" and parser.peek(1).kind in ("num", "sym", "cmd"):
        items = [node]
        while parser.accept(":"):
            items.append(parser.expression())
        return Seq("ratio", tuple(items))
    if not currency and parser.peek().value in _CURRENCY:
        currency = parser.take().value
    unit = _read_unit(parser)
    scale, _, rest = unit.partition(" ")
    if scale in SCALES or scale.rstrip("s") in SCALES:
        node, unit = multiply(plain(node), integer(SCALES.get(scale) or SCALES[scale.rstrip("s")])), rest
    canonical = canonical_unit(unit)
    if canonical is None or (currency and canonical not in ("", currency)):
        raise NotMathError(f"{unit!r} is no unit")
    if isinstance(node, Quantity) and canonical:
        if node.unit == "deg" and canonical in ("c", "f", "celsius", "fahrenheit"):
            return Quantity(node.value, "deg " + canonical[0])
        raise NotMathError("two units")
    if canonical or currency:
        return Quantity(node, canonical or currency)
    return node


def _read_unit(parser: Parser) -> str:
    """The words, letters and powers after a number, up to a connective, a relation or the end."""
    parts: list[str] = []
    while True:
        token = parser.peek()
        if token.kind == "text" and token.value.lower() not in CONNECTIVES:
            parts.append(" " + token.value)
        elif token.value == "^" and parts and parser.peek(1).kind == "num":
            parser.take()
            parts.append("^" + parser.peek().value)
        elif token.value == "^" and parts and parser.peek(1).value == "{":
            parser.position += 2
            exponent = ""
            while parser.peek().value != "}" and parser.peek().kind != "end":
                exponent += parser.take().value
            parts.append("^" + exponent)
        elif token.value == "/" and parts:
            parts.append("/")
        elif token.kind == "sym" and parts:
            parts.append(token.value if not token.spaced or parts[-1] == "/" else " " + token.value)
        else:
            return "".join(parts).strip()
        parser.take()


def _read_set_expression(parser: Parser) -> Node:
    node = parser.expression()
    if parser.accept(r"\choose"):
        return Fn("binom", (node, parser.expression()))
    while (op := _SET_OPERATORS.get(parser.peek().value)) is not None:
        parser.take()
        right = parser.expression()
        if op == "union" and isinstance(node, SetOp) and node.op == "union":
            node = SetOp("union", (*node.parts, right))
        else:
            node = SetOp(op, (node, right))
    return node


def is_structured(node: Node) -> bool:
    """Whether anything but a scalar expression stands in the tree."""
    return contains(node, (Seq, Interval, SetOp, Rel, Matrix, Text, Choice))
