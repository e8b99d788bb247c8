"""A fast proof that a text does not repeat itself, so that the slow rules need not be asked.

N numbers words.
"""

from collections.abc import Sequence

import numpy as np

from llama2.cleaning.words import ngram_hashes, word_hashes

Limits = Sequence[tuple[int, float]]


def may_repeat(words: list[str], characters: int, top: Limits, repeated: Limits) -> bool:
    """False only where a text of so many `characters` keeps within the limits of datatrove's
    `GopherRepetitionFilter`: of each n, the share of the text that the most frequent n-gram (`top`)
    or n-grams that came before (`repeated`, n of 5 and more) may have.

    Repeated n-grams consist of repeated 5-grams, so the words within those bound all of them.
    """
    hashes_N = word_hashes(words)
    lengths_N = np.fromiter(map(len, words), np.int64, len(words))
    ends = np.concatenate([[0], np.cumsum(lengths_N + 1)])
    for n, share in top:
        _, first, counts = np.unique(
            ngram_hashes(hashes_N, n), return_index=True, return_counts=True
        )
        if len(first):
            places = first[counts == counts.max()]
            longest = (ends[places + n] - ends[places]).max() - 1
            if longest * counts.max() > share * characters:
                return True
    fives = ngram_hashes(hashes_N, 5)
    came_before = np.ones(len(fives), bool)
    came_before[np.unique(fives, return_index=True)[1]] = False
    within_N = np.zeros(len(words), bool)
    for k in range(5):
        within_N[np.flatnonzero(came_before) + k] = True
    return bool(lengths_N[within_N].sum() > min(share for _, share in repeated) * characters)
