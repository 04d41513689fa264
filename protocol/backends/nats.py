"""The transport over NATS: at most once, as fast as the client library goes, never given up.

Each connection is a client of its own, and one task of the transport keeps it: it asks the
broker for a sign of life, drops what gives none, dials again with jitter, and subscribes anew.
The library's own reconnection is not used: it closes for good on most errors that a broker
reports, and waits for a stalled broker to read what is still unsent before it lets go.
"""

from __future__ import annotations

import asyncio
import logging
import random
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from ssl import SSLCertVerificationError
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import nats.errors
from nats.aio.client import PING_PROTO, Client
from nats.micro import add_service
from nats.micro.service import ServiceConfig

from coase.protocol.errors import (
    ConfigurationError,
    LocalProtocolError,
    TransportUnavailable,
    WorldError,
)
from coase.protocol.messages import ENVELOPE_SIZE_MAX_BYTES
from coase.protocol.ports import OnEnvelope, Transport, TransportHealth
from coase.protocol.subjects import inbox_subject, request_subject, served_subjects

from .delivery import Deliveries, counted_loud, note, require_size
from .nats_config import NatsConfig, NkeyLogin, Server, Tls

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription

    from coase.protocol.types import AgentId

__all__ = ["NatsConfig", "NatsTransport", "Tls"]

DISCOVERED_MAX: Final = 32  # Brokers of a cluster that are tried beside the configured ones.
_ROOM_WAIT_MAX_S: Final = 0.25  # A sender waits this long for a full socket, then drops.
_ROOM_POLL_S: Final = 0.005
_CLOSE_WAIT_MAX_S: Final = 1.0
_RECEIVED_AT_ONCE_MAX: Final = 8  # Answers leave meanwhile: 64 at once is 30 ms of silence.
_CANCEL_WAIT_S: Final = 0.1
_NEVER_S: Final = 2**30  # The library's own pings: this module sends its own.

_LIBRARY_ERRORS: Final = (nats.errors.Error, OSError, TimeoutError)
# What the library raises besides, when a stranger at the broker's address answers nonsense.
_NONSENSE_ERRORS: Final = (ValueError, TypeError, LookupError, AttributeError, AssertionError)
_CHANCE: Final = random.SystemRandom()

log = logging.getLogger("coase.protocol.nats")


