"""The addresses that this machine has now, as far as others on its networks can use them."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path
from typing import TYPE_CHECKING, Final

import ifaddr

from coase.protocol.advert import ADDRESSES_MAX, address
from coase.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from coase.protocol.advert import IpAddress

WATCH_EVERY_S: Final = 5.0  # From Wi-Fi to cable, or awake again: soon enough, and costs 0.1 ms.
_LINKS: Final = Path("/sys/class/net")


def local_addresses(*, loopback: bool = False) -> tuple[str, ...]:
    """Return the addresses of every interface that is up, IPv4 first, in a fixed order.

    Of IPv6, link-local addresses are left out: they mean something else on each machine. With
    ``loopback`` there are those of this machine alone, and nothing else. At most 16, since an
    advertisement holds no more.

    :raises ConfigurationError: if the system does not tell them
    """
    try:
        found = {ip for ip in _all() if ip.is_loopback == loopback}
    except OSError as error:
        raise ConfigurationError(
            f"this machine does not tell its network addresses ({error.strerror}): give the"
            " address that other machines shall use"
        ) from error
    ordered = sorted(found, key=lambda ip: (ip.version, not ip.is_private, int(ip)))
    return tuple(map(str, ordered[:ADDRESSES_MAX]))


async def watch_addresses(
    *, every_s: float = WATCH_EVERY_S, loopback: bool = False
) -> AsyncIterator[tuple[str, ...]]:
    """Yield the addresses now, and again each time that they have changed.

    :raises ConfigurationError: if the system does not tell them
    """
    known: tuple[str, ...] | None = None
    while True:
        if (now := local_addresses(loopback=loopback)) != known:
            known = now
            yield now
        await asyncio.sleep(every_s)


def _all() -> Iterator[IpAddress]:
    for adapter in ifaddr.get_adapters():
        if not _is_up(adapter.name):
            continue
        for one in adapter.ips:
            if ip := address(one.ip if isinstance(one.ip, str) else one.ip[0], loopback=True):
                yield ip


def _is_up(interface: str) -> bool:
    """Return whether there is a link: without a cable the address stays, and leads nowhere."""
    name = interface.partition(":")[0]  # An alias such as eth0:1.
    try:
        return (_LINKS / name / "carrier").read_text().strip() != "0"
    except OSError as error:
        return error.errno != errno.EINVAL  # That means down; else it is no Linux, or hides it.
