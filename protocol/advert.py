"""What a node says of itself on a local network, and how strictly it is read.

An advertisement is a hint that anybody can forge: it leads to an attempt to connect, and only the
handshake under mutual TLS proves anything. It holds no time of day, since such records are cached
for minutes: how far clocks differ is asked over the broker, once connected.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Final

from .errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MESH_VERSION: Final = 1
SERVICE_TYPE: Final = "_coase._tcp.local."
OPEN_NETWORK: Final = "0" * 32
"""The tag of nodes that were started without a join code."""

ADDRESSES_MAX: Final = 16  # A laptop has two to four; container bridges add some.
NAME_MAX_CHARS: Final = 32
PROPERTIES_MAX: Final = 32
TEXT_MAX_BYTES: Final = 1024  # Ours is below 200; larger records would be cut into several packets.
REASON_MAX_CHARS: Final = 120
_PORT_MAX: Final = 65535

_NODE: Final = re.compile(r"[0-9a-f]{16}")
_NETWORK: Final = re.compile(r"[0-9a-f]{32}")
_RUN: Final = re.compile(r"[0-9a-f]{8}")
_VERSION: Final = re.compile(r"[1-9][0-9]{0,3}")
_SOFTWARE: Final = re.compile(r"[0-9A-Za-z.+_-]{0,32}")

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an advertisement is not believed. The text is safe to print."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Advert:
    """One node as it describes itself.

    :raises ConfigurationError: if a field is not what ``parse`` would take
    """

    node_id: str
    """16 hex digits: the name of its broker, kept in its state directory."""
    network: str
    """32 hex digits that everybody with the same join code derives from it."""
    addresses: tuple[str, ...]
    port: int
    """Where its broker takes routes."""
    run: str
    """8 hex digits drawn at each start: tells our own echo from a copy of our state directory."""
    name: str = ""
    """For people. Anybody can take any name."""
    software: str = ""
    serves_chain: bool = False
    version: int = MESH_VERSION

    def __post_init__(self) -> None:
        if problem := self._problem():
            raise ConfigurationError(f"this node cannot be advertised: {problem}")

    def properties(self) -> dict[str, str]:
        """Return the text of the record, from which ``parse`` makes the same again."""
        return {
            "v": str(self.version),
            "id": self.node_id,
            "net": self.network,
            "run": self.run,
            "name": self.name,
            "sw": self.software,
            "chain": "1" if self.serves_chain else "0",
        }

    @classmethod
    def parse(
        cls,
        properties: Mapping[bytes, bytes | None],
        addresses: Iterable[str],
        port: int | None,
        *,
        loopback: bool = False,
    ) -> Advert | Refusal:
        """Return what a stranger's record says, or why it is refused. Never raises.

        Unknown properties are ignored, so that later versions may add some. Addresses that lead
        nowhere are left out, and it is refused when none is left.
        """
        text = _text(properties)
        if isinstance(text, Refusal):
            return text
        if not _VERSION.fullmatch(text.get("v", "")):
            return Refusal("it does not say its version")
        if text.get("chain", "0") not in ("0", "1"):
            return Refusal("it does not say clearly whether it serves the chain")
        usable = usable_addresses(addresses, loopback=loopback)
        if isinstance(usable, Refusal):
            return usable
        try:
            return cls(
                node_id=text.get("id", ""),
                network=text.get("net", ""),
                addresses=usable,
                port=port or 0,
                run=text.get("run", ""),
                name=text.get("name", ""),
                software=text.get("sw", ""),
                serves_chain=text.get("chain") == "1",
                version=int(text["v"]),
            )
        except ConfigurationError as error:
            return Refusal(str(error).partition(": ")[2][:REASON_MAX_CHARS])

    def _problem(self) -> str:
        """Return what is wrong, without quoting what a stranger may have written."""
        if not _NODE.fullmatch(self.node_id):
            return "its node id is not 16 hex digits"
        if not _NETWORK.fullmatch(self.network):
            return "its network is not 32 hex digits"
        if not _RUN.fullmatch(self.run):
            return "its run is not 8 hex digits"
        if len(self.name) > NAME_MAX_CHARS or not self.name.isprintable():
            return f"its name is longer than {NAME_MAX_CHARS} characters or not printable"
        if not _SOFTWARE.fullmatch(self.software):
            return "its software version has odd characters or is too long"
        if not 1 <= self.port <= _PORT_MAX:
            return f"its port is not one of 1 to {_PORT_MAX}"
        if not 1 <= len(self.addresses) <= ADDRESSES_MAX:
            return f"it has {len(self.addresses)} addresses: 1 to {ADDRESSES_MAX} can be told"
        if not all(address(text, loopback=True) for text in self.addresses):
            return "one of its addresses leads nowhere"
        if not _VERSION.fullmatch(str(self.version)):
            return "its version is not a small number"
        return ""


@dataclass(frozen=True, slots=True)
class Heard:
    """A node advertises itself, or something else than before."""

    advert: Advert


@dataclass(frozen=True, slots=True)
class Malformed:
    """Something under our service type that is no advertisement of ours."""

    label: str
    """The name that it goes by, cut and cleaned for printing."""
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Gone:
    """A node said goodbye, or its advertisement ran out."""

    node_id: str


News = Heard | Malformed | Gone


def usable_addresses(texts: Iterable[str], *, loopback: bool) -> tuple[str, ...] | Refusal:
    """Return the addresses that can be dialled, in order and once each, or why there is none."""
    first = list(islice(texts, ADDRESSES_MAX + 1))
    if len(first) > ADDRESSES_MAX:
        return Refusal(f"it names more than {ADDRESSES_MAX} addresses")
    usable = (ip for text in first if (ip := address(text, loopback=loopback)))
    kept = tuple(dict.fromkeys(map(str, usable)))
    if not kept:
        return Refusal("it names no address that can be reached from another machine")
    return kept


def address(text: str, *, loopback: bool = False) -> IpAddress | None:
    """Return the address if a node can be dialled at it, else None."""
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    if ip.is_unspecified or ip.is_multicast or (ip.is_loopback and not loopback):
        return None
    if isinstance(ip, ipaddress.IPv4Address):
        # 0.x is "this network", and 240 and above, with the broadcast address, is reserved.
        return ip if 0 < ip.packed[0] < 240 else None
    # Mapped is another spelling, by which the rules for IPv4 could be got round. A link-local one
    # means something else on each machine, and where there is one there is IPv4 as well.
    return None if ip.ipv4_mapped or ip.is_link_local or ip.scope_id else ip


def printable_name(text: str) -> str:
    """Return ``text`` as a node may call itself: cut, and without what does not print."""
    clean = "".join(char for char in text if char.isprintable())
    return " ".join(clean.split())[:NAME_MAX_CHARS].strip()


def _text(properties: Mapping[bytes, bytes | None]) -> dict[str, str] | Refusal:
    if len(properties) > PROPERTIES_MAX:
        return Refusal(f"it has more than {PROPERTIES_MAX} properties")
    if sum(len(key) + len(value or b"") for key, value in properties.items()) > TEXT_MAX_BYTES:
        return Refusal(f"its text is longer than {TEXT_MAX_BYTES} bytes")
    try:
        # Names of properties are compared without regard to case (RFC 6763, 6.4).
        return {
            key.decode("ascii").lower(): value.decode()
            for key, value in properties.items()
            if value is not None
        }
    except UnicodeDecodeError:
        return Refusal("its text is not UTF-8")
