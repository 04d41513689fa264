"""A node that only advertises itself, as a process of its own that a test can kill.

Arguments: the addresses to speak on (with commas), then the fields of its advertisement as JSON.
It writes a line of JSON for each piece of news, and says goodbye when its input ends.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from typing import TYPE_CHECKING

from coase.protocol.advert import Advert
from coase.protocol.backends.mdns import MdnsNeighbours

if TYPE_CHECKING:
    from coase.protocol.advert import News


def _write(news: News) -> None:
    print(json.dumps({type(news).__name__: dataclasses.asdict(news)}), flush=True)


async def main(interfaces: str, fields: str) -> None:
    said = json.loads(fields)
    said["addresses"] = tuple(said["addresses"])
    neighbours = MdnsNeighbours(
        interfaces=interfaces.split(","), ttl_s=1, ask_every_s=0.3, loopback=True
    )
    await neighbours.open(Advert(**said), _write)
    await asyncio.to_thread(sys.stdin.readline)
    await neighbours.close()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
