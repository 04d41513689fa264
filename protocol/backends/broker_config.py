"""The mesh of a broker: what it is told of it, and the text that the server reads.

What was measured with nats-server 2.15, and what follows here:

* A dialler checks the acceptor's certificate, the address that it dialled included, and an
  acceptor the dialler's (for routes even with ``verify: false``). Addresses that a member gossips
  are dialled under the same TLS: a stranger's becomes no route. A zone (``fe80::1%eth0``) is
  dialled, and the address without it is what must stand in the certificate. Without TLS anybody
  who speaks the protocol is a member.
* Who is told of whom: the servers that are there of the newcomer, and they dial him.
* TLS comes before the first word: who has no certificate reads not even the server's name. A
  silent connection is closed after the TLS timeout; 900 of them hindered nobody. The server has no
  limit on connections to the route port but the process's number of open files.
* ``0.0.0.0`` listens on IPv4 and IPv6 alike where the machine has both, and works where IPv6 is
  off, which ``::`` does not. The server takes a single address to listen on.
* A reload adds routes, removes them, and brings new certificates into use; live routes and clients
  stay. A removed route is closed if it was dialled from here. If the other side dials too, or
  alone, it is there again at once: a node is out when *both* lists are without the other.
* A route whose certificate fails is dialled again each second with two lines of log each time,
  which no option quietens: prove an address (``prove_peer``) before it becomes a route.
* ``connect_backoff`` makes a node that was away for 20 s come back after 12 s more, and a reload
  of the same list does not hurry it. So it is off: one attempt a second, rarely logged.
* Two addresses of one node make duplicate routes that close each other for some seconds. Give one.
  One's own address in the list does no harm; routes in both directions become one. When ten that
  all dial each other start at once, some pairs close both and need the second attempt, 1 s later.
* Two meet in 0.04 s, two meshes merge in 0.06 s, a killed one is back 0.02 s after its start if it
  dials the others itself, and within the second that they wait between attempts if not.
* A peer that vanishes without a word (a closed lid) is noticed by the pings set here, in 15 s
  instead of minutes.
* Pools of route connections must be of one size on all servers or they refuse each other; all our
  traffic is one account, which uses one connection of a pool. So there is none (-1).
"""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import ConfigurationError

from .mesh_tls import MeshFiles, require_node_id

if TYPE_CHECKING:
    from collections.abc import Iterable

ANY_ADDRESS: Final = "0.0.0.0"  # noqa: S104 - the route port is what other machines reach.
NODES_MAX: Final = 32  # A full mesh has a connection for every two nodes.
TLS_WAIT_MAX_S: Final = 3  # A handshake takes milliseconds; a silent stranger is cut off.
PING_INTERVAL_S: Final = 5
PINGS_MAX: Final = 2  # Unanswered, then the route is dead.
DEAD_ROUTE_LOG_EVERY: Final = 600  # Attempts, one a second.
SYSTEM_USER: Final = "system"
SYSTEM_ACCOUNT: Final = "$SYS"
SYSTEM_INBOX: Final = "_INBOX_SYSTEM"

