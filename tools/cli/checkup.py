"""What ``coase doctor`` examines."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import anyio

from coase.agents.compute.find import ComputeConfig, find_compute
from coase.agents.compute.model import find_model
from coase.agents.config import Network, load_network, state_home
from coase.agents.wiring import open_transport
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.ports import MemoryTxStore
from coase.protocol.backends.broker import find_server
from coase.protocol.errors import CoaseError, ConfigurationError
from coase.protocol.messages import CLOCK_SKEW_MAX_MS

from .scratch import alive
from .up_command import starts_again

DISK_FREE_MIN_BYTES: Final = 512 * 1024 * 1024
CHAIN_LAG_MAX_S: Final = 10
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was examined."""

    level: Literal["ok", "note", "bad"]
    what: str
    text: str

    def to_json(self) -> dict[str, str]:
        """Return it for ``--json``."""
        return asdict(self)


def examine_machine() -> list[Finding]:
    """Return what this machine has, without any network."""
    return [_python(), _libgomp(), _broker(), _model(), _disk()]


def _python() -> Finding:
    version = platform.python_version()
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    level: Literal["ok", "bad"] = "ok" if fits else "bad"
    return Finding(level, "python", f"{version} (3.11 to 3.13 are supported)")


def _libgomp() -> Finding:
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        return Finding(
            "bad", "libgomp1", "missing, the embedded engine needs it: apt-get install libgomp1"
        )
    return Finding("ok", "libgomp1", "is here")


def _broker() -> Finding:
    try:
        return Finding("ok", "nats-server", str(find_server()))
    except CoaseError as error:
        return Finding("bad", "nats-server", str(error))


def _model() -> Finding:
    path = find_model()
    if path is None:
        return Finding("note", "model", "the small model is missing: coase model get")
    return Finding("ok", "model", str(path))


def _disk() -> Finding:
    home = state_home()
    place = next((p for p in (home, *home.parents) if p.exists()), Path("/"))
    free = shutil.disk_usage(place).free
    text = f"{free // 2**20} MiB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding("bad", "disk", f"{place} cannot be written; set COASE_HOME to another place")
    if free < DISK_FREE_MIN_BYTES:
        return Finding("bad", "disk", f"{text}; at least {DISK_FREE_MIN_BYTES // 2**20} are wanted")
    return Finding("ok", "disk", text)


async def examine_network(path: Path) -> list[Finding]:
    """Return how the engine, the network file, broker and chain are."""
    findings = [await _engine()]
    try:
        network = load_network(path)
    except ConfigurationError as error:
        return [*findings, _no_network(path, str(error))]
    findings.append(_network_process(network, path))
    findings += [await _broker_answers(network), *_listens(network)]
    findings += await _chain(network)
    return findings


def _no_network(path: Path, why: str) -> Finding:
    return Finding("bad" if path.exists() else "note", "network", why)


def _network_process(network: Network, path: Path) -> Finding:
    if not network.pid:
        return Finding("ok", "network", f"{network.net}, described by {path}")
    if not alive(network.pid):
        text = f"its process {network.pid} has ended ({path}); start: {starts_again(network)}"
        return Finding("bad", "network", text)
    return Finding("ok", "network", f"{network.net}, run by process {network.pid} ({path})")


async def _engine() -> Finding:
    said: list[str] = []
    try:
        compute = await find_compute(ComputeConfig(), say=said.append)
        await compute.close()
    except CoaseError as error:
        return Finding("note", "engine", str(error))
    return Finding("ok", "engine", said[0] if said else compute.name)


async def _broker_answers(network: Network) -> Finding:
    try:
        transport = await open_transport(network, name="coase-doctor")
        await transport.close()
    except CoaseError as error:
        return Finding("bad", "broker", str(error))
    return Finding("ok", "broker", f"{network.nats.url} answers")


def _listens(network: Network) -> list[Finding]:
    out = []
    for what, url in (("broker", network.nats.url), ("chain", network.rpc)):
        host = urlsplit(url).hostname or ""
        local = host in _LOOPBACK
        where = "this machine only" if local else f"{host}: whoever reaches it can talk to it"
        out.append(Finding("ok" if local else "note", f"{what} listens on", where))
    return out


async def _chain(network: Network) -> list[Finding]:
    try:
        with anyio.fail_after(10):
            settlement = await EvmSettlement.connect(
                network.rpc,
                escrow=network.escrow,
                store=MemoryTxStore(),
                chain_id=network.chain_id,
            )
            try:
                head = await settlement.head()
            finally:
                await settlement.close()
    except (CoaseError, TimeoutError) as error:
        return [Finding("bad", "chain", str(error) or f"{network.rpc} does not answer")]
    skew_s = head.time_s - int(time.time())
    findings = [Finding("ok", "chain", f"block {head.number} at {network.rpc}")]
    if abs(skew_s) * 1000 > CLOCK_SKEW_MAX_MS or abs(skew_s) > CHAIN_LAG_MAX_S:
        findings.append(
            Finding(
                "bad",
                "clock",
                f"this machine and the newest block are {abs(skew_s)} s apart: set the clock"
                " (timedatectl set-ntp true), or the chain has stopped",
            )
        )
    else:
        findings.append(Finding("ok", "clock", f"{abs(skew_s)} s from the newest block"))
    return findings