class _Connection(Client):
    """One connection. When it ends, it says so and leaves the rest to the transport.

    Overrides of the library's internals stand here and nowhere else; each is tested with a
    real broker.
    """

    def __init__(self, on_lost: Callable[[Exception], None]) -> None:
        super().__init__()
        self.subscriptions: dict[str, Subscription | None] = {}
        self.lost: Exception | None = None
        self._wants_tls = False
        self._on_lost = on_lost

    async def dial(
        self,
        config: NatsConfig,
        server: Server,
        on_error: Callable[[Exception], Awaitable[None]],
        on_discovered: Callable[[], Awaitable[None]],
    ) -> None:
        """Connect and log in to ``server``, within the time that ``config`` allows."""
        self._wants_tls = config.wants_tls(server)
        options: dict[str, Any] = {}
        if config.tls is not None or self._wants_tls:
            options["tls"] = (config.tls or Tls()).context()
        if server.tls_hostname:
            options["tls_hostname"] = server.tls_hostname
        if server.user or server.password:
            options |= {"user": server.user, "password": server.password}
        elif server.token:
            options["token"] = server.token
        elif login := config.login():
            self._log_in_with(login, options)
        async with asyncio.timeout(config.connect_timeout_s):
            await self.connect(
                servers=[server.url],
                error_cb=on_error,
                discovered_server_cb=on_discovered,
                name=config.name,
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=max(1, round(config.connect_timeout_s)),
                ping_interval=_NEVER_S,
                pending_size=2 * config.send_pending_max_bytes,  # We drop well before it blocks.
                **options,
            )

        if not self.is_connected:  # Neither yes nor no, which the library lets pass.
            raise nats.errors.Error("what answers there does not speak NATS")

    def _log_in_with(self, login: NkeyLogin, options: dict[str, Any]) -> None:
        options["signature_cb"] = login.sign
        if login.jwt:
            options["user_jwt_cb"] = login.jwt.encode
        else:
            self._public_nkey = login.public

    def _connect_command(self) -> bytes:
        # The library upgrades to TLS only if the broker asks for it, so that whoever sits in
        # between could have the password in clear.
        if self._wants_tls and not self._server_info.get("tls_required"):
            scheme = self._current_server.uri.scheme if self._current_server else ""
            if scheme != "wss":
                raise nats.errors.Error("TLS is wanted and the broker does not offer it")
        return super()._connect_command()

    async def _process_op_err(self, e: Exception) -> None:
        self._lose(e)

    async def _process_err(self, err_msg: str) -> None:
        if "permissions violation" in err_msg:  # The connection stays as it is.
            await self._error_cb(nats.errors.Error(f"nats: {err_msg}"))
        else:
            self._lose(nats.errors.Error(f"nats: {err_msg}"))

    async def _process_pong(self) -> None:
        # Whoever waited may have been cancelled; the library would end its reader over that.
        if self._pongs and self._pongs[0].done():
            self._pongs.pop(0)
        else:
            await super()._process_pong()

    async def _send_ping(self, future: asyncio.Future[Any] | None = None) -> None:
        # The library writes its ping past what still waits for the socket, so that the pong
        # would not prove that the broker has seen a subscription made before.
        self._pongs.append(future or asyncio.get_running_loop().create_future())
        await self._send_command(PING_PROTO)
        await self._flush_pending()

    def _lose(self, error: Exception) -> None:
        if self.lost is None and not self.is_closed:
            self.lost = error
            self._on_lost(error)

    async def settle(self, wait_max_s: float) -> None:
        """Return when the broker has seen all that was sent before.

        :raises TimeoutError: if it does not say so in time
        """
        async with asyncio.timeout(wait_max_s):
            await self.rtt(timeout=_NEVER_S)

    async def discard(self) -> None:
        """Drop the connection at once and what was still unsent with it, without waiting."""
        self._pending = []
        self._pending_data_size = 0
        if writer := getattr(self._transport, "_io_writer", None):
            writer.transport.abort()
            self._transport = None  # Or the library waits for a close that TLS may never tell of.
        try:
            async with asyncio.timeout(_CLOSE_WAIT_MAX_S):
                await self._close(Client.CLOSED, do_cbs=False)
        except (*_LIBRARY_ERRORS, *_NONSENSE_ERRORS) as error:
            log.debug("closing a connection: %s", error)


