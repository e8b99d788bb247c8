"""Street addresses, by the forms that are common in English, German and French.

There is no library that knows addresses without gigabytes of data, so these are rules, made to miss
some rather than to take prose for an address: a house number, a name, and a word for a street.
"""

import re
from collections.abc import Iterator

_NAME = r"(?:[A-Z][A-Za-z'’.\-]{0,20}|\d{1,3}(?:st|nd|rd|th))"
_STREET = (
    r"(?:Street|Avenue|Road|Boulevard|Lane|Drive|Court|Square|Terrace|Parkway|Crescent|Close|"
    r"Place|Highway|Circle|Trail)"
)
# Short forms mean other things too (St for Saint, Dr for Doctor): the address must end there.
_SHORT = r"(?:St|Ave|Av|Rd|Blvd|Ln|Dr|Ct|Sq|Ter|Pkwy|Cres|Pl|Hwy|Cir)\b\.?(?=\s*(?:,|;|$|[#)]))"
_ENGLISH = re.compile(
    rf"(?<![\w.,$€£:/-])(?P<number>\d{{1,5}}[A-Za-z]?),? {_NAME}(?: {_NAME}){{0,3}}? "
    rf"(?:{_STREET}\b|{_SHORT})",
    re.MULTILINE,
)
_GERMAN_WORDS = ("straße ", "strasse ", "str. ", "gasse ", "allee ", "platz ")
_GERMAN = re.compile(
    r"\b[A-ZÄÖÜ][\w.-]{2,30}(?:straße|strasse|str\.|gasse|allee|platz) (?P<number>\d{1,3}[a-z]?)\b"
)
_FRENCH_WORDS = ("rue ", "avenue ", "boulevard ", "chemin ", "impasse ", "allée ", "quai ")
_FRENCH = re.compile(
    r"(?<![\w.,$€£:/-])(?P<number>\d{1,4}),? (?:(?:bis|ter),? )?"
    r"(?:rue|avenue|boulevard|chemin|impasse|allée|quai) (?:(?:de|du|des|la|le|les) |[dl]['’]){0,2}"
    r"[A-ZÉÈÀÂ][\w'’-]+"
)
_BOX = re.compile(r"\bP\. ?O\. ?Box \d{1,6}\b|\bPO Box \d{1,6}\b|\bPostfach \d{2,6}\b")
_YEAR = re.compile(r"1\d{3}|20\d\d")
# "In 1990 Oxford Street was closed": a year, unless it says so.
_LIVES = re.compile(
    r"\b(?:at|to|address|lives?|lived|visit|is)\W{1,3}$|(?:^|[\n:;(])\s*$", re.IGNORECASE
)


def addresses(text: str) -> Iterator[tuple[str, int, int]]:
    """Street addresses and post-office boxes; a number that may be a year counts only where the
    words before it lead to an address."""
    for pattern, words in ((_ENGLISH, ()), (_GERMAN, _GERMAN_WORDS), (_FRENCH, _FRENCH_WORDS)):
        # Whether a word occurs is seen much faster than where a pattern does.
        if words and not any(word in text for word in words):
            continue
        for match in pattern.finditer(text):
            before = text[max(0, match.start() - 12) : match.start()]
            year = pattern is not _GERMAN and _YEAR.fullmatch(match["number"])
            if not year or _LIVES.search(before):
                yield "address", *match.span()
    if "Box" in text or "Postfach" in text:
        for match in _BOX.finditer(text):
            yield "address", *match.span()
