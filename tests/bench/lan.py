"""The figures of several machines: users of this one, whose brokers meet over loopback."""

from __future__ import annotations

import contextlib
import json
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from coase.agents.agent import Agent
from coase.agents.config import load_network
from tests.bench.bare import round_trips
from tests.bench.parts import bench_node, emit, spawn
from tests.bench.run import BUYER_SECRET, Buyer, percentile
from tests.tools.commands import Home, Running, eventually

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

    from coase.agents.config import Network
    from coase.agents.steps import Notice

HERE: Final = ("--interface", "127.0.0.1", "--json")
MACHINES: Final = 10
KIB: Final = 1024


def network_of(home: Home) -> Network:
    """Return the network as a machine's programs see it."""
    return load_network(home.path / "network.json")


def met(home: Home) -> int:
    """Return how many machines one is joined with."""
    return len(json.loads(home.run("lan", "status", "--json").stdout)["met"])


def knows_all(home: Home) -> bool:
    """Return whether one is joined with all others."""
    return met(home) == MACHINES - 1


@contextlib.contextmanager
def beside(process: subprocess.Popen[str]) -> Iterator[None]:
    """End a process of the bench after the block."""
    try:
        yield
    finally:
        process.kill()
        process.wait()


async def bid_and_agreement(network: Network, began: float) -> tuple[float, float]:
    """Return the seconds from ``began`` to this machine's first bid, and to its agreement.

    Between the two lies the time in which a buyer waits for other bids, as on one machine.
    """
    agent = Agent("bench-buyer", by_rounds=True)
    bids: list[float] = []

    def observe(_: str, notice: Notice) -> None:
        if notice.kind == "heard:offer":
            bids.append(time.perf_counter() - began)

    async with bench_node(network, agent, BUYER_SECRET) as node:
        node.runtime.observers.append(observe)
        await Buyer(node, agent, rounds=1).one(1)
        return bids[0], time.perf_counter() - began


async def hops(here: Network, there: Network, count: int) -> None:
    """Measure a round trip within one broker and over two, in the same run."""
    near = spawn("responder", "bare", there.model_dump_json())
    with beside(near):
        await round_trips(there, count // 4, in_flight=1)
        one = percentile(await round_trips(there, count, in_flight=1), 500)
        two = percentile(await round_trips(here, count, in_flight=1), 500)
    emit("lan_round_trip", two, "ms", one_broker_ms=one, added_per_hop_ms=(two - one) / 2)


def resident_kib(pid: int) -> int:
    """Return the resident memory of a process and its children."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError, ValueError):
            fields = dict(
                line.split(":", 1) for line in status.read_text().splitlines() if ":" in line
            )
            if pid in (int(fields["Pid"]), int(fields["PPid"])):
                total += int(fields.get("VmRSS", "0 kB").split()[0])
    return total


async def lan(count: int) -> None:
    """Measure joining, hops, the death of the machine that began, and memory."""
    with tempfile.TemporaryDirectory(prefix="coase-bench-") as folder, contextlib.ExitStack() as on:
        place = Path(folder)
        homes = [Home(place / f"machine-{number}") for number in range(MACHINES)]
        for home in homes:
            home.path.mkdir()
        first = on.enter_context(homes[0].running("up", "--lan", *HERE))
        first.ready()
        code = json.loads(homes[0].run("lan", "code", "--json").stdout)["code"]
        seller = spawn("responder", "seller", network_of(homes[0]).model_dump_json())
        joined: list[Running] = []
        with beside(seller):
            began = time.perf_counter()
            joined.append(on.enter_context(homes[1].running("join", code, *HERE)))
            joined[0].ready()
            ready_s = time.perf_counter() - began
            bid_s, _ = await bid_and_agreement(network_of(homes[1]), began)
            emit("lan_join_to_first_bid", bid_s, "s", join_ready_s=ready_s, aim_s=3)
        await hops(network_of(homes[1]), network_of(homes[0]), count)
        joined += [
            on.enter_context(home.running("join", code, *HERE)) for home in homes[2:MACHINES]
        ]
        for running in joined[1:]:
            running.ready()
        for home in homes:
            eventually(partial(knows_all, home))
        used = [resident_kib(running.process.pid) // KIB for running in joined]
        emit(
            "lan_memory_per_machine",
            sum(used) / len(used),
            "MiB",
            machines=MACHINES,
            most=max(used),
        )
        seller = spawn("responder", "seller", network_of(homes[1]).model_dump_json())
        with beside(seller):
            first.end(signal.SIGKILL)
            bid_s, deal_s = await bid_and_agreement(network_of(homes[2]), time.perf_counter())
            emit("lan_first_machine_killed_to_next_deal", deal_s, "s", first_bid_s=bid_s, aim_s=5)
