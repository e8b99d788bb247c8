"""Documents that are nearly the same, found on disk by MinHash (Broder 1997; datatrove's hashes).

1. `write_signatures`: a part's documents become 14 band hashes each, sorted.
2. `find_duplicates`: one band of all parts; documents that share its hash are pairs.
3. `cluster_duplicates`: pairs of all bands become clusters; all but the first document are dropped.
4. `duplicates`: what a part has to drop.

Any step may run again, and its tasks in any order: files appear whole, and the same texts give the
same bytes. What a task holds in memory is bounded: one part's hashes (some 400 bytes a document),
a range of a band, and in the third step some 20 bytes a document of all parts.

B numbers bands, K permutations (14 bands of 8), S shingles of a text; N documents, or words of one.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from llama2.cleaning.words import Hashes, ngram_hashes, normalized_words, word_hashes
from llama2.whole_files import whole_file

if TYPE_CHECKING:
    from datatrove.pipeline.dedup.minhash import MinhashDedupSignature

Pairs = npt.NDArray[np.int64]

# FineWeb's numbers (arXiv 2406.17557). Documents that share a part s of their 5-word shingles are
# found with probability 1 - (1 - s^8)^14: 0.92 for s = 0.8.
BUCKETS, HASHES_PER_BUCKET, SHINGLE = 14, 8, 5
# So that permutations of a piece of a document stay in the processor's cache.
_SHINGLES_AT_A_TIME = 256
_RECORDS_AT_A_TIME = 1 << 21
_PAIR_BYTES = 16


def write_signatures(texts: Iterable[str], folder: Path, part: int) -> None:
    """Write the signatures of a part's texts.

    Of each band its hashes, sorted, and whose they are: uint64 [2, 14, N]. Texts of fewer than five
    words have a single shingle, so they are found only where their words are equal.
    """
    rows = [_bands(text) for text in texts]
    bands_BN = np.array(rows, np.uint64).reshape(len(rows), BUCKETS).T
    order_BN = np.argsort(bands_BN, axis=1, kind="stable")
    sorted_BN = np.take_along_axis(bands_BN, order_BN, axis=1)
    with whole_file(_signatures(folder, part)) as handle:
        np.save(handle, np.stack([sorted_BN, order_BN.astype(np.uint64)]))


def find_duplicates(folder: Path, parts: int, bucket: int) -> None:
    """Write the pairs (first, other) of documents that share a hash in one of the `BUCKETS` bands;
    documents are numbered over all parts. Does nothing where that is done already.

    Raises `FileNotFoundError` where a part has no signatures.
    """
    assert 0 <= bucket < BUCKETS
    path = _pairs(folder, bucket)
    if path.exists():
        return
    # Files are opened one at a time: a process may hold only about a thousand.
    counts = [_read_signatures(folder, part).shape[2] for part in range(parts)]
    offsets = np.cumsum([0, *counts])
    ranges = max(1, -(-int(offsets[-1]) // _RECORDS_AT_A_TIME))
    # Hashes are uniform, so equal ranges of values hold about equally many.
    cuts = np.array([number * 2**64 // ranges for number in range(1, ranges)], np.uint64)
    bounds = [
        [0, *np.searchsorted(_read_signatures(folder, part)[0, bucket], cuts), count]
        for part, count in enumerate(counts)
    ]
    with whole_file(path) as handle:
        for number in range(ranges):
            bands, documents = [], []
            for part, bound in enumerate(bounds):
                place = slice(bound[number], bound[number + 1])
                hashes = _read_signatures(folder, part)[:, bucket, place]
                bands.append(np.array(hashes[0]))
                documents.append(hashes[1] + np.uint64(offsets[part]))
            handle.write(_equal(_joined(bands), _joined(documents)).tobytes())


def cluster_duplicates(folder: Path, parts: int) -> None:
    """Write each part's documents to drop: of documents that pairs connect, directly or through
    others, all but the first (lowest part, then index). Does nothing where that is done already.

    Raises `FileNotFoundError` where a part has no signatures or a band no pairs.
    """
    if all(_drops(folder, part).exists() for part in range(parts)):
        return
    counts = [_read_signatures(folder, part).shape[2] for part in range(parts)]
    first_N = _first_of_cluster(partial(_all_pairs, folder), sum(counts))
    is_other_N = first_N != np.arange(len(first_N), dtype=first_N.dtype)
    start = 0
    for part, count in enumerate(counts):
        drop = np.flatnonzero(is_other_N[start : start + count]).astype(np.uint32)
        start += count
        with whole_file(_drops(folder, part)) as handle:
            np.save(handle, drop)


def duplicates(folder: Path, part: int) -> npt.NDArray[np.uint32]:
    """Indices of the part's documents to drop, sorted. Raises `FileNotFoundError` before
    `cluster_duplicates` is done."""
    return np.load(_existing(_drops(folder, part)))


def _bands(text: str) -> Hashes:
    """The hash of each band of the text's signature, [14]."""
    hashes_N = word_hashes(normalized_words(text))
    if len(hashes_N):
        shingles_S = ngram_hashes(hashes_N, min(SHINGLE, len(hashes_N)))
    else:
        # No letter and no digit: only what is equal to the last sign is the same.
        shingles_S = word_hashes([text])
    # One hash for the eight of a band: little-endian, so that every machine gets the same.
    bands = (band.tobytes() for band in _signature(shingles_S).astype("<u8"))
    return np.fromiter(map(xxhash.xxh64_intdigest, bands), np.uint64, BUCKETS)


