"""``coase wallet`` and ``coase export``: what the keys hold, and every movement."""

from __future__ import annotations

import csv
import io
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .app import Json, app, emit, out, perform, say

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coase.agents.config import Network
    from coase.agents.ledger import Posting
    from coase.agents.wallet import ChannelPosition, Holding, Place, Position
    from coase.escrow.backends.evm.settlement import EvmSettlement

COIN_DECIMALS: Final = 18  # Of every EVM chain's own coin.
ADDRESS_WIDTH: Final = 42
WIDE: Final = 135  # From here on all columns fit.
COIN_SHOWN: Final = 8  # Characters of it in a table.

State = Annotated[
    Path | None,
    typer.Option(help="Directory of one node; without it, all of this user on the network."),
]


class Format(StrEnum):
    """In which form postings are written."""

    CSV = "csv"
    JSON = "json"


@app.command()
def wallet(state: State = None, json_: Json = False) -> None:
    """Show what each key holds: tokens, coin, and what lies in escrow, channels and vault for it.

    Works beside agents that run, and when none runs.

    Example: [b]coase wallet[/b]
    """
    document = perform(lambda: _wallet(state))
    if json_:
        emit(document)
        return
    if not document["keys"]:
        out.print("no keys yet: run an agent, or buy something with coase ask", soft_wrap=True)
        return
    _print_wallet(document)


async def _wallet(state: Path | None) -> dict[str, Any]:
    from coase.agents.config import load_network
    from coase.agents.wallet import Reach, holdings_of, read_facts, read_places

    network = load_network()
    places = read_places(places_of(network, state))
    async with viewing(network) as settlement:
        facts = await read_facts(settlement, places, reach=Reach.of(network))
    holdings = holdings_of(facts, places)
    return {
        "network": network.net,
        "chain_id": network.chain_id,
        "block": facts.head,
        "token": network.token,
        "symbol": network.symbol,
        "decimals": network.decimals,
        "keys": [_holding(network, holding) for holding in holdings],
    }


def places_of(network: Network, state: Path | None) -> list[Path]:
    """Return the directories of the nodes that are meant.

    :raises ConfigurationError: if the one that was named is none
    """
    from coase.protocol.errors import ConfigurationError

    from .journals import node_home

    if state is None:
        home = node_home(network)
        return sorted(path for path in home.glob("*") if path.is_dir())
    if not state.is_dir():
        raise ConfigurationError(f"{state} is no directory of a node")
    return [state]


@asynccontextmanager
async def viewing(network: Network) -> AsyncIterator[EvmSettlement]:
    """Yield the network's settlement, to look at."""
    from coase.agents.wiring import view_settlement

    settlement = await view_settlement(network)
    try:
        yield settlement
    finally:
        await settlement.close()


def _holding(network: Network, holding: Holding) -> dict[str, Any]:
    from coase.protocol.types import units_to_text

    amounts = {
        "balance": holding.units,
        "locked": holding.locked_units,
        "bonds": holding.bond_units,
        "channels": holding.channel_units,
        "stake": holding.stake.bonded_units if holding.stake is not None else 0,
        "claimable": holding.claimable_units,
        "owed": holding.owed_units,
    }
    return {
        "name": holding.name,
        "address": holding.owner,
        "node": holding.place.name,
        **{name: units_to_text(units, network.decimals) for name, units in amounts.items()},
        **{f"{name}_units": str(units) for name, units in amounts.items()},
        "coin": units_to_text(holding.wei, COIN_DECIMALS),
        "coin_wei": str(holding.wei),
        "positions": [
            *(_position(position) for position in holding.positions),
            *(channel_row(network, channel) for channel in holding.channels),
            *_stake_rows(holding),
        ],
    }


def _position(position: Position) -> dict[str, Any]:
    return {
        "kind": "job",
        "deal": position.deal,
        "job_id": position.job_id.hex(),
        "side": position.side,
        "counterparty": position.counterparty,
        "phase": position.phase,
        "units": str(position.units),
        "bond_units": str(position.bond_units),
        "claimable_units": str(position.claimable_units),
        "silence_at": iso(position.limit_s),
    }


