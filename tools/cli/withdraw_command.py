"""``coase withdraw``: money out of an agent's key, to an address of the owner's choice."""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from coase.protocol.errors import ChainUnavailable, ConfigurationError

from .app import EXIT_FAILED, Json, app, emit, err, out, perform, raise_user, say
from .wallet_commands import COIN_DECIMALS, State, places_of, viewing

if TYPE_CHECKING:
    from coase.agents.config import Network
    from coase.agents.wallet import Holding
    from coase.agents.withdrawal import Order, Outcome

ALL: Final = "all"
TAKEN_MAX_S: Final = 30.0  # A node that runs looks three times a second, if it is not hindered.
PAID_MAX_S: Final = 150.0  # Longer than its chain client waits for a block.
POLL_S: Final = 0.1


@app.command()
def withdraw(
    to: Annotated[str, typer.Argument(help="The address that is paid.")] = "",
    amount: Annotated[str, typer.Argument(help="How much, such as 2.5; or all.")] = "",
    source: Annotated[
        str, typer.Option("--from", help="Agent's name or address; needed if you have several.")
    ] = "",
    coin: Annotated[
        bool, typer.Option("--coin", help="The chain's own coin instead of the token.")
    ] = False,
    channels: Annotated[
        bool,
        typer.Option("--channels", help="Home with what is free in channels; no address, no sum."),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    id_: Annotated[
        str,
        typer.Option("--id", help="The same id is the same withdrawal: it is paid once."),
    ] = "",
    state: State = None,
    json_: Json = False,
) -> None:
    """Send tokens or coin out of an agent's key. Nothing is ever paid twice.

    Works beside the agent that has the key, and when it does not run. No budget stands in the way:
    budgets bind agents, not their owner.

    With --channels vouchers are claimed, and deposits that are not signed away come back to the
    keys that made them, after the channel's delay. The node sees to it, or the same command again.

    Example: [b]coase withdraw 0x52908400098527886E0F7030069857D2E4169EE7 2.5 --from oracle[/b]
    """
    if channels:
        from .takeback_command import bring_home

        if to or amount or coin or id_:
            raise_user("--channels takes all that is free: say no address, sum, coin or id with it")
        bring_home(source, state, json_=json_)
        return
    if not to or not amount:
        raise_user("say to which address and how much: coase withdraw ADDRESS AMOUNT")

    async def work() -> tuple[Order, Outcome, dict[str, Any]]:
        return await _withdraw(to, amount, source, state, coin=coin, yes=yes, order_id=id_)

    order, outcome, document = perform(work)
    if json_:
        emit(document | {"id": order.id, "tx": outcome.tx_hash, "why": outcome.why})
    elif outcome.tx_hash:
        out.print(
            f"sent {document['amount']} {document['asset']} to {document['to_checksum']}\n"
            f"transaction {outcome.tx_hash}",
            highlight=False,
            soft_wrap=True,
        )
    if outcome.why:
        err.print(f"[bold red]coase:[/] refused, nothing was sent: {outcome.why}", soft_wrap=True)
        raise typer.Exit(EXIT_FAILED)


async def _withdraw(
    to: str,
    amount: str,
    source: str,
    state: Path | None,
    *,
    coin: bool,
    yes: bool,
    order_id: str,
) -> tuple[Order, Outcome, dict[str, Any]]:
    from coase.agents.config import load_network
    from coase.agents.wallet import Reach, holdings_of, read_facts, read_places
    from coase.agents.wiring import chain_kind
    from coase.agents.withdrawal import (
        Order,
        checked_address,
        require_order_id,
        require_payable,
    )
    from coase.escrow.chains import ChainKind

    network = load_network()
    if order_id:
        require_order_id(order_id)
    address = checked_address(to, strict=chain_kind(network) is ChainKind.MAIN)
    places = read_places(places_of(network, state))
    async with viewing(network) as settlement:
        facts = await read_facts(settlement, places, reach=Reach.of(network))
        holdings = holdings_of(facts, places)
        holding = _source(holdings, source)
        require_payable(
            address,
            holding.owner,
            settlement,
            channels=network.channels,
            vault=network.vault,
        )
        known = _Known(holding.place)
        earlier = known.orders.get(order_id)
        if amount == ALL and earlier is not None:
            units = earlier.units  # What all was when it was ordered.
        else:
            units = _units(network, holding, amount, coin=coin)
        order = known.same(
            Order(
                order_id or secrets.token_hex(8),
                holding.owner,
                "coin" if coin else "token",
                address,
                units,
            ),
            given=bool(order_id),
        )
        over = known.paid(order)
        document = _document(network, holding, order)
        if over is None:
            if order.id not in known.orders:
                _require_enough(holding, order, document)
            _confirm(document, yes=yes)
            say(f"withdrawal {order.id}: the same --id never pays twice")
            over = await _pay(network, holding.place, order)
    return order, over, document


def _source(holdings: list[Holding], source: str) -> Holding:
    named = [h for h in holdings if h.name]
    found = [h for h in named if source.lower() in (h.name.lower(), h.owner)] if source else named
    if len(found) == 1:
        return found[0]
    if not named:
        raise ConfigurationError("there are no keys to pay from: see coase keys list")
    listed = ", ".join(f"{h.name} {h.owner}" for h in found or named)
    raise ConfigurationError(f"name one of your keys with --from: {listed}")


def _units(network: Network, holding: Holding, amount: str, *, coin: bool) -> int:
    from coase.protocol.types import Asset

    if amount == ALL:
        if coin:
            raise ConfigurationError("some coin must stay to pay for gas: say how much")
        units = holding.units
    else:
        asset = Asset(network.chain_id, network.token, network.symbol, network.decimals)
        asset = replace(asset, symbol="coin", decimals=COIN_DECIMALS) if coin else asset
        units = asset.money(amount).units
    if units == 0:
        raise ConfigurationError("the amount is 0: nothing to send")
    return units


class _Known:
    """The orders that were given to a node before, and what became of them."""

    def __init__(self, place: Path) -> None:
        from coase.agents.withdrawal import Order, Outcome, placed

        self.orders: dict[str, Order] = {kept.id: kept for kept in placed(place)}
        self._ends: dict[str, Outcome] = {}
        for kind, deal, data in _owners_records(place):
            if kind == "withdraw":
                kept = Order.from_json(data)
                self.orders[kept.id] = kept
                self._ends.pop(kept.id, None)
            else:
                row = json.loads(data)
                self._ends[deal.partition(":")[2]] = Outcome(row["tx"], row["why"])

    def same(self, order: Order, *, given: bool) -> Order:
        """Return the order to go on with: without an id of the user's, an unfinished one like it.

        :raises ConfigurationError: if the id that the user gave stands for another
        """
        if given:
            known = self.orders.get(order.id, order)
            if known != order:
                raise ConfigurationError(
                    f"the id {order.id} stands for another withdrawal: {known.units} units of"
                    f" {known.asset} from {known.owner} to {known.to}; nothing was sent"
                )
            return order
        for known in self.orders.values():
            if replace(known, id=order.id) == order and known.id not in self._ends:
                say(f"withdrawal {known.id} of the same amount is not finished: going on with it")
                return known
        return order

    def paid(self, order: Order) -> Outcome | None:
        """Return the outcome of an order that was paid; one that was refused may be tried again."""
        end = self._ends.get(order.id)
        return end if end is not None and end.tx_hash else None


def _owners_records(place: Path) -> list[tuple[str, str, bytes]]:
    path = place / "journal.sqlite"
    if not path.exists():
        return []
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=5)
        try:
            rows = connection.execute(
                "SELECT kind, deal, data FROM records"
                " WHERE kind IN ('withdraw', 'withdrawn') ORDER BY seq"
            ).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ConfigurationError(f"no journal can be read at {path}: {error}") from error
    return [(row[0], row[1], bytes(row[2])) for row in rows]


