"""Text in one form: ftfy's repairs, NFC, and no more blank space than says something."""

import re

import ftfy

# Quotation marks, ligatures and wide characters stay: a model should know how people write.
_REPAIRS = ftfy.TextFixerConfig(
    uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, explain=False
)
# ftfy leaves such a line alone: printable ASCII without the ampersand of an HTML entity.
_PLAIN = re.compile(r"[\t -%'-~]*")
_BLANK_LINES = re.compile(r"\n{3,}")


def normalize(text: str, as_prose: bool = True) -> str:
    """The text with mojibake, HTML entities, control characters and lone surrogates repaired
    (ftfy), line breaks as `\\n`, in form NFC, without blanks at line ends and with at most one
    empty line in a row.

    A text with a `<` may be HTML, where entities mean something: it keeps them. So does what is not
    `as_prose`, as dialogues about code, and all its empty lines.
    """
    repairs = _REPAIRS._replace(unescape_html=as_prose and "<" not in text)
    lines = text.replace("\r\n", "\n").split("\n")
    fixed = "\n".join(
        line if _PLAIN.fullmatch(line) else ftfy.fix_text(line, repairs) for line in lines
    )
    stripped = "\n".join(line.rstrip() for line in fixed.split("\n"))
    return (_BLANK_LINES.sub("\n\n", stripped) if as_prose else stripped).strip("\n")
