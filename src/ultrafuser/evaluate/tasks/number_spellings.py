r"""Numbers as people write them: 1 200, 1'200, 1,00,000, 10**3, 10³, 1.5 x 10^3, $5, 60 km/h, 16 cm^2."""

from __future__ import annotations

import re

_CURRENCY = r"(?:(?:US|CA?|AU?|HK|NZ|S)?\\?\$|[€£¥₹₩₽¢]|\\(?:euro|pounds)\b)"
_CURRENCY_CODE = r"(?:USD|EUR|GBP|INR|JPY|CNY|CHF|CAD|AUD|Rs\.?)"
# ---- thousands: 10{,}000 and 10\,000 in LaTeX, 1 200 with any kind of blank, 1'200, and 1,00,000 in India
_LATEX_SEPARATOR = re.compile(r"(?<=\d)(?:,?\\[,!;: ] ?|\{,\}|~)(?=\d{3}(?!\d))")
_GROUPS = re.compile(r"(?<![\w.,])[1-9]\d{0,2}([ \u00a0\u2007-\u200a\u202f'’])\d{3}(?:\1\d{3})*(?!\d)")
_INDIAN_GROUPS = re.compile(r"(?<![\w.,])\d{1,2}(?:,\d{2})+,\d{3}(?!,?\d)")
# ---- powers
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SUPERSCRIPT = re.compile(r"[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
# "**" needs a base and equal blanks on both sides, as **bold** text has none.
_POWER_SIGN = r"(?: ?\^ ?|(?:(?<=[\d)\]}])|(?<=\b[A-Za-z]))\*\*|(?<=[\d)\]}]) \*\* )"
_EXPONENT = re.compile(_POWER_SIGN + r"(?:\{\s*([-+−]?\d+)\s*\}|\(\s*([-+−]?\d+)\s*\)|([-+−]?\d+))")
_TIMES_TEN = re.compile(r"(?<=\d)\s*(?:\\times|\\cdot|[x×*·⋅])\s*(?=10\^)")
# ---- units: a symbol or a word, with powers, joined by "/", "per" or a dot
MAX_QUANTITY_CHARS = 200  # in a longer text, no unit is looked for
_SHORT_SYMBOLS = (
    "mm|cm|dm|km|nm|[µμ]m|mg|kg|lb|oz|ms|hr|ml|mL|cl|cL|dl|dL|kJ|kW|MW|kN|Pa|Hz|mA|kV|mV|ft|in|yd|mi|ha|[KMG]B|[KMG]b"
    "|sq\\.?|cu\\.?|Rs\\.?|m|g|s|h|l|L|t|N|J|W|V|A|K|C|F|d|Ω"
)
_SYMBOLS = f"lbs|min|sec|hrs|kWh|kPa|MPa|kHz|MHz|GHz|kcal|mol|rad|rpm|mph|kmh|kph|kmph|fps|[mM]bps|USD|EUR|GBP|INR|{_SHORT_SYMBOLS}"
_WORDS = r"(?!degrees\b|percent\b|per\b|and\b|or\b)[A-Za-z]{3,}"  # longer symbols too
_POWER = r"(?:\^\{?-?[1-4]\}?|[23](?!\d))?"
_JOINT = r"(?:\s*/\s*|\s+per\s+|\s*[·⋅*]\s*|\s*\\cdot\s*|\s+)"
_SYMBOL = rf"(?:{_SYMBOLS})(?![A-Za-z]){_POWER}"
_SYMBOL_UNIT = re.compile(rf"(?:sq\.?|cu\.?)?{_SYMBOL}(?:(?:/|per|[·⋅*]|\\cdot){_SYMBOL})*")
_UNIT_WORD = rf"(?:{_SHORT_SYMBOLS}|{_WORDS})(?![A-Za-z]){_POWER}"
_UNIT = rf"{_UNIT_WORD}(?:{_JOINT}{_UNIT_WORD})*"
_DEGREES = r"\^?\{?(?:\\circ|°)\}?\s*[CF]?"
_QUANTITY = re.compile(rf"(.*[\d}})])(?:\s+({_UNIT})|((?![A-Za-z]\b(?!\s*/)){_UNIT})|\s*({_DEGREES}|{_CURRENCY}))")
_PRICE = re.compile(rf"([-+−]?)\s*({_CURRENCY}|{_CURRENCY_CODE})\s*([-+−]?[\d.\\].*)")
_SPELLINGS = {"hr": "h", "hrs": "h", "sec": "s", "lbs": "lb", "L": "l", "mL": "ml", "cL": "cl", "dL": "dl", "Rs": "INR"}
_SPELLINGS |= {"kmh": "km/h", "kph": "km/h", "kmph": "km/h", "mph": "mi/h", "fps": "ft/s"}
_WRAPPED = re.compile(r"\\(?:text|textrm|mathrm|mbox|operatorname)\s*\{([^{}]*)\}")
_LATEX_BLANK = re.compile(r"\\[,;:! ]|~|\\quad\b")


def join_digits(text: str) -> str:
    """The text without separators of thousands, except commas between groups of three."""
    text = _LATEX_SEPARATOR.sub("", text)
    return _GROUPS.sub(lambda match: match[0].replace(match[1], ""), text)


def join_indian_digits(text: str) -> str:
    """1,00,000 as 100000. A list of numbers without blanks looks the same."""
    return _INDIAN_GROUPS.sub(lambda match: match[0].replace(",", ""), text)


def latex_powers(text: str) -> str:
    """10³, 10**3, 10^3 and 10^(3) as 10^{3}, and the sign before a power of ten as \\times."""
    text = _SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _EXPONENT.sub(lambda match: f"^{{{next(filter(None, match.groups())).replace('−', '-').lstrip('+')}}}", text)
    return _TIMES_TEN.sub(r" \\times ", text)


def without_currency(text: str) -> str:
    """The text without currency signs."""
    return re.sub(_CURRENCY, "", text)


def split_unit(text: str) -> tuple[str, str]:
    r"""The number and the unit of a quantity such as 60 km/h, 16\text{ cm}^2, $5 or 5 €. The unit may be empty."""
    if len(text) > MAX_QUANTITY_CHARS:
        return text, ""
    plain = _LATEX_BLANK.sub(" ", _WRAPPED.sub(r" \1", text)).strip()
    if price := _PRICE.fullmatch(plain):
        return price[1] + price[3], price[2]
    if quantity := _QUANTITY.fullmatch(plain):
        return quantity[1], re.sub(r"\s", "", next(filter(None, quantity.groups()[1:])))
    return text, ""


def are_different_units(first: str, second: str) -> bool:
    """Whether two units are certainly not the same, such as km and m. Words are not compared."""
    if not (_SYMBOL_UNIT.fullmatch(first) and _SYMBOL_UNIT.fullmatch(second)):
        return False
    return _common_spelling(first) != _common_spelling(second)


def _common_spelling(unit: str) -> str:
    """A unit of symbols in one of its spellings: `hrs` as `h`, `sq.ft` as `ft^2`."""
    unit = re.sub(r"^sq\.?(.*)", r"\1^2", re.sub(r"^cu\.?(.*)", r"\1^3", unit))
    unit = re.sub(r"(?<=[A-Za-z])([23])", r"^\1", re.sub(r"[{}]", "", unit))
    unit = re.sub(r"per", "/", re.sub(r"[⋅*]|\\cdot", "·", unit))
    return re.sub(r"[A-Za-z]+", lambda symbol: _SPELLINGS.get(symbol[0], symbol[0]), unit)