class NatsTransport(Transport):
    """Envelopes over a NATS broker. Made by :meth:`connect`.

    While the broker is away, sends are dropped and counted and the connection is dialled again
    for ever; what listens and serves is subscribed again as soon as it is back.
    """

    def __init__(self, config: NatsConfig) -> None:
        self._config = config
        self._health = TransportHealth()
        self._deliveries = Deliveries(self._health)
        self._connection: _Connection | None = None
        self._lost = asyncio.Event()
        self._stalled = False
        self._ever_connected = False
        self._closed = False
        self._received = 0
        self._discovered: dict[str, Server] = {}
        self._keeper: asyncio.Task[None] | None = None

    @classmethod
    async def connect(cls, config: NatsConfig, *, must_connect: bool = True) -> NatsTransport:
        """Return a transport that is connected, and stays so for as long as it is open.

        With ``must_connect=False`` a broker that is away is no error: dialling goes on behind
        the returned transport, and ``health().connected`` tells when it succeeded.

        :raises TransportUnavailable: if no broker answers
        :raises ConfigurationError: if a broker refuses the credentials, its certificate is not
            to be believed, or it takes no envelopes of full size; in either mode
        """
        transport = cls(config)
        await transport.open(must_connect=must_connect)
        return transport

    async def open(self, *, must_connect: bool = True) -> None:
        """Connect, as :meth:`connect` does for a new transport."""
        self._require_open()
        if self._keeper is not None:
            return
        try:
            await self._dial_any()
        except TransportUnavailable:
            if must_connect:
                raise
        self._keeper = asyncio.create_task(self._keep(), name="nats-keeper")

    async def send(self, to: AgentId, envelope: bytes) -> None:
        """Hand ``envelope`` to the broker for the inbox of ``to``; dropped if it is away.

        :raises LocalProtocolError: if it is too large, ``to`` is no address, or we are closed
        """
        await self._publish(inbox_subject(self._config.net, to), envelope)

    async def ask(self, capability: str, envelope: bytes, *, level: int, prefix: str) -> None:
        """Publish a request to one shard of the sellers; dropped if the broker is away.

        :raises ConfigurationError: if ``capability`` is none
        :raises LocalProtocolError: if it is too large, the shard is none, or we are closed
        """
        subject = request_subject(self._config.net, capability, level, prefix)
        await self._publish(subject, envelope)

    async def listen(self, agent: AgentId, on_envelope: OnEnvelope) -> None:
        """Deliver the inbox of ``agent``; when it returns, a connected broker knows of it."""
        await self._hear((inbox_subject(self._config.net, agent),), agent, on_envelope)

    async def serve(self, agent: AgentId, capability: str, on_envelope: OnEnvelope) -> None:
        """Deliver requests for ``capability``; when it returns, a connected broker knows of it.

        Other brokers of a cluster may take a little longer.
        """
        subjects = served_subjects(self._config.net, capability, agent)
        await self._hear(subjects, agent, on_envelope)

    async def forget(self, agent: AgentId) -> None:
        """Stop all deliveries to ``agent``; not one more reaches it."""
        silent = self._deliveries.forget(agent)
        if (connection := self._connection) is not None:
            for subject in silent:
                subscription = connection.subscriptions.pop(subject, None)
                if subscription is not None:
                    await self._quietly(subscription.unsubscribe())

    async def close(self) -> None:
        """Send what is still unsent, within a second, and close."""
        if self._closed:
            return
        self._closed = True
        if self._keeper is not None:
            while not self._keeper.done():  # Under Python 3.11 wait_for may swallow a cancellation.
                self._keeper.cancel()
                await asyncio.wait((self._keeper,), timeout=_CANCEL_WAIT_S)
        connection, self._connection = self._connection, None
        self._health.connected = False
        if connection is not None:
            await self._quietly(connection.settle(_CLOSE_WAIT_MAX_S))
            await connection.discard()

    def health(self) -> TransportHealth:
        """Return the counters as they are now."""
        return self._health

    # Sending

    async def _publish(self, subject: str, envelope: bytes) -> None:
        require_size(envelope)
        self._require_open()
        connection = self._connection
        # Whatever the socket does not take piles up in the library, so it is looked at first.
        if connection is None or not (
            connection.pending_data_size <= self._config.send_pending_max_bytes
            or await self._room(connection)
        ):
            self._health.send_drops += 1
            return
        self._stalled = False
        try:
            await connection.publish(subject, envelope)
        except _LIBRARY_ERRORS as error:
            self._health.send_drops += 1
            self._note(error)
        else:
            self._health.sent += 1

    async def _room(self, connection: _Connection) -> bool:
        """Return whether the socket takes bytes again; once it did not, later sends do not wait."""
        limit = self._config.send_pending_max_bytes
        for _ in range(int(_ROOM_WAIT_MAX_S / _ROOM_POLL_S)):
            if self._stalled or connection is not self._connection:
                return False
            await asyncio.sleep(_ROOM_POLL_S)
            if connection.pending_data_size <= limit:
                return connection is self._connection
        self._stalled = True
        return False

    # Receiving

    async def _hear(
        self, subjects: tuple[str, ...], agent: AgentId, on_envelope: OnEnvelope
    ) -> None:
        self._require_open()
        for subject in subjects:
            self._deliveries.put(subject, agent, on_envelope)
        if (connection := self._connection) is not None:
            await self._quietly(self._subscribe(connection, subjects))

    async def _subscribe(self, connection: _Connection, subjects: tuple[str, ...]) -> None:
        """Subscribe to what is not subscribed yet, and wait until the broker knows."""
        fresh = [subject for subject in subjects if subject not in connection.subscriptions]
        for subject in fresh:
            connection.subscriptions[subject] = None  # Before the await: others come by here.
            subscription = await connection.subscribe(
                subject,
                cb=self._receive,
                pending_msgs_limit=self._config.inbound_pending_max,
                pending_bytes_limit=self._config.inbound_pending_max_bytes,
            )
            if self._deliveries.hears(subject):
                connection.subscriptions[subject] = subscription
            else:  # Forgotten in the meantime.
                connection.subscriptions.pop(subject, None)
                await subscription.unsubscribe()
        await connection.settle(self._config.pong_wait_s)

    async def _receive(self, message: Msg) -> None:
        self._deliveries.deliver(message.subject, message.data)
        self._received += 1
        if self._received % _RECEIVED_AT_ONCE_MAX == 0:
            await asyncio.sleep(0)  # The library never yields while it has more.

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, nats.errors.SlowConsumerError):
            self._health.slow_consumer_drops += 1
            if counted_loud(self._health.slow_consumer_drops):
                log.warning(
                    "messages arrive faster than they are handled: %d dropped so far",
                    self._health.slow_consumer_drops,
                )
            self._note("slow consumer: a message was dropped")
        else:
            self._note(error)

    # Keeping the connection

    def _on_lost(self, error: Exception) -> None:
        self._health.connected = False
        self._note(error)
        self._lost.set()

    async def _keep(self) -> None:
        """Hold a connection for ever: find out that it died, drop it, dial again."""
        wait_s = self._config.reconnect_wait_min_s
        while not self._closed:
            if (connection := self._connection) is not None:
                await self._until_lost(connection)
                self._connection, self._health.connected = None, False
                log.warning("the broker %s is away", self._health.where)
                await connection.discard()
                wait_s = self._config.reconnect_wait_min_s
            try:
                await self._dial_any()
            except WorldError:
                pass  # Noted where it happened.
            except ConfigurationError as error:
                self._note(error)  # A rotated password, say: whoever mends it need not restart.
            else:
                continue
            # Half to one and a half times as long, lest a thousand nodes dial at once.
            await asyncio.sleep(wait_s * (0.5 + _CHANCE.random()))
            wait_s = min(2 * wait_s, self._config.reconnect_wait_max_s)

    async def _until_lost(self, connection: _Connection) -> None:
        """Return when the connection broke, or the broker has not answered for too long."""
        while not self._lost.is_set():
            try:
                async with asyncio.timeout(self._config.ping_interval_s):
                    await self._lost.wait()
            except TimeoutError:
                received = connection.stats["in_msgs"]
                try:
                    await connection.settle(self._config.pong_wait_s)
                except _LIBRARY_ERRORS:
                    # On a slow line the ping waits behind what we send: messages are life, too.
                    if connection.stats["in_msgs"] == received:
                        self._on_lost(TransportUnavailable("the broker answers no ping"))

    async def _dial_any(self) -> None:
        """Connect to the first broker that answers, in random order, and subscribe anew.

        :raises TransportUnavailable: if none does
        :raises ConfigurationError: if none does and the last one refused us
        """
        servers = [*self._config.servers(), *self._discovered.values()]
        _CHANCE.shuffle(servers)
        refusal: ConfigurationError | None = None
        reasons = []
        for server in servers:
            try:
                return await self._dial(server)
            except ConfigurationError as error:
                refusal = error
            except TransportUnavailable as error:
                reasons.append(str(error))
        if refusal is not None:
            raise refusal
        raise TransportUnavailable(
            "; ".join(reasons) + ". Start the broker, check address and firewall, or let the"
            " node run an embedded one"
        )

    async def _dial(self, server: Server) -> None:
        last: list[Exception] = []

        async def on_error(error: Exception) -> None:
            last.append(error)
            if self._connection is connection:
                await self._on_error(error)

        def on_lost(error: Exception) -> None:
            last.append(error)
            if self._connection is connection:
                self._on_lost(error)

        async def on_discovered() -> None:
            self._learn(connection, server)

        connection = _Connection(on_lost)
        try:
            await connection.dial(self._config, server, on_error, on_discovered)
            self._learn(connection, server)  # What was in the greeting; later news call back.
            self._require_payload(connection)
            await self._resume(connection)
        except (*_LIBRARY_ERRORS, *_NONSENSE_ERRORS, ConfigurationError) as error:
            await connection.discard()
            # "No servers" hides what went wrong; the callback was told.
            hidden = isinstance(error, nats.errors.NoServersError | TimeoutError) and last
            self._refuse(server, last[-1] if hidden else error)
        except BaseException:  # Cancelled: the socket must not outlive us.
            await connection.discard()
            raise
        self._adopt(connection, server)

    async def _resume(self, connection: _Connection) -> None:
        """Subscribe to all that is heard, including what is added while this runs."""
        while missing := tuple(
            subject
            for subject in self._deliveries.subjects()
            if subject not in connection.subscriptions
        ):
            await self._subscribe(connection, missing)
        if self._config.micro:
            await self._describe(connection)

    def _adopt(self, connection: _Connection, server: Server) -> None:
        self._lost.clear()
        self._stalled = False
        self._connection = connection
        self._health.connected = True
        self._health.where = server.url
        if self._ever_connected:
            self._health.reconnects += 1
            log.warning("the broker %s is back", server.url)
        self._ever_connected = True
        if connection.lost is not None:  # It broke while we subscribed.
            self._on_lost(connection.lost)

    def _learn(self, connection: _Connection, server: Server) -> None:
        """Remember the brokers of its cluster that ``server`` tells of, to dial them as well."""
        for found in connection.discovered_servers if self._config.follow_cluster else ():
            url = f"{found.scheme}://{found.netloc.rpartition('@')[2]}"
            if len(self._discovered) < DISCOVERED_MAX and url not in self._discovered:
                # Its certificate may well name the host that we know, and not its address.
                hostname = server.tls_hostname or urlsplit(server.url).hostname or ""
                self._discovered[url] = replace(server, url=url, tls_hostname=hostname)

    def _refuse(self, server: Server, error: Exception) -> None:
        """Say what went wrong with ``server``, without a secret, and what to do about it."""
        text = self._note(error)
        if isinstance(error, ConfigurationError):
            raise error
        if "authorization violation" in text.lower() or "authentication" in text.lower():
            raise ConfigurationError(
                f"the broker {server.url} refused the credentials; check user, password, token,"
                " .creds file or nkey"
            ) from None
        if isinstance(error, SSLCertVerificationError):
            raise ConfigurationError(
                f"the certificate of the broker {server.url} is not to be believed ({text});"
                " check ca_file and hostname of its TLS settings"
            ) from None
        raise TransportUnavailable(f"no broker answers at {server.url} ({text})") from None

    def _require_payload(self, connection: _Connection) -> None:
        if connection.max_payload < ENVELOPE_SIZE_MAX_BYTES:
            raise ConfigurationError(
                f"the broker takes at most {connection.max_payload} bytes a message; set its"
                f" max_payload to {ENVELOPE_SIZE_MAX_BYTES} or more"
            )

    async def _describe(self, connection: _Connection) -> None:
        """Run the NATS micro service of this node: ping, info and stats, no endpoints.

        Endpoints would share a queue group: one of three sellers would hear a request.
        """
        service = ServiceConfig(
            name="coase",
            version=_version(),
            description="a node of an agent-to-agent economy",
            metadata={"net": self._config.net},
        )
        await add_service(connection, service)

    # Small things

    def _require_open(self) -> None:
        if self._closed:
            raise LocalProtocolError("the transport is closed")

    def _note(self, error: Exception | str) -> str:
        text = self._config.redact(str(error) or type(error).__name__)
        note(self._health, text)
        return text

    async def _quietly(self, call: Awaitable[object]) -> None:
        """Await ``call``; what the connection says about its own end is noted, not raised."""
        try:
            await call
        except _LIBRARY_ERRORS as error:
            self._note(error)


def _version() -> str:
    try:
        return version("coase")
    except PackageNotFoundError:
        return "0.0.0"
