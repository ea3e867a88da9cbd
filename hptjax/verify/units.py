"""One spelling for each unit that answers are written with. Units are names here: nothing is converted."""

from __future__ import annotations

import re

_ALIASES = {
    "%": "percent percents percentage pct",
    "°": "degree degrees deg",
    "$": "dollar dollars usd",
    "cent": "cents ¢",
    "m": "meter meters metre metres",
    "cm": "centimeter centimeters centimetre centimetres",
    "mm": "millimeter millimeters millimetre millimetres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "g": "gram grams",
    "kg": "kilogram kilograms",
    "mg": "milligram milligrams",
    "lb": "pound pounds lbs",
    "oz": "ounce ounces",
    "l": "liter liters litre litres",
    "ml": "milliliter milliliters millilitre millilitres",
    "s": "sec secs second seconds",
    "min": "minute minutes mins",
    "h": "hour hours hr hrs",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "unit": "units",
    "mph": "",
    "rad": "radian radians",
    "mol": "mole moles",
    "n": "newton newtons",
    "j": "joule joules",
    "w": "watt watts",
    "v": "volt volts",
    "hz": "hertz",
    "pa": "pascal pascals",
}
_SPELLINGS = {spelling: unit for unit, spellings in _ALIASES.items() for spelling in [unit, *spellings.split()]}
WORDS = frozenset(spelling for spelling in _SPELLINGS if len(spelling) > 1)
LETTERS = frozenset("m g s h L l N J W V A K C".split())  # units that are one letter, where a variable is not meant
_POWERS = {"square": "2", "sq": "2", "squared": "2", "cubic": "3", "cu": "3", "cubed": "3"}


def unit_name(text: str) -> str:
    """The unit in one spelling: aliases merged, powers behind a ^, articles and full stops dropped.

    Example
      >>> unit_name("square centimeters"), unit_name("cm^2"), unit_name("km / hour"), unit_name("miles per hour")
      ('cm^2', 'cm^2', 'km/h', 'mi/h')
    """
    words = re.findall(r"[A-Za-z$%°¢]+|\^\s*-?\d+|/", text.lower().replace("{", "").replace("}", ""))
    parts: list[str] = []
    power = ""
    for word in words:
        if word in ("of", "the", "a", "an"):
            continue
        if word in ("/", "per"):
            parts.append("/")
        elif word.startswith("^"):
            parts.append(word.replace(" ", ""))
        elif word in ("squared", "cubed"):
            parts.append(f"^{_POWERS[word]}")
        elif word in _POWERS:
            power = f"^{_POWERS[word]}"
        else:
            separator = " " if parts and parts[-1] != "/" else ""
            parts.append(f"{separator}{_SPELLINGS.get(word, word)}{power}")
            power = ""
    return "".join(parts)
