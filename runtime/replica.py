"""One replica of the engine: rows of the batch, pages of the cache, and the requests on them. No JAX."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

from .page_pool import PagePool
from .request import Request
from .step_plan import Chunk

HEADROOM = 64  # one page in so many is left to those that run when a request is admitted


class Replica:
    """Keeps account of who runs on its rows and pages.

    Args:
        index: which of the engine's replicas it is.
        pool: the pages of its cache.
        num_rows: of its batch.
        decode_steps: tokens that one decode step makes for each request.
        prefix_caching: whether prefixes are looked up in the cache.

    Attributes:
        running: the requests on its rows, in the order of their turns.
        masked: those of them whose next token depends on all before it.
    """

    def __init__(
        self, index: int, pool: PagePool, *, num_rows: int, decode_steps: int, prefix_caching: bool
    ) -> None:
        self.pool = pool
        self.running: list[Request] = []
        self.masked: list[Request] = []
        self._index = index
        self._num_rows = num_rows
        self._decode_steps = decode_steps
        self._prefix_caching = prefix_caching
        self._free_rows = list(range(num_rows))[::-1]

    def decodes(self) -> tuple[list[Chunk], list[Request]]:
        """A token of each request that decodes, and the requests that lost their pages for that."""
        chunks, preempted, page_size = list[Chunk](), list[Request](), self.pool.page_size
        for request in tuple(self.running):
            if request.row < 0 or not request.can_decode:
                continue
            if request.masks and request.num_pending:  # what its next token may be is not known yet
                continue
            start = request.num_computed
            while start >= len(request.pages) * page_size and not self._grow(request, start + 1):
                victim = self.running[-1]
                self.preempt(victim)
                preempted.append(victim)
                if victim is request:
                    break
            else:
                chunks.append(Chunk(request, start, 1, 1))
        return chunks, preempted

    def extended(self, chunks: list[Chunk]) -> list[Chunk]:
        """More tokens of each decode, up to `decode_steps`: as many as may come, and have pages."""
        if self._decode_steps == 1:
            return chunks
        return [chunk._replace(length=n, num_outputs=n) for chunk in chunks for n in [self._steps_of(chunk)]]

    def _steps_of(self, chunk: Chunk) -> int:
        """How many tokens of a decode may come in one step, and have pages from now on."""
        request = chunk.request
        most = 1 if request.masks else request.max_tokens_in_cache - chunk.start
        length = max(1, min(self._decode_steps, most))
        while length > 1 and not self._grow(request, chunk.start + length):
            length -= 1
        return length

    def count(self, chunks: Iterable[Chunk]) -> None:
        """From now on the tokens of some chunks are computed."""
        for request, _, length, num_outputs in chunks:
            request.num_computed += length
            request.num_pending += num_outputs
            self.register(request)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Gives it pages for so many tokens; False if there are not as many."""
        if num_tokens > len(request.pages) * self.pool.page_size:
            missing = self.pool.pages_for(num_tokens) - len(request.pages)
            if not self.pool.can_allocate(missing):
                return False
            request.pages += self.pool.allocate(missing)
        return True

    def preempt(self, request: Request) -> None:
        """Takes a request's row and pages; its tokens are to be computed anew."""
        self.remove(request)
        request.num_preemptions += 1

    def cost_of(self, request: Request) -> int:
        """Pages that are in use once it has admitted a request, those that they share counted once more."""
        known = request.num_known
        return self.pool.num_used + self.pool.pages_for(known) - self.pool.num_known(self._prefix_of(request))

    def admit(self, request: Request) -> bool:
        """Gives a request a row and pages; False if there are none."""
        if not self._free_rows:
            return False
        pool, known = self.pool, request.num_known
        shared = pool.share(self._prefix_of(request))
        missing = pool.pages_for(known) - len(shared)
        headroom = -(-pool.num_pages // HEADROOM) if self.running else 0
        if not pool.can_allocate(missing + headroom):
            pool.release(shared)
            return False
        request.pages = shared + pool.allocate(missing)
        self._registered(request, len(shared))
        request.num_found = len(shared) * pool.page_size
        # At least one token must be computed, for the next one to come out of it.
        request.num_computed = min(request.num_found, known - 1)
        request.num_to_prefill = known
        request.replica, request.row = self._index, self._free_rows.pop()
        insert(self.running, request)
        if request.masks:
            self.masked.append(request)
        return True

    def _prefix_of(self, request: Request) -> list[bytes]:
        """The keys of the pages that it may share with others."""
        # The tokens of a prompt whose log-probabilities are wanted must be computed.
        scored = request.params.prompt_logprobs is not None and not request.output_ids
        return [] if scored else self._keys(request, request.num_known)

    def _keys(self, request: Request, num_tokens: int) -> list[bytes]:
        return request.keys_of_full_pages(num_tokens, self.pool.page_size) if self._prefix_caching else []

    def register(self, request: Request) -> None:
        """Lets others share the pages that are full of known tokens."""
        if request.num_computed < request.full_at or not self._prefix_caching:  # nearly always
            return
        if request.num_known >= request.full_at:
            keys = self._keys(request, min(request.num_computed, request.num_known))
            for page in range(request.num_registered, len(keys)):
                self.pool.register(request.pages[page], keys[page])
            self._registered(request, len(keys))

    def _registered(self, request: Request, num_pages: int) -> None:
        """The pool knows so many of its pages by their keys."""
        request.num_registered = num_pages
        request.full_at = (num_pages + 1) * self.pool.page_size

    def remove(self, request: Request) -> None:
        """Takes back its pages and its row."""
        self.running.remove(request)
        if request.masks:
            self.masked.remove(request)
        self.pool.release(request.pages)
        self._free_rows.append(request.row)
        request.pages, request.row, request.num_computed = [], -1, 0

    def clear(self) -> None:
        """Forgets everything, whatever state an exception left it in."""
        self.running.clear()
        self.masked.clear()
        self.pool.clear()
        self._free_rows = list(range(self._num_rows))[::-1]


class Prompts:
    """Chunks of prompts in a replica's part of a step.

    Args:
        replica: whose.
        budget: tokens.
        most: chunks.
        admits: whether it may take requests that wait.

    Attributes:
        chunks: so far.
        num_tokens: of these.
    """

    def __init__(self, replica: Replica, *, budget: int, most: int, admits: bool) -> None:
        self.replica = replica
        self.chunks: list[Chunk] = []
        self.num_tokens = 0
        self._budget, self._most, self._admits = budget, most, admits
        self._prefilling = [request for request in replica.running if not request.is_prefilled]

    @property
    def _has_room(self) -> bool:
        return self.num_tokens < self._budget and len(self.chunks) < self._most

    def go_on(self, before: tuple[int, int] | None = None) -> None:
        """Takes what is left of those that run, as far as there is room; of those before a turn, if given."""
        while self._has_room and self._prefilling:
            if before is not None and self._prefilling[0].turn > before:
                break
            self._take(self._prefilling.pop(0))

    def admit(self, request: Request) -> bool:
        """Admits a request and takes its first chunk; False if there is no room for it."""
        if not (self._has_room and self._admits and self.replica.admit(request)):
            return False
        self._take(request)
        return True

    def _take(self, request: Request) -> None:
        rest = request.num_to_prefill - request.num_computed
        length = min(self._budget - self.num_tokens, rest)
        chunk = Chunk(request, request.num_computed, length, int(length == rest))
        self.replica.count([chunk])  # at once, for the next one may begin alike
        self.chunks.append(chunk)
        self.num_tokens += length


def insert(requests: list[Request], request: Request) -> None:
    """Puts a request in its turn."""
    insort(requests, request, key=lambda other: other.turn)
