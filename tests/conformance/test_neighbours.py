"""Both discoveries keep the same promises."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from coase.protocol.backends.mdns import MdnsNeighbours
from coase.protocol.backends.neighbours import MemoryLan
from tests.conformance.neighbours_suite import MakeNeighbours, NeighboursSuite

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coase.protocol.ports import Neighbours


class TestMemoryNeighbours(NeighboursSuite):
    @pytest.fixture
    def make(self) -> MakeNeighbours:
        return MemoryLan().neighbours


@pytest.mark.xdist_group("mdns")
class TestMdnsNeighbours(NeighboursSuite):
    @pytest.fixture
    async def make(self) -> AsyncIterator[MakeNeighbours]:
        made: list[Neighbours] = []

        def make_one() -> Neighbours:
            made.append(
                MdnsNeighbours(interfaces=("127.0.0.1",), loopback=True, ttl_s=4, ask_every_s=1)
            )
            return made[-1]

        yield make_one
        await asyncio.gather(*(one.close() for one in made))
