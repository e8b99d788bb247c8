"""Quality rules for English prose, all datatrove's: Gopher, C4 and FineWeb.

datatrove splits words with spaCy; here a regular expression does it, which is fast and needs no
further package. Punctuation is not a word, so that "word ," and "word," count alike.
"""

import re

from datatrove.data import Document
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter, get_filter_result
from datatrove.pipeline.filters.c4_filters import CITATION_REGEX
from datatrove.utils.text import split_into_words
from datatrove.utils.word_tokenizers import WordTokenizer

from llama2.cleaning.repetition import may_repeat

# Words with what is inside them, or symbols that prose has no use for, such as # or |.
_WORD = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s.,;:!?'\"“”‘’()\[\]–—-]+")
# Begins at the first mark only, or a row of ten thousand points would take their square's time.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*(?=\s|$)")


class EnglishTokenizer(WordTokenizer):
    """Words and sentences of English, for datatrove's filters."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """The sentences of a text, each with its end mark."""
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Where sentences start and end; together they are the whole text."""
        ends = [match.end() for match in _SENTENCE_END.finditer(text)]
        if text[ends[-1] if ends else 0 :].strip():
            ends.append(len(text))
        return list(zip([0, *ends[:-1]], ends, strict=True))


class Quality:
    """The rules with FineWeb's settings (Penedo et al., arXiv 2406.17557): those of
    Gopher (Rae et al., arXiv 2112.11446, table A1) and C4 (Raffel et al., arXiv 1910.10683, section
    2.2) save terminal punctuation of each line, and FineWeb's own three.

    One thing differs: headings, which C4's three words a line would strike out, stay.
    """

    def __init__(self, min_words: int, max_words: int) -> None:
        self._tokenizer = EnglishTokenizer()
        english = {"language": self._tokenizer}
        self._gopher = GopherQualityFilter(
            min_doc_words=min_words, max_doc_words=max_words, **english
        )
        self._lines = GopherRepetitionFilter(top_n_grams=(), dup_n_grams=(), **english)
        self._ngrams = GopherRepetitionFilter(
            dup_line_frac=None,
            dup_para_frac=None,
            dup_line_char_frac=None,
            dup_para_char_frac=None,
            **english,
        )
        # One word a line, not none, since an empty line would count as a sentence.
        self._c4 = C4QualityFilter(filter_no_terminal_punct=False, min_words_per_line=1, **english)
        # The paper's number. datatrove's default of 0.01 drops plays, whose speakers' names repeat.
        self._fineweb = FineWebQualityFilter(char_duplicates_ratio=0.1, **english)

    def judge(self, text: str) -> tuple[str, str | None]:
        """The text without lines about cookies, terms of use and JavaScript and without citation
        marks, and the rule that it breaks, by datatrove's name, or None."""
        if not text.strip():
            return text, "empty"
        document = Document(text=text, id="")
        broken = _broken(self._gopher, document) or _broken(self._lines, document)
        if not broken and self._may_repeat(text):
            broken = _broken(self._ngrams, document)
        broken = broken or _broken(self._c4, document)
        if broken:
            return text, broken
        document.text = text = _with_kept_lines(text, document.text)
        return text, _broken(self._fineweb, document)

    def _may_repeat(self, text: str) -> bool:
        words = split_into_words(text, self._tokenizer)
        return may_repeat(words, len(text), self._ngrams.top_n_grams, self._ngrams.dup_n_grams)


def _broken(rule: BaseFilter, document: Document) -> str | None:
    kept, reason = get_filter_result(rule.filter(document))
    return None if kept else reason


def _with_kept_lines(text: str, kept: str) -> str:
    """The text without the lines that C4 struck out; C4 itself also takes indentation and empty
    lines. Whether it keeps a line depends on nothing but the line."""
    stripped = {line.strip() for line in kept.splitlines()}
    lines = (CITATION_REGEX.sub("", line) for line in text.splitlines())
    return "\n".join(line for line in lines if not line.strip() or line.strip() in stripped)
