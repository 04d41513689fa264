"""One machine's part of a local network: a broker that is joined with those of other machines.

The loop here turns what is heard on the network into routes of the broker, and tells the others
how this machine is reached. What decides is elsewhere and pure (`protocol/mesh.py`); what is
heard is a hint, and only a certificate of the join code's authority makes a route.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import socket
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import anyio

from coase.protocol.advert import OPEN_NETWORK, Advert, Gone, Heard, printable_name
from coase.protocol.backends.broker import EmbeddedBroker, MeshConfig
from coase.protocol.backends.calls import Calls
from coase.protocol.backends.interfaces import local_addresses, watch_addresses
from coase.protocol.backends.mdns import MdnsNeighbours
from coase.protocol.backends.mesh_tls import MeshAuthority
from coase.protocol.errors import ConfigurationError, TransportUnavailable
from coase.protocol.mesh import MESH_NODES_MAX, Membership

from .neighbours import Neighbour, NeighbourDesk, greet
from .proofs import Proofs
from .supervisor import supervise

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from anyio.abc import TaskGroup

    from coase.protocol.advert import News
    from coase.protocol.backends.mesh_tls import MeshFiles, NodeCertificate
    from coase.protocol.joincode import JoinCode
    from coase.protocol.ports import Neighbours

log = logging.getLogger(__name__)

OPEN_MESH: Final = "lan-open"
TLS_DIRECTORY: Final = "mesh"
BROKER_DIRECTORY: Final = "broker"
LOOK_EVERY_S: Final = 2.0  # At the broker's routes: who is joined, and whose address failed.
HURRY_EVERY_S: Final = 0.1  # A route takes 0.1 s.
HURRY_MS: Final = 3_000  # After a route was added; then it is not there for a reason.
SOON_S: Final = 0.02
DOUBLES_MAX: Final = 4  # Places at which somebody says that he is us.
GREET_EVERY_S: Final = 10.0
ADDRESSES_EVERY_S: Final = 3.0
SLEPT_MIN_S: Final = 10.0  # A busy machine is late by less.
TICK_S: Final = 2.0
RENEW_LOOK_EVERY_S: Final = 60.0
CLOSE_WAIT_MAX_S: Final = 3.0
_LOOPBACKS: Final = ("127.", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LanOptions:
    """What a user may choose of a machine's part in a local network."""

    code: JoinCode | None
    """None for an open network, which everybody may join."""
    node: str
    port: int = 0
    """Of the route listener; 0 takes any."""
    nats_port: int = 0
    interfaces: tuple[str, ...] = ()
    """Addresses of this machine to use; all of them without."""
    peers: tuple[str, ...] = ()
    """``host:port`` of machines that mDNS does not find."""
    chain: bool = False


def version() -> str:
    """Return the installed version."""
    return importlib.metadata.version("coase")


