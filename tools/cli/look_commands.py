"""``coase status``, ``replay`` and ``doctor``: to look at the market, a deal, this machine."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from .app import EXIT_FAILED, Json, app, emit, out, perform, printable, raise_user, show_json

if TYPE_CHECKING:
    from coase.agents.config import Network
    from coase.protocol.messages import Description

    from .journals import Row

DECIMALS: Final = 6
DEALS_SHOWN: Final = 20
ID_SHOWN: Final = 8
ADDRESS_SHOWN: Final = 10
WIDE: Final = 100  # Columns from which on there is room for what a seller says of itself.


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
        f"network [b]{network['net']}[/b]: broker {network['nats']}, chain {network['chain_id']}"
        f" at {network['rpc']}, block {network['block']}",
        highlight=False,
        soft_wrap=True,
    )
    _print_sellers(document["sellers"])
    _print_deals(document["deals"])


async def _status() -> dict[str, Any]:
    from coase.agents.config import load_network

    network = load_network()
    from .journals import deals_below, node_home
    from .purchases import finish_earlier, looker

    await finish_earlier(network)
    async with looker(network) as (node, agent):
        head = await node.settlement.head()
        found = await node.discover(agent)
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
            "arbiters": list(network.arbiters),
        },
        "sellers": _sellers(network, found),
        "deals": deals_below(node_home(network)),
    }


def _sellers(network: Network, found: list[tuple[str, Description]]) -> list[dict[str, str]]:
    return [
        {
            "agent": description.agent,
            "address": sender,
            "capability": description.capability,
            "price": description.price,
            "about": description.about,
        }
        for sender, description in sorted(found, key=lambda item: (item[1].capability, item[0]))
        if sender not in network.arbiters
    ]


def _print_sellers(sellers: list[dict[str, str]]) -> None:
    from .journals import short_name

    if not sellers:
        out.print("nobody sells anything yet: coase agent run FILE", soft_wrap=True)
        return
    shown = table("who sells what", "sells", "price", "agent", "address")
    wide = out.width >= WIDE
    if wide:
        shown.add_column("about", no_wrap=True, overflow="ellipsis")
    ids = {seller["capability"] for seller in sellers}
    for seller in sellers:
        name = short_name(seller["capability"])
        alone = sum(1 for other in ids if short_name(other) == name) == 1
        cells = [
            name if alone else seller["capability"],
            seller["price"],
            seller["agent"],
            seller["address"][:ADDRESS_SHOWN],
        ]
        # What strangers say of themselves is text, and never markup.
        shown.add_row(*map(clean, cells + ([seller["about"]] if wide else [])))
    out.print(shown)


def clean(text: str) -> Text:
    """Return what somebody else wrote, as text and never markup."""
    return Text("".join(c if c.isprintable() else "?" for c in text))


def table(title: str, *columns: str) -> Table:
    """Return a table in the one style that all commands have."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        made.add_column(column, no_wrap=True, overflow="ellipsis")
    return made


_table = table


def _print_deals(deals: list[Row]) -> None:
    from coase.protocol.types import units_to_text

    from .journals import short_name

    bound = [deal for deal in deals if deal["job_id"]]
    if not bound:
        out.print("no deals of yours yet", soft_wrap=True)
        return
    shown = table("your deals, newest last", "deal", "as", "with", "what")
    for column in ("agreed", "paid"):
        shown.add_column(column, justify="right", no_wrap=True)
    shown.add_column("state")
    for deal in bound[-DEALS_SHOWN:]:
        shown.add_row(
            deal["deal"][:ID_SHOWN],
            deal["side"],
            deal["counterparty"][:ADDRESS_SHOWN],
            short_name(deal["capability"]),
            "" if deal.get("rates") else units_to_text(deal["price_units"], DECIMALS),
            "" if deal["open"] else units_to_text(deal["to_seller_units"], DECIMALS),
            Text(printable(_state(deal)), style="yellow" if deal["open"] else ""),
        )
    out.print(shown)
    if len(bound) > DEALS_SHOWN:
        out.print(f"and {len(bound) - DEALS_SHOWN} older ones: coase status --json")


def _state(deal: Row) -> str:
    state, how = str(deal["state"]), str(deal["how"]).replace("_", " ")
    if deal.get("rates"):  # By itself it costs nothing; what was called for has rows of its own.
        from coase.protocol.types import units_to_text

        most = units_to_text(deal["price_units"], DECIMALS)
        return f"rates for calls up to {most}" if deal["open"] else f"rates, over: {deal['why']}"
    if deal["open"]:
        return f"{state}, open"
    if how in ("open", state):
        why = str(deal["why"])
        return f"{state}: {why}" if why and why != state else state
    return f"{state}: {how}"


