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
    """Deal indices into `shares` parts of equal count whose token totals are close.

    Longest first, back and forth over the parts. Raises `ValueError` unless the parts come out
    even.
    """
    if len(lengths) % shares:
        raise ValueError(f"{len(lengths)} sequences cannot be dealt evenly to {shares} shares.")
    parts: list[list[int]] = [[] for _ in range(shares)]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for turn, start in enumerate(range(0, len(order), shares)):
        dealt = order[start : start + shares]
        for part, index in zip(parts, dealt if turn % 2 == 0 else dealt[::-1], strict=True):
            part.append(index)
    return parts


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
