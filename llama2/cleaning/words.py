"""A text as words, and runs of n words as 64-bit hashes: what contamination and near-duplicates are
found by.

N numbers words; a hash array is uint64.
"""

import re
import unicodedata

import numpy as np
import numpy.typing as npt
import xxhash

Hashes = npt.NDArray[np.uint64]

# Letters and digits of any script; where a script has no spaces, each character is a word.
_SPACELESS = "぀-ヿ㐀-鿿฀-๿"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W_{_SPACELESS}]+")
# Odd, so that no bit of a hash is lost. The golden ratio, as in Fibonacci hashing.
_BASE = 0x9E3779B97F4A7C15


def normalized_words(text: str) -> list[str]:
    """Words in lower case without punctuation, as GPT-3 (appendix C) compares texts."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return _WORD.findall(text.lower())


def word_hashes(words: list[str]) -> Hashes:
    """xxh64 of each word, [N]."""
    # A lone surrogate has no UTF-8; it still needs a hash.
    encoded = (word.encode("utf-8", "surrogatepass") for word in words)
    return np.fromiter(map(xxhash.xxh64_intdigest, encoded), np.uint64, len(words))


def ngram_hashes(hashes_N: Hashes, n: int) -> Hashes:
    """A hash of each run of n words, [N - n + 1], or empty where there are fewer than n words.

    A polynomial of the words' hashes modulo 2^64, then mixed (splitmix64), since MinHash's
    permutations are linear too. Runs of different n differ.
    """
    count = len(hashes_N) - n + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    mixed = np.full(count, n, np.uint64)
    for k in range(n):
        mixed *= np.uint64(_BASE)
        mixed += hashes_N[k : k + count]
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed
