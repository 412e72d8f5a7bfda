"""Units and the other words that follow a number: one spelling for each, and which words mean something else."""

from __future__ import annotations

import re
from collections.abc import Mapping

from rewards.math_notation import words

SCALES: Mapping[str, int] = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip

_SPELLINGS = """
%: percent pct percentage percents
deg: degree degrees
$: dollar dollars usd bucks
cent: cents ¢ penny pennies
€: euro euros eur
£: gbp
cm: centimeter centimeters centimetre centimetres
mm: millimeter millimeters millimetre millimetres
km: kilometer kilometers kilometre kilometres kms
m: meter meters metre metres
ft: foot feet
in: inch inches
yd: yard yards yds
mi: mile miles
kg: kilogram kilograms kgs
g: gram grams
mg: milligram milligrams
lb: pound pounds lbs
oz: ounce ounces
l: liter liters litre litres
ml: milliliter milliliters millilitre millilitres
h: hour hours hr hrs
min: minute minutes mins
s: second seconds sec secs
ms: millisecond milliseconds
day: days
week: weeks
month: months
year: years yr yrs
mph: mph
rad: radian radians
unit: units
n: newton newtons
j: joule joules
w: watt watts
v: volt volts
pa: pascal pascals
hz: hertz
k: kelvin
person: people persons
child: children
man: men
woman: women
foot: foot
"""
_CANONICAL = {
    spelling: unit
    for unit, _, spellings in (line.partition(":") for line in _SPELLINGS.strip().splitlines()[:-1])
    for spelling in (unit, *spellings.split())
}
LETTER_UNITS = frozenset(["m", "g", "s", "h", "l", "L", "J", "N", "W", "V", "K"])
"""Single letters that may be units where a number is asked; elsewhere they are variables."""

_NOT_UNITS = words(
    "if when not or and where with than is are but except only otherwise mod modulo plus minus times half less more "
    "at from to both either neither nor no wrong incorrect false unless for all some none approximately about maybe "
    "possibly perhaps between was were be would could should i we it this that over under divided root squareroot pi "
    "infinity infinite undefined quarter third thirds quarters halves fifth fifths twice double triple pair pairs "
    "score base choose factorial power negative positive remainder versus vs because since so then else yes"
)
_MAX_UNIT_WORDS = 5


def canonical_unit(phrase: str) -> str | None:
    """One spelling for a unit phrase (`square centimeters`, `cm^2`, `km/h`, `apples`); None if the words are no
    unit."""
    phrase = (
        phrase.strip().rstrip(".").lower().replace("⋅", " ").replace(" per ", "/").replace("²", "^2").replace("³", "^3")
    )
    phrase = re.sub(r"\s*/\s*", "/", phrase).strip()
    phrase = re.sub(r"^per ", "/", phrase)
    if not phrase:
        return ""
    halves = phrase.split("/")
    if len(halves) > 2:
        return None
    out = []
    for half in halves:
        unit = _canonical_part(half)
        if unit is None:
            return None
        out.append(unit)
    return "/".join(out)


def is_known_unit(phrase: str) -> bool:
    """Whether the phrase is a unit of measurement of the table, not any noun."""
    *powers, word = phrase.lower().split()
    return (
        word in _CANONICAL
        and len(word) > 1
        and word not in ("in", "min")
        and all(p in ("square", "cubic") for p in powers)
    )


def _canonical_part(part: str) -> str | None:
    parts = re.sub(r"\s*\^\s*\{?(-?\d+)\}?", r"^\1", part).split()
    if len(parts) > _MAX_UNIT_WORDS:
        return None
    power = ""
    out: list[str] = []
    for word in parts:
        base, caret, exponent = word.partition("^")
        if base in _NOT_UNITS or not (base.isalpha() or base in ("%", "$", "€", "£", "¢")):
            return None
        if base in ("square", "sq", "squared"):
            power = "^2"
        elif base in ("cubic", "cubed", "cu"):
            power = "^3"
        elif base in ("of", "the", "a", "an", "in") and len(parts) > 1:
            continue
        else:
            out.append(_CANONICAL.get(base, _singular(base)) + caret + exponent)
    return " ".join(out) + power


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if (word.endswith("es") and word[-4:-2] in ("ch", "sh", "ss")) or word.endswith("xes"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") and len(word) > 2 else word
