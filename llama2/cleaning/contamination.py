"""Which documents hold text of a benchmark."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from llama2.cleaning.words import Hashes, ngram_hashes, normalized_words, word_hashes
from llama2.whole_files import whole_file

LONGEST, SHORTEST = 13, 8


class Decontamination:
    """Evaluation texts as hashes of their runs of 13 words (GPT-3, arXiv 2005.14165, appendix C).

    Words are in lower case without punctuation. A text of 8 to 12 words is looked for as a whole;
    a still shorter one, such as an answer of one word, would be found everywhere, so it
    contaminates only a document that consists of nothing else.

    Written here because datatrove's index builder needs lighteval and downloads, and its n-grams
    read all numbers as one, so that one arithmetic problem would contaminate all others.
    """

    def __init__(self, benchmarks: Mapping[str, Iterable[str]]) -> None:
        """From the name of each benchmark and its texts. Of benchmarks that share a run of words,
        the first is named. Raises `ValueError` where a benchmark has no words at all."""
        self.names = list(benchmarks)
        found: list[Hashes] = []
        owners: list[npt.NDArray[np.uint32]] = []
        lengths: set[int] = set()
        for owner, name in enumerate(self.names):
            of_text = []
            for text in benchmarks[name]:
                words = normalized_words(text)
                if words:
                    n = min(LONGEST, len(words))
                    lengths.add(n)
                    of_text.append(ngram_hashes(word_hashes(words), n))
            if not of_text:
                raise ValueError(
                    f"The benchmark {name} holds no words, so nothing can be decontaminated "
                    "against it; name a file with texts or leave it out."
                )
            found.append(np.unique(np.concatenate(of_text)))
            owners.append(np.full(len(found[-1]), owner, np.uint32))
        self._lengths = sorted(lengths, reverse=True)
        every = np.concatenate([np.empty(0, np.uint64), *found])
        self._hashes, first = np.unique(every, return_index=True)
        self._owners = np.concatenate([np.empty(0, np.uint32), *owners])[first]

    def hit(self, text: str) -> str | None:
        """The name of a benchmark that the text holds a part of, or None."""
        hashes_N = word_hashes(normalized_words(text))
        for n in self._lengths:
            if n >= SHORTEST or n == len(hashes_N):
                owner = self._owner(ngram_hashes(hashes_N, n))
                if owner is not None:
                    return owner
        return None

    def save(self, path: Path) -> None:
        """Write to one file, all or nothing; the same benchmarks give the same bytes."""
        with whole_file(path) as handle:
            np.savez(
                handle,
                names=np.array(self.names, np.str_),
                lengths=np.array(self._lengths, np.int64),
                hashes=self._hashes,
                owners=self._owners,
            )

    @staticmethod
    def load(path: Path) -> "Decontamination":
        """What `save` wrote. Raises `FileNotFoundError`, or `ValueError` where it is something
        else."""
        loaded = Decontamination({})
        try:
            with np.load(path, allow_pickle=False) as arrays:
                loaded.names = arrays["names"].tolist()
                loaded._lengths = arrays["lengths"].tolist()
                loaded._hashes, loaded._owners = arrays["hashes"], arrays["owners"]
        except (ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"{path} is not an index of benchmarks ({error}); delete it so that it is made "
                "again."
            ) from error
        return loaded

    def _owner(self, hashes: Hashes) -> str | None:
        """The benchmark of the first hash that belongs to one."""
        if not len(hashes):
            return None
        places = np.searchsorted(self._hashes, hashes)
        places[places == len(self._hashes)] = 0
        hits = np.flatnonzero(self._hashes[places] == hashes)
        return self.names[self._owners[places[hits[0]]]] if len(hits) else None
