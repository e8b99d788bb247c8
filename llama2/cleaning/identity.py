"""Identity numbers: those with a check that chance rarely passes, and a form one can know them by.

python-stdnum decides. Numbers without a check digit or a form of their own (plain nine digits, say)
are not looked for.
"""

import re
from collections.abc import Callable, Iterator

from stdnum import iban, luhn
from stdnum.br import cpf
from stdnum.ca import sin
from stdnum.cn import ric
from stdnum.es import dni, nie
from stdnum.fi import hetu
from stdnum.fr import nir
from stdnum.in_ import aadhaar
from stdnum.it import codicefiscale
from stdnum.kr import rrn
from stdnum.mx import curp
from stdnum.se import personnummer
from stdnum.us import itin, ssn


def _is_card(number: str) -> bool:
    """Luhn's check, and the first digits of American Express, Visa, Mastercard or Discover."""
    digits = re.sub(r"\D", "", number)
    brand = re.match(r"3[47]\d{13}$|(?:4|5[1-5]|2[2-7]|6(?:011|4[4-9]|5))\d+$", digits)
    return bool(brand) and len(set(digits)) > 1 and luhn.is_valid(digits)


def _is_aadhaar(number: str) -> bool:
    """Three years in a row pass the check once in ten times."""
    return not re.fullmatch(r"(?:20\d\d\D?){3}", number) and aadhaar.is_valid(number)


def _is_china(number: str) -> bool:
    return ric.is_valid(number.upper())


_Check = Callable[[str], bool]
# Name, written form, and what must hold.
_STARTING_WITH_DIGITS: list[tuple[str, str, _Check]] = [
    ("us_ssn", r"\d{3}-\d{2}-\d{4}", lambda n: ssn.is_valid(n) or itin.is_valid(n)),
    ("card", r"\d{4}([ -]?)\d{4}\2\d{4}\2\d{4}|3[47]\d\d([ -]?)\d{6}\3\d{5}", _is_card),
    ("ca_sin", r"\d{3}-\d{3}-\d{3}", sin.is_valid),
    ("in_aadhaar", r"[2-9]\d{3}([ -])\d{4}\2\d{4}", _is_aadhaar),
    ("br_cpf", r"\d{3}\.\d{3}\.\d{3}-\d\d", cpf.is_valid),
    ("cn_ric", r"\d{17}[\dXx]", _is_china),
    ("kr_rrn", r"\d{6}-\d{7}", rrn.is_valid),
    ("se_personnummer", r"\d{6}[-+]\d{4}", personnummer.is_valid),
    ("fi_hetu", r"\d{6}[-+A]\d{3}[0-9A-FHJ-NPR-Y]", hetu.is_valid),
    ("fr_nir", r"[12] ?\d\d ?(?:0[1-9]|1[0-2]) ?\d\d ?\d{3} ?\d{3} ?\d\d", nir.is_valid),
    ("es_dni", r"\d{8}-?[A-Z]", dni.is_valid),
]
_STARTING_WITH_LETTERS: list[tuple[str, str, _Check]] = [
    ("iban", r"[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?", iban.is_valid),
    ("it_codice_fiscale", r"[A-Z]{6}\d\d[A-EHLMPR-T]\d\d[A-Z]\d{3}[A-Z]", codicefiscale.is_valid),
    ("mx_curp", r"[A-Z]{4}\d{6}[HM][A-Z]{5}[A-Z\d]\d", curp.is_valid),
    ("es_nie", r"[XYZ]-?\d{7}-?[A-Z]", nie.is_valid),
]


def _alone(form: str) -> re.Pattern[str]:
    """The form where no other letters or digits touch it."""
    return re.compile(rf"(?<![\w.])(?<!\d-)({form})(?![\w]|[-.]\d)")


_DIGITS = [(name, _alone(form), check) for name, form, check in _STARTING_WITH_DIGITS]
_LETTERS = [(name, _alone(form), check) for name, form, check in _STARTING_WITH_LETTERS]
# A word that begins with capitals and goes on with digits: rare, so all four forms can be tried.
_CAPITALS = re.compile(r"\b[A-Z]{1,6}-?\d[\dA-Z]")
# A number of seven digits may be followed by up to this many characters that belong to it.
_TAIL = 6


def identity_numbers(text: str, numbers: list[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    """Identity numbers by kind; `numbers` are where numbers of seven digits or more stand."""
    for start, end in numbers:
        for name, form, check in _DIGITS:
            for match in form.finditer(text, start, end + _TAIL):
                if check(match[0]):
                    yield name, *match.span()
    for candidate in _CAPITALS.finditer(text):
        for name, form, check in _LETTERS:
            found = form.match(text, candidate.start())
            if found and check(found[0]):
                yield name, *found.span()
