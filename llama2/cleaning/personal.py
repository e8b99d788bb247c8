"""Personal details in a text: e-mail, phone, street address, identity number, IP address.

What only looks like one must not count: years, prices, ISBNs, versions, statistics. Cheap regular
expressions find candidates; the libraries that know the numbers' rules are asked about those alone.
"""

import ipaddress
import re
from collections.abc import Iterator
from typing import NamedTuple

from llama2.cleaning.addresses import addresses
from llama2.cleaning.identity import identity_numbers
from llama2.cleaning.phones import phones


class Detail(NamedTuple):
    """A personal detail and where it stands in the text."""

    kind: str
    """email, ip, phone, address, or the identity number's name."""
    start: int
    end: int


# RFC 5321's unquoted form. Backtracking is bounded by the lengths that the RFC allows.
_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![A-Za-z0-9-])"
)
# RFC 2606: these belong to nobody.
_EXAMPLE = re.compile(r"@(?:.*\.)?example(?:\.(?:com|net|org|edu))?$", re.IGNORECASE)
_IPV4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\w)")
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_VERSION = re.compile(
    r"(?:\bv|version|release|section|chapter|firmware|build)\.?\s{0,2}$", re.IGNORECASE
)
# A number of seven digits or more as people write them; most that follows looks only at these.
_NUMBER = re.compile(r"[+(]{0,2}\d(?:[ ().\-–‐‑/\u00a0]{0,3}\d){6,}")


def personal_details(text: str, regions: tuple[str, ...]) -> list[Detail]:
    """All personal details of a text, in order, without overlaps.

    `regions` are the countries (ISO 3166 codes) whose phone numbers are known without +code.
    """
    numbers = [match.span() for match in _NUMBER.finditer(text)]
    found: list[Detail] = []
    taken: set[int] = set()
    for finder in (
        _emails(text),
        _ip_addresses(text),
        identity_numbers(text, numbers),
        phones(text, numbers, regions),
        addresses(text),
    ):
        for kind, start, end in finder:
            if taken.isdisjoint(range(start, end)):
                taken.update(range(start, end))
                found.append(Detail(kind, start, end))
    return sorted(found, key=lambda detail: detail.start)


def _emails(text: str) -> Iterator[tuple[str, int, int]]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            if not _EXAMPLE.search(match[0]):
                yield "email", *match.span()


def _ip_addresses(text: str) -> Iterator[tuple[str, int, int]]:
    """Addresses of the public internet; private ones (RFC 1918 and the like) name nobody."""
    for pattern in (_IPV4, _IPV6):
        for match in pattern.finditer(text):
            before = text[max(0, match.start() - 12) : match.start()]
            if _is_public(match[0]) and not _VERSION.search(before):
                yield "ip", *match.span()


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:
        return False
