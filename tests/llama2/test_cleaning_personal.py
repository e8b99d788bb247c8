"""Personal details: what must be found, kind by kind, and what only looks like one."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2.cleaning.personal import personal_details

REGIONS = ("US", "GB")


def kinds(text: str, regions: tuple[str, ...] = REGIONS) -> list[tuple[str, str]]:
    return [
        (detail.kind, text[detail.start : detail.end]) for detail in personal_details(text, regions)
    ]


@pytest.mark.parametrize(
    ("text", "kind", "detail"),
    [
        ("Write to john.doe+news@mail.co.uk, please.", "email", "john.doe+news@mail.co.uk"),
        ("<mailto:o'neil@cs.cam.ac.uk>", "email", "neil@cs.cam.ac.uk"),
        ("Call me at (415) 555-2671 today", "phone", "(415) 555-2671"),
        ("415-555-2671", "phone", "415-555-2671"),
        ("Jane Roe 415.555.2671 ext. 12", "phone", "415.555.2671"),
        ("toll-free 1-800-356-9377!", "phone", "1-800-356-9377"),
        ("John Smith 212 300 4000", "phone", "212 300 4000"),
        ("tel: 4155552671", "phone", "4155552671"),
        ("phone=415-555-2671", "phone", "415-555-2671"),
        ("London +44 20 7946 0958", "phone", "+44 20 7946 0958"),
        ("(+49) 30 901820 in Berlin", "phone", "(+49) 30 901820"),
        ("Tokyo +81 3-3580-3311.", "phone", "+81 3-3580-3311"),
        ("Office: 020 7946 0958", "phone", "020 7946 0958"),
        ("my SSN is 123-45-6789.", "us_ssn", "123-45-6789"),
        ("card 4111 1111 1111 1111, valid", "card", "4111 1111 1111 1111"),
        ("Amex 378282246310005", "card", "378282246310005"),
        ("5555-5555-5555-4444", "card", "5555-5555-5555-4444"),
        ("IBAN GB82 WEST 1234 5698 7654 32", "iban", "GB82 WEST 1234 5698 7654 32"),
        ("DE89370400440532013000", "iban", "DE89370400440532013000"),
        ("SIN 123-456-782", "ca_sin", "123-456-782"),
        ("Aadhaar 2345 6789 0124", "in_aadhaar", "2345 6789 0124"),
        ("CPF 111.444.777-35", "br_cpf", "111.444.777-35"),
        ("身份证 11010519491231002X", "cn_ric", "11010519491231002X"),
        ("RRN 971013-9019902", "kr_rrn", "971013-9019902"),
        ("personnummer 811228-9874", "se_personnummer", "811228-9874"),
        ("HETU 131052-308T", "fi_hetu", "131052-308T"),
        ("NIR 2 95 10 99 126 111 93", "fr_nir", "2 95 10 99 126 111 93"),
        ("DNI 54362315K", "es_dni", "54362315K"),
        ("NIE X-2482300-W", "es_nie", "X-2482300-W"),
        ("CF RCCMNL83S18D969H", "it_codice_fiscale", "RCCMNL83S18D969H"),
        ("CURP BOXW310820HNERXN09", "mx_curp", "BOXW310820HNERXN09"),
        ("from 8.8.8.8 at noon", "ip", "8.8.8.8"),
        ("2001:4860:4860::8888", "ip", "2001:4860:4860::8888"),
        ("He lives at 742 Evergreen Terrace, Springfield", "address", "742 Evergreen Terrace"),
        ("123 N. Main St., Apt 4", "address", "123 N. Main St."),
        ("815 23rd Avenue", "address", "815 23rd Avenue"),
        ("Visit 1901 Front Street", "address", "1901 Front Street"),
        ("P.O. Box 1234", "address", "P.O. Box 1234"),
        ("Hauptstraße 12, Berlin", "address", "Hauptstraße 12"),
        ("au 12 rue de la Paix, Paris", "address", "12 rue de la Paix"),
    ],
)
def test_found(text: str, kind: str, detail: str) -> None:
    assert kinds(text) == [(kind, detail)]


@pytest.mark.parametrize(
    "text",
    [
        "Between 1990-1995 and 2001-2010, and in 2010 2011 2012.",
        "It cost $1,234,567,890, or €415 555 2671.",
        "ISBN 978-0-306-40615-7, ISBN 0-306-40615-2, 9780306406157",
        "doi:10.1038/s41586-020-2649-2 and arXiv 2307.09288",
        "At 2023-01-15 12:30:45 and 20230115T120000, and 01/02/2003 10:30.",
        "2147483647 is the largest of 4294967296 integers; 3.14159265358979 is not.",
        "lat 40.712776, long -74.005974",
        "row 212 300 4000 5000 6000",
        "Scores 3-2-1-4-5-6-7; pages 123-456, 789-1011",
        "order #415-555-2671",
        "Population 8,336,817 on 302.6 square miles",
        "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15",
        "555-1234",
        # Checks that fail by one digit, numbers never issued, and numbers that belong to nobody.
        "4111 1111 1111 1112",
        "0000 0000 0000 0000",
        "DE89370400440532013001",
        "123-456-783",
        "666-12-3456 and 000-12-3456, and the wallet maker's 078-05-1120",
        "54362315L",
        "info@example.com, user@localhost, @handle, a @ b",
        "192.168.1.1, 10.0.0.1, 127.0.0.1, 256.8.8.8, fe80::1",
        "version 8.8.8.8 and v1.2.3.4, section 5.6.7.8",
        "std::vector, dead::beef and 12:30:45",
        "In 1990 Oxford Street was closed. Highway 61. 5 Golden Rings.",
        "The 12 St Andrews golfers met 3 Dr Watsons on the road.",
    ],
)
def test_not_found(text: str) -> None:
    assert kinds(text) == []


def test_regions_decide_which_national_numbers_are_known() -> None:
    text = "Bureau: 01 42 68 53 00"
    assert kinds(text, ("US",)) == []
    assert kinds(text, ("US", "FR")) == [("phone", "01 42 68 53 00")]
    assert kinds("+33 1 42 68 53 00", ()) == [("phone", "+33 1 42 68 53 00")]


def test_many_in_order_and_counted_once() -> None:
    text = "415-555-2671 / 415-555-2672, a@b.org; 1 Main Street. SSN 123-45-6789, 8.8.4.4"
    assert [kind for kind, _ in kinds(text)] == [
        "phone",
        "phone",
        "email",
        "address",
        "us_ssn",
        "ip",
    ]


@given(st.text(st.sampled_from("0123456789٣３ .-+()/:@,AZaz\n#$%°²"), max_size=80))
@settings(max_examples=200, deadline=None)
def test_any_text_gives_separate_places_inside_it(text: str) -> None:
    found = personal_details(text, REGIONS)
    end = 0
    for detail in found:
        assert end <= detail.start < detail.end <= len(text)
        end = detail.end


@pytest.mark.parametrize("unit", ["1 ", "1-", "a.", "A1", "a@", "12 Aa ", "1:", "(", "+1", "Aaaa"])
def test_time_grows_with_length_alone(unit: str) -> None:
    """No pattern backtracks without bound: 100,000 characters of any of these take well below a
    second, where a quadratic pattern would take minutes."""
    start = time.perf_counter()
    personal_details(unit * (100_000 // len(unit)), REGIONS)
    assert time.perf_counter() - start < 5
