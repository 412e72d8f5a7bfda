"""The notation that answers are written in: unicode and LaTeX spellings, names of functions, words. Tables only."""

from __future__ import annotations

import re


def words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


FRACTIONS = {
    "½": (1, 2), "⅓": (1, 3), "⅔": (2, 3), "¼": (1, 4), "¾": (3, 4), "⅕": (1, 5), "⅖": (2, 5), "⅗": (3, 5), "⅘": (4, 5),
    "⅙": (1, 6), "⅚": (5, 6), "⅐": (1, 7), "⅛": (1, 8), "⅜": (3, 8), "⅝": (5, 8), "⅞": (7, 8), "⅑": (1, 9), "⅒": (1,
    10),
}  # fmt: skip
SIGNS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "‒": "-", "﹣": "-", "－": "-", "×": r"\times ", "✕": r"\times ",
    "⋅": r"\cdot ", "·": r"\cdot ", "∙": r"\cdot ", "•": r"\cdot ", "÷": r"\div ", "⁄": "/", "∕": "/", "√": r"\sqrt ",
    "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ",
    "≦": r"\le ", "≧": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ",
    "∅": r"\emptyset ", "°": r"^\circ ", "º": r"^\circ ", "′": "'", "’": "'", "″": "''", "≈": r"\approx ",
    "≅": r"\cong ",
    "∼": r"\sim ", "≡": r"\equiv ", "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ", "∖": r"\setminus ", "⌊": r"\lfloor ",
    "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "⟨": r"\langle ", "⟩": r"\rangle ", "→": r"\to ",
    "∧": r"\land ",
    "∨": r"\lor ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}",
    "“": '"', "”": '"', "、": ",", "。": ".", "‖": r"\|", "…": r"\ldots ", "⋯": r"\ldots ", "‰": r"/1000 ",
    "∂": r"\partial ",
    "µ": r"\mu ", "ϕ": r"\phi ", "ϵ": r"\epsilon ",
}  # fmt: skip
GREEK_LETTERS = {
    "α": "alpha", "β": "beta", "γ": "gamma", "δ": "delta", "ε": "epsilon", "ζ": "zeta", "η": "eta", "θ": "theta",
    "ι": "iota", "κ": "kappa", "λ": "lambda", "μ": "mu", "ν": "nu", "ξ": "xi", "π": "pi", "ρ": "rho", "σ": "sigma",
    "ς": "sigma", "τ": "tau", "υ": "upsilon", "φ": "phi", "χ": "chi", "ψ": "psi", "ω": "omega", "Γ": "Gamma",
    "Δ": "Delta",
    "Θ": "Theta", "Λ": "Lambda", "Ξ": "Xi", "Π": "Pi", "Σ": "Sigma", "Φ": "Phi", "Ψ": "Psi", "Ω": "Omega",
}  # fmt: skip
SUPERSCRIPTS = {
    **dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True)),
    "ᵏ": "k",
    "ˣ": "x",
    "ᵐ": "m",
    "ᵗ": "t",
}
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙₖₘᵢⱼ", "0123456789+-nkmij", strict=True))
REPLACED = str.maketrans(
    {k: rf"\frac{{{a}}}{{{b}}}" for k, (a, b) in FRACTIONS.items()}
    | SIGNS
    | {k: rf"\{v} " for k, v in GREEK_LETTERS.items()}
)
SUPERSCRIPT_RUN = re.compile(f"[{''.join(map(re.escape, SUPERSCRIPTS))}]+")
SUBSCRIPT_RUN = re.compile(f"[{''.join(map(re.escape, SUBSCRIPTS))}]+")

