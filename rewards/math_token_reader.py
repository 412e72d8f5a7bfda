"""A position in a list of tokens, for the parser that reads them."""

from __future__ import annotations

from rewards.latex import Token
from rewards.math_ast import Node
from rewards.math_numbers import NotMathError

MAX_NODES = 2_000
_END = (Token("end", ""),) * 8
"""After the last token, so that looking ahead needs no check."""


class TokenReader:
    """Looks at tokens and steps over them; counts the nodes that are made of them."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = [*tokens, *_END]
        self.position = 0
        self.nodes = 0

    def peek(self, ahead: int = 0) -> Token:
        """The token `ahead` of the current one; past the last, a token of kind `end`."""
        return self.tokens[self.position + ahead]

    def take(self) -> Token:
        """The current token, stepped over."""
        token = self.tokens[self.position]
        if token.kind != "end":
            self.position += 1
        return token

    def accept(self, *values: str) -> bool:
        """Steps over the current token if it is one of these."""
        if self.tokens[self.position].value in values:
            self.position += 1
            return True
        return False

    def expect(self, value: str) -> None:
        """Steps over this token; raises NotMathError if another stands here."""
        if not self.accept(value):
            raise NotMathError(f"expected {value!r}, found {self.peek().value!r}")

    def count(self, node: Node) -> Node:
        """Passes the node on, counting it against the bound."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise NotMathError(f"more than {MAX_NODES} nodes")
        return node
