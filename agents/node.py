"""A node: one process with its key, journal, broker and chain, and the agents that live in it."""

from __future__ import annotations

import logging
import secrets
import signal
import sys
import threading
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import anyio

from coase.protocol.errors import CoaseError, ConfigurationError, JournalFailed, WorldError
from coase.protocol.subjects import LEVELS

from .arbiter import Arbiter
from .asks import DeclineAll
from .backends.sqlite import SqliteJournal, StateDirectory
from .bench import Bench
from .beside import Beside, open_beside
from .buyer import BuyerDesk
from .collector import COIN_UNITS, LOCAL_CLAIMS, PUBLIC_CLAIMS, Collector
from .config import Network, load_network, state_home
from .desk import Desk
from .dispute import Advocate, ArbiterFace
from .firm import Colleagues, FirmFile
from .guarantor import Guarantor
from .limits import Budgets
from .means import Means
from .pace import pace_of
from .ports import Chance, Codec, Journal
from .purse import Budget, permit, rows_of
from .runtime import Runtime, Seat
from .seller import SellerDesk
from .steps import Step
from .supervisor import supervise

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from pathlib import Path

    from coase.escrow.backends.keystore import KeyRing
    from coase.escrow.ports import Panel, Settlement
    from coase.protocol.envelope import Message
    from coase.protocol.identity import Identity
    from coase.protocol.messages import Description
    from coase.protocol.ports import Transport
    from coase.protocol.session import Margins
    from coase.protocol.types import AgentId

    from .agent import Agent
    from .asks import Ask
    from .compute.ports import Compute
    from .steps import Notice

log = logging.getLogger(__name__)

EXIT_USER: Final = 2
EXIT_UNAVAILABLE: Final = 69
EXIT_JOURNAL: Final = 70
"""A service manager that starts the process again does the right thing."""
CLOSE_WAIT_MAX_S: Final = 5.0  # Who ends says goodbye, but not for ever.
SETTLE_WAIT_MAX_S: Final = 8.0  # Two blocks of a local chain and some more.
DISCOVER_WAIT_S: Final = 0.8


class SystemChance(Chance):
    """The operating system's randomness."""

    def take(self, count: int) -> bytes:
        """Return ``count`` bytes that nobody can guess."""
        return secrets.token_bytes(count)


