"""The URLs of one model: the load is spread over them, and where one fails the others take over.

A URL whose requests fail several times in a row rests. After a while one request tries it again, and it is back when
that is answered. While all of them rest, all are asked. A URL that refuses everybody is asked no more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

FAILURES = 4  # in a row, after which a URL rests
FIRST_REST = 5.0  # seconds; each further one is twice as long
LONGEST_REST = 60.0


@dataclass(eq=False)
class Endpoint:
    """One URL, and how it fares."""

    url: str  # ``http://host:port/v1``
    open: int = 0  # requests
    failures: int = 0  # in a row
    rest: float = 0.0  # seconds of its present rest; 0 where it doesn't rest
    until: float = 0.0  # the end of the rest, by the monotonic clock
    gone: str = ""  # why it is asked no more

    @property
    def is_ready(self) -> bool:
        """Whether it may be asked: it doesn't rest, or is to be tried again by one request."""
        return not self.gone and (not self.rest or (time.monotonic() >= self.until and not self.open))


@dataclass(eq=False)
class Endpoints:
    """The URLs of one model, with at most ``concurrency`` requests open at each."""

    urls: Sequence[str]
    concurrency: int
    note: Callable[[str], None]  # is told of URLs that fail, and of their return
    all: list[Endpoint] = field(init=False)
    _freed: asyncio.Condition = field(default_factory=asyncio.Condition, init=False)

    def __post_init__(self) -> None:
        self.all = [Endpoint(url) for url in self.urls]

    def begin(self) -> None:
        """Make ready for another event loop, in which nothing is open yet."""
        self._freed = asyncio.Condition()
        for endpoint in self.all:
            endpoint.open = 0

    async def take(self, tried: Collection[Endpoint]) -> Endpoint:
        """Open a request at the URL with the fewest, once there is room, and return it; one not tried, if there is."""
        async with self._freed:
            while True:
                ready = [each for each in self.all if each.is_ready] or [each for each in self.all if not each.gone]
                among = [each for each in ready if each not in tried] or ready or self.all
                free = [each for each in among if each.open < self.concurrency]
                if free:
                    chosen = min(free, key=lambda each: each.open)
                    chosen.open += 1
                    return chosen
                await self._freed.wait()

    async def release(self, endpoint: Endpoint) -> None:
        """Close a request."""
        async with self._freed:
            endpoint.open -= 1
            self._freed.notify_all()  # those who wait may want different ones

    def other(self, tried: Collection[Endpoint]) -> bool:
        """Whether there is a URL to ask that is not among those tried."""
        return any(each.is_ready and each not in tried for each in self.all)

    def answered(self, endpoint: Endpoint) -> None:
        """Note a reply. One that comes while the URL rests was asked for before."""
        if time.monotonic() < endpoint.until:
            return
        if endpoint.rest:
            self.note(f"{endpoint.url} answers again")
        endpoint.failures, endpoint.rest = 0, 0.0

    def failed(self, endpoint: Endpoint, why: str) -> None:
        """Note a request that failed, and let the URL rest where that is one too many and there are others."""
        endpoint.failures += 1
        if len(self.all) == 1 or endpoint.failures < FAILURES or time.monotonic() < endpoint.until:
            return
        if not endpoint.rest:
            self.note(f"{endpoint.url} fails ({why}): {self._rest_of(endpoint)}; it is tried again now and then")
        endpoint.rest = min(2 * endpoint.rest or FIRST_REST, LONGEST_REST)
        endpoint.until = time.monotonic() + endpoint.rest

    def give_up(self, endpoint: Endpoint, why: str) -> bool:
        """Ask a URL no more, and return whether there are others."""
        first, endpoint.gone = not endpoint.gone, why
        others = any(not each.gone for each in self.all)
        if first and others:
            self.note(f"{why}: {self._rest_of(endpoint)}")
        return others

    def _rest_of(self, endpoint: Endpoint) -> str:
        up = sum(not each.gone and not each.rest for each in self.all if each is not endpoint)
        return f"{up} of {len(self.all)} URLs go on"
