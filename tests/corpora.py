"""Made-up prose that the quality rules take for English, to test preparation with."""

import json
import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

SYLLABLES = ("ka", "ro", "mi", "len", "tu", "sar", "vo", "pel", "ni", "dra", "ces", "tor", "ba")
COMMON = ("the", "of", "and", "to", "in", "that", "with", "a", "have", "be", "was", "for", "on")


@lru_cache(maxsize=4)
def sentences(seed: int, count: int = 20_000) -> tuple[str, ...]:
    """A stock of sentences, whose words are as unevenly frequent as those of a language."""
    draw = random.Random(seed)
    words = sorted({"".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(6000)})
    draw.shuffle(words)
    weights = list(accumulate(1 / (rank + 10) for rank in range(len(words))))
    found = []
    for _ in range(count):
        rare = draw.choices(words, cum_weights=weights, k=draw.randint(6, 16))
        text = " ".join(
            f"{draw.choice(COMMON)} {word}" if draw.random() < 0.6 else word for word in rare
        )
        found.append(text[0].upper() + text[1:] + ".")
    return tuple(found)


def documents(seed: int) -> Iterator[str]:
    """Documents without end: paragraphs of some sentences, a line each."""
    draw, stock = random.Random(seed), sentences(seed)
    while True:
        yield "\n".join(
            " ".join(draw.choices(stock, k=draw.randint(3, 8))) for _ in range(draw.randint(3, 9))
        )


def write_corpus(path: Path, size: int, seed: int) -> Path:
    """A file of JSON lines of at least `size` bytes."""
    with path.open("w") as file:
        for number, text in enumerate(documents(seed)):
            file.write(json.dumps({"id": number, "text": text}) + "\n")
            if file.tell() >= size:
                return path
    raise AssertionError("documents end")
