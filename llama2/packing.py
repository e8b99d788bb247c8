"""Laying sequences into rows, shares and orders: all of it arithmetic on lengths."""

import bisect
import hashlib
from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of the sequences in each row, by best-fit decreasing, no row above `capacity` tokens.

    Longest first, each into the fullest row that still holds it; ties keep their order.
    Raises `ValueError` for a sequence longer than a row.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"A sequence of {length} tokens does not fit a row of {capacity}.")
        place = bisect.bisect_left(free, (length, -1))
        if place == len(free):
            rows.append([index])
            bisect.insort(free, (capacity - length, len(rows) - 1))
        else:
            left, row = free.pop(place)
            rows[row].append(index)
            bisect.insort(free, (left - length, row))
    return rows


def balance(lengths: Sequence[int], shares: int) -> list[list[int]]:
    """Deal indices into `shares` parts whose token totals are close and whose counts differ by one
    at most.

    Round by round, longest first: a round's longest goes to the part with the fewest tokens so far.
    Totals differ by no more than the lengths of one round do, and so by the longest at most.
    """
    parts: list[list[int]] = [[] for _ in range(shares)]
    totals = [0] * shares
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), shares):
        lightest = sorted(range(shares), key=lambda part: totals[part])
        for index, part in zip(order[start : start + shares], lightest, strict=False):
            parts[part].append(index)
            totals[part] += lengths[index]
    return parts


def micro_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices by micro-batch: rows times the longest row stay within `budget` tokens, unless a
    single row is longer.

    Longest first, so that rows of like length are padded together; no other cut of that order
    makes fewer.
    """
    found: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room < 1:
            found.append([])
            room = max(1, budget // max(1, lengths[index]))
        found[-1].append(index)
        room -= 1
    return found


def deal(lengths: Sequence[int], shares: int, budget: int) -> list[list[list[int]]]:
    """A batch's indices by share and micro-batch: totals are balanced, all shares have equally
    many micro-batches, and each keeps to `budget` as in `micro_batches`.

    A share that could do with fewer halves its largest; one with too few rows for that ends with
    empty micro-batches.
    """
    parts = balance(lengths, shares)
    dealt = [
        [[part[i] for i in micro] for micro in micro_batches([lengths[i] for i in part], budget)]
        for part in parts
    ]
    wanted = max(len(share) for share in dealt)
    return [_split(share, lengths, wanted) for share in dealt]


def _split(share: list[list[int]], lengths: Sequence[int], wanted: int) -> list[list[int]]:
    while len(share) < wanted:
        place = max(
            range(len(share)),
            key=lambda i: (len(share[i]) > 1, len(share[i]) * max(lengths[j] for j in share[i])),
            default=-1,
        )
        if place < 0 or len(share[place]) < 2:
            return share + [[]] * (wanted - len(share))
        rows = share[place]
        half = (len(rows) + 1) // 2
        share = [*share[:place], rows[:half], rows[half:], *share[place + 1 :]]
    return share


def shuffled(index: int, size: int, seed: int) -> int:
    """Where a seeded permutation of range(size) sends `index`, in constant memory.

    A four-round Feistel network over the next even power of two, walked until it lands inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    assert 0 <= index < size
    half = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            key = f"{seed}/{turn}/{right}".encode()
            digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
            left, right = right, left ^ (digest & mask)
        index = left << half | right
        if index < size:
            return index


def sample_order(step: int, batch: int, size: int, seed: int) -> list[int]:
    """Indices of global batch number `step`: pass after pass over `size` samples, each
    reshuffled."""
    places = range(step * batch, (step + 1) * batch)
    return [shuffled(place % size, size, seed * 1_000_003 + place // size) for place in places]
