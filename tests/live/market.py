"""A real market for tests: ``coase up`` as a process, and buyers and sellers as others."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from coase.agents.config import Network, load_network
from coase.agents.wiring import open_transport
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.ports import MemoryTxStore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from coase.protocol.backends.nats import NatsTransport

PR_SET_PDEATHSIG = 1
START_MAX_S = 90
DEADLINE_S = 100  # Far beyond what anything takes; only a defect ever waits that long.
POLL_S = 0.05
FUNDS_UNITS = 100_000_000
PRICE_UNITS = 20_000


async def eventually(
    happened: Callable[[], object], what: str, *, within_s: int = DEADLINE_S
) -> Any:
    """Return what ``happened`` gives as soon as that is true."""
    with anyio.move_on_after(within_s):
        while not (found := happened()):  # noqa: ASYNC110
            await anyio.sleep(POLL_S)
        return found
    raise AssertionError(f"in {within_s} s it did not come about: {what}")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@dataclass(slots=True)
class Market:
    """``coase up`` in a directory of its own, and what it left there."""

    home: Path
    process: subprocess.Popen[bytes]
    network: Network

    @property
    def network_file(self) -> Path:
        return self.home / "network.json"

    def broker_pid(self) -> int:
        (ports,) = (self.home / "state" / "broker" / "ports").glob("nats-server_*.ports")
        return int(ports.stem.rpartition("_")[2])

    def chain_pid(self) -> int:
        children = children_of(self.process.pid)
        (pid,) = (pid for pid in children if b"backends.devchain" in command_of(pid))
        return pid

    @contextlib.asynccontextmanager
    async def transport(self) -> AsyncIterator[NatsTransport]:
        transport = await open_transport(self.network, name="test")
        try:
            yield transport
        finally:
            await transport.close()

    @contextlib.asynccontextmanager
    async def settlement(self) -> AsyncIterator[EvmSettlement]:
        settlement = await EvmSettlement.connect(
            self.network.rpc, escrow=self.network.escrow, store=MemoryTxStore()
        )
        try:
            yield settlement
        finally:
            await settlement.close()


@contextlib.contextmanager
def market(home: Path) -> Iterator[Market]:
    """Run ``coase up`` for the length of the block; fail if it leaves a process behind."""
    environment = os.environ | {"COASE_HOME": str(home)}
    environment.pop("COASE_NETWORK", None)
    command = [str(Path(sys.executable).parent / "coase"), "-v", "up"]
    home.mkdir()
    with (home / "up.err").open("wb") as log:
        process = subprocess.Popen(
            [*command, "--state", str(home / "state"), "--json"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            preexec_fn=_die_with_parent,
        )
    try:
        assert process.stdout is not None
        timer = threading.Timer(START_MAX_S, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        assert line, (home / "up.err").read_text()
        yield Market(home, process, load_network(home / "network.json"))
    finally:
        process.terminate()
        try:
            process.wait(START_MAX_S)
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def with_environment(text: str) -> list[int]:
    """The processes that run with ``text`` in their environment, and so came from one of ours."""
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit() and int(place.name) != os.getpid():
            with contextlib.suppress(OSError):
                if text.encode() in (place / "environ").read_bytes():
                    found.append(int(place.name))
    return found


def children_of(pid: int) -> list[int]:
    found = []
    for place in Path("/proc").iterdir():
        if place.name.isdigit():
            with contextlib.suppress(OSError):
                if int((place / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(place.name))
    return found


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# ---- Buyers and sellers -----------------------------------------------------------------------


@dataclass(slots=True)
class Life:
    """One process of an actor, from its start to its end."""

    pid: int = 0
    code: int | None = None
    started: threading.Event = field(default_factory=threading.Event)

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


class Forge:
    """Makes actors: asks one prepared process to fork, and hears from it who ended how."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "actor.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=_die_with_parent,
        )
        self._lives: list[Life] = []
        self._by_pid: dict[int, Life] = {}
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(self, orders: dict[str, Any]) -> Life:
        """Fork a process that carries out ``orders``."""
        with self._lock:
            life = Life()
            self._lives.append(life)
            assert self._process.stdin is not None
            line = json.dumps({**orders, "id": len(self._lives) - 1})
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        assert life.started.wait(START_MAX_S), "no process was made"
        return life

    def _read(self) -> None:
        assert self._process.stdout is not None
        for text in self._process.stdout:
            line = json.loads(text)
            if "id" in line:
                life = self._lives[line["id"]]
                life.pid = line["pid"]
                self._by_pid[life.pid] = life
                life.started.set()
            elif "code" in line:
                self._by_pid[line["pid"]].code = line["code"]

    def close(self) -> None:
        """End all actors that are left, and the process that made them."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(START_MAX_S)
        self._reader.join()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Actor:
    """A buyer or a seller with a state directory of its own, through all of its lives."""

    def __init__(self, forge: Forge, market: Market, place: Path, **orders: Any) -> None:
        place.mkdir(parents=True, exist_ok=True)
        self.place, self._forge = place, forge
        self.orders = {
            "name": "actor",
            "network": str(market.network_file),
            "state": str(place / "state"),
            "log": str(place / "log"),
            **orders,
        }
        self.lives: list[Life] = []

    def start(self, fate: str = "", **orders: Any) -> Life:
        """Begin a new life that ends as ``fate`` says."""
        life = self._forge.start({**self.orders, **orders, "fate": fate})
        self.lives.append(life)
        return life

    async def ready(self) -> str:
        """Return the actor's address once it has joined the market in its present life."""
        lives = len(self.lives)

        def found() -> str:
            assert self.lives[-1].code is None, self.errors()
            lines = [line["ready"] for line in self.said() if "ready" in line]
            return lines[lives - 1] if len(lines) >= lives else ""

        return str(await eventually(found, f"{self.place.name} joins the market"))

    async def address(self) -> str:
        """Return the address that it has in all of its lives."""
        (address,) = {line["ready"] for line in self.said("ready")}
        return str(address)

    async def end(self) -> int:
        """Return the exit code of the present life; minus the signal that killed it."""
        life = self.lives[-1]
        await eventually(lambda: life.code is not None, f"{self.place.name} ends")
        assert life.code is not None
        return life.code

    async def stop(self) -> int:
        """Tell it to end, as a service manager would."""
        self.lives[-1].kill(signal.SIGTERM)
        return await self.end()

    def said(self, kind: str = "") -> list[dict[str, Any]]:
        """Return the lines of its standard output, of all lives; those of one kind if named."""
        try:
            text = Path(self.orders["log"] + ".out").read_text()
        except FileNotFoundError:
            return []
        lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
        return [line for line in lines if kind in line] if kind else lines

    def noticed(self, kind: str) -> list[dict[str, Any]]:
        """Return the notices of one kind, of all lives."""
        return [line for line in self.said("notice") if line["notice"] == kind]

    def errors(self) -> str:
        """Return what it wrote to standard error."""
        path = Path(self.orders["log"] + ".err")
        return path.read_text() if path.exists() else ""

    # What its journal says

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """Return rows of its journal, which it may be writing at the moment."""
        journal = Path(self.orders["state"]) / "journal.sqlite"
        if not journal.exists():
            return []
        connection = sqlite3.connect(f"file:{journal}?mode=ro", uri=True, timeout=30)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()

    def open_deals(self) -> list[str]:
        """Return what its journal would replay."""
        return [row[0] for row in self.rows("SELECT DISTINCT deal FROM records WHERE open = 1")]

    def summaries(self) -> list[dict[str, Any]]:
        """Return the deals that are over."""
        return [json.loads(row[0]) for row in self.rows("SELECT summary FROM closed ORDER BY seq")]

    def paid(self) -> list[dict[str, Any]]:
        """Return the deals in which the seller was paid."""
        return [row for row in self.summaries() if row["to_seller_units"] > 0]


def terms_of(**more: object) -> dict[str, object]:
    """Orders for a seller: what it asks, and windows that are short as far as that is safe."""
    windows = {"lock_s": 20, "dispute_s": 10, "answer_s": 5, "rule_s": 6}
    return {"price": "0.02", "deliver_within": 25, "windows": windows, **more}


def stream_wish(ware: str, text: str) -> dict[str, object]:
    """Orders for one purchase that is paid while it is written."""
    more = {"settlements": ["channel"], "input_max": 100, "output_max": 1_000}
    return wish(ware, text, **more)


def wish(ware: str, text: str, **more: object) -> dict[str, object]:
    """Orders for one purchase, which goes on under its key after a restart."""
    return {
        "key": text,
        "ware": ware,
        "text": text,
        "max_price": "0.05",
        "tries": 4,
        "reply_within_ms": 8_000,
        "decide_after_ms": 200,
        **more,
    }
