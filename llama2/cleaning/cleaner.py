"""One document through all that is decided by looking at it alone."""

from typing import NamedTuple

from llama2.cleaning.contamination import Decontamination
from llama2.cleaning.normalization import normalize
from llama2.cleaning.personal import personal_details
from llama2.cleaning.settings import CleaningSettings

PERSONAL = "personal information"


class Cleaned(NamedTuple):
    """What became of a document."""

    text: str
    reason: str | None
    """None where the document is kept; else "empty", "personal information", "quality: " with
    datatrove's name of the rule, or "contaminated: " with the benchmark's name."""
    personal: int
    """How many personal details were found."""


class Cleaner:
    """Normalises a document, then decides whether to keep it. Holds no state between documents."""

    def __init__(self, settings: CleaningSettings, benchmarks: Decontamination | None) -> None:
        # Here, since importing datatrove takes half a second that only those who clean should pay.
        from llama2.cleaning.quality import Quality

        self._settings, self._benchmarks = settings, benchmarks
        self._quality = Quality(settings.min_words, settings.max_words)

    def clean(self, text: str) -> Cleaned:
        """The document as it should be read, and why it is dropped, if it is.

        Personal details come first, so that a source's share of such documents does not depend on
        the other rules.
        """
        settings = self._settings
        if settings.normalize:
            text = normalize(text)
        if not text.strip():
            return Cleaned(text, "empty", 0)
        personal = len(personal_details(text, settings.phone_regions))
        if personal:
            thousands = max(100, len(text.split())) / 1000
            if personal > settings.max_personal * thousands:
                return Cleaned(text, PERSONAL, personal)
        if settings.quality:
            text, rule = self._quality.judge(text)
            if rule:
                return Cleaned(text, f"quality: {rule}", personal)
        benchmark = self._benchmarks.hit(text) if self._benchmarks else None
        return Cleaned(text, f"contaminated: {benchmark}" if benchmark else None, personal)