@app.command()
def replay(
    deal: Annotated[str, typer.Argument(help="The beginning of a deal's id; none lists all.")] = "",
    journal: Annotated[
        Path | None, typer.Option(help="A journal.sqlite; all of this user without.")
    ] = None,
    json_: Json = False,
) -> None:
    """Show how a deal went, step by step, out of the journal.

    Needs no network, and shows deals that are still open too.

    Example: [b]coase replay 8fe282[/b]
    """
    if journal is not None and not journal.is_file():
        raise_user(f"{journal} does not exist; name the journal.sqlite of a node")
    if deal and not set(deal) <= set("0123456789abcdef"):
        raise_user(f"{deal!r} begins no deal's id: they are hex; see them with: coase replay")

    async def work() -> list[Row]:
        return _find(journal)

    rows = [row for row in perform(work) if str(row["deal"]).startswith(deal)]
    if deal and not rows:
        raise_user(f"no deal begins with {deal!r}; see them with: coase replay")
    if json_:
        emit(rows)
        return
    if not deal:
        _print_deals(rows)
        return
    for row in rows:
        _print_history(row)


def _find(journal: Path | None) -> list[Row]:
    from coase.agents.backends.sqlite import read_summaries
    from coase.agents.config import state_home

    from .journals import deals_below, deals_in

    if journal is None:
        return deals_below(state_home())
    read_summaries(journal)  # Raises if it is no journal; below a home such files are passed over.
    return deals_in(journal)


def _print_history(row: Row) -> None:
    from coase.protocol.types import units_to_text

    from .journals import short_name

    out.print(
        f"[b]{row['deal']}[/b]\n{row['side']} {row['agent']} in {row['node']},"
        f" with {row['counterparty']}: {short_name(row['capability'])}",
        highlight=False,
        soft_wrap=True,
    )
    if row.get("contract"):
        out.print(f"called for under the rates of {row['contract']}", highlight=False)
    shown = table("", "time", "after", "who", "did what", "then")
    shown.add_column("price", justify="right", no_wrap=True)
    shown.add_column("transaction", no_wrap=True)
    first = row["history"][0][0] if row["history"] else 0
    for at_ms, state, role, move, price, tx in row["history"]:
        when = datetime.fromtimestamp(at_ms / 1000, tz=UTC).astimezone()
        shown.add_row(
            when.strftime("%H:%M:%S"),
            f"{(at_ms - first) / 1000:.2f} s",
            role,
            move,
            state,
            units_to_text(price, DECIMALS) if price else "",
            tx[:14],
        )
    out.print(shown)
    if row.get("rates"):
        line = f"{_state(row)}; nothing is owed for them, and what was called for is paid by itself"
    elif row["open"]:
        from coase.protocol.states import State, silence_of

        silence = silence_of(State(row["state"]), row.get("method", "escrow"))
        line = f"still open: if the {silence.who} stays silent, {silence.outcome}"
    else:
        line = (
            f"{_state(row)}: seller got {units_to_text(row['to_seller_units'], DECIMALS)},"
            f" buyer {units_to_text(row['to_buyer_units'], DECIMALS)} back"
        )
    out.print(line, highlight=False, soft_wrap=True, markup=False)
    if row["result"]:
        out.print("result:", highlight=False)
        _print_result(row["result"])


def _print_result(result: str) -> None:
    try:
        made = json.loads(result)
    except (ValueError, RecursionError):
        made = None
    if isinstance(made, dict | list):
        show_json(made)
    else:
        out.print(result, highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor(json_: Json = False) -> None:
    """Say what is here, what is missing and how to get it.

    Example: [b]coase doctor[/b]
    """
    findings = perform(_diagnose)
    if json_:
        emit(findings)
    else:
        marks = {"ok": "[green]ok  [/]", "note": "[yellow]note[/]", "bad": "[red]bad [/]"}
        for finding in findings:
            out.print(marks[finding["level"]], end=" ")
            text = f"{finding['what']}: {finding['text']}"
            out.print(text, highlight=False, soft_wrap=True, markup=False)
    if any(finding["level"] == "bad" for finding in findings):
        raise typer.Exit(EXIT_FAILED)


async def _diagnose() -> list[dict[str, str]]:
    from coase.agents.config import network_path

    from .checkup import examine_machine, examine_network
    from .lan_checkup import examine_lan

    findings = examine_machine()
    findings += await examine_network(network_path())
    findings += await examine_lan()
    return [finding.to_json() for finding in findings]
