"""``coase gateway keys``: who may ask, and for how much."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from coase.protocol.errors import ConfigurationError

from .app import Json, emit, out, perform, say

if TYPE_CHECKING:
    from coase.agents.config import Network
    from coase.agents.purse import Purse
    from coase.tools.gateway.keys import ApiKey

NAME: Final = "gateway"
"""Of the agent that buys for a gateway, and of the gateway's own directory."""
NONE: Final = "none"

keys = typer.Typer(help="API keys, each with a budget of its own.", no_args_is_help=True)

KeyName = Annotated[str, typer.Argument(help="Whose key it is.")]
Limit = Annotated[str, typer.Option(help="An amount, or none for no limit.")]
GatewayState = Annotated[
    Path | None, typer.Option(help="The gateway's --state; the user's own without.")
]


def directory_of(state: Path | None) -> Path:
    """Return where a gateway keeps its keys and what was used."""
    from coase.agents.config import state_home

    return state or state_home() / NAME


@keys.command("add")
def add(
    name: KeyName,
    budget: Limit = "",
    per_deal: Limit = "",
    per_hour: Limit = "",
    per_day: Limit = "",
    state: GatewayState = None,
    json_: Json = False,
) -> None:
    """Make a key and show it, this once; only its hash is kept.

    What its answers cost counts against its limits, and against the gateway's. As soon as there is
    a key, nobody is answered without one, by a gateway that runs already too.

    Example: [b]coase gateway keys add alice --budget 1.50 --per-day 0.25[/b]
    """

    async def work() -> str:
        from coase.agents.purse import Budget
        from coase.tools.gateway.keys import KeyFile

        limits = _limits(budget, per_deal, per_hour, per_day)
        return KeyFile(directory_of(state)).add(name, Budget(**limits))

    key = perform(work)
    if json_:
        emit({"name": name, "key": key})
        return
    out.print(key, highlight=False, soft_wrap=True, markup=False)
    say(f"the key of {name}; keep it, it is shown this once")
    if not any((budget, per_deal, per_hour, per_day)):
        say("it has no limit of its own: it can spend what the gateway can", style="yellow")


@keys.command("change")
def change(
    name: KeyName,
    budget: Limit = "",
    per_deal: Limit = "",
    per_hour: Limit = "",
    per_day: Limit = "",
    state: GatewayState = None,
) -> None:
    """Set other limits of a key; what it spent so far counts against them.

    Example: [b]coase gateway keys change alice --budget 3 --per-day none[/b]
    """

    async def work() -> None:
        from coase.tools.gateway.keys import KeyFile

        limits = _limits(budget, per_deal, per_hour, per_day)
        if not limits:
            raise ConfigurationError("say which limit: --budget, --per-deal, --per-hour, --per-day")
        KeyFile(directory_of(state)).change(name, limits)

    perform(work)
    say("it counts from the next request on, also where the gateway runs")


@keys.command("remove")
def remove(name: KeyName, state: GatewayState = None) -> None:
    """Take a key back: from the next request on nobody is let in with it.

    Whoever gets a new key of the same name goes on with the account of the old one.

    Example: [b]coase gateway keys remove alice[/b]
    """

    async def work() -> None:
        from coase.tools.gateway.keys import KeyFile

        KeyFile(directory_of(state)).remove(name)

    perform(work)


@keys.command("list")
def list_keys(state: GatewayState = None, json_: Json = False) -> None:
    """Show the keys: how each begins, what it may spend, and what is left of that."""

    async def work() -> list[dict[str, Any]]:
        return _rows(state)

    rows = perform(work)
    if json_:
        emit(rows)
        return
    if not rows:
        out.print("no keys: make one with  coase gateway keys add NAME --budget 1", soft_wrap=True)
        return
    _print(rows)


def _limits(budget: str, per_deal: str, per_hour: str, per_day: str) -> dict[str, str | None]:
    """Return the limits that were said, each an amount of the network's money if there is one."""
    from coase.agents.config import load_network
    from coase.agents.purse import Budget

    said = {"total": budget, "per_deal": per_deal, "per_hour": per_hour, "per_day": per_day}
    limits = {name: None if text == NONE else text for name, text in said.items() if text}
    checked = Budget(**limits)
    try:
        asset = load_network().asset
    except ConfigurationError:
        return limits  # No network yet: the gateway looks again when it joins one.
    checked.limits(asset)
    return limits


def _rows(state: Path | None) -> list[dict[str, Any]]:
    from coase.tools.gateway.keys import KeyFile

    found = KeyFile(directory_of(state)).read()
    purse, network = _purse(state)
    return [_row(key, purse, network) for key in found.values()]


def _purse(state: Path | None) -> tuple[Purse | None, Network | None]:
    """Return the purse of the gateway's agent as its journal tells it; none without a network."""
    from coase.agents.config import load_network
    from coase.agents.purse import Budget, Purse
    from coase.agents.wallet import read_places

    from .journals import node_home

    try:
        network = load_network()
    except ConfigurationError:
        return None, None
    purse = Purse(Budget(), network.asset, name=NAME)
    for place in read_places([state or node_home(network) / NAME]):
        if place.journal is not None:
            purse.recall(place.journal.threads, [closed.row for closed in place.journal.closed])
    return purse, network


def _row(key: ApiKey, purse: Purse | None, network: Network | None) -> dict[str, Any]:
    from coase.agents.limits import LIMITS

    row: dict[str, Any] = {
        "name": key.name,
        "begins": key.begins,
        "made": datetime.fromtimestamp(key.made_s, tz=UTC).isoformat().replace("+00:00", "Z"),
        "limits": {name: {"limit": text} for name in LIMITS if (text := getattr(key.budget, name))},
    }
    if purse is None or network is None:
        return row
    from coase.protocol.types import units_to_text

    purse.set_account(key.name, key.budget)
    rooms = purse.rooms("", now_ms=time.time_ns() // 1_000_000, account=key.name)
    for name, told in row["limits"].items():
        words = "in all" if name == "total" else name.replace("_", " ")
        left = max(0, rooms[f"account {key.name}: {words}"])
        told["left"] = units_to_text(left, network.decimals)
    promised = purse.held_by(key.name)
    spent = purse.used_by(key.name) - promised
    row["spent"] = units_to_text(spent, network.decimals)
    row["promised"] = units_to_text(promised, network.decimals)
    row["symbol"] = network.symbol
    return row


def _print(rows: list[dict[str, Any]]) -> None:
    from .look_commands import table

    shown = table("API keys of the gateway", "name", "begins", "limit")
    for column in ("of", "left", "spent"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        spent = row.get("spent", "")
        if not row["limits"]:
            shown.add_row(row["name"], f"{row['begins']}…", "none", "", "", spent)
        for limit, told in row["limits"].items():
            words = "in all" if limit == "total" else limit.replace("_", " ")
            name, begins = row["name"], f"{row['begins']}…"
            shown.add_row(name, begins, words, told["limit"], told.get("left", ""), spent)
    out.print(shown)