class Node:
    """Everything that the agents of one process share."""

    def __init__(
        self,
        network: Network,
        transport: Transport,
        settlement: Settlement,
        journal: Journal,
        *,
        seed: Identity | KeyRing,
        compute: Compute | None = None,
        chance: Callable[[str], Chance] = lambda name: SystemChance(),
        margins: Margins | None = None,
        budget: Budget | str | None = None,
        directory: Path | None = None,
        beside: Beside | None = None,
    ) -> None:
        self.network, self.settlement, self.journal = network, settlement, journal
        beside = beside or Beside()
        self.channels, self.registries, self.stake = (
            beside.channels,
            beside.registries,
            beside.stake,
        )
        """What stands on the chain beside the escrow, each None where the network has none."""
        self.panel = beside.panel
        self.transport, self.seed, self.compute = transport, seed, compute
        self.runtime = Runtime(transport, settlement, journal)
        self.runtime.channels = self.channels
        self.collector = self._collector()
        self.guarantor = Guarantor(self.runtime, self.stake) if self.stake is not None else None
        self.pace = pace_of(network)
        self.runtime.poll_s = self.pace.poll_s
        self._chance, self._margins = chance, margins or self.pace.margins
        self.agents: list[Agent] = []
        self._arbiters: list[tuple[Arbiter, Seat]] = []
        self.firm = FirmFile()
        """The firm of whoever runs this node, for whose agents nothing costs anything."""
        self.colleagues = Colleagues(self.firm)
        self.budgets = Budgets(settlement.asset, swarm=budget, directory=directory)
        """``budget`` binds all agents together; the owner's word in ``directory`` goes over it."""

    def _collector(self) -> Collector | None:
        """Return what claims for the agents; where gas is free, by time and not by its price."""
        if self.channels is None:
            return None
        local = self.network.faucet
        policy = LOCAL_CLAIMS if local else PUBLIC_CLAIMS
        coin_units = 0 if local else COIN_UNITS
        return Collector(self.runtime, self.channels, policy=policy, coin_units=coin_units)

    def _desk(self, identity: Identity, name: str) -> Desk:
        desk = Desk(
            Codec(identity, net=self.network.net),
            self._chance(name),
            domain=self.settlement.domain,
            asset=self.settlement.asset,
            margins=self._margins,
        )
        # The same after a restart: others remember where to write to us.
        desk.inbox_secret = identity.subkey("inbox")
        return desk

    async def add(self, agent: Agent, *, identity: Identity | None = None) -> Agent:
        """Give ``agent`` its key and its place; from now on it is found and can buy.

        :raises ConfigurationError: if another agent of this node has that key
        """
        identity = identity or self.seed.derive(agent.name)
        if identity.address in self.runtime.seats:
            raise ConfigurationError(
                f"this node has an agent with the key of {agent.name!r} already: give each agent a"
                " name of its own"
            )
        desk = self._desk(identity, agent.name)
        if self.stake is not None:
            desk.vault = self.stake.vault
        if self.channels is not None:
            desk.streams.open(self.channels.domain, is_local=self.network.faucet)
        arbiters = tuple(self.network.arbiters)
        level = 0 if self.network.faucet else LEVELS[-1]
        agent.node, agent.buying = self, BuyerDesk(desk, arbiters=arbiters, start_level=level)
        buying = agent.buying
        buying.firm = self.firm.current
        buying.reserve = self.budgets.open(agent.name, agent.budget, under=agent.under)
        buying.means = Means(buying.under_way, name=agent.name)
        desk.buyer = agent.buying
        capabilities: tuple[str, ...] = ()
        if agent.offerings:
            key = desk.codec.public_key(desk.inbox_secret)
            agent.selling = SellerDesk(desk, agent=agent.name, arbiters=arbiters, inbox_key=key)
            agent.selling.firm = self.firm.current
            for ware in agent.wares(self):
                agent.selling.sell(ware)
            desk.seller = agent.selling
            names = {offering.name for offering in agent.offerings.values()}
            capabilities = (*agent.offerings, *sorted(names), "any")
        seat = Seat(
            name=agent.name,
            desk=desk,
            identity=identity,
            worker=agent.work if agent.offerings else None,
            checker=agent.check,
            capabilities=capabilities,
            restore=lambda: self._restore(agent),
            permit=lambda deal, call: permit(
                buying.reserve, deal, call, now_ms=self.runtime.now_ms()
            ),
        )
        agent.seat = seat
        self.agents.append(agent)
        self.runtime.observers.append(agent.observe)
        advocate = agent.advocate = Advocate(agent)

        def described(message: Message, description: Description) -> None:
            self.colleagues.hear(message, description)
            advocate.on_description(message, description)

        desk.on_description = described
        self.runtime.observers.append(
            lambda who, notice: advocate.observe(who, notice, self.runtime.start)
        )
        self.budgets.tell()
        await self.runtime.add(seat)
        self._promise_stake(agent, seat)
        return agent

    def _promise_stake(self, agent: Agent, seat: Seat) -> None:
        """Have an agent's stake put up as soon as it has the money.

        :raises ConfigurationError: if it is no amount, or the network has no vault
        """
        if not agent.stake:
            return
        if self.guarantor is None:
            raise ConfigurationError(
                f"{agent.name} cannot stake {agent.stake}: this network has no vault"
            )
        self.guarantor.wanted[seat.desk.me] = self.settlement.asset.money(agent.stake).units

    async def discover(
        self, agent: Agent, name: str = "", *, wait_s: float = DISCOVER_WAIT_S
    ) -> list[tuple[AgentId, Description]]:
        """Ask who sells ``name`` (a name, a capability id, or nothing for everything).

        Returns what was answered within ``wait_s``, each seller's ware once.
        """
        seat, advocate = agent.seat, agent.advocate
        if seat is None or advocate is None:
            raise ConfigurationError(f"{agent.name} has no place in this node")
        found: dict[tuple[AgentId, str], Description] = {}

        def heard(sender: AgentId, description: Description) -> None:
            found[(sender, description.capability)] = description

        advocate.listeners.append(heard)
        try:
            for _ in range(2):  # Interest takes time to spread, and messages get lost.
                step = seat.desk.ask_who(name, now_ms=self.runtime.now_ms())
                self.runtime.apply(seat, step)
                await anyio.sleep(wait_s / 2)
        finally:
            advocate.listeners.remove(heard)
        return [(sender, description) for (sender, _), description in sorted(found.items())]

    async def at_rest(self) -> None:
        """Return once no deal of this node's agents is open."""
        ended = anyio.Event()

        def observe(_: AgentId, notice: Notice) -> None:
            if notice.kind == "ended":
                ended.set()

        self.runtime.observers.append(observe)
        try:
            while any(agent.seat and agent.seat.desk.bound() for agent in self.agents):
                await ended.wait()
                ended = anyio.Event()
        finally:
            self.runtime.observers.remove(observe)

    async def add_arbiter(self, identity: Identity) -> Arbiter:
        """Give this node an arbiter that rules where both sides name its key."""
        desk = self._desk(identity, "arbiter")
        desk.seller = ArbiterFace(desk)
        seat = Seat("arbiter", desk, identity, capabilities=("any",))
        arbiter = Arbiter(
            identity,
            self.settlement,
            forget=lambda case: self.runtime.apply(seat, Step(closed=[(case, b"")])),
            bench=self._bench(identity, seat),
        )
        desk.court = arbiter
        self._arbiters.append((arbiter, seat))
        await self.runtime.add(seat)
        self.runtime.start(supervise, "arbiter", arbiter.run)
        return arbiter

    def sit(self, panel: Panel, network: Network) -> None:
        """Let the arbiters of this node sit on the panel that ``network`` names from now on."""
        self.panel, self.network = panel, network
        for arbiter, seat in self._arbiters:
            bench = self._bench(arbiter.identity, seat)
            if bench is not None:
                arbiter.sit(bench)

    def _bench(self, identity: Identity, seat: Seat) -> Bench | None:
        """Return the seat of ``identity`` on the network's panel, if it has one."""
        if self.panel is None or identity.address not in self.panel.constitution.members:
            return None

        def tell(member: AgentId, job_id: bytes, body: dict[str, object]) -> None:
            deal, now_ms = job_id[:16].hex(), self.runtime.now_ms()
            self.runtime.apply(
                seat, seat.desk.tell(member, "ruling", body, now_ms=now_ms, deal=deal)
            )

        return Bench(identity, self.panel, tell=tell)

    def _restore(self, agent: Agent) -> None:
        """Take the agent's own requests out of the journal, where a deal of theirs is bound."""
        buying = agent.buying
        if buying is None:
            return
        for record in self.journal.open_records(buying.desk.me):
            if record.kind == "asked":
                # Whoever bargained is gone: what is bound goes on, what is not lapses.
                buying.replay(record, DeclineAll())
        buying.replayed(rows_of(self.journal.summaries(buying.desk.me)))
        # What is paid while it is made is of no use to a reader who died, unless he comes back.
        buying.desk.abandoned = [
            thread.deal
            for thread in buying.under_way()
            if thread.streamed and thread.result is None
            if not _is_kept(buying.asks.get(thread.request_id))
        ]
        buying.desk.abandoned += [thread.deal for thread in buying.desk.contracts()]


