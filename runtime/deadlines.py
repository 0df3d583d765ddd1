"""Which request's time is up next."""

from __future__ import annotations

from bisect import bisect_left, insort

from .request import Request


class Deadlines:
    """Requests that have a deadline, in the order of these.

    A sorted list and no heap: a request that ends early leaves at once, with its tokens.
    """

    def __init__(self) -> None:
        self._requests: list[Request] = []

    def add(self, request: Request) -> None:
        """Watches a request, if it has a deadline."""
        if request.deadline is not None:
            insort(self._requests, request, key=_key)

    def remove(self, request: Request) -> None:
        """Watches it no more, if it did."""
        if request.deadline is not None:
            place = bisect_left(self._requests, _key(request), key=_key)
            if place < len(self._requests) and self._requests[place] is request:
                del self._requests[place]

    def due(self, now: float) -> list[Request]:
        """Those whose time is up; they stay until they are removed."""
        if not self._requests or _key(self._requests[0])[0] > now:  # nearly always
            return []
        return [request for request in self._requests if _key(request)[0] <= now]

    def next(self) -> float | None:
        """When the next one's time is up; None if there is none."""
        return _key(self._requests[0])[0] if self._requests else None


def _key(request: Request) -> tuple[float, tuple[int, int]]:
    assert request.deadline is not None  # those without are not in the list
    return request.deadline, request.turn
