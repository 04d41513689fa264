"""Which other brokers one is joined with now, in its own words.

The server has no monitoring port here. It is asked over its client port by the one user of its
system account, who may ask nothing else, with the few lines of the protocol that this takes: a
connection for one question needs no library that keeps it alive.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
from dataclasses import dataclass
from typing import Final

from coase.protocol.errors import TransportUnavailable

from .broker_config import SYSTEM_INBOX, SYSTEM_USER

ASK_WAIT_MAX_S: Final = 5.0  # It takes two milliseconds; a loaded machine may take seconds.
ANSWER_SIZE_MAX_BYTES: Final = 1024 * 1024

_NS_PER_UNIT: Final = {"ns": 1, "µs": 10**3, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9}
_DURATION: Final = re.compile(r"([0-9]+)(?:\.([0-9]+))?(ns|µs|us|ms|s|m)")


@dataclass(frozen=True, slots=True)
class Route:
    """Another broker that is connected now."""

    node_id: str
    server_id: str
    """Another one at each start of that broker."""
    address: str
    """Where it is reached, or where it came from if it dialled: then the port is passing."""
    rtt_us: int
    """0 as long as it was not measured."""
    dialled: bool
    """Whether it was us who dialled."""


async def connected_routes(*, host: str, port: int, password: str) -> tuple[Route, ...]:
    """Return the routes of the broker at this client port, ordered by node.

    :raises TransportUnavailable: if it does not answer
    """
    try:
        async with asyncio.timeout(ASK_WAIT_MAX_S):
            answer = await _ask(host, port, password)
        found = [_route(item) for item in json.loads(answer)["data"].get("routes") or ()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
        raise TransportUnavailable(
            f"the embedded broker does not tell its routes ({error or type(error).__name__})"
        ) from error
    # A server that is being replaced may stand there twice for a moment; it is one node.
    return tuple(sorted({route.server_id: route for route in found}.values(), key=_by_node))


def _by_node(route: Route) -> tuple[str, str]:
    return route.node_id, route.server_id


def _route(item: dict[str, object]) -> Route:
    host = str(item["ip"])
    return Route(
        node_id=str(item.get("remote_name") or ""),
        server_id=str(item["remote_id"]),
        address=f"[{host}]:{item['port']}" if ":" in host else f"{host}:{item['port']}",
        rtt_us=_microseconds(str(item.get("rtt") or "")),
        dialled=bool(item.get("did_solicit")),
    )


async def _ask(host: str, port: int, password: str) -> bytes:
    reader, writer = await asyncio.open_connection(host, port, limit=ANSWER_SIZE_MAX_BYTES)
    try:
        server = json.loads((await reader.readuntil(b"\r\n")).removeprefix(b"INFO "))["server_id"]
        login = {"user": SYSTEM_USER, "pass": password, "verbose": False, "lang": "coase"}
        inbox = f"{SYSTEM_INBOX}.{secrets.token_hex(8)}"
        writer.write(
            f"CONNECT {json.dumps(login)}\r\nSUB {inbox} 1\r\n"
            f"PUB $SYS.REQ.SERVER.{server}.ROUTEZ {inbox} 0\r\n\r\n".encode()
        )
        await writer.drain()
        while True:
            word, *rest = (await reader.readuntil(b"\r\n")).split()
            if word == b"MSG":
                return await reader.readexactly(int(rest[-1]))
            if word == b"-ERR":
                raise ValueError(b" ".join(rest).decode(errors="replace"))
            if word == b"PING":
                writer.write(b"PONG\r\n")
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _microseconds(text: str) -> int:
    """Return the microseconds of a duration as Go writes it, such as ``1m2.5s`` or ``253.1µs``."""
    nanoseconds = 0
    for whole, fraction, unit in _DURATION.findall(text):
        per_unit = _NS_PER_UNIT[unit]
        nanoseconds += int(whole) * per_unit
        nanoseconds += int(fraction or "0") * per_unit // 10 ** len(fraction)
    return nanoseconds // 1000