def _require_enough(holding: Holding, order: Order, document: dict[str, Any]) -> None:
    from coase.protocol.types import units_to_text

    held = holding.wei if order.asset == "coin" else holding.units
    if order.units > held:
        text = units_to_text(held, document["decimals"])
        more = "what is locked comes back by its deadline: see coase wallet"
        if order.asset == "token" and (holding.channel_units or holding.claimable_units):
            more += "; what is free in channels comes home by coase withdraw --channels"
        raise ConfigurationError(
            f"{holding.name} holds {text} {document['asset']}, less than {document['amount']};"
            f" {more}"
        )


def _confirm(document: dict[str, Any], *, yes: bool) -> None:
    """Return if the owner means it."""
    if yes:
        return
    from coase.agents.passphrase import can_ask

    question = (
        f"send {document['amount']} {document['asset']} from {document['from']}"
        f" {document['address']} to {document['to_checksum']}?"
    )
    if not can_ask():
        raise ConfigurationError(f"{question} Nobody is here to say yes: add --yes")
    if not typer.confirm(question, err=True):
        raise ConfigurationError("nothing was sent")


async def _pay(network: Network, place: Path, order: Order) -> Outcome:
    """Pay with the node that runs, or without one."""
    from coase.agents.wiring import instead_of_node
    from coase.agents.withdrawal import Withdrawals, identity_in

    from .journals import held_by

    if holder := held_by(place):
        return await _by_node(place, order, holder)
    async with instead_of_node(network, place) as (journal, keys, settlement):
        withdrawals = Withdrawals(
            settlement,
            journal,
            identity_of=lambda owner: identity_in(keys, place, owner),
            now_ms=lambda: time.time_ns() // 1_000_000,
        )
        return await withdrawals.perform(order)


