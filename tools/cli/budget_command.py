"""``coase budget``: what agents may spend, what is left of it, and the owner's word on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from coase.protocol.errors import ConfigurationError

from .app import Json, app, emit, out, perform, say
from .wallet_commands import State, places_of

if TYPE_CHECKING:
    from coase.agents.config import Network
    from coase.agents.limits import Budgets
    from coase.agents.purse import Budget
    from coase.agents.wallet import Place

NONE: Final = "none"
DECLARED: Final = "declared"
_SAY: Final = "An amount, none for no limit, declared for what the program says."

Limit = Annotated[str, typer.Option(help=_SAY)]


@app.command()
def budget(
    name: Annotated[str, typer.Argument(help="An agent; all without.")] = "",
    swarm: Annotated[
        bool, typer.Option("--swarm", help="What all agents of its node share.")
    ] = False,
    total: Limit = "",
    per_deal: Limit = "",
    per_counterparty: Limit = "",
    per_hour: Limit = "",
    per_day: Limit = "",
    state: State = None,
    json_: Json = False,
) -> None:
    """Show what agents may spend and what is left of it; with a limit, change it.

    A change counts from the next purchase on, also where the agent runs. Whatever a model decides,
    the key signs no more than this.

    Example: [b]coase budget oracle --per-day 2.5 --per-deal 0.1[/b]
    """
    asked = {
        "total": total,
        "per_deal": per_deal,
        "per_counterparty": per_counterparty,
        "per_hour": per_hour,
        "per_day": per_day,
    }
    change = {limit: text for limit, text in asked.items() if text}

    async def work() -> list[dict[str, Any]]:
        return _budget(name, state, change, swarm=swarm)

    rows = perform(work)
    if json_:
        emit(rows)
        return
    if not rows:
        out.print("no agents yet: run one, or coase keys new NAME", soft_wrap=True)
        return
    _print(rows)


def _budget(
    name: str, state: Path | None, change: dict[str, str], *, swarm: bool
) -> list[dict[str, Any]]:
    from coase.agents.config import load_network
    from coase.agents.wallet import read_places

    network = load_network()
    places = read_places(places_of(network, state))
    if name:
        places = [place for place in places if name in place.names.values()]
        if not places:
            raise ConfigurationError(f"there is no agent {name!r}; see them with: coase budget")
    if change:
        if len(places) != 1:
            listed = ", ".join(str(place.path) for place in places) or "none"
            raise ConfigurationError(
                f"a change is for one node, and there are: {listed}; name an agent, or --state"
            )
        if not name and not swarm:
            raise ConfigurationError("a change is for one agent: name it, or say --swarm")
        _change(network, places[0].path, None if swarm else name, change)
    rows = [row for place in places for row in _rows(network, place)]
    return [row for row in rows if not name or row["agent"] == name or (swarm and not row["agent"])]


def _change(network: Network, path: Path, name: str | None, change: dict[str, str]) -> None:
    from coase.agents.limits import read_overrides, write_overrides
    from coase.agents.purse import Budget

    said = {
        limit: None if text == NONE else text for limit, text in change.items() if text != DECLARED
    }
    Budget(**said).limits(network.asset)  # Before anything is written.
    drop = {limit for limit, text in change.items() if text == DECLARED}
    write_overrides(path, read_overrides(path).changed(name, said, drop))
    say("it counts from the next purchase on, also where the agent runs")


def _rows(network: Network, place: Place) -> list[dict[str, Any]]:
    """Return the limits of a node as it would count them now, by its journal."""
    from coase.agents.limits import Budgets, read_declared

    swarm, declared = read_declared(place.path)
    budgets = Budgets(network.asset, swarm=swarm, directory=place.path)
    for told in declared:
        budgets.open(told.name, told.budget, under=told.under)
    addresses = {name: address for address, name in place.names.items()}
    for name in sorted(set(addresses) - set(budgets.purses)):
        from coase.agents.purse import Budget

        budgets.open(name, Budget())  # Made or imported, and not run yet.
    journal = place.journal
    for name, purse in budgets.purses.items() if journal is not None else ():
        assert journal is not None
        owner = addresses.get(name, "")
        rows = [closed.row for closed in journal.closed if closed.agent == owner]
        purse.recall([thread for thread in journal.threads if thread.holder == owner], rows)
    return _documents(network, place, budgets, addresses)


def _documents(
    network: Network, place: Place, budgets: Budgets, addresses: dict[str, str]
) -> list[dict[str, Any]]:
    from coase.agents.limits import SWARM
    from coase.protocol.types import units_to_text

    now_ms = time.time_ns() // 1_000_000
    swarm, agents = budgets.state()
    rooms = budgets.swarm.rooms(counterparty="", now_s=now_ms // 1_000)
    pause = budgets.swarm.pause(now_s=now_ms // 1_000)
    rows = [
        {
            "node": place.path.name,
            "agent": "",
            "address": "",
            "limits": _limits(network, swarm, rooms, SWARM),
            "paused": f"{pause.limit} is spent" if pause is not None else "",
        }
    ]
    for name, purse in budgets.purses.items():
        balance = purse.balance
        rooms = purse.rooms("", now_ms=now_ms)
        rows.append(
            {
                "node": place.path.name,
                "agent": name,
                "address": addresses.get(name, ""),
                "limits": _limits(network, agents.get(name), rooms, name),
                "spent": units_to_text(balance.spent_units, network.decimals),
                "promised": units_to_text(purse.open_units, network.decimals),
                "paused": purse.paused(now_ms=now_ms),
            }
        )
    return rows


def _limits(
    network: Network, budget: Budget | None, rooms: dict[str, int], name: str
) -> dict[str, Any]:
    """Return the limits that there are, each with what is left of it."""
    from coase.agents.limits import LIMITS
    from coase.protocol.types import units_to_text

    found: dict[str, Any] = {}
    for limit in LIMITS:
        text = getattr(budget, limit)
        if text is None:
            continue
        words = "in all" if limit == "total" else limit.replace("_", " ")
        left = max(0, rooms[f"{name}: {words}"])
        found[limit] = {"limit": text, "left": units_to_text(left, network.decimals)}
    return found


def _print(rows: list[dict[str, Any]]) -> None:
    from .look_commands import _table

    table = _table("what agents may spend", "node", "agent", "limit")
    for column in ("of", "left"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        who = row["agent"] or "(all together)"
        if not row["limits"] and row["agent"]:
            table.add_row(row["node"], who, "none", "", "")
        for limit, told in row["limits"].items():
            table.add_row(row["node"], who, limit.replace("_", " "), told["limit"], told["left"])
    out.print(table)
    for row in rows:
        if row["paused"]:
            who = row["agent"] or f"the agents of {row['node']}"
            out.print(f"paused: {who}: {row['paused']}", highlight=False, soft_wrap=True)