def channel_row(network: Network, channel: ChannelPosition) -> dict[str, Any]:
    """Return one end of a channel as a document tells it."""
    from coase.protocol.types import units_to_text

    amounts = {
        "deposited": channel.balance_units,
        "signed": channel.signed_units,
        "claimed": channel.claimed_units,
        "claimable": channel.claimable_units,
        "free": channel.free_units,
        "withdrawing": channel.withdrawing_units,
    }
    return {
        "kind": "channel",
        "channel": channel.channel_id.hex(),
        "side": str(channel.side),
        "counterparty": channel.counterparty,
        "state": channel.state,
        **{name: units_to_text(units, network.decimals) for name, units in amounts.items()},
        **{f"{name}_units": str(units) for name, units in amounts.items()},
        "takeable_at": iso(channel.takeable_at_s),
        "stopped": channel.stopped,
    }


def _stake_rows(holding: Holding) -> list[dict[str, Any]]:
    stake = holding.stake
    if stake is None or not stake.bonded_units:
        return []
    return [
        {
            "kind": "stake",
            "bonded_units": str(stake.bonded_units),
            "free_units": str(stake.free_units),
            "reserved_units": str(stake.reserved_units),
            "unbonding_units": str(stake.unbonding_units),
            "releasable_at": iso(stake.unbond_at_s),
        }
    ]


def print_channels(keys: list[dict[str, Any]]) -> None:
    """Print the channels of some keys, if they have any."""
    from .look_commands import _table

    rows = [(key, row) for key in keys for row in key["positions"] if row["kind"] == "channel"]
    if not rows:
        return
    names = ["deposited", "signed", "claimed", "claimable", "free"]
    if out.width < WIDE:
        names = ["signed", "claimable", "free"]
    table = _table("what lies in channels", "agent", "side", "with")
    table.columns[-1].min_width = ADDRESS_WIDTH
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for key, row in rows:
        amounts = [row[name] for name in names]
        name = key["name"] or key["node"]
        table.add_row(name, row["side"], row["counterparty"], *amounts, row["state"])
    out.print(table)
    for key, row in rows:
        if row["takeable_at"]:
            whose = "comes home" if row["side"] == "buyer" else "goes back to the buyer"
            name = key["name"] or key["node"]
            say(f"{name}: {row['withdrawing']} {whose} from {row['takeable_at']} on")


def _print_stakes(document: dict[str, Any]) -> None:
    from coase.protocol.types import units_to_text

    for key in document["keys"]:
        for row in key["positions"]:
            if row["kind"] != "stake":
                continue
            told = [
                f"{units_to_text(int(row[f'{name}_units']), document['decimals'])} {name}"
                for name in ("free", "reserved", "unbonding")
            ]
            when = (
                f", to be released from {row['releasable_at']} on" if row["releasable_at"] else ""
            )
            say(f"{key['name'] or key['node']}'s stake: {', '.join(told)}{when}")


def _print_wallet(document: dict[str, Any]) -> None:
    from .look_commands import _table

    table = _table(f"what your keys hold at block {document['block']}", "agent", "address")
    table.columns[-1].min_width = ADDRESS_WIDTH  # One that is cut is none.
    names = ["balance", "locked", "bonds", "channels", "stake", "claimable", "owed"]
    if out.width < WIDE:  # Then only of what there is.
        names = [n for n in names if n == "balance" or any(k[n] != "0" for k in document["keys"])]
    for name in (*names, "coin"):
        column = document["symbol"] if name == "balance" else name
        table.add_column(column, justify="right", no_wrap=True)
    for key in document["keys"]:
        amounts = [key[name] for name in names]
        coin = key["coin"] if len(key["coin"]) <= COIN_SHOWN else key["coin"][:COIN_SHOWN] + "…"
        table.add_row(key["name"] or key["node"], key["address"], *amounts, coin)
    out.print(table)
    print_channels(document["keys"])
    _print_stakes(document)
    if any(int(key["claimable_units"]) for key in document["keys"]):
        say("claimable: yours already; any node of yours that runs fetches it")
    rows = [row for key in document["keys"] for row in key["positions"] if row["kind"] == "channel"]
    if any(int(row["free_units"]) and not row["takeable_at"] for row in rows):
        say("free in channels: spent on the next deals there, or taken back by")
        say("coase withdraw --channels")


