"""How numbers are written on the page, in its tables, plots and sentences alike: one minus sign, no negative zero, intervals in one form."""

from __future__ import annotations

NONE = "–"
"""Where there is no number."""
_MINUS = "\N{MINUS SIGN}"


def number(value: float, spec: str) -> str:
    """A number in a format such as `.2f`, with a true minus sign (U+2212); what is rounded to zero has no sign."""
    text = format(value, spec)
    if not any(digit in text for digit in "123456789infa"):
        text = text.lstrip("+-")
    return text.replace("-", _MINUS)


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal; the space does not break."""
    return NONE if value is None else f"{bare(value)}\N{NO-BREAK SPACE}%"


def bare(value: float) -> str:
    """A fraction as a percentage without its sign, for the ends of an interval."""
    return number(100 * value, ".1f")


def points(value: float | None) -> str:
    """A difference of fractions in signed percentage points."""
    return NONE if value is None else number(100 * value, "+.1f")


def ratio(value: float | None) -> str:
    """An attention ratio."""
    return NONE if value is None else number(value, ".3f")