def _signature(shingles_S: Hashes) -> Hashes:
    """The smallest of all shingles under each permutation, [14, 8]."""
    smallest = np.full((BUCKETS, HASHES_PER_BUCKET), np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles_S), _SHINGLES_AT_A_TIME):
        piece = shingles_S[start : start + _SHINGLES_AT_A_TIME, None]
        np.minimum(smallest, np.array(_minhash().get_signature(piece), np.uint64), out=smallest)
    return smallest


@lru_cache(maxsize=1)
def _minhash() -> "MinhashDedupSignature":
    """datatrove's permutations. Its shingles are not used: they need spaCy."""
    # Here, since importing datatrove takes half a second that only those who clean should pay.
    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
    from datatrove.utils.word_tokenizers import WhitespaceTokenizer

    config = MinhashConfig(
        n_grams=SHINGLE, num_buckets=BUCKETS, hashes_per_bucket=HASHES_PER_BUCKET, seed=1
    )
    return MinhashDedupSignature(".", config, language=WhitespaceTokenizer())


def _equal(bands: Hashes, documents: Hashes) -> Hashes:
    """Pairs (first, other), [P, 2], of documents with equal bands. Documents come in order."""
    order = np.argsort(bands, kind="stable")
    bands, documents = bands[order], documents[order]
    is_first = np.ones(len(bands), bool)
    is_first[1:] = bands[1:] != bands[:-1]
    places = np.arange(len(bands))
    firsts = documents[np.maximum.accumulate(np.where(is_first, places, 0))]
    return np.stack([firsts, documents], axis=1)[~is_first].astype("<u8")


def _first_of_cluster(
    read_pairs: Callable[[], Iterator[Pairs]], documents: int
) -> npt.NDArray[np.unsignedinteger]:
    """The first document of each document's cluster, [N], by lowering labels along pairs until no
    pair has two. The result does not depend on the order of pairs."""
    labels_N = np.arange(documents, dtype=np.min_scalar_type(documents))
    changed = True
    while changed:
        changed = False
        for pairs in read_pairs():
            labels = labels_N[pairs]
            differ = labels[:, 0] != labels[:, 1]
            if differ.any():
                changed = True
                low, high = labels[differ].min(axis=1), labels[differ].max(axis=1)
                np.minimum.at(labels_N, high, low)
        # Every label becomes that of its label, until they stay.
        while not np.array_equal(shorter := labels_N[labels_N], labels_N):
            labels_N = shorter
    return labels_N


def _all_pairs(folder: Path) -> Iterator[Pairs]:
    """Pairs of all bands, [P, 2], a bounded number at a time."""
    for bucket in range(BUCKETS):
        with _existing(_pairs(folder, bucket)).open("rb") as handle:
            while piece := handle.read(_PAIR_BYTES * _RECORDS_AT_A_TIME):
                yield np.frombuffer(piece, "<u8").reshape(-1, 2).astype(np.int64)


def _joined(pieces: list[Hashes]) -> Hashes:
    return np.concatenate([np.empty(0, np.uint64), *pieces])


def _signatures(folder: Path, part: int) -> Path:
    return folder / f"signatures-{part:05d}.npy"


def _pairs(folder: Path, bucket: int) -> Path:
    return folder / f"pairs-{bucket:02d}.bin"


def _drops(folder: Path, part: int) -> Path:
    return folder / f"duplicates-{part:05d}.npy"


def _read_signatures(folder: Path, part: int) -> Hashes:
    return np.load(_existing(_signatures(folder, part)), mmap_mode="r")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is absent, so near-duplicates cannot be found; run the step that writes it."
        )
    return path
