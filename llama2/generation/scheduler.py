"""Which requests the next step computes, and in which pages."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from llama2.generation.pages import Pages
from llama2.generation.request import Request


@dataclass
class Counters:
    """What the engine did since it began."""

    steps: int = 0
    computed: int = 0
    """Tokens of prompts, but for the last of each, that went through the model; those of preempted
    requests again."""
    reused: int = 0
    """Such tokens whose keys and values another request had computed."""
    drawn: int = 0
    preempted: int = 0


class Scheduler:
    """First come, first served, as long as there are rows and pages.

    Where pages run out, the request that came last gives back its own and waits at the head of the
    queue; what it had drawn is computed again, one token at a time like the first time, so that
    rounding is the same too.
    copy: duplicates the content of a page. chunk: most tokens of one prompt in a step, whole pages
    of them, so that a long prompt does not hold up the others.
    """

    def __init__(
        self, pages: Pages, rows: int, chunk: int, budget: int, copy: Callable[[int, int], None]
    ) -> None:
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.counters = Counters()
        self._pages, self._rows, self._copy = pages, rows, copy
        self._chunk = pages.needed(chunk) * pages.size
        self._budget = max(self._chunk, budget)

    def plan(self) -> list[tuple[Request, int]]:
        """Requests and how many tokens of each to compute now; those past their prompts' beginning,
        of which it is one, come first."""
        self._extend()
        self._admit(self._budget - sum(self._due(request) for request in self.running))
        decoding = [(request, 1) for request in self.running if request.prefix <= 0]
        budget, chunks = self._budget, []
        for request in self.running:
            due = self._due(request)
            if 0 < due <= budget:
                budget -= due
                chunks.append((request, due))
        return decoding + chunks

    def _due(self, request: Request) -> int:
        """Tokens of the prompt's beginning that a step should compute."""
        return max(0, min(self._chunk, request.prefix))

    def computed(self, request: Request, count: int) -> None:
        """Note that `count` more tokens lie in the request's pages."""
        before, request.computed = request.computed, request.computed + count
        if before >= request.prompt_length - 1:
            return
        self.counters.computed += count
        last = request.prompt_length - 1
        for i, key in enumerate(request.keys):
            if before < min((i + 1) * self._pages.size, last) <= request.computed:
                self._pages.remember(request.pages[i], key)

    def remove(self, request: Request) -> None:
        """Forget a request, ended or cancelled."""
        if request.pages:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)

    def _release(self, request: Request) -> None:
        self._pages.release(request.pages)
        request.pages, request.computed = [], 0

    def _extend(self) -> None:
        """Give every running request room for its next token."""
        for request in list(self.running):
            room = len(request.pages) * self._pages.size
            if not room or room >= len(request.tokens):
                continue  # preempted for one before it, or with room enough
            while not self._pages.available:
                last = self.running.pop()
                self._release(last)
                self.waiting.appendleft(last)
                self.counters.preempted += 1
                if last is request:
                    break
            else:
                request.pages.append(self._pages.take())

    def _admit(self, budget: int) -> None:
        if not self.waiting or budget <= 0:
            return
        # A prompt whose beginning is just being computed waits for it rather than repeat it.
        promised = {key for request in self.running for key in self._promised(request)}
        held: list[Request] = []
        while self.waiting and budget > 0 and len(self.running) + len(held) < self._rows:
            request = self.waiting[0]
            shared = self._shared(request)
            if promised.intersection(request.keys[len(shared) : len(shared) + 1]):
                held.append(self.waiting.popleft())
                continue
            if not self._place(request, shared):
                break
            self.waiting.popleft()
            self.running.append(request)
            promised.update(self._promised(request))
            budget -= self._due(request)
        self.waiting.extendleft(reversed(held))

    def _promised(self, request: Request) -> list[bytes]:
        """Keys of the pages that a request is about to fill."""
        if request.computed >= request.prompt_length - 1:
            return []
        return request.keys[request.computed // self._pages.size :]

    def _shared(self, request: Request) -> list[int]:
        """Pages that hold the beginning of the prompt."""
        found: list[int] = []
        for key in request.keys:
            page = self._pages.find(key)
            if page is None:
                break
            found.append(page)
        return found

    def _place(self, request: Request, shared: list[int]) -> bool:
        """Give a request the pages of its tokens; False where there are too few besides one for
        each that runs."""
        size = self._pages.size
        for page in shared:  # at once, so that none of them is given away
            self._pages.share(page)
        reused = min(len(shared) * size, request.prompt_length - 1)
        # The last page may be one that its owner fills behind the prompt: that one is copied.
        partial = shared.pop() if reused % size else None
        missing = self._pages.needed(len(request.tokens)) - len(shared)
        missing_now = missing + len(self.running)
        if partial is not None and missing_now > self._pages.available:
            self._pages.release([partial])
            partial, reused = None, len(shared) * size
        if missing_now > self._pages.available:
            self._pages.release(shared)
            return False
        request.pages = shared + [self._pages.take() for _ in range(missing)]
        request.computed = reused
        self.counters.reused += reused
        if partial is not None:
            self._copy(partial, request.pages[len(shared)])
            self._pages.release([partial])
        return True
