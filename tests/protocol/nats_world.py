"""Real brokers for tests: the embedded one, and a bare nats-server with any configuration."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from coase.protocol.backends.broker import EmbeddedBroker, find_server
from coase.protocol.backends.nats import NatsTransport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from coase.protocol.backends.nats import NatsConfig

DEADLINE_S = 30  # Far beyond what anything takes; only a defect ever waits that long.


def agent(number: int) -> str:
    return f"0x{number:040x}"


def impatient(config: NatsConfig) -> NatsConfig:
    """The same broker, with a client that dials again at once."""
    return replace(
        config,
        connect_timeout_s=1.0,
        reconnect_wait_min_s=0.01,
        reconnect_wait_max_s=0.1,
    )


@contextlib.asynccontextmanager
async def connected(config: NatsConfig, **how: bool) -> AsyncIterator[NatsTransport]:
    transport = await NatsTransport.connect(config, **how)
    try:
        yield transport
    finally:
        await transport.close()


def watchful(config: NatsConfig) -> NatsConfig:
    """The same broker, with a client that notices within a second that it says nothing.

    On a busy machine it may take a live broker for dead, and connect anew.
    """
    return replace(impatient(config), ping_interval_s=0.05, pong_wait_s=0.5)


async def eventually(happened: Callable[[], object]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # What is looked at has no event of its own.


async def stall(broker: EmbeddedBroker) -> None:
    """Stop its process, and return when the last of its threads has stopped."""
    os.kill(broker.pid, signal.SIGSTOP)
    await eventually(lambda: all(state == "T" for state in _states(broker.pid)))


def _states(pid: int) -> list[str]:
    stats = Path(f"/proc/{pid}/task").glob("*/stat")
    return [stat.read_text().rpartition(")")[2].split()[0] for stat in stats]


@dataclass
class BareServer:
    process: asyncio.subprocess.Process
    config_file: Path
    ports: dict[str, list[str]]

    @property
    def port(self) -> int:
        return int(self.ports["nats"][0].rpartition(":")[2])

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.config_file.parent / "log").read_text()

    async def reload(self, text: str) -> None:
        seen = self.log.count("Reloaded server configuration")
        self.config_file.write_text(_common(self.config_file.parent) + text)
        self.process.send_signal(signal.SIGHUP)
        await eventually(lambda: self.log.count("Reloaded server configuration") > seen)

    async def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


def _written(directory: Path, text: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    config_file = directory / "server.conf"
    config_file.write_text(_common(directory) + text)
    return config_file


def _common(directory: Path) -> str:
    return f"""
        host: "127.0.0.1"
        port: -1
        log_file: "{directory / "log"}"
        ports_file_dir: "{directory}"
    """


@contextlib.asynccontextmanager
async def bare_server(directory: Path, text: str = "") -> AsyncIterator[BareServer]:
    config_file = _written(directory, text)
    process = await asyncio.create_subprocess_exec(
        str(find_server()), "-c", str(config_file), stderr=asyncio.subprocess.DEVNULL
    )
    ports_file = directory / f"nats-server_{process.pid}.ports"
    try:
        await eventually(lambda: process.returncode is not None or _complete(ports_file))
        yield BareServer(process, config_file, json.loads(ports_file.read_text()))
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _complete(ports_file: Path) -> bool:
    try:
        return bool(json.loads(ports_file.read_text()))
    except (OSError, ValueError):
        return False
