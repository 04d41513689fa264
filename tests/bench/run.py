"""``make bench``: one JSON line for each figure, beside the raw baseline of the same run.

These machines are noisy, so only the ratios mean something. ``--quick`` measures less of each.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).parents[2]))  # Run as a script from anywhere.

import anyio

from coase.agents.agent import Agent
from coase.agents.asks import Wish
from coase.agents.bargain import BuyerBargain
from coase.agents.wares import Summarise, Summary, capability_of
from coase.protocol.backends.broker import EmbeddedBroker
from coase.protocol.envelope import open_body, public_key, read_header, seal, unseal
from coase.protocol.identity import Identity, keccak256, recover
from coase.protocol.messages import canonical_json, schemas_hash
from tests.bench.bare import round_trips
from tests.bench.gateway import gateway
from tests.bench.parts import LOCK_S, bench_node, emit, network_of, spawn
from tests.bench.routes import routes
from tests.bench.settlement import settlement

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from coase.agents.config import Network
    from coase.agents.node import Node
    from coase.agents.steps import Notice

BUYER_SECRET: Final = 9
IN_FLIGHT: Final = 64
ROOT: Final = Path(__file__).parents[2]


def percentile(values: list[int], permille: int) -> float:
    """Return a percentile in milliseconds of values in nanoseconds."""
    ranked = sorted(values)
    return ranked[min(len(ranked) * permille // 1000, len(ranked) - 1)] / 1e6


@contextlib.asynccontextmanager
async def broker() -> AsyncIterator[Network]:
    """Yield the network of a broker of our own."""
    with tempfile.TemporaryDirectory(prefix="coase-bench-") as folder:
        embedded = EmbeddedBroker(net="bench", state_dir=Path(folder))
        await embedded.start()
        config = embedded.client_config()
        try:
            yield network_of(embedded.url, config.user, config.password)
        finally:
            await embedded.stop()


class Buyer:
    """Makes agreements and counts the time of each, from request to ``agreed``."""

    def __init__(self, node: Node, agent: Agent, *, rounds: int) -> None:
        self.node, self.agent, self.rounds = node, agent, rounds
        self.digest = schemas_hash(Summarise.model_json_schema(), Summary.model_json_schema())
        self.capability = capability_of("summarise", Summarise, Summary)
        self.taken: list[int] = []
        self.unmet = 0
        self._waiting: dict[str, asyncio.Future[bool]] = {}
        node.runtime.observers.append(self._observe)

    def _observe(self, _: str, notice: Notice) -> None:
        thread = notice.thread
        if notice.kind == "agreed" and thread is not None:
            self._finish(thread.request_id, True)
        elif notice.kind == "request_ended":
            self._finish(notice.deal, False)

    def _finish(self, request_id: str, agreed: bool) -> None:
        future = self._waiting.pop(request_id, None)
        if future is not None:
            future.set_result(agreed)

    async def one(self, number: int) -> None:
        """Make one agreement."""
        buying, seat, runtime = self.agent.buying, self.agent.seat, self.node.runtime
        assert buying is not None
        assert seat is not None
        task = canonical_json({"text": f"text number {number}", "words_max": 60})
        wish = Wish(self.capability, self.digest, task, bids_max=1, deliver_within_s=90)
        bargain = BuyerBargain(
            max_price_units=30_000,
            # Hoping for less than the list price makes a bargain; 1000 takes the first offer.
            hope_permille=700 if self.rounds > 1 else 1_000,
            deliver_within_s=90,
            style="boulware",
            rounds=self.rounds,
            by_rounds=True,
        )
        started = time.perf_counter_ns()
        ask, step = buying.ask(wish, bargain, now_ms=runtime.now_ms())
        future = asyncio.get_running_loop().create_future()
        self._waiting[ask.request_id] = future
        runtime.apply(seat, step)
        if not await future:
            self.unmet += 1  # A machine that stands still for seconds; not an agreement.
            return
        self.taken.append(time.perf_counter_ns() - started)

    async def many(self, count: int, *, in_flight: int) -> float:
        """Make ``count`` agreements and return how many a second."""
        numbers = iter(range(count))

        async def worker() -> None:
            for number in numbers:
                await self.one(number)

        started = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(in_flight)))
        return count / (time.perf_counter() - started)


async def bare_rate(network: Network, count: int) -> float:
    """Return bare round trips a second, 64 in flight."""
    other = spawn("responder", "bare", network.model_dump_json())
    try:
        await round_trips(network, count // 10, in_flight=IN_FLIGHT)
        started = time.perf_counter()
        await round_trips(network, count, in_flight=IN_FLIGHT)
        return count / (time.perf_counter() - started)
    finally:
        other.kill()
        other.wait()


async def bare_serial(network: Network, count: int) -> list[int]:
    """Return the nanoseconds of bare round trips, one after the other."""
    other = spawn("responder", "bare", network.model_dump_json())
    try:
        return await round_trips(network, count, in_flight=1)
    finally:
        other.kill()
        other.wait()


def fdatasyncs(count: int) -> list[int]:
    """Return the nanoseconds of appending a page to a file and syncing it."""
    taken = []
    with tempfile.NamedTemporaryFile(prefix="coase-bench-") as file:
        for _ in range(count):
            started = time.perf_counter_ns()
            file.write(b"\0" * 4096)
            file.flush()
            os.fdatasync(file.fileno())
            taken.append(time.perf_counter_ns() - started)
    return taken


async def agreements(network: Network, count: int) -> None:
    """Measure agreements a second, and whether they get slower with history."""
    bare = await bare_rate(network, 4 * count)
    other = spawn("responder", "seller", network.model_dump_json())
    agent = Agent("bench-buyer", by_rounds=True)
    try:
        async with bench_node(network, agent, BUYER_SECRET) as node:
            buyer = Buyer(node, agent, rounds=1)
            await buyer.many(max(count // 10, IN_FLIGHT), in_flight=IN_FLIGHT)
            rate = await buyer.many(count, in_flight=IN_FLIGHT)
            emit(
                "agreements",
                rate,
                "1/s",
                bare_round_trips_per_s=bare,
                ratio=rate / bare,
                aim_ratio=0.20,
                in_flight=IN_FLIGHT,
            )
            # From when deals lapse as fast as they are made, only the history grows.
            began, made = time.perf_counter(), 0
            while time.perf_counter() - began < 2 * LOCK_S:
                await buyer.many(count, in_flight=IN_FLIGHT)
                made += count
            fresh = await buyer.many(count, in_flight=IN_FLIGHT)
            await buyer.many(5 * count, in_flight=IN_FLIGHT)
            later = await buyer.many(count, in_flight=IN_FLIGHT)
            emit(
                "agreements_with_history",
                later,
                "1/s",
                fresh_per_s=fresh,
                ratio=later / fresh,
                deals_between=5 * count,
                deals_before=made + 7 * count,
                unmet=buyer.unmet,
            )
    finally:
        other.kill()
        other.wait()


async def negotiation(network: Network, count: int) -> None:
    """Measure a bargain of three rounds, one at a time."""
    bare = await bare_serial(network, 5 * count)
    syncs = fdatasyncs(count)
    other = spawn("responder", "seller", network.model_dump_json())
    agent = Agent("bench-buyer", by_rounds=True)
    try:
        async with bench_node(network, agent, BUYER_SECRET) as node:
            buyer = Buyer(node, agent, rounds=3)
            await buyer.many(10, in_flight=1)
            buyer.taken.clear()
            await buyer.many(count, in_flight=1)
            bare_ms, sync_ms = percentile(bare, 500), percentile(syncs, 500)
            for name, permille in (("p50", 500), ("p99", 990)):
                emit(
                    f"negotiation_3_rounds_{name}",
                    percentile(buyer.taken, permille),
                    "ms",
                    bare_round_trip_ms=percentile(bare, permille),
                    fdatasync_ms=percentile(syncs, permille),
                    aim_ms=5 * bare_ms + 6 * sync_ms if name == "p50" else None,
                )
    finally:
        other.kill()
        other.wait()


def cpu_us(work: Callable[[], object], count: int) -> float:
    """Return the CPU microseconds of ``work``."""
    started = time.process_time_ns()
    for _ in range(count):
        work()
    return (time.process_time_ns() - started) / count / 1_000


async def stages(count: int) -> None:
    """Measure the CPU time of each stage of a message."""
    from coase.agents.ports import Codec

    identity, secret = Identity(b"\x05" * 32), b"\x07" * 32
    codec, key = Codec(identity, net="bench"), public_key(secret)
    plain = json.dumps({"reason": "x" * 150}).encode()
    fields = {
        "kind": "withdraw",
        "message_id": "0" * 32,
        "to": identity.address,
        "deal": "1" * 32,
        "re": "",
        "sent_ms": 1,
        "expires_ms": 2,
        "plain": plain,
        "key": key,
    }
    wire = codec.encode(**fields)  # type: ignore[arg-type]
    header, digest = read_header(wire), keccak256(b"x")
    signature = identity.sign(digest)
    body = seal(plain, key, deal="1" * 32, kind="withdraw")
    for name, work in (
        ("encode_seal_sign", lambda: codec.encode(**fields)),  # type: ignore[arg-type]
        ("seal", lambda: seal(plain, key, deal="1" * 32, kind="withdraw")),
        ("unseal", lambda: unseal(body, secret, deal="1" * 32, kind="withdraw")),
        ("sign", lambda: identity.sign(digest)),
        ("verify", lambda: recover(digest, signature)),
        ("read_header", lambda: read_header(wire)),
        ("open_body", lambda: open_body(header, plain)),
        ("deal_key", lambda: public_key(secret)),
    ):
        emit(f"cpu_{name}", cpu_us(work, count), "us")
    await journal_stage(4 * count)


async def journal_stage(count: int) -> None:
    """Measure what a journalled record costs in CPU time, its commit included."""
    from coase.agents.backends.sqlite import SqliteJournal
    from coase.agents.ports import Record

    with tempfile.TemporaryDirectory(prefix="coase-bench-") as folder:
        journal = SqliteJournal(Path(folder) / "journal.sqlite")
        record = Record("0x" + "1" * 40, "1" * 32, "heard", 1, b"x" * 800)
        started = time.process_time_ns()
        for _ in range(count):
            group = journal.append([record])
            if group % IN_FLIGHT == 0:
                await journal.durable(group)
        await journal.durable(group)
        spent = (time.process_time_ns() - started) / count / 1_000
        emit("cpu_journal_record", spent, "us", records_per_commit=count / journal.commits)
        await journal.close()


def gas() -> None:
    """Print the gas of every path, as the contracts' own tests measured and committed it."""
    path = ROOT / "escrow" / "contracts" / "gas-snapshot.json"
    for name, units in json.loads(path.read_text()).items():
        if isinstance(units, int):
            emit(f"gas_{name}", units, "gas", source="escrow/contracts/gas-snapshot.json")


