"""Neighbours on the local network by multicast DNS, through python-zeroconf.

Its browser keeps something for each name that it was ever told, without limit; here a listener
follows a bounded number of names that look like ours, and looks each of them up in the library's
cache, which is bounded. Whatever is multicast by whomever costs no more than that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import re
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from zeroconf import (  # type: ignore[attr-defined] # Exported without being listed.
    DNSOutgoing,
    DNSPointer,
    DNSQuestion,
    IPVersion,
    NotRunningException,
    RecordUpdate,
    RecordUpdateListener,
    Zeroconf,
)
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from coase.protocol.advert import (
    SERVICE_TYPE,
    Advert,
    Gone,
    Heard,
    Malformed,
    Refusal,
    printable_name,
)
from coase.protocol.errors import ConfigurationError
from coase.protocol.ports import Neighbours, NeighboursHealth, OnNews

from .interfaces import local_addresses

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from coase.protocol.advert import News

MDNS_PORT: Final = 5353
TTL_S: Final = 120  # What RFC 6762, 10 says for records that name a host.
ASK_EVERY_S: Final = 50.0  # Twice in that time, so that one lost packet makes nobody go away.
ASK_WAITS_S: Final = (0.0, 1.0, 2.0)  # At first more often: RFC 6762, 5.2.
NAMES_MAX: Final = 384  # A full table of members and of strangers.
ODD_NAMES_MAX: Final = 64
SILENCES_MAX: Final = 3  # Questions of ours that we may miss ourselves before it is taken amiss.
ANSWER_WAIT_S: Final = 2.0  # Answers are held back for half a second, to be sent together.
RESOLVE_WAIT_MS: Final = 3000
RESOLVING_MAX: Final = 8
LOOK_EVERY_S: Final = 1.0
LOOK_PAUSE_S: Final = 0.05  # What comes in a burst is looked at once.
START_WAIT_MAX_S: Final = 5.0
COMPLAINT_MAX_CHARS: Final = 200

IpChoice = Literal["v4", "v6", "all"]

_LABEL: Final = re.compile(r"[0-9a-f]{16}")
_HOST: Final = re.compile(r"coase-([0-9a-f]{16})\.local\.")
_TYPE_PTR, _CLASS_IN, _FLAGS_QUERY = 12, 1, 0


class MdnsNeighbours(Neighbours):
    """Advertises a node as ``<node id>._coase._tcp.local.`` and follows all others.

    It speaks on ``interfaces``, which are addresses of this machine, or on those of the advert.
    ``loopback`` takes neighbours on this machine alone for reachable: that is for tests.
    """

    def __init__(
        self,
        *,
        interfaces: Sequence[str] = (),
        ip_version: IpChoice = "all",
        ttl_s: int = TTL_S,
        ask_every_s: float = ASK_EVERY_S,
        loopback: bool = False,
    ) -> None:
        self._settings = _Settings(tuple(interfaces), ip_version, ttl_s, ask_every_s, loopback)
        self._session: _Session | None = None
        self._closing: asyncio.Task[None] | None = None
        self._health = NeighboursHealth()

    async def open(self, advert: Advert, on_news: OnNews) -> None:
        """See ``Neighbours.open``.

        :raises ConfigurationError: also if UDP port 5353 is held by a program that does not
            share it, or no interface takes multicast
        """
        if self._session is not None:
            raise ConfigurationError("this node is advertised already")
        self._session = session = _Session(self._settings, advert, on_news, self._health)
        try:
            await session.start()
        except BaseException:
            self._session = None
            await session.stop()
            raise

    async def update(self, advert: Advert) -> None:
        """See ``Neighbours.update``."""
        session = self._session
        if session is None or advert.node_id != session.advert.node_id:
            raise ConfigurationError("this node is not advertised under that id")
        await session.change(advert)

    async def ask(self) -> None:
        """See ``Neighbours.ask``."""
        if self._session is not None:
            self._session.ask(check=True)

    async def close(self) -> None:
        """See ``Neighbours.close``. It goes on if the caller is cancelled meanwhile."""
        session, self._session = self._session, None
        if session is not None:
            self._closing = asyncio.get_running_loop().create_task(session.stop())
        if self._closing is not None:
            await asyncio.shield(self._closing)

    def health(self) -> NeighboursHealth:
        """Return the counters as they are now."""
        return self._health


@dataclass(frozen=True, slots=True)
class _Settings:
    interfaces: tuple[str, ...]
    ip_version: IpChoice
    ttl_s: int
    ask_every_s: float
    loopback: bool

    def speaks_on(self, advert: Advert) -> list[str]:
        """Return the addresses of this machine whose interfaces are used for ``advert``."""
        present = {*local_addresses(), *local_addresses(loopback=True)}
        unwanted = {"v4": ":", "v6": "."}.get(self.ip_version, " ")
        chosen = self.interfaces or advert.addresses
        return [one for one in chosen if one in present and unwanted not in one]

    def info(self, advert: Advert) -> AsyncServiceInfo:
        """Return the records of ``advert``."""
        return AsyncServiceInfo(
            SERVICE_TYPE,
            _name(advert.node_id),
            port=advert.port,
            properties=advert.properties(),
            server=f"coase-{advert.node_id}.local.",
            parsed_addresses=list(advert.addresses),
            host_ttl=self.ttl_s,
            other_ttl=self.ttl_s,
        )


@dataclass(slots=True)
class _Name:
    """Something that goes by a name like ours."""

    told: News | None = None
    """What was reported of it last."""
    resolving: bool = False


class _Session(RecordUpdateListener):
    """What lives from ``open`` to ``close``."""

    def __init__(
        self, settings: _Settings, advert: Advert, on_news: OnNews, health: NeighboursHealth
    ) -> None:
        self.advert = advert
        self._settings = settings
        self._on_news: OnNews | None = on_news
        self._health = health
        self._complaints = _Complaints(health)
        self._names: dict[str, _Name] = {}
        self._odd: dict[str, None] = {}
        self._changed: set[str] = set()
        self._resolving = 0
        self._checking = False
        self._look_now = asyncio.Event()
        self._mdns: AsyncZeroconf | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._announcement: asyncio.Task[Any] | None = None
        self._socket_lock = asyncio.Lock()
        self._speaks_on: list[str] = []
        self._heard_self_s = 0.0

    # From open to close

    async def start(self) -> None:
        self._complaints.listen()
        await self._open_sockets()
        self._spawn(self._keep_asking())
        self._spawn(self._keep_looking())

    async def stop(self) -> None:
        self._on_news = None  # From here on nothing is told, and no socket opened again.
        try:
            async with self._socket_lock:
                await self._close_sockets(goodbye=True)
        finally:
            self._drop_sockets()
            for task in self._tasks:
                task.cancel()
            self._complaints.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def change(self, advert: Advert) -> None:
        async with self._socket_lock:
            self.advert = advert
            addresses = self._settings.speaks_on(advert)
            if self._mdns is not None and addresses == self._speaks_on:
                info = self._settings.info(advert)
                self._announce(await self._mdns.async_update_service(info))
            elif addresses:
                await self._reopen()
            # Between two networks there is no address; then it is tried again before each question.
        self.ask()

    async def _open_sockets(self) -> None:
        addresses = self._settings.speaks_on(self.advert)
        if not addresses:
            raise ConfigurationError(
                "this machine has no network address to be found at: connect it to a network, or"
                " choose one of its addresses"
            )
        require_port(v6=_version(addresses) is not IPVersion.V4Only)
        self._mdns = AsyncZeroconf(zc=_zeroconf(addresses))
        zc = self._mdns.zeroconf
        zc.async_add_listener(self, DNSQuestion(SERVICE_TYPE, _TYPE_PTR, _CLASS_IN))
        try:
            await zc.async_wait_for_start(START_WAIT_MAX_S)
        except NotRunningException as error:
            raise ConfigurationError(_no_multicast(addresses)) from error
        if not zc.engine.senders:
            raise ConfigurationError(_no_multicast(addresses))
        # No probing for the name: it is random, and whoever has a copy of it is told as a clash.
        info = self._settings.info(self.advert)
        self._announce(await self._mdns.async_register_service(info, cooperating_responders=True))
        self._speaks_on = addresses
        self._health.announced = True
        self._heard_self_s = asyncio.get_running_loop().time()

    async def _close_sockets(self, *, goodbye: bool) -> None:
        announcement, self._announcement = self._announcement, None
        self._health.announced = False
        try:
            if announcement is not None:
                announcement.cancel()
                await asyncio.gather(announcement, return_exceptions=True)
            if self._mdns is not None:
                if not goodbye:
                    registry = self._mdns.zeroconf.registry
                    registry.async_remove(registry.async_get_service_infos())
                await self._mdns.async_close()
        finally:
            self._drop_sockets()

    def _drop_sockets(self) -> None:
        """Close what is still open, in one step: this is the end of the program, or of a try."""
        mdns, self._mdns = self._mdns, None
        if mdns is not None and not mdns.zeroconf.done:
            mdns.zeroconf.close()

    async def _reopen(self) -> None:
        """Join the networks afresh, as after an interface went and came back."""
        if self._on_news is None:
            return
        await self._close_sockets(goodbye=False)
        try:
            await self._open_sockets()
        except ConfigurationError as error:
            self._drop_sockets()
            for label in [*self._names]:
                self._forget(label)  # Cut off as we are, nobody is around.
            self._health.complaints += 1
            self._health.last_complaint = str(error)[:COMPLAINT_MAX_CHARS]

    def _announce(self, announcement: object) -> None:
        """Keep hold of what goes on saying who we are, three times over half a second."""
        if self._announcement is not None:
            self._announcement.cancel()
        if isinstance(announcement, asyncio.Task):
            self._announcement = announcement

    def ask(self, *, check: bool = False) -> None:
        """Ask everybody to say who they are; on demand, check that we hear ourselves at least."""
        if check and not self._checking:
            self._checking = True
            self._spawn(self._check())
        if self._mdns is not None:
            question = DNSOutgoing(_FLAGS_QUERY)
            question.add_question(DNSQuestion(SERVICE_TYPE, _TYPE_PTR, _CLASS_IN))
            self._mdns.zeroconf.async_send(question)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _check(self) -> None:
        """Open the sockets again if our own answer to a question does not come back."""
        asked_s = asyncio.get_running_loop().time()
        await asyncio.sleep(ANSWER_WAIT_S)
        self._checking = False
        if self._heard_self_s < asked_s:
            async with self._socket_lock:
                await self._reopen()
            self.ask()

    async def _keep_asking(self) -> None:
        loop = asyncio.get_running_loop()
        every_s = self._settings.ask_every_s
        for wait_s in ASK_WAITS_S:
            await asyncio.sleep(min(wait_s, every_s))
            self.ask()
        while True:
            await asyncio.sleep(every_s)
            # Each question brings our own answer back. If it does not, the interface was away, or
            # the machine slept, and the system has forgotten that we belong to the group.
            if self._mdns is None or loop.time() - self._heard_self_s > SILENCES_MAX * every_s:
                async with self._socket_lock:
                    await self._reopen()
            self.ask()

    # What is heard

    def async_update_records(self, zc: Zeroconf, now: float, records: list[RecordUpdate]) -> None:
        """Note whom a packet speaks of. Called by the library before its cache has it."""
        for record in (update.new for update in records):
            if isinstance(record, DNSPointer):
                if record.name.lower() == SERVICE_TYPE:
                    self._pointed_at(record.alias, goodbye=record.is_expired(now))
            elif host := _HOST.fullmatch(record.key):
                self._changed.add(host[1])
            elif record.key.endswith(SERVICE_TYPE):
                self._changed.add(record.key[: -len(SERVICE_TYPE) - 1])

    def async_update_records_complete(self) -> None:
        """Have the names that changed looked at. Called when the cache has the packet."""
        self._changed &= self._names.keys()
        if self._changed:
            self._look_now.set()

    def _pointed_at(self, alias: str, *, goodbye: bool) -> None:
        label = alias.lower().removesuffix(SERVICE_TYPE).removesuffix(".")
        if not _LABEL.fullmatch(label) or _name(label) != alias.lower():
            if not goodbye:
                self._odd_name(label)
        elif label == self.advert.node_id:
            self._heard_self_s = asyncio.get_running_loop().time()
            self._health.heard_self = True
            self._names.setdefault(label, _Name())
            self._changed.add(label)
        elif goodbye:
            self._forget(label)
        else:
            if label not in self._names:
                self._make_room()
                self._names[label] = _Name()
            self._changed.add(label)
        self._health.names = len(self._names)

    def _odd_name(self, label: str) -> None:
        """Tell of a name that cannot be ours, once, unless there are too many of them."""
        shown = printable_name(label) or "a name that does not print"
        if shown in self._odd:
            return
        self._health.malformed += 1
        self._odd[shown] = None
        if len(self._odd) > ODD_NAMES_MAX:
            del self._odd[next(iter(self._odd))]
        self._tell(Malformed(shown, Refusal("its name is not the id of a node")))

    def _make_room(self) -> None:
        """Stop following a stranger if there are too many, or the one that is followed longest.

        If that was ours after all, it is heard again at the next question.
        """
        if len(self._names) < NAMES_MAX:
            return
        self._health.dropped += 1
        others = [label for label in self._names if label != self.advert.node_id]
        strangers = (label for label in others if not self._is_ours(self._names[label]))
        self._forget(next(strangers, others[0]))

    def _is_ours(self, name: _Name) -> bool:
        return isinstance(name.told, Heard) and name.told.advert.network == self.advert.network

    def _forget(self, label: str) -> None:
        name = self._names.pop(label, None)
        self._health.names = len(self._names)
        if name is not None and name.told is not None:
            self._tell(Gone(label))

    def _tell(self, news: News) -> None:
        if self._on_news is not None:
            self._on_news(news)

    # Looking

    async def _keep_looking(self) -> None:
        """Look at names that changed, and every second at all: records run out silently."""
        loop = asyncio.get_running_loop()
        look_at_all_s = loop.time()
        while True:
            if loop.time() >= look_at_all_s:
                self._changed.update(self._names)
                look_at_all_s = loop.time() + LOOK_EVERY_S
            changed, self._changed = self._changed, set()
            for label in changed:
                if name := self._names.get(label):
                    self._look(label, name)
            await asyncio.sleep(LOOK_PAUSE_S)
            self._look_now.clear()
            if self._changed:
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(look_at_all_s):
                    await self._look_now.wait()

    def _look(self, label: str, name: _Name) -> None:
        if self._mdns is None:
            return
        info = AsyncServiceInfo(SERVICE_TYPE, _name(label))
        if info.load_from_cache(self._mdns.zeroconf):
            self._found(label, name, info)
        elif label != self.advert.node_id and not name.resolving:
            if self._resolving < RESOLVING_MAX:
                name.resolving = True
                self._resolving += 1
                self._spawn(self._resolve(label, name, self._mdns.zeroconf))

    async def _resolve(self, label: str, name: _Name, zc: Zeroconf) -> None:
        """Ask for the records of a name; if there is no answer, nobody is behind it."""
        info = AsyncServiceInfo(SERVICE_TYPE, _name(label))
        try:
            answered = await info.async_request(zc, RESOLVE_WAIT_MS)
        finally:
            name.resolving = False
            self._resolving -= 1
        if self._names.get(label) is not name:
            return
        if answered:
            self._found(label, name, info)
        else:
            self._forget(label)

    def _found(self, label: str, name: _Name, info: AsyncServiceInfo) -> None:
        news = self._read(label, info)
        if label == self.advert.node_id:
            if not isinstance(news, Heard) or news.advert.run == self.advert.run:
                return
        if news != name.told:
            name.told = news
            if isinstance(news, Malformed):
                self._health.malformed += 1
            self._tell(news)

    def _read(self, label: str, info: AsyncServiceInfo) -> Heard | Malformed:
        read = Advert.parse(
            info.properties,
            info.parsed_addresses(IPVersion.All),
            info.port,
            loopback=self._settings.loopback,
        )
        if isinstance(read, Refusal):
            return Malformed(label, read)
        if read.node_id != label:
            return Malformed(label, Refusal("its name and its node id differ"))
        return Heard(read)


class _Complaints(logging.Handler):
    """Counts what the library logs, of garbage for instance, and keeps it off the terminal."""

    def __init__(self, health: NeighboursHealth) -> None:
        super().__init__(logging.WARNING)
        self._health = health
        self._logger = logging.getLogger("zeroconf")

    def listen(self) -> None:
        self._logger.addHandler(self)
        self._logger.propagate = False

    def stop(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = not any(isinstance(h, _Complaints) for h in self._logger.handlers)

    def emit(self, record: logging.LogRecord) -> None:
        self._health.complaints += 1
        text = "".join(char if char.isprintable() else " " for char in record.getMessage())
        self._health.last_complaint = text[:COMPLAINT_MAX_CHARS]


def require_port(port: int = MDNS_PORT, *, v6: bool = False) -> None:
    """Return if the port of mDNS can be shared with whatever else uses it.

    :raises ConfigurationError: if a program holds it for itself, or the system forbids it
    """
    family = socket.AF_INET6 if v6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            probe.bind(("", port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigurationError(
                f"UDP port {port}, by which nodes find each other, is held by a program that does"
                f" not share it: 'ss -ulpn sport = :{port}' names it. End it, or let it share"
                " (avahi: disallow-other-stacks=no in avahi-daemon.conf)"
            ) from error
        raise ConfigurationError(
            f"UDP port {port}, by which nodes find each other, cannot be used ({error.strerror}):"
            " allow it to this program"
        ) from error


def _zeroconf(addresses: list[str]) -> Zeroconf:
    try:
        return Zeroconf(interfaces=list(addresses), ip_version=_version(addresses))
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(f"{_no_multicast(addresses)} ({error})") from error


def _no_multicast(addresses: list[str]) -> str:
    return (
        f"no network of this machine takes multicast (tried at {', '.join(addresses)}), so nodes"
        " cannot find each other: use another network, or start without it and join brokers by"
        " address"
    )


def _version(addresses: list[str]) -> IPVersion:
    v6 = [":" in address for address in addresses]
    if all(v6):
        return IPVersion.V6Only
    return IPVersion.All if any(v6) else IPVersion.V4Only


def _name(label: str) -> str:
    return f"{label}.{SERVICE_TYPE}"