async def _by_node(place: Path, order: Order, holder: str) -> Outcome:
    """Lay the order down for the node that has the key, and wait for what it does."""
    import anyio

    from coase.agents.withdrawal import place_order, take_back

    before = len(_ends(place, order))
    place_order(place, order)
    try:
        with anyio.move_on_after(TAKEN_MAX_S):
            while (place / "orders" / f"{order.id}.json").exists():  # noqa: ASYNC110
                await anyio.sleep(POLL_S)
    finally:
        back = take_back(place, order)
    if back:
        raise ConfigurationError(
            f"{place} is held by {holder}, which takes no orders: nothing was sent; stop it first"
        )
    with anyio.move_on_after(PAID_MAX_S):
        while True:
            if len(ends := _ends(place, order)) > before:
                return ends[-1]
            await anyio.sleep(POLL_S)
    raise ChainUnavailable(
        f"the withdrawal is under way in {holder}, and not in a block yet; ask again with:"
        f" coase withdraw … --id {order.id}"
    )


def _ends(place: Path, order: Order) -> list[Outcome]:
    """Return what became of an order so far: it may be refused and tried again."""
    from coase.agents.withdrawal import Outcome

    rows = [
        json.loads(d)
        for kind, deal, d in _owners_records(place)
        if deal == order.name and kind == "withdrawn"
    ]
    return [Outcome(row["tx"], row["why"]) for row in rows]


def _document(network: Network, holding: Holding, order: Order) -> dict[str, Any]:
    from coase.agents.withdrawal import checksum_address
    from coase.protocol.types import units_to_text

    decimals = COIN_DECIMALS if order.asset == "coin" else network.decimals
    return {
        "from": holding.name,
        "address": order.owner,
        "to": order.to,
        "to_checksum": checksum_address(order.to),
        "asset": "coin" if order.asset == "coin" else network.symbol,
        "amount": units_to_text(order.units, decimals),
        "units": str(order.units),
        "decimals": decimals,
    }