GREEK = frozenset(GREEK_LETTERS.values()) | {
    "varepsilon",
    "varphi",
    "vartheta",
    "varrho",
    "ell",
    "hbar",
    "Upsilon",
    "varsigma",
}
FUNCTIONS = words(
    "sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc asin acos atan sinh cosh tanh coth sech csch "
    "arcsinh arccosh arctanh asinh acosh atanh ln log lg exp sqrt cbrt abs floor ceil max min gcd lcm deg det dim "
    "Re Im sgn sign arg tr rank ker erf Li"
)
PLAIN_NAMES = words("pi alpha beta gamma delta epsilon theta lambda sigma phi omega infty")
CONNECTIVES = frozenset({"and", "or"})
SHORT_WORDS = words(
    "yes no odd all and or so we he she his her let get was can but who "
    "how of the is not one two six ten cm km mm kg mg ml ft hr hrs mph kph deg sec min pm am any if "
    "in "
    "per are for has its day big new old red tie win may mon tue wed thu fri sat sun jan feb mar apr jun jul aug sep "
    "oct "
    "nov dec usd eur gbp lb lbs oz pct nor dne nan our dm yd yr rpm sq mod mon"
)
DROPPED = words(
    r"\left \right \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \Biggl \Biggr \displaystyle \textstyle "
    r"\scriptstyle \limits \nolimits \mathstrut \strut \middle \hfill \nonumber \centering \cr \rm \bf \it \normalfont "
    r"\small \large \Large \tiny \,"
)
SPACES = frozenset(
    [r"\,", r"\;", r"\:", r"\!", r"\ ", r"\quad", r"\qquad", r"\thinspace", r"\medspace", r"\enspace", "~"]
)
FONTS = words(r"\mathrm \mathit \mathsf \mathtt \mathnormal \operatorname \operatorname* \mathop")
TEXTS = words(r"\text \mbox \textbf \textit \textrm \textnormal \textsf \texttt \hbox \emph \textsc \textup")
TRANSPARENT = words(r"\boldsymbol \bm \mathbf \pmb \boxed \fbox \framebox \underline \ensuremath \phantom \mathbin")
SAME = {
    r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\cfrac": r"\frac", r"\nicefrac": r"\frac", r"\sfrac": r"\frac",
    r"\dbinom": r"\binom", r"\tbinom": r"\binom", r"\leq": r"\le", r"\geq": r"\ge", r"\lt": "<", r"\gt": ">",
    r"\leqslant": r"\le", r"\geqslant": r"\ge", r"\neq": r"\ne", r"\ast": "*", r"\lbrace": r"\{", r"\rbrace": r"\}",
    r"\lbrack": "[", r"\rbrack": "]", r"\lparen": "(", r"\rparen": ")", r"\vert": "|", r"\lvert": "|", r"\rvert": "|",
    r"\mid": "|", r"\Vert": r"\|", r"\lVert": r"\|", r"\rVert": r"\|", r"\backslash": r"\setminus", r"\varnothing":
    r"\emptyset", r"\colon": ":", r"\land": r"\and", r"\wedge": r"\and", r"\lor": r"\or", r"\vee": r"\or", r"\dots":
    r"\ldots", r"\cdots": r"\ldots", r"\dotsc": r"\ldots", r"\dotsb": r"\ldots", r"\degree": r"\circ", r"\simeq":
    r"\approx", r"\doteq": r"\approx", r"\rightarrow": r"\to", r"\euro": "€", r"\pounds": "£", r"\gets": r"\from",
    r"\bigcup":
    r"\cup", r"\bigcap": r"\cap", r"\dotsm": r"\ldots", r"\rm{e}": "e", r"\slash": "/", r"\infin": r"\infty",
    r"\star": "*",
    r"\arctg": r"\arctan", r"\tg": r"\tan", r"\ctg": r"\cot", r"\iff": r"\Leftrightarrow", r"\N": r"\natural",
}  # fmt: skip
NO_FACTORS = words(
    r"\le \ge \ne \in \notin \approx \sim \cong \equiv \cup \cap \setminus \pm \mp \cdot \times \div \to \mapsto "
    r" \and \or \subset \subseteq \supset \supseteq \rangle \rfloor \rceil \end \Rightarrow \Leftrightarrow "
    r" \implies \oplus \otimes \circ \prime \pmod \bmod \mod \propto \parallel \perp \ldots \choose \over \vdots "
    r" \ddots \quad \hline \ll \gg \prec \nmid \tag \label \text \because \therefore"
)
"""Commands that do not begin a factor: after one, no multiplication is meant."""
