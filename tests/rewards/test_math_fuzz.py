"""Properties over generated expressions and over mutated answers: nothing raises, equal is right, shifted is wrong."""

from fractions import Fraction

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rewards import MathPolicy, verify_math
from rewards.extract import extract_answer
from rewards.math_answer import read_answer
from rewards.math_ast import Text

SETTINGS = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
NO_SYMPY = MathPolicy(use_sympy=False)

numbers = st.one_of(
    st.integers(0, 10**6).map(str),
    st.fractions(min_value=0, max_value=99, max_denominator=60).map(
        lambda f: rf"\frac{{{f.numerator}}}{{{f.denominator}}}"
    ),
    st.decimals(0, 1000, places=3).map(str),
)
atoms = st.one_of(numbers, st.sampled_from(["x", "y", "n", r"\pi", r"\sqrt{2}", r"\sqrt{3}", r"\alpha", "e"]))


def combine(inner):
    pairs = st.tuples(inner, inner)
    return st.one_of(
        pairs.map(lambda p: f"({p[0]} + {p[1]})"),
        pairs.map(lambda p: f"({p[0]} - {p[1]})"),
        pairs.map(lambda p: rf"{p[0]} \cdot {p[1]}"),
        pairs.map(lambda p: rf"\frac{{{p[0]}}}{{({p[1]})^2 + 1}}"),
        inner.map(lambda e: rf"\sqrt{{({e})^2 + 1}}"),
        inner.map(lambda e: rf"\left({e}\right)^{{2}}"),
        inner.map(lambda e: rf"\sin({e})"),
        inner.map(lambda e: rf"e^{{{e}}}"),
        inner.map(lambda e: rf"\left|{e}\right|"),
    )


expressions = st.recursive(atoms, combine, max_leaves=6)
pieces = st.sampled_from(
    [
        *"0123456789+-*/^_=<>()[]{}|\\,.;:!%$ xyzABeifn\n\t'\"&~#\u202e\x00½²∞−",
        r"\frac",
        r"\sqrt",
        r"\boxed{",
        r"\text{",
    ]
    + [r"\left(", r"\right)", r"\pi", r"\sum", r"\int", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", r"\cup", r"\in"]
    + [
        r"\pm",
        r"\infty",
        " or ",
        " and ",
        "<think>",
        "</think>",
        "answer is ",
        "####",
        "^{10^{10^{10}}}",
        "99999999999",
    ]
)
notation = st.lists(pieces, max_size=40).map("".join)


@SETTINGS
@given(expressions)
def test_an_expression_equals_itself_however_it_is_wrapped(expression):
    assert not isinstance(read_answer(expression).node, Text)
    for completion in (
        expression,
        f"$ {expression} $",
        f"So \\boxed{{{expression}}}.",
        f"The answer is \\({expression}\\)",
    ):
        assert verify_math(completion, expression).reward == 1.0


@SETTINGS
@given(expressions, expressions)
def test_sums_and_products_commute(first, second):
    gold = f"({first}) + ({second})"
    assert verify_math(f"({second}) + ({first})", gold, policy=NO_SYMPY).reward == 1.0
    assert verify_math(f"({second})({first})", f"({first})({second})", policy=NO_SYMPY).reward == 1.0


@SETTINGS
@given(expressions, st.integers(1, 10**6))
def test_a_shifted_value_is_wrong(expression, shift):
    assert verify_math(f"\\boxed{{{expression} + {shift}}}", expression).reward == 0.0


@SETTINGS
@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_rationals_are_compared_exactly(first, second):
    one, two = (rf"\frac{{{f.numerator}}}{{{f.denominator}}}" for f in (first, second))
    assert verify_math(one, two).reward == float(first == second)


@SETTINGS
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_lists_are_unordered_and_tuples_ordered(values, rng):
    shuffled = list(values)
    rng.shuffle(shuffled)
    gold, answer = (", ".join(map(str, v)) for v in (values, shuffled))
    assert verify_math(answer, gold).reward == 1.0
    assert verify_math(f"\\{{{answer}\\}}", f"\\{{{gold}\\}}").reward == 1.0
    assert verify_math(f"({answer})", f"({gold})").reward == float(values == shuffled)
    assert verify_math(answer, str(values[0])).reward == 0.0


@settings(max_examples=400, deadline=None, derandomize=True)
@given(notation, st.sampled_from(["42", r"\frac{1}{2}", "(1,2)", "[0,1)", "x^2+1", "yes", "C", r"\{1,2\}", "x>3"]))
def test_no_text_raises(text, gold):
    result = verify_math(text, gold, policy=NO_SYMPY)
    assert result.reward in (0.0, 1.0)
    assert result.status in ("ok", "unparsed")
    assert verify_math(gold, text, policy=NO_SYMPY).reward in (0.0, 1.0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(notation)
def test_extraction_finds_the_last_box(text):
    found = extract_answer(text.replace("<think>", "").replace("</think>", "") + "\n\nSo \\boxed{17/3}")
    assert found is not None
    assert "17/3" in found.text


@SETTINGS
@given(st.fractions(min_value=-50, max_value=50, max_denominator=40), st.integers(3, 6))
def test_a_rounded_value_earns_nothing(value, places):
    rounded = Fraction(round(value * 10**places), 10**places)
    text = f"{float(rounded):.{places}f}"
    assert verify_math(text, rf"\frac{{{value.numerator}}}{{{value.denominator}}}").reward == float(rounded == value)
