"""Which requests the engine's thread has taken in, and who waits for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .channel import Channel
from .deadlines import Deadlines
from .meter import Meter
from .request import Request


class Roster:
    """Requests from when the thread takes them in until they end.

    Args:
        meter: counts them.

    Attributes:
        requests: those that have not ended.
        channels: those that still wait for output, in the order in which they came.
        deadlines: of the requests, each from when the scheduler has given it its turn.
    """

    def __init__(self, meter: Meter) -> None:
        self.requests: set[Request] = set()
        self.channels: dict[Channel, None] = {}
        self.deadlines = Deadlines()
        self._meter = meter

    def take(self, requests: Sequence[Request]) -> None:
        """Takes requests in."""
        self.requests.update(requests)
        self.channels.update((request.channel, None) for request in requests)
        self._meter.taken(len(requests))

    def end(self, ended: Iterable[Request], *, failed: bool = False) -> list[Request]:
        """Forgets requests; those that it knew."""
        known = [request for request in ended if request in self.requests]
        for request in known:
            self.requests.remove(request)
            self.deadlines.remove(request)
            self._meter.ended(request, failed=failed)
            request.let_go()
        return known