class Lan:
    """This machine's broker in the mesh, and the loop that keeps it there.

    :raises ConfigurationError: if no address of this machine can be used
    """

    def __init__(
        self, state: Path, options: LanOptions, *, neighbours: Neighbours | None = None
    ) -> None:
        self.options, self.node = options, options.node
        code = options.code
        self.mesh = code.net if code else OPEN_MESH
        self._network = code.network_tag if code else OPEN_NETWORK
        self._authority = MeshAuthority(code) if code else None
        self._loopback = any(a.startswith(_LOOPBACKS) for a in options.interfaces)
        self.addresses = self._usable(local_addresses(loopback=self._loopback))
        if not self.addresses:
            raise ConfigurationError(_no_address(options.interfaces))
        self._certificate_ends_s = self._renew_at_s = 0
        self._tls = self._certify(state / TLS_DIRECTORY)
        only_one = len(options.interfaces) == 1
        self.broker = EmbeddedBroker(
            net=self.mesh,
            port=options.nats_port,
            state_dir=state / BROKER_DIRECTORY,
            mesh=MeshConfig(
                node_id=self.node,
                tls=self._tls,
                open=code is None,
                listen=options.interfaces[0] if only_one else "0.0.0.0",  # noqa: S104 - asked for
                port=options.port,
            ),
        )
        self._proofs = Proofs(self._tls, self._on_proof)
        self._routes: list[str] = []
        self._hurry_until_ms = 0
        self._troubles: dict[str, str] = {}
        self._doubles: set[str] = set()
        self._announced: set[str] = set()
        self._run = f"{time.time_ns() & 0xFFFFFFFF:08x}"
        self._news = anyio.Event()
        self._changed = anyio.Event()
        self.met: dict[str, Neighbour] = {}
        self._neighbours = neighbours or MdnsNeighbours(
            interfaces=options.interfaces, loopback=self._loopback
        )
        self._since_s = 0.0
        self.membership: Membership | None = None
        self._calls: Calls | None = None

    # What others ask

    @property
    def calls(self) -> Calls:
        """Questions and answers over the broker, while this runs."""
        if self._calls is None:
            raise TransportUnavailable("the network is not joined")
        return self._calls

    def joined(self) -> set[str]:
        """Return the ids of the machines that are joined, as last seen."""
        return set(self.met)

    async def changed(self) -> None:
        """Return when machines came or went, or were heard."""
        await self._changed.wait()

    def heard(self) -> list[dict[str, Any]]:
        """Return every machine that was heard, with why it is not joined if it is not."""
        if self.membership is None:
            return []
        return [
            {
                "node": row.node_id,
                "name": row.name,
                "version": row.software,
                "ours": row.network == self._network,
                "addresses": list(row.addresses),
                "joined": row.joined,
                "announced": row.node_id in self._announced,
                "chain": row.serves_chain,
                "why": row.why if row.joined else self._troubles.get(row.node_id) or row.why,
            }
            for row in self.membership.rows(_now_ms())
        ]

    def peers(self) -> dict[str, str]:
        """Return the machines that the user named, each with why it is not joined, if it is not."""
        return {peer: self._troubles.get(peer, "") for peer in self.options.peers}

    @property
    def clash(self) -> str:
        """What is wrong if another machine runs on a copy of our state, else nothing.

        Who only says so is not believed: it must have shown our name in a certificate.
        """
        proven = any(self._proofs.node_at(place) == self.node for place in self._doubles)
        if self.membership is None or not (proven or (self._doubles and self._tls is None)):
            return ""
        return self.membership.clash

    @property
    def full(self) -> str:
        """What is wrong if there is no place for this machine any more, else nothing."""
        heard = [row for row in self.heard() if row["ours"] and row["announced"]]
        ours = len(heard)
        if self.met or ours < MESH_NODES_MAX:
            return ""
        if self._tls is not None:
            # Whoever only says so is not believed: all that were asked must have shown the code.
            proven = [row for row in heard if any(map(self._proofs.node_at, row["addresses"]))]
            if len(proven) < MESH_NODES_MAX - 1:
                return ""
        return (
            f"the network has {ours} machines already, and {MESH_NODES_MAX} is the most that one"
            " may have: let one leave, or begin another network with coase up --lan"
        )

    def view(self) -> dict[str, Any]:
        """Return all that this machine knows of the network: no secrets."""
        health = self._neighbours.health()
        return {
            "node": self.node,
            "mesh": self.mesh,
            "open": self.options.code is None,
            "version": version(),
            "chain": self.options.chain,
            "addresses": list(self.addresses),
            "port": self.broker.route_port,
            "met": [neighbour.to_json() for neighbour in self.met.values()],
            "heard": self.heard(),
            "peers": self.peers(),
            "clash": self.clash,
            "full": self.full,
            "running_s": round(anyio.current_time() - self._since_s),
            "certificate_ends_s": self._certificate_ends_s,
            "strangers_dropped": self.membership.strangers_dropped if self.membership else 0,
            "mdns": {
                "announced": health.announced,
                "heard_self": health.heard_self,
                "last_complaint": health.last_complaint,
            },
        }

    # Running

    @asynccontextmanager
    async def running(self, *, card: Callable[[], bytes]) -> AsyncIterator[None]:
        """Be part of the network for the length of the block. The broker must have been started.

        ``card`` gives the network's signed card, or nothing as long as it is not known.

        :raises ConfigurationError: if nothing can be heard or said on this machine's network
        """
        self._calls = await Calls.connect(self.broker.client_config())
        try:
            desk = NeighbourDesk(
                self._calls,
                self.mesh,
                node=self.node,
                name=printable_name(socket.gethostname()),
                version=version(),
                chain=self.options.chain,
                card=card,
                view=self.view,
            )
            await desk.open()
            advert = self._advert()
            self.membership = Membership(advert, loopback=self._loopback)
            self._since_s = anyio.current_time()
            await self._neighbours.open(advert, self._on_news)
            async with anyio.create_task_group() as group:
                for name, work in (
                    ("routes", self._keep_routes),
                    ("greetings", self._keep_greeting),
                    ("addresses", self._keep_addresses),
                    ("certificate", self._keep_certificate),
                    ("wake", self._keep_awake),
                ):
                    group.start_soon(supervise, name, work)
                try:
                    yield
                finally:
                    group.cancel_scope.cancel()
        finally:
            with anyio.move_on_after(CLOSE_WAIT_MAX_S, shield=True):
                await self._neighbours.close()
            with anyio.CancelScope(shield=True):
                await self._calls.close()
                self._calls = None

    def _on_news(self, news: News) -> None:
        if self.membership is not None:
            self.membership.note(news, _now_ms())
        if isinstance(news, Heard):
            self._announced.add(news.advert.node_id)
            if news.advert.node_id == self.node and news.advert.run != self._run:
                self._doubles |= set(_endpoints(news.advert)) - set(_endpoints(self._advert()))
        elif isinstance(news, Gone):
            self._announced.discard(news.node_id)
        self._tell()
        self._news.set()

    def _on_proof(self) -> None:
        self._tell()
        self._news.set()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def _keep_routes(self) -> None:
        """Give the broker the routes that membership wants, and tell membership what came of it."""
        async with anyio.create_task_group() as group:
            while True:
                self._news = anyio.Event()
                try:
                    await self._look(group)
                except TransportUnavailable as error:  # It is being started again.
                    log.warning("the broker's routes cannot be set: %s", error)
                with anyio.move_on_after(self._pause_s()):
                    await self._news.wait()

    async def _look(self, group: TaskGroup) -> None:
        assert self.membership is not None
        now_ms = _now_ms()
        dials = {dial.address: dial.node_id for dial in self.membership.routes(now_ms)}
        if self.full:
            dials = {}
        self._proofs.look(
            [*dials, *self.options.peers, *sorted(self._doubles)[:DOUBLES_MAX]], group
        )
        wanted = [address for address in dials if self._is_proven(address, dials[address], now_ms)]
        reached = {self._proofs.node_at(address) or dials[address] for address in wanted}
        for peer in self.options.peers:
            node = self._proofs.node_at(peer)
            self._trouble_with(peer, node)
            if self._tls is None or (node and node != self.node and node not in reached):
                wanted.append(peer)
                reached.add(node)
        wanted = wanted[: MESH_NODES_MAX - 1]
        if wanted != self._routes:
            self._routes, self._hurry_until_ms = wanted, now_ms + HURRY_MS
        await self.broker.set_routes(wanted)
        found = {r.node_id: r.address if r.dialled else "" for r in await self.broker.routes()}
        found.pop(self.node, None)
        self.membership.connected(found, _now_ms())
        for node in found:
            self._troubles.pop(node, None)
        if set(found) != set(self.met):
            await self._greet(expect=len(found))

    def _is_proven(self, address: str, node: str, now_ms: int) -> bool:
        """Return whether the broker may be sent there; tell membership if it may not."""
        if self._tls is None:
            return True
        assert self.membership is not None
        if found := self._proofs.node_at(address):
            if found == node:
                return True
            self._troubles[node] = f"another machine ({found}) answers at {address}"
            self.membership.dial_failed(node, address, now_ms)
        elif trouble := self._proofs.trouble_at(address):
            self._troubles[node] = trouble
            self.membership.dial_failed(node, address, now_ms)
        return False

    def _trouble_with(self, peer: str, node: str) -> None:
        """Keep why a machine that the user named is not joined; it is tried again."""
        if node:
            self._troubles.pop(peer, None)
        elif trouble := self._proofs.trouble_at(peer):
            self._troubles[peer] = trouble

    def _pause_s(self) -> float:
        assert self.membership is not None
        now_ms = _now_ms()
        wait_s = HURRY_EVERY_S if now_ms < self._hurry_until_ms else LOOK_EVERY_S
        if (change_ms := self.membership.next_change_ms(now_ms)) is not None:
            wait_s = min(wait_s, max(change_ms - now_ms, 0) / 1_000 + SOON_S)
        return wait_s

    async def _keep_greeting(self) -> None:
        while True:
            await anyio.sleep(GREET_EVERY_S)
            await self._greet()

    async def _greet(self, *, expect: int = 0) -> None:
        found = await greet(self.calls, self.mesh, but=self.node, expect=expect)
        before, self.met = set(self.met), {neighbour.node: neighbour for neighbour in found}
        if set(self.met) != before:
            self._tell()

    async def _keep_addresses(self) -> None:
        """Tell the others when this machine is reached elsewhere: another Wi-Fi, a cable."""
        async for found in watch_addresses(every_s=ADDRESSES_EVERY_S, loopback=self._loopback):
            usable = self._usable(found)
            if not usable or usable == self.addresses:
                continue  # Without any address there is nobody to tell.
            log.warning("this machine is now at %s", ", ".join(usable))
            self.addresses = usable
            await self._renew()
            if self.membership is not None:
                advert = self._advert()
                self.membership.moved(advert)
                await self._neighbours.update(advert)
            self._news.set()

    async def _keep_certificate(self) -> None:
        while True:
            await anyio.sleep(RENEW_LOOK_EVERY_S)
            if self._authority is not None and time.time() >= self._renew_at_s:
                await self._renew()

    async def _keep_awake(self) -> None:
        """Ask anew after a sleep: who came meanwhile said so while nobody listened here."""
        while True:
            before_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            await anyio.sleep(TICK_S)
            if time.clock_gettime(time.CLOCK_BOOTTIME) - before_s > TICK_S + SLEPT_MIN_S:
                log.warning("this machine slept; the network is asked who is there")
                if self._authority is not None and time.time() >= self._renew_at_s:
                    await self._renew()
                await self._neighbours.ask()
                self._news.set()

    # Addresses and certificates

    def _usable(self, found: Sequence[str]) -> tuple[str, ...]:
        chosen = self.options.interfaces
        return tuple(a for a in found if not chosen or a.partition("%")[0] in chosen)

    def _advert(self) -> Advert:
        return Advert(
            node_id=self.node,
            network=self._network,
            addresses=self.addresses[:16],
            port=self.broker.route_port,
            run=self._run,
            name=printable_name(socket.gethostname()),
            software=version(),
            serves_chain=self.options.chain,
        )

    def _certify(self, directory: Path) -> MeshFiles | None:
        if self._authority is None:
            return None
        certificate = self._issue()
        return certificate.write(directory)

    def _issue(self) -> NodeCertificate:
        assert self._authority is not None
        certificate = self._authority.issue(self.node, self.addresses, now_s=int(time.time()))
        self._renew_at_s = certificate.renew_at_s
        self._certificate_ends_s = certificate.not_after_s
        return certificate

    async def _renew(self) -> None:
        if self._authority is not None:
            with contextlib.suppress(TransportUnavailable):  # It is written, and read at the start.
                await self.broker.renew_tls(self._issue())


def _endpoints(advert: Advert) -> list[str]:
    return [
        f"[{address}]:{advert.port}" if ":" in address else f"{address}:{advert.port}"
        for address in advert.addresses
    ]


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def _no_address(interfaces: Sequence[str]) -> str:
    if interfaces:
        there = ", ".join(local_addresses(loopback=True)) or "none"
        return f"no interface of this machine has the address {interfaces[0]}; there are: {there}"
    return (
        "this machine has no address on any network: connect it to one, or name an interface's"
        " address with --interface"
    )
