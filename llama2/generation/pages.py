"""Which pages of the key/value cache are free, in use, or kept for prompts that begin alike."""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np


class Pages:
    """Counts the users of `count` pages of `size` tokens each.

    A page that nobody uses any more but that holds the beginning of a prompt is kept until its
    room is needed, the one that was longest without a user first.
    """

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count))  # a heap: low pages first, so that those in use lie dense
        self._users = [0] * count
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, list[bytes]] = {}

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.size)

    def take(self) -> int:
        """A page for new content, with one user. Some must be available."""
        if self._free:
            page = heapq.heappop(self._free)
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._users[page] = 1
        return page

    def share(self, page: int) -> None:
        """Count one more user of a page that `find` named."""
        self._idle.pop(page, None)
        self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Count one user less of each. The last ones are the first to be given away."""
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page] == 0:
                if page in self._keys:
                    self._idle[page] = None
                else:
                    heapq.heappush(self._free, page)

    def remember(self, page: int, key: bytes) -> None:
        """Let others find by `key` what a page in use holds now and will hold as long as it has a
        user. The first page of a key stays."""
        if key not in self._pages:
            self._pages[key] = page
            self._keys.setdefault(page, []).append(key)

    def find(self, key: bytes) -> int | None:
        """The page with this content."""
        return self._pages.get(key)

    def forget(self) -> None:
        """Let no content be found again: the weights that made it are gone."""
        for page in list(self._keys):
            self._forget(page)
        for page in self._idle:
            heapq.heappush(self._free, page)
        self._idle.clear()

    def _forget(self, page: int) -> None:
        for key in self._keys.pop(page, []):
            del self._pages[key]


def prefix_keys(tokens: Sequence[int], size: int) -> list[bytes]:
    """A key per page of `size` tokens, the last perhaps part of a page, which stands for its tokens
    and all before them."""
    data = np.asarray(tokens, dtype=np.int64)
    keys, key = [], b""
    for start in range(0, len(data), size):
        key = blake2b(key + data[start : start + size].tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys
