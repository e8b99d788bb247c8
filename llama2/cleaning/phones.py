"""Phone numbers, by Google's libphonenumber."""

import re
from collections.abc import Iterator

from phonenumbers import Leniency, PhoneNumberMatcher

# A number with a country code or after such a word needs only be a valid one. Any other must also
# be grouped as its country groups them, since statistics have many digits too.
_INTRODUCED = re.compile(
    r"\b(?:tele)?(?:phone|tel|ph|call|fax|mobile|mob|cell|whatsapp|sms|text|dial|hotline|"
    r"contact)s?\b[^\w\n]{0,6}(?:(?:number|no|us|me|at|on|is|or)\b[^\w\n]{0,4}){0,3}$",
    re.IGNORECASE,
)
# What libphonenumber may find in one: North America's grouping, or a trunk prefix of 0.
_GROUPED = re.compile(r"(?<!\d)(?:\d{3}\)? ?|\d{3}[.\-–‐‑/])\d{3}[ .\-–‐‑]\d{4}(?!\d)|(?<!\d)0\d")
_NOT_BEFORE = re.compile(r"(?:[\w$€£¥#№%]|\d[.,])$")
_LONGEST = 60


def phones(
    text: str, numbers: list[tuple[int, int]], regions: tuple[str, ...]
) -> Iterator[tuple[str, int, int]]:
    """Phone numbers among the `numbers` (start and end in the text) of seven digits or more."""
    for start, end in numbers:
        number = text[start:end]
        before = text[max(0, start - 40) : start]
        # A table of figures has long rows.
        if len(number) > _LONGEST or _NOT_BEFORE.search(before):
            continue
        international = number.lstrip("(").startswith("+")
        introduced = international or bool(_INTRODUCED.search(before))
        if not introduced and not _GROUPED.search(number):
            continue
        leniency = Leniency.VALID if introduced else Leniency.STRICT_GROUPING
        # A little of what follows: with a letter or a per cent sign there it is no phone number.
        window = text[start : end + 2]
        for region in (None,) if international else regions:
            found = [
                ("phone", start + match.start, start + match.end)
                for match in PhoneNumberMatcher(window, region, leniency=leniency)
                if introduced or _stands_apart(match.raw_string, number)
            ]
            yield from found
            if found:
                break


def _stands_apart(phone: str, number: str) -> bool:
    """Whether a phone number has groups and, where nothing but blanks part them, is not a piece of
    a longer row of figures."""
    if re.search(r"[().\-–‐‑/]", phone):
        return True
    return not phone.isdigit() and re.sub(r"\D", "", phone) == re.sub(r"\D", "", number)
