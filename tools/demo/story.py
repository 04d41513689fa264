"""The plot: set the stage, let the agents trade, wait until all money has come to rest."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import anyio

from coase.agents.agent import Agent
from coase.agents.backends.sqlite import SqliteJournal
from coase.agents.beside import open_beside
from coase.agents.compute.ports import Compute
from coase.agents.local import local_market
from coase.agents.node import Node, SystemChance, running
from coase.agents.ports import Chance, SeededChance
from coase.agents.purchasing import Purchase
from coase.agents.steps import Notice
from coase.agents.wiring import open_settlement, open_transport
from coase.escrow.backends.evm.deploy import give
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.protocol.errors import ConfigurationError, DealFailed
from coase.protocol.identity import Identity, keccak256
from coase.protocol.types import AgentId
from coase.tools.cli.scratch import scratch

from .cast import LEAD_QUALITY_MIN, MARGINS, Digest, DigestText, Document, cast

log = logging.getLogger(__name__)

FUNDS_UNITS: Final = 5_000_000
REST_MAX_S: Final = 60.0  # Windows of the demonstration add up to about forty seconds.
DOCUMENT_SIZE_MAX_BYTES: Final = 100_000
DOCUMENTS_MAX: Final = 12
READER: Final = "reader"

OnNotice = Callable[[str, Notice], None]
OnProgress = Callable[[str], None]
OnNames = Callable[[dict[AgentId, str]], None]


@dataclass(slots=True)
class Outcome:
    """What the demonstration leaves behind, for the report."""

    started_s: float
    names: dict[AgentId, str]
    before: dict[str, int]
    after: dict[str, int]
    held_units: int
    owed_units: int
    streamed_units: int
    """What is in payment channels."""
    supply_units: int
    bank_units: int
    """What is with the account that minted all and fed the agents."""
    purchases: list[Purchase[DigestText]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    summaries: list[tuple[AgentId, str, bytes]] = field(default_factory=list)
    asked: int = 0
    gas: dict[str, int] = field(default_factory=dict)
    chain_id: int = 0
    wall_s: float = 0.0


def shipped_documents() -> list[Document]:
    """Return the texts that come with the project."""
    from importlib.resources import files

    folder = files("coase.examples").joinpath("texts")
    found = sorted((item for item in folder.iterdir()), key=lambda item: item.name)
    return [_document(item.name, item.read_text()) for item in found if item.name.endswith(".txt")]


def documents_at(path: Path) -> list[Document]:
    """Return the documents of the user: a file, or a folder of .txt and .md files.

    :raises ConfigurationError: if there is nothing to read; says what is wrong
    """
    if not path.exists():
        raise ConfigurationError(f"{path} does not exist; name a text file or a folder of them")
    names = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [name for name in names if name.is_file() and (name == path or name.suffix in _TEXT)]
    out = []
    for name in files[:DOCUMENTS_MAX]:
        if name.stat().st_size > DOCUMENT_SIZE_MAX_BYTES:
            raise ConfigurationError(
                f"{name} has over {DOCUMENT_SIZE_MAX_BYTES} bytes; give a shorter text"
            )
        try:
            text = name.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ConfigurationError(
                f"{name} is no UTF-8 text; convert it, for example with iconv -t UTF-8"
            ) from None
        except OSError as error:
            raise ConfigurationError(f"{name} cannot be read: {error.strerror}") from None
        if "\0" in text:
            raise ConfigurationError(f"{name} is no text: it holds NUL bytes")
        if text.strip():
            out.append(_document(name.name, text))
    if not out:
        raise ConfigurationError(f"{path} holds no text; name a .txt or .md file, or a folder")
    return out


_TEXT: Final = (".txt", ".md")


def _document(name: str, text: str) -> Document:
    first, _, rest = text.strip().partition("\n")
    if rest.strip() and len(first) < 120:
        return Document(first.strip("# ").strip(), rest.strip())
    return Document(name, text.strip())


@asynccontextmanager
async def stage(
    state: Path, seed: bytes | None, compute: Compute
) -> AsyncIterator[tuple[Node, EvmSettlement, Path]]:
    """Yield a node on a market of its own, with an arbiter. Leaves nothing running."""
    chance: Callable[[str], Chance] = lambda name: SystemChance()  # noqa: E731
    root = SystemChance().take(32)
    if seed is not None:
        root = keccak256(b"coase/demo/v1\0" + seed)
        chance = lambda name: SeededChance(root + name.encode())  # noqa: E731
    identity = Identity(root)
    arbiter = identity.derive("arbiter")
    async with local_market(state, net="demo", arbiter=arbiter, keep=False) as network:
        path = state / "journal.sqlite"
        journal = SqliteJournal(path)
        transport = await open_transport(network, name="coase-demo")
        settlement = await open_settlement(network, journal)
        try:
            node = Node(
                network,
                transport,
                settlement,
                journal,
                seed=identity,
                compute=compute,
                chance=chance,
                margins=MARGINS,
                beside=await open_beside(network, settlement),
            )
            async with running(node):
                await node.add_arbiter(arbiter)
                yield node, settlement, path
        finally:
            with anyio.CancelScope(shield=True):
                await settlement.close()
                await transport.close()
                await journal.close()


async def play(
    documents: list[Document],
    compute: Compute,
    *,
    seed: bytes | None,
    on_notice: OnNotice,
    on_progress: OnProgress,
    on_names: OnNames,
) -> Outcome:
    """Run the whole demonstration and return what it left behind."""
    started_s = time.monotonic()
    with scratch("coase-demo-") as state:
        on_progress("starting a broker and a chain, deploying the contracts")
        async with stage(state, seed, compute) as (node, settlement, _):
            reader, sellers = Agent(READER, by_rounds=True), cast(documents)
            for agent in (*sellers, reader):
                await node.add(agent)
            names = {agent.address: agent.name for agent in node.agents}
            names[node.network.arbiters[0]] = "arbiter"
            on_names(names)
            on_progress(f"funding {len(names)} agents")
            await _fund(settlement, list(names))
            before = await _balances(settlement, names)
            node.runtime.observers.append(
                lambda who, notice: on_notice(names.get(who, who), notice)
            )
            on_progress(f"{READER} wants {len(documents)} documents digested")
            outcome = Outcome(started_s, names, before, {}, 0, 0, 0, 0, 0)
            await _trade(reader, documents, outcome)
            on_progress("waiting until all money has come to rest")
            with anyio.move_on_after(REST_MAX_S):
                await node.at_rest()
            if node.collector is not None:
                on_progress("claiming what vouchers have paid, giving back the rest")
                await node.collector.wind_up()
            await _count(node, settlement, outcome)
            outcome.wall_s = time.monotonic() - started_s
            return outcome


async def _fund(settlement: EvmSettlement, addresses: list[AgentId]) -> None:
    async with anyio.create_task_group() as group:
        for address in addresses:

            async def one(address: AgentId = address) -> None:
                token = settlement.asset.token
                await give(settlement.chain, address, token=token, units=FUNDS_UNITS)

            group.start_soon(one)


async def _balances(settlement: EvmSettlement, names: dict[AgentId, str]) -> dict[str, int]:
    return {name: await settlement.balance(address) for address, name in names.items()}


async def _trade(reader: Agent, documents: list[Document], outcome: Outcome) -> None:
    async def one(number: int, document: Document) -> None:
        try:
            bought = await reader.purchase(
                "digest",
                Digest(title=document.title, text=document.text, number=number),
                returns=DigestText,
                max_price="0.1",
                deliver_within=90,
                # The first document is for print, and only the better editor will do.
                quality_min=0 if number else LEAD_QUALITY_MIN,
                decide_after_ms=1_000,
                strategy="boulware",
                rounds=4,
                features={"characters": len(document.text)},
                tries=2,
                key=f"document {number}",
            )
            outcome.purchases.append(bought)
        except DealFailed as error:
            outcome.failures.append(f"{document.title}: {error}")

    async with anyio.create_task_group() as group:
        for number, document in enumerate(documents):
            group.start_soon(one, number, document)


async def _count(node: Node, settlement: EvmSettlement, outcome: Outcome) -> None:
    outcome.after = await _balances(settlement, outcome.names)
    outcome.held_units = await settlement.held()
    if node.channels is not None:
        outcome.streamed_units = await node.channels.held()
    for address in outcome.names:
        outcome.owed_units += await settlement.owed(address)
    outcome.supply_units = await settlement.supply()
    outcome.bank_units = await settlement.balance(node.network.bank)
    outcome.chain_id = settlement.domain.chain_id
    journal = node.journal
    await journal.durable(journal.append(()))
    outcome.summaries = journal.summaries()
    outcome.asked = sum(len(agent.buying.asks) for agent in node.agents if agent.buying)