def simulation(seeds: int) -> None:
    """Run the simulator and print its own count of deals a second."""
    command = [sys.executable, str(ROOT / "tests/simulation/run.py"), "--seeds", str(seeds)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    emit(
        "simulation",
        figures["deals"] / figures["took_s"],
        "deals/s",
        per_processor_s=figures["deals"] / figures["processor_s"],
        events_per_s=figures["events"] / figures["took_s"],
        deals=figures["deals"],
        seeds=seeds,
    )


async def machines(count: int) -> None:
    """Measure what several machines on one network need."""
    from tests.bench.lan import lan

    await lan(count)


async def wire(count: int) -> None:
    """Measure what needs the broker."""
    async with broker() as network:
        await agreements(network, count)
        await negotiation(network, max(count // 10, 30))


def main() -> None:
    """Measure everything and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--only", default="", help="wire, lan, cpu, gas, settlement, simulation, router or gateway"
    )
    arguments = parser.parse_args()
    count = 300 if arguments.quick else 1_700
    parts: dict[str, Callable[[], object]] = {
        "wire": lambda: anyio.run(wire, count),
        "lan": lambda: anyio.run(machines, count),
        "cpu": lambda: anyio.run(stages, count),
        "gas": gas,
        "settlement": lambda: settlement(count, quick=arguments.quick),
        "simulation": lambda: simulation(10 if arguments.quick else 60),
        "router": lambda: routes(quick=arguments.quick),
        "gateway": lambda: gateway(quick=arguments.quick),
    }
    for name, part in parts.items():
        if arguments.only in ("", name):
            part()


if __name__ == "__main__":
    main()