def _is_kept(ask: Ask | None) -> bool:
    return ask is None or ask.wish.kept


@asynccontextmanager
async def open_node(
    *,
    network: Network | None = None,
    state: Path | None = None,
    name: str = "node",
    compute: Compute | None = None,
    margins: Margins | None = None,
    registers: bool = False,
) -> AsyncIterator[Node]:
    """Join a network and yield a running node.

    With ``registers`` its sellers are registered on a local chain unless their profile says no.

    :raises ConfigurationError: if there is no network, or the state directory is taken
    :raises TransportUnavailable: if the broker does not answer
    """
    from .reviewer import serve_reputation
    from .wiring import open_settlement, open_transport, unlock_keys
    from .withdrawal import serve_owner

    network = network or load_network()
    home = state_home() / "nodes" / f"{network.net}-{network.escrow[2:10]}"
    directory = StateDirectory(state or home / name)
    try:
        journal = SqliteJournal(directory.path / "journal.sqlite")
        try:
            seed = unlock_keys(network, directory.path)
            transport = await open_transport(network)
            try:
                settlement = await open_settlement(network, journal)
                try:
                    beside = await open_beside(network, settlement)
                    node = Node(
                        network,
                        transport,
                        settlement,
                        journal,
                        seed=seed,
                        compute=compute,
                        margins=margins,
                        directory=directory.path,
                        beside=beside,
                    )
                    async with running(node):
                        serve_owner(node, journal, directory.path)
                        serve_reputation(node, registers=registers, directory=directory.path)
                        yield node
                finally:
                    with anyio.move_on_after(CLOSE_WAIT_MAX_S, shield=True):
                        await settlement.close()
            finally:
                with anyio.move_on_after(CLOSE_WAIT_MAX_S, shield=True):
                    await transport.close()
        finally:
            with anyio.CancelScope(shield=True):
                await journal.close()
    finally:
        directory.release()


