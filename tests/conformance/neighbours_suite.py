"""What every discovery of neighbours promises, whatever carries the news."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from coase.protocol.advert import Advert, Gone, Heard, Malformed
from coase.protocol.errors import ConfigurationError
from coase.protocol.ports import Neighbours

if TYPE_CHECKING:
    from coase.protocol.advert import News

_DEADLINE_S = 60

MakeNeighbours = Callable[[], Neighbours]


def advert(**fields: object) -> Advert:
    """A node of its own network, since others may be on the same one while the tests run."""
    plain: dict[str, object] = {
        "node_id": secrets.token_hex(8),
        "network": secrets.token_hex(16),
        "addresses": ("127.0.0.1",),
        "port": 4248,
        "run": secrets.token_hex(4),
    }
    return Advert(**(plain | fields))  # type: ignore[arg-type]


class Ear:
    """Keeps the news and waits for what is needed of them."""

    def __init__(self) -> None:
        self.all: list[News] = []
        self._more = asyncio.Event()

    def __call__(self, news: News) -> None:
        self.all.append(news)
        self._more.set()

    def of(self, node_id: str) -> list[News]:
        return [news for news in self.all if _who(news) == node_id]

    async def until(self, enough: Callable[[], bool]) -> None:
        async with asyncio.timeout(_DEADLINE_S):
            while not enough():
                self._more.clear()
                await self._more.wait()

    async def hears(self, news: News) -> None:
        await self.until(lambda: news in self.all)


def _who(news: News) -> str:
    if isinstance(news, Heard):
        return news.advert.node_id
    return news.label if isinstance(news, Malformed) else news.node_id


@pytest.mark.anyio
class NeighboursSuite:
    """A subclass gives the fixture ``make``, which closes at the end what it made."""

    async def test_three_nodes_hear_each_other_whoever_came_first(
        self, make: MakeNeighbours
    ) -> None:
        adverts = [advert(name=f"node {number}", serves_chain=number == 1) for number in range(3)]
        ears = [Ear() for _ in adverts]
        for one, ear in zip(adverts, ears, strict=True):
            await make().open(one, ear)
        for one, ear in zip(adverts, ears, strict=True):
            for other in adverts:
                if other is not one:
                    await ear.hears(Heard(other))
            assert ear.of(one.node_id) == []

    async def test_a_goodbye_is_heard(self, make: MakeNeighbours) -> None:
        here, there, ear = make(), make(), Ear()
        leaving = advert()
        await here.open(advert(), ear)
        await there.open(leaving, Ear())
        await ear.hears(Heard(leaving))
        await there.close()
        await ear.hears(Gone(leaving.node_id))
        assert not there.health().announced

    async def test_a_change_is_heard(self, make: MakeNeighbours) -> None:
        here, there, ear = make(), make(), Ear()
        before = advert(name="before")
        after = replace(before, name="after", port=4249, serves_chain=True)
        await here.open(advert(), ear)
        await there.open(before, Ear())
        await ear.hears(Heard(before))
        await there.update(after)
        await here.ask()
        await ear.until(lambda: ear.of(before.node_id)[-1] == Heard(after))

    async def test_whoever_goes_by_our_id_is_told(self, make: MakeNeighbours) -> None:
        here, ear = make(), Ear()
        ours = advert()
        copy = replace(ours, run=secrets.token_hex(4), port=4999)
        await here.open(ours, ear)
        await make().open(copy, Ear())
        await ear.hears(Heard(copy))
        assert Heard(ours) not in ear.all

    async def test_it_can_be_closed_twice_and_opened_again(self, make: MakeNeighbours) -> None:
        here, there, ear = make(), make(), Ear()
        again = advert()
        await here.open(advert(), ear)
        await there.open(again, Ear())
        await ear.hears(Heard(again))
        await there.close()
        await there.close()
        await ear.hears(Gone(again.node_id))
        await there.open(again, Ear())
        await ear.until(lambda: ear.of(again.node_id)[-1] == Heard(again))
        with pytest.raises(ConfigurationError, match="already"):
            await there.open(again, Ear())

    async def test_nothing_is_told_after_close(self, make: MakeNeighbours) -> None:
        here, there, ear = make(), make(), Ear()
        heard, later, witness = advert(), advert(), Ear()
        await here.open(advert(), ear)
        await there.open(heard, witness)
        await ear.hears(Heard(heard))
        await here.close()
        count = len(ear.all)
        await make().open(later, Ear())
        await witness.hears(Heard(later))
        assert len(ear.all) == count

    async def test_only_an_open_one_is_updated_and_only_under_its_id(
        self, make: MakeNeighbours
    ) -> None:
        here = make()
        with pytest.raises(ConfigurationError):
            await here.update(advert())
        await here.open(advert(), Ear())
        with pytest.raises(ConfigurationError):
            await here.update(advert())