_LABEL: Final = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")
_ZONE: Final = re.compile(r"[A-Za-z0-9_.-]{1,15}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """How a broker joins others. Only its route port is open beyond loopback, never its clients'.

    :raises ConfigurationError: if something of it cannot work
    """

    node_id: str
    """The broker's name in the mesh, and that in its certificate."""
    tls: MeshFiles | None = None
    """What proves membership. None only with ``open``."""
    open: bool = False
    """Take and dial anybody, in clear. Whoever joins reads every request and inbox."""
    listen: str = ANY_ADDRESS
    port: int = 0
    """The route port; 0 for any free one, which then stays the same."""
    advertise: str = ""
    """``host:port`` that others pass on for us, where what they see of us is not what to dial."""
    routes: tuple[str, ...] = ()
    """``host:port`` of the others, one for each node; an IPv6 address in brackets."""

    def __post_init__(self) -> None:
        require_node_id(self.node_id)
        if self.open == (self.tls is not None):
            raise ConfigurationError(
                "a mesh is either for members, with their certificates, or open to everybody"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigurationError(f"{self.port} is no port: 1 to 65535, or 0 for any free one")
        try:
            ipaddress.ip_address(self.listen)
        except ValueError as error:
            raise ConfigurationError(
                f"{self.listen!r} is no address to listen on: give one of this machine,"
                f" or {ANY_ADDRESS} for all, IPv6 included"
            ) from error
        if self.advertise:
            route_address(self.advertise)
        route_addresses(self.routes)


def route_address(text: str) -> str:
    """Return ``host:port`` in the one spelling that is compared.

    :raises ConfigurationError: if it is no such address
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    name = host[1:-1] if bracketed else host
    if colon and re.fullmatch(r"[1-9][0-9]{0,4}", port) and int(port) <= 65535:
        bare, percent, zone = name.partition("%")
        try:
            address = ipaddress.ip_address(bare)
        except ValueError:
            if not bracketed and _HOST_NAME.fullmatch(name):
                return f"{name.lower()}:{port}"
        else:
            if address.version == 4 and not bracketed and not percent:
                return f"{address}:{port}"
            if address.version == 6 and bracketed and (not percent or _ZONE.fullmatch(zone)):
                return f"[{address}{percent}{zone}]:{port}"
    raise ConfigurationError(
        f"{text!r} is no address of a broker's route port: write 192.0.2.7:4248, name:4248 or"
        " [2001:db8::7]:4248"
    )


def route_addresses(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the addresses in their one spelling, each once, in order.

    :raises ConfigurationError: if one is none, or there are more than a mesh may have
    """
    found = tuple(sorted({route_address(text) for text in texts}))
    if len(found) >= NODES_MAX:
        raise ConfigurationError(
            f"a mesh has at most {NODES_MAX} nodes and this list names {len(found)} others:"
            " join further ones by a leaf node"
        )
    return found


def cluster_block(
    mesh: MeshConfig, *, net: str, port: int, routes: tuple[str, ...], system_login: str
) -> tuple[str, ...]:
    """Return the lines of the configuration that make a broker one of a mesh.

    Its system account, the same on all servers, gets one user, who may ask for the routes and
    nothing else; he comes in by the client port, which is on loopback.
    """
    listen = f"[{mesh.listen}]" if ":" in mesh.listen else mesh.listen
    urls = [f"nats://{route.replace('%', '%25')}" for route in routes]
    rights = f'publish: "$SYS.REQ.SERVER.*.ROUTEZ", subscribe: "{SYSTEM_INBOX}.>"'
    return (
        f"reconnect_error_reports: {DEAD_ROUTE_LOG_EVERY}",
        f"accounts {{ {quoted(SYSTEM_ACCOUNT)}: {{ users: [",
        f"  {{ {system_login}, permissions: {{ {rights} }} }}",
        "] } }",
        f"system_account: {quoted(SYSTEM_ACCOUNT)}",
        "cluster {",
        f"  name: {quoted(f'coase-{net}')}",
        f"  listen: {quoted(f'{listen}:{port or -1}')}",
        *((f"  advertise: {quoted(route_address(mesh.advertise))}",) if mesh.advertise else ()),
        *_tls_block(mesh.tls),
        "  pool_size: -1",
        "  compression: off",  # What travels is sealed, and does not get smaller.
        "  no_advertise: true",  # Of clients' ports, which are on loopback.
        f'  ping_interval: "{PING_INTERVAL_S}s"',
        f"  ping_max: {PINGS_MAX}",
        f"  routes: {json.dumps(urls)}",
        "}",
    )


def _tls_block(files: MeshFiles | None) -> tuple[str, ...]:
    if files is None:
        return ()
    return (
        "  tls {",
        f"    ca_file: {quoted(str(files.ca))}",
        f"    cert_file: {quoted(str(files.cert))}",
        f"    key_file: {quoted(str(files.key))}",
        "    verify: true",
        '    min_version: "1.3"',
        f"    timeout: {TLS_WAIT_MAX_S}",
        "  }",
    )


def quoted(text: str) -> str:
    """Return ``text`` as the server's configuration spells it."""
    return json.dumps(text, ensure_ascii=False)
