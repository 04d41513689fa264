"""The local network's twin in memory: everybody of one event loop hears everybody."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from coase.protocol.advert import Gone, Heard
from coase.protocol.errors import ConfigurationError
from coase.protocol.ports import Neighbours, NeighboursHealth, OnNews

if TYPE_CHECKING:
    from coase.protocol.advert import Advert, News


class MemoryLan:
    """What several ``MemoryNeighbours`` are connected by. News arrive in the next turn."""

    def __init__(self) -> None:
        self._open: list[MemoryNeighbours] = []

    def neighbours(self) -> MemoryNeighbours:
        """Return one more that can be opened on this network."""
        return MemoryNeighbours(self)

    def expire(self, one: MemoryNeighbours) -> None:
        """Let ``one`` die without a goodbye, and its advertisement run out."""
        one.cut()

    def join(self, newcomer: MemoryNeighbours, advert: Advert) -> None:
        """Introduce everybody and the newcomer to one another."""
        for other in self._open:
            if other.advert is not None:
                newcomer.hear(Heard(other.advert))
            other.hear(Heard(advert))
        self._open.append(newcomer)

    def tell(self, news: News, *, but: MemoryNeighbours) -> None:
        """Let everybody but one hear something, true or not."""
        for other in self._open:
            if other is not but:
                other.hear(news)

    def leave(self, one: MemoryNeighbours) -> None:
        """Take one off the network."""
        if one in self._open:
            self._open.remove(one)


class MemoryNeighbours(Neighbours):
    """One node on a ``MemoryLan``."""

    def __init__(self, lan: MemoryLan) -> None:
        self._lan = lan
        self._on_news: OnNews | None = None
        self._known: dict[str, Advert] = {}
        self.advert: Advert | None = None
        """What it advertises now; None before ``open`` and after ``close``."""

    async def open(self, advert: Advert, on_news: OnNews) -> None:
        """See ``Neighbours.open``."""
        if self.advert is not None:
            raise ConfigurationError("this node is advertised already")
        self.advert, self._on_news = advert, on_news
        self._lan.join(self, advert)

    async def update(self, advert: Advert) -> None:
        """See ``Neighbours.update``."""
        if self.advert is None or advert.node_id != self.advert.node_id:
            raise ConfigurationError("this node is not advertised under that id")
        self.advert = advert
        self._lan.tell(Heard(advert), but=self)

    async def ask(self) -> None:
        """See ``Neighbours.ask``: nothing is ever missed here."""

    async def close(self) -> None:
        """See ``Neighbours.close``."""
        self.cut()

    def cut(self) -> None:
        """Leave at once; everybody else hears that it is gone."""
        advert, self.advert, self._on_news = self.advert, None, None
        self._lan.leave(self)
        if advert is not None:
            self._lan.tell(Gone(advert.node_id), but=self)

    def hear(self, news: News) -> None:
        """Take in what is said on the network, and report what is new."""
        if isinstance(news, Heard):
            if self._known.get(news.advert.node_id) == news.advert:
                return
            self._known[news.advert.node_id] = news.advert
        elif isinstance(news, Gone) and self._known.pop(news.node_id, None) is None:
            return
        asyncio.get_running_loop().call_soon(self._report, news)

    def health(self) -> NeighboursHealth:
        """Return the counters as they are now."""
        is_open = self.advert is not None
        return NeighboursHealth(announced=is_open, heard_self=is_open, names=len(self._known))

    def _report(self, news: News) -> None:
        if self._on_news is not None:
            self._on_news(news)