@asynccontextmanager
async def running(node: Node) -> AsyncIterator[Node]:
    """Run a node's loops around the body. What the body raises comes out as it is."""
    try:
        async with anyio.create_task_group() as group:
            ready = anyio.Event()
            group.start_soon(_run, node.runtime, ready)
            await ready.wait()
            if node.collector is not None:
                group.start_soon(supervise, "collector", node.collector.run)
            if node.guarantor is not None:
                group.start_soon(supervise, "guarantor", node.guarantor.run)
            try:
                yield node
            finally:
                await node.runtime.say_goodbye()
                group.cancel_scope.cancel()
    except BaseExceptionGroup as group_of_one:
        raise alone(group_of_one) from None


def alone(error: BaseException) -> BaseException:
    """Return what is inside a group of one error, however often it is wrapped; else the error."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def _run(runtime: Runtime, ready: anyio.Event) -> None:
    await runtime.run(ready=ready.set)


@asynccontextmanager
async def joined(
    *agents: Agent, state: Path | None = None, compute: Compute | None = None
) -> AsyncIterator[Node]:
    """Join the network with ``agents`` for the length of the block, funded on a local chain.

    After the block it stays for some seconds while deals are still open, so that what was bought
    is also settled; whatever is open then goes on when the same agents join again.

    :raises ConfigurationError: if there is no network; start one with: coase up
    """
    from .wiring import ensure_funds

    name = agents[0].name if agents else "node"
    async with open_node(state=state, name=name, compute=compute, registers=True) as node:
        for agent in agents:
            await node.add(agent)
            await ensure_funds(node.settlement, node.network, agent.address)
        yield node
        with anyio.move_on_after(SETTLE_WAIT_MAX_S):
            await node.at_rest()


async def run_agents(agents: Sequence[Agent]) -> None:
    """Join the network with ``agents`` and work until told to stop, by SIGINT or SIGTERM."""
    from .compute.find import open_compute

    async with anyio.create_task_group() as group:
        if threading.current_thread() is threading.main_thread():  # No other hears signals.
            group.start_soon(_until_told, group.cancel_scope)
        compute = await open_compute("auto")
        try:
            async with joined(*agents, compute=compute):
                for agent in agents:
                    wares = ", ".join(
                        f"{o.capability} at {o.price}" for o in agent.offerings.values()
                    )
                    print(
                        f"{agent.name} {agent.address} sells {wares or 'nothing'}", file=sys.stderr
                    )
                print(f"engine: {compute.name}; Ctrl-C ends it", file=sys.stderr)
                await anyio.sleep_forever()
        finally:
            with anyio.move_on_after(CLOSE_WAIT_MAX_S, shield=True):
                await compute.close()


async def _until_told(scope: anyio.CancelScope) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            scope.cancel()
            return


def run_process(agents: Sequence[Agent]) -> None:
    """Be the process of ``agents``: run them until told to stop.

    What makes it impossible is said in one line, and by the exit code: 70 for a disk that refuses
    the journal, 69 for a broker or a chain that is away, 2 for what its user can mend.
    """
    try:
        anyio.run(run_agents, agents)
    except (CoaseError, BaseExceptionGroup) as error:
        cause: BaseException = error
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        if not isinstance(cause, CoaseError):
            raise
        sys.stderr.write(f"coase: {cause}\n")
        raise SystemExit(_exit_code(cause)) from None


def _exit_code(error: CoaseError) -> int:
    match error:
        case JournalFailed():
            return EXIT_JOURNAL
        case ConfigurationError():
            return EXIT_USER
        case WorldError():
            return EXIT_UNAVAILABLE
    return 1