@app.command()
def export(
    format_: Annotated[Format, typer.Option("--format", help="csv or json.")] = Format.CSV,
    state: State = None,
    json_: Json = False,
) -> None:
    """Write every movement of money, as an accountant books it: two postings that add up to none.

    Of each key the account wallet is what it holds; escrow, channels and stake are what the
    contracts hold for it; vouchers is what is signed and not claimed yet.

    Example: [b]coase export --format csv > postings.csv[/b]
    """
    rows = perform(lambda: _export(state))
    if json_ or format_ is Format.JSON:
        emit(rows)
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    sys.stdout.write(text.getvalue())
    sys.stdout.flush()


FIELDS: Final = (
    "time",
    "entry",
    "agent",
    "address",
    "account",
    "counterparty",
    "deal",
    "capability",
    "asset",
    "amount",
    "units",
    "tx",
)


async def _export(state: Path | None) -> list[dict[str, str]]:
    from coase.agents.config import load_network
    from coase.agents.ledger import ledger_of
    from coase.agents.wallet import (
        Reach,
        channels_of,
        imported_of,
        job_ids_of,
        read_facts,
        read_places,
    )

    network = load_network()
    places = read_places(places_of(network, state))
    async with viewing(network) as settlement:
        facts = await read_facts(settlement, places, moves=True, reach=Reach.of(network))
    journals = [place.journal for place in places if place.journal is not None]
    withdrawals = {tx: who for journal in journals for tx, who in journal.withdrawals().items()}
    ledger = ledger_of(
        facts,
        escrow=network.escrow,
        withdrawals=withdrawals,
        older=imported_of(places) if network.from_block else frozenset(),
        kept=channels_of(places),
        job_ids=job_ids_of(places),
    )
    labels = _labels(places)
    numbers: dict[str, int] = {}
    return [
        _row(network, line, labels, str(numbers.setdefault(line.entry, len(numbers) + 1)))
        for line in ledger.postings
    ]


class _Labels:
    """How we call what the chain knows by hashes."""

    def __init__(self) -> None:
        self.agents: dict[str, str] = {}
        self.deals: dict[bytes, str] = {}
        self.wares: dict[bytes, str] = {}


def _labels(places: list[Place]) -> _Labels:
    labels = _Labels()
    for place in places:
        labels.agents |= {owner: name or place.path.name for owner, name in place.names.items()}
        if (journal := place.journal) is None:
            continue
        labels.deals |= journal.deal_names()
        closed = ((row.row["job_id"], row.row["capability"]) for row in journal.closed)
        labels.wares |= {bytes.fromhex(job): ware for job, ware in closed if job}
        labels.wares |= {t.job_id: t.request.capability for t in journal.bound()}
    return labels


def _row(network: Network, line: Posting, labels: _Labels, entry: str) -> dict[str, str]:
    from coase.agents.ledger import TOKEN
    from coase.protocol.types import units_to_text

    token = line.asset == TOKEN
    return {
        "time": iso(line.time_s),
        "entry": entry,
        "agent": labels.agents.get(line.owner, ""),
        "address": line.owner,
        "account": str(line.account),
        "counterparty": line.counterparty,
        "deal": labels.deals.get(line.job_id, line.job_id.hex()),
        "capability": labels.wares.get(line.job_id, ""),
        "asset": network.symbol if token else "coin",
        "amount": units_to_text(line.amount, network.decimals if token else COIN_DECIMALS),
        "units": str(line.amount),
        "tx": line.tx_hash,
    }


def iso(time_s: int) -> str:
    """Return a time as ISO 8601 in UTC, or nothing for none."""
    if not 0 < time_s < 2**37:
        return ""
    return datetime.fromtimestamp(time_s, tz=UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
