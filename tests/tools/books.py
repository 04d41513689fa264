"""A market whose books are checked as its user would, and hands that reach into its journals."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from anyio.from_thread import start_blocking_portal

from coase.agents.wiring import view_settlement
from tests.agents.realmarket import RealMarket, real_market
from tests.tools.commands import Home

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from anyio.from_thread import BlockingPortal

    from coase.agents.audit import Report
    from coase.agents.node import Node
    from coase.escrow.backends.evm.settlement import EvmSettlement


@dataclass(slots=True)
class World:
    """A market in a thread of its own, and the user to whom its nodes belong."""

    home: Home
    market: RealMarket
    portal: BlockingPortal
    settlement: EvmSettlement
    addresses: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def node(self, name: str) -> Iterator[Node]:
        """Run a node on its directory."""
        with self.portal.wrap_async_context_manager(self.market.node(name)) as node:
            yield node

    def keys(self) -> dict[str, Any]:
        """Return what the wallet shows, by the names of the keys."""
        return {key["name"] or key["address"]: key for key in self.home.json("wallet")["keys"]}


AnyWorld = TypeVar("AnyWorld", bound=World)


@contextmanager
def open_world(
    kind: type[AnyWorld],
    path: Path,
    deals: Callable[[RealMarket, Node], Awaitable[dict[str, str]]],
) -> Iterator[AnyWorld]:
    """Yield a world after ``deals`` between the agents of one node, which returns who they are."""
    home = Home(path)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(real_market(home.path)) as market,
    ):
        settlement = portal.call(view_settlement, market.network)
        world = kind(home, market, portal, settlement)
        with world.node("swarm") as node:
            world.addresses = portal.call(deals, market, node)
        yield world
        portal.call(settlement.close)


def copied(world: World, tmp_path: Path) -> Path:
    """Return a copy of the node's directory, for a hand to reach into."""
    path = tmp_path / "swarm"
    shutil.copytree(world.market.place("swarm"), path)
    return path


def alter(place: Path, *statements: str) -> None:
    """Change the journal of a node; each statement must find something."""
    connection = sqlite3.connect(place / "journal.sqlite")
    for statement in statements:
        assert connection.execute(statement).rowcount
    connection.commit()
    connection.close()


def with_field(column: str, path: str, value: str) -> str:
    """SQL for what a column has with one field changed."""
    return f"CAST(json_set(CAST({column} AS TEXT), '$.{path}', {value}) AS BLOB)"


def without_deal(deal: str) -> list[str]:
    """SQL that takes a deal that is over out of a journal."""
    return [
        f"DELETE FROM records WHERE deal = {deal}",  # noqa: S608
        f"DELETE FROM closed WHERE deal = {deal}",  # noqa: S608
    ]


def lines(report: Report) -> list[str]:
    """Return the differences as one reads them."""
    return [f"{found.where}: {found.what}" for found in report.differences]
