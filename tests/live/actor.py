"""Buyers and sellers in processes of their own, for tests that kill them.

One process imports everything and then forks a node for each line of orders on its standard
input, so that hundreds of nodes can be started within a test. Each of them is an ordinary
process with a journal, a key and connections of its own. How it dies is told by its orders:

``after:3``       by SIGKILL right after its third commit, before anything that waited for it
``before:3``      by SIGKILL when all but the COMMIT of the third was done
``acted:3``       by SIGKILL once what waited for the third commit was done and sent
``notice:KIND``   by SIGKILL when that notice comes
``called:KIND``   by SIGKILL when that notice comes of a deal that was called for under rates
``fail:3``        not at all: the third commit fails, as on a disk that is broken
``fail-on:TEXT``  the same for the first commit that has TEXT in a statement or its values
``size:N``        not at all: no file of its own may grow beyond N bytes
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import logging
import os
import resource
import select
import signal
import sqlite3
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import anyio
import anyio.from_thread
import anyio.lowlevel
import typer
from pydantic import BaseModel

from coase.agents import Agent, Job
from coase.agents.backends.sqlite import SqliteJournal
from coase.agents.config import load_network
from coase.agents.node import Node, open_node
from coase.agents.runtime import Runtime
from coase.agents.seller import Windows
from coase.agents.wiring import ensure_funds
from coase.negotiation.pricing import Price
from coase.protocol.errors import CoaseError
from coase.protocol.session import Margins
from coase.tools.cli.app import perform

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coase.agents.steps import Notice
    from coase.protocol.session import Thread
    from coase.protocol.types import AgentId

PR_SET_PDEATHSIG = 1
REST_MAX_S = 90
MARGINS = Margins(halt_s=0)  # The windows of these tests are short.
CALLS_MAX = 20  # Tries of one call; each may fail while its seller is away.
CALL_MOST_UNITS = 50_000
WORDS = 60
WORD_S = 0.005  # So that the text takes a while and some chunks, and its commits come one by one.
VANISH_AFTER_S = 1.5  # Long enough for the signed ack of the task, which comes after 0.2 s.


class Ping(BaseModel):
    text: str


class Pong(BaseModel):
    text: str


def say(**line: object) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
    raise AssertionError("killed, and still here")


# ---- How it dies -----------------------------------------------------------------------------


def arm(fate: str) -> None:
    """Prepare the death, or the broken disk, that ``fate`` names."""
    what, _, detail = fate.partition(":")
    match what:
        case "":
            return
        case "after" | "before" | "acted":
            _arm_commit(what, int(detail))
        case "notice":
            _arm_notice(lambda notice: notice.kind == detail)
        case "called":
            _arm_notice(
                lambda notice: (
                    notice.kind == detail
                    and notice.thread is not None
                    and notice.thread.contract != ""
                )
            )
        case "fail":
            _arm_failure(lambda journal: journal.commits == int(detail))
        case "fail-on":
            _arm_failure(lambda journal: detail in journal.text)
        case "size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(detail), int(detail)))
        case _:
            raise ValueError(fate)


class Tampered:
    """The connection through which a journal is written, between the journal and its disk."""

    def __init__(self, connection: sqlite3.Connection, fate: Callable[[Tampered], None]) -> None:
        self._connection, self._fate = connection, fate
        self.commits = 0
        self.text = ""
        """What the present transaction has said so far."""

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Any:
        if statement != "COMMIT":
            self.text += f"{statement} {values}\n"
            return self._connection.execute(statement, values)
        self.commits += 1
        return self._fate(self)

    def commit(self) -> None:
        self._connection.execute("COMMIT")
        self.text = ""

    def fail(self) -> None:
        self._connection.execute("ROLLBACK")
        raise sqlite3.OperationalError("disk I/O error")

    def close(self) -> None:
        self._connection.close()


def _tamper(fate: Callable[[Tampered], None]) -> None:
    """Put ``fate`` in the place of each commit of a journal."""
    make = SqliteJournal.__init__

    def tampered(self: SqliteJournal, path: Path) -> None:
        make(self, path)
        self._writer = Tampered(self._writer, fate)  # type: ignore[assignment]

    SqliteJournal.__init__ = tampered  # type: ignore[method-assign]


def _arm_commit(what: str, number: int) -> None:
    run = Runtime.run
    running: list[tuple[Runtime, Any]] = []

    async def remembered(self: Runtime, **options: Any) -> None:
        running.append((self, anyio.lowlevel.current_token()))
        await run(self, **options)

    def fate(journal: Tampered) -> None:
        if journal.commits != number:
            return journal.commit()
        if what == "before":
            die()
        journal.commit()
        if what == "after":
            die()
        runtime, token = running[-1]
        anyio.from_thread.run_sync(runtime.start, _die_when_sent, runtime, token=token)

    Runtime.run = remembered  # type: ignore[method-assign]
    _tamper(fate)


async def _die_when_sent(runtime: Runtime) -> None:
    await anyio.sleep(0.03)  # Those who waited for the commit go first.
    while runtime._outgoing:  # noqa: ASYNC110  # It has no event of its own.
        await anyio.sleep(0.001)
    await anyio.sleep(0.02)
    die()


def _arm_notice(due: Callable[[Notice], bool]) -> None:
    notify = Runtime._notify

    def deadly(self: Runtime, agent: AgentId, notice: Notice) -> None:
        if due(notice):
            die()
        notify(self, agent, notice)

    Runtime._notify = deadly  # type: ignore[method-assign]


def _arm_failure(due: Callable[[Tampered], bool]) -> None:
    def fate(journal: Tampered) -> None:
        if due(journal):
            journal.fail()
        journal.commit()

    _tamper(fate)


# ---- What it does ----------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """What a seller writes, word by word, on a text."""
    return [f"{text}, word {n}; " for n in range(WORDS)]


def seller_of(orders: dict[str, Any]) -> Agent:
    """An agent that gives back the text it was given, and misbehaves where the text says so."""
    agent = Agent(orders["name"])
    windows = Windows(**orders.get("windows", {}))
    for ware in orders.get("streams", []):

        @agent.offers(
            ware,
            price=Price.per_million(input="2", output="20"),
            deliver_within=orders["deliver_within"],
            capacity=64,
            windows=windows,
            shown=True,
        )
        async def write(task: Ping, job: Job) -> Pong:
            for word in words(task.text):
                job.show(word)
                await anyio.sleep(WORD_S)
            return Pong(text="".join(words(task.text)))

    for ware in orders["wares"]:

        @agent.offers(
            ware,
            price=Price.per_task(orders["price"]),
            deliver_within=orders["deliver_within"],
            capacity=orders.get("capacity", 64),
            windows=windows,
        )
        async def echo(task: Ping, job: Job) -> Pong:
            if task.text == "vanish":
                await anyio.sleep(VANISH_AFTER_S)
                die()
            if task.text.startswith("slow"):
                await anyio.sleep(2)
            return Pong(text=task.text)

    return agent


async def sell(orders: dict[str, Any]) -> None:
    agent = seller_of(orders)
    async with open_node(
        network=load_network(Path(orders["network"])),
        state=Path(orders["state"]),
        margins=MARGINS,
    ) as node:
        await settle_in(node, agent)
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async for _ in signals:
                break
    say(stopped=True)


async def settle_in(node: Node, agent: Agent) -> None:
    await node.add(agent)
    node.runtime.observers.append(lambda who, notice: tell(notice))
    units = await ensure_funds(node.settlement, node.network, agent.address)
    say(ready=agent.address, units=units)


def tell(notice: Notice) -> None:
    state = str(notice.thread.state) if notice.thread is not None else ""
    say(notice=notice.kind, deal=notice.deal, state=state, detail=notice.detail)


async def buy(orders: dict[str, Any]) -> None:
    agent = Agent(orders["name"], budget=orders.get("budget"))
    async with open_node(
        network=load_network(Path(orders["network"])),
        state=Path(orders["state"]),
        margins=MARGINS,
    ) as node:
        await settle_in(node, agent)
        if "calls" in orders:
            (wish,) = orders["wishes"]
            seller = await buy_one(agent, dict(wish))
            await Caller(agent, wish, seller).call_all(orders["calls"])
        else:
            async with anyio.create_task_group() as group:
                for wish in orders["wishes"]:
                    group.start_soon(buy_one, agent, dict(wish))
        with anyio.move_on_after(REST_MAX_S):
            while not at_rest(agent):  # noqa: ASYNC110
                await anyio.sleep(0.05)
        say(rested=True, spent_units=agent.purse.balance.spent_units)


def at_rest(agent: Agent) -> bool:
    """Return whether nothing is open any more, what an earlier life asked for included.

    Rates that it accepted may be agreed only now: nobody wants them any more.
    """
    assert agent.seat is not None
    assert agent.buying is not None
    for contract in agent.seat.desk.contracts():
        agent._stop(contract.deal)
    asks = agent.buying.asks.values()
    return not agent.seat.desk.threads and not any(ask.state == "open" for ask in asks)


class Caller:
    """Calls for work under rates, with the seller of a purchase, until all of it is there."""

    def __init__(self, agent: Agent, wish: dict[str, Any], seller: AgentId) -> None:
        self.agent, self.ware, self.seller = agent, wish["ware"], seller
        self.limits = {"input_max": wish["input_max"], "output_max": wish["output_max"]}
        self.rates: Thread | None = None
        self.agreeing = anyio.Lock()

    async def call_all(self, texts: list[str]) -> None:
        """Call for all at once; what comes to nothing is called for again."""
        async with anyio.create_task_group() as group:
            for text in texts:
                group.start_soon(self._call, text)
        if self.rates is not None:
            self.agent._stop(self.rates.deal)

    async def _call(self, text: str) -> None:
        for _ in range(CALLS_MAX):
            rates = await self._agreed()
            try:
                bought = await self.agent.call(rates, Ping(text=text), returns=Pong, **self.limits)
            except CoaseError as error:
                say(refused=text, why=str(error))
                if self.rates is rates:
                    self.rates = None
                    self.agent._stop(rates.deal)
                continue
            say(called=text, text=bought.result.text, deal=bought.deal, units=bought.paid_units)
            return
        say(failed=text, why="called too often")

    async def _agreed(self) -> Thread:
        async with self.agreeing:
            while self.rates is None:
                try:
                    self.rates = await self.agent.agree(
                        self.ware,
                        Ping,
                        Pong,
                        most_units=CALL_MOST_UNITS,
                        deliver_within=25,
                        sellers=[self.seller],
                        **self.limits,
                    )
                except CoaseError as error:
                    say(disagreed=self.ware, why=str(error))
            return self.rates


async def buy_one(agent: Agent, wish: dict[str, Any]) -> AgentId:
    """Buy one piece of work, tell of it, and return who sold it."""
    key, ware, text = wish["key"], wish.pop("ware"), wish.pop("text")
    try:
        bought = await agent.purchase(ware, Ping(text=text), returns=Pong, **wish)
    except CoaseError as error:
        say(failed=key, why=str(error))
        return ""
    say(
        bought=key,
        text=bought.result.text,
        deal=bought.deal,
        request=bought.request,
        seller=bought.seller,
        paid_units=bought.paid_units,
    )
    return bought.seller


def work(orders: dict[str, Any]) -> int:
    """Carry out the orders in this process and return its exit code, as the command line would."""
    role = {"sell": sell, "buy": buy}[orders["role"]]
    try:
        perform(lambda: role(orders))
    except typer.Exit as ended:
        return ended.exit_code
    return 0


# ---- The process that forks ------------------------------------------------------------------


def fork(orders: dict[str, Any]) -> int:
    sys.stdout.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(os.open(orders["log"] + ".out", flags, 0o600), 1)
        os.dup2(os.open(orders["log"] + ".err", flags, 0o600), 2)
        os.closerange(3, 64)
        level = getattr(logging, orders.get("level", "ERROR"))
        logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s", force=True)
        faulthandler.register(signal.SIGUSR1)  # Tells where it hangs, if it ever does.
        arm(orders.get("fate", ""))
        code = work(orders)
    finally:  # Nothing may unwind into the process that forks.
        if sys.exc_info()[0] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Fork for each line of orders; tell of each start and each end; end with standard input."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: set[int] = set()
    say(prepared=True)
    pending = b""
    while True:
        ready, _, _ = select.select([0, readable], [], [])
        if readable in ready:
            os.read(readable, 4096)
            _reap(running)
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                orders = json.loads(line)
                pid = fork(orders)
                running.add(pid)
                say(id=orders["id"], pid=pid)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _reap(running: set[int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        running.discard(pid)
        say(pid=pid, code=os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
