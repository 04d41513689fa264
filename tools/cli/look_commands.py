"""``coase status``, ``replay`` and ``doctor``: to look at the market, a deal, this machine."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import anyio
import typer
from rich.table import Table

from coase.agents.agent import Agent
from coase.agents.backends.sqlite import read_summaries
from coase.agents.config import load_network, network_path, state_home
from coase.agents.node import open_node
from coase.protocol.errors import ConfigurationError
from coase.protocol.types import units_to_text

from .agent_command import raise_user
from .app import EXIT_FAILED, Json, app, emit, out, perform
from .buy_commands import free_slot, node_home

DECIMALS: Final = 6
DEALS_SHOWN: Final = 20


@app.command()
def status(json_: Json = False) -> None:
    """Show the network, who sells what, and your own deals.

    Example: [b]coase status --json[/b]
    """
    document = perform(_status)
    if json_:
        emit(document)
        return
    network = document["network"]
    out.print(
        f"network [b]{network['net']}[/b]: broker {network['nats']}, chain {network['chain_id']} at"
        f" {network['rpc']} (block {network['block']})",
        highlight=False,
    )
    table = Table("agent", "address", "sells", "price", "about", title="who sells what")
    for seller in document["sellers"]:
        table.add_row(
            seller["agent"],
            seller["address"][:12] + "…",
            seller["capability"],
            seller["price"],
            seller["about"],
        )
    out.print(table if document["sellers"] else "nobody sells anything yet: coase agent run FILE")
    _print_deals(document["deals"])


async def _status() -> dict[str, Any]:
    network = load_network()
    shopper = Agent("shopper")
    async with open_node(network=network, state=free_slot(network)) as node:
        await node.add(shopper)
        head = await node.settlement.head()
        found = await node.discover(shopper)
        held = await node.settlement.held()
    return {
        "network": {
            "net": network.net,
            "nats": network.nats.url,
            "rpc": network.rpc,
            "chain_id": network.chain_id,
            "block": head.number,
            "escrow": network.escrow,
            "escrow_holds_units": str(held),
            "token": network.token,
        },
        "sellers": [
            {
                "agent": description.agent,
                "address": sender,
                "capability": description.capability,
                "price": description.price,
                "about": description.about,
            }
            for sender, description in found
        ],
        "deals": _deals(node_home(network)),
    }


def _deals(home: Path) -> list[dict[str, Any]]:
    """Return the closed deals of all nodes below ``home``, oldest first."""
    rows: list[dict[str, Any]] = []
    for path in sorted(home.rglob("journal.sqlite")):
        try:
            rows += [{**row, "journal": str(path)} for row in read_summaries(path)]
        except ConfigurationError:
            continue  # One that is being made has no tables yet.
    return sorted(rows, key=lambda row: row["history"][-1][0] if row["history"] else 0)


def _print_deals(deals: list[dict[str, Any]]) -> None:
    bound = [deal for deal in deals if deal["job_id"]]
    if not bound:
        out.print("no deals of yours have ended yet")
        return
    table = Table("deal", "side", "with", "capability", title="your deals, newest last")
    for column in ("price", "paid"):
        table.add_column(column, justify="right")
    table.add_column("ended")
    for deal in bound[-DEALS_SHOWN:]:
        table.add_row(
            deal["deal"][:12],
            deal["side"],
            deal["counterparty"][:12] + "…",
            deal["capability"],
            units_to_text(deal["price_units"], DECIMALS),
            units_to_text(deal["to_seller_units"], DECIMALS),
            f"{deal['state']} ({deal['why']})",
        )
    out.print(table)


@app.command()
def replay(
    deal: Annotated[str, typer.Argument(help="The beginning of a deal's id; none lists all.")] = "",
    journal: Annotated[
        Path | None, typer.Option(help="A journal.sqlite; all of this user without.")
    ] = None,
    json_: Json = False,
) -> None:
    """Show how a deal went, step by step, out of the journal.

    Example: [b]coase replay 8fe282[/b]
    """
    if journal is not None and not journal.is_file():
        raise_user(f"{journal} does not exist; name the journal.sqlite of a node")
    home = journal.parent if journal is not None else state_home()
    rows = [row for row in _deals(home) if str(row["deal"]).startswith(deal)]
    if deal and not rows:
        raise_user(f"no deal that has ended begins with {deal!r}; see them with: coase replay")
    if not deal:
        emit(rows) if json_ else _print_deals(rows)
        return
    if json_:
        emit(rows)
        return
    for row in rows:
        _print_history(row)


def _print_history(row: dict[str, Any]) -> None:
    out.print(
        f"[b]{row['deal']}[/b] as the {row['side']}, with {row['counterparty']}:"
        f" {row['capability']}",
        highlight=False,
    )
    table = Table("time", "after", "who", "did what", "state")
    table.add_column("price", justify="right")
    table.add_column("transaction")
    first = row["history"][0][0] if row["history"] else 0
    for at_ms, state, role, move, price, tx in row["history"]:
        when = datetime.fromtimestamp(at_ms / 1000, tz=UTC)
        table.add_row(
            when.strftime("%H:%M:%S"),
            f"{(at_ms - first) / 1000:.2f} s",
            role,
            move,
            state,
            units_to_text(price, DECIMALS) if price else "",
            tx[:14],
        )
    out.print(table)
    out.print(
        f"ended {row['state']} ({row['why']}): seller got"
        f" {units_to_text(row['to_seller_units'], DECIMALS)}, buyer"
        f" {units_to_text(row['to_buyer_units'], DECIMALS)} back",
        highlight=False,
    )


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what is here, what is missing and how to get it.

    Example: [b]coase doctor[/b]
    """
    findings = anyio.run(_diagnose)
    if json_:
        emit(findings)
    else:
        for finding in findings:
            mark = {"ok": "[green]✓[/]", "note": "[yellow]·[/]", "bad": "[red]✗[/]"}
            out.print(
                f"{mark[finding['level']]} {finding['what']}: {finding['text']}",
                highlight=False,
                soft_wrap=True,
            )
    if any(finding["level"] == "bad" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


async def _diagnose() -> list[dict[str, str]]:
    from .checkup import examine_machine, examine_network

    findings = examine_machine()
    findings += await examine_network(network_path())
    return [finding.to_json() for finding in findings]
