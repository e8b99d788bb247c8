"""What is cleaned, and how strictly."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CleaningSettings:
    """What happens to a document of plain text before it is tokenized."""

    normalize: bool = True
    """Repair broken encodings, line breaks and control characters (ftfy), in Unicode form NFC."""
    quality: bool = True
    """Drop what the Gopher, C4 and FineWeb rules call bad. They are made for English prose: turn
    them off for code and for other languages."""
    min_words: int = 50
    """Quality: fewest words of a document."""
    max_words: int = 100_000
    """Quality: most words of a document."""
    max_personal: float = 10.0
    """Personal details (e-mail, phone, address, identity number, IP address) per 1,000 words above
    which a document is dropped. Fewer than 100 words count as 100, so by default one detail never
    drops a document."""
    max_personal_source: float = 0.2
    """Share of documents with too many personal details above which a whole source is dropped."""
    phone_regions: tuple[str, ...] = ("US", "GB")
    """Countries (ISO 3166 codes) whose phone numbers are known without their +code."""
    near_duplicates: bool = True
    """Keep only the first of documents that are nearly the same."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(
                f"cleaning.min_words {self.min_words} and max_words {self.max_words} leave no "
                "document; give 0 <= min_words <= max_words."
            )
        if self.max_personal < 0:
            raise ValueError(f"cleaning.max_personal is {self.max_personal}; give 0 or more.")
        if not 0 <= self.max_personal_source <= 1:
            raise ValueError(
                f"cleaning.max_personal_source is {self.max_personal_source}; give a share from 0 "
                "to 1."
            )
        for region in self.phone_regions:
            if region not in phone_regions():
                raise ValueError(
                    f"cleaning.phone_regions names {region!r}, which has no phone numbers; give "
                    "two-letter country codes such as US."
                )


def phone_regions() -> set[str]:
    """The country codes whose phone numbers are known."""
    import phonenumbers

    return phonenumbers.SUPPORTED_REGIONS
