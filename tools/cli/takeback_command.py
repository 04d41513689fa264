"""``coase withdraw --channels``: home with what is free in channels, to the keys that it is of."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any, Final

from coase.protocol.errors import ChainUnavailable, ConfigurationError

from .app import emit, err, out, perform, say
from .journals import held_by
from .wallet_commands import _holding, places_of, print_channels, viewing

if TYPE_CHECKING:
    from pathlib import Path

    from coase.agents.config import Network
    from coase.agents.takeback import TakeBack
    from coase.agents.wallet import Holding, Place

TAKEN_MAX_S: Final = 30.0  # A node that runs looks three times a second, if it is not hindered.
PASS_MAX_S: Final = 300.0  # Longer than its chain client waits for some blocks.
POLL_S: Final = 0.1


def bring_home(source: str, state: Path | None, *, json_: bool) -> None:
    """Do what ``coase withdraw --channels`` does, for one key or all of them."""
    document = perform(lambda: _bring_home(source, state))
    if json_:
        emit(document)
        return
    if not document["keys"]:
        out.print("nothing of yours lies in channels", soft_wrap=True)
        return
    print_channels(document["keys"])
    for line in document["refused"]:
        err.print(f"[bold red]coase:[/] refused: {line}", soft_wrap=True)
    for key in document["keys"]:
        _tell(key)


def _tell(key: dict[str, Any]) -> None:
    name = key["name"] or key["node"]
    rows = [row for row in key["positions"] if row["kind"] == "channel"]
    for row in rows:
        if row["takeable_at"] and row["side"] == "buyer":
            say(
                f"{name}: the node takes it then, if it runs; else do the same again:"
                " coase withdraw --channels"
            )
        elif not row["takeable_at"] and int(row["free_units"]):
            say(f"{name}: {row['free']} still pay for a deal; the node asks for the rest after it")
    if not any(int(row["free_units"]) for row in rows):
        say(f"{name}: all that was free is home")


async def _bring_home(source: str, state: Path | None) -> dict[str, Any]:
    from coase.agents.config import load_network
    from coase.agents.wallet import Reach, holdings_of, read_facts, read_places

    network = load_network()
    if not network.channels:
        raise ConfigurationError("this network has no channels: nothing lies in any")
    paths = places_of(network, state)

    async def look() -> tuple[list[Place], list[Holding]]:
        places = read_places(paths)
        async with viewing(network) as settlement:
            facts = await read_facts(settlement, places, reach=Reach.of(network))
        return places, holdings_of(facts, places)

    places, holdings = await look()
    named = [h for h in holdings if h.name]
    chosen = [h for h in named if not source or source.lower() in (h.name.lower(), h.owner)]
    if source and not chosen:
        raise ConfigurationError(f"none of your keys is {source}: see coase wallet")
    unfinished = {order.owner: order for place in places for order in _unfinished(place)}
    refused: list[str] = []
    owners = [h.owner for h in chosen if _has_some(h) or h.owner in unfinished]
    for path in dict.fromkeys(h.place for h in chosen if h.owner in owners):
        orders = [
            unfinished.get(h.owner) or _order(h.owner)
            for h in chosen
            if h.place == path and h.owner in owners
        ]
        if holder := held_by(path):
            for order in orders:
                await _by_node(path, order, holder)
        else:
            _warn(next(place for place in places if place.path == path), owners)
            refused += await _alone(network, path, orders)
    _, holdings = await look()
    return {
        "refused": refused,
        "keys": [_holding(network, holding) for holding in holdings if holding.owner in owners],
    }


def _warn(place: Place, owners: list[str]) -> None:
    """Say what it means to stop signing where no agent runs that could end its deals first."""
    open_ = [
        thread
        for thread in (place.journal.bound() if place.journal is not None else ())
        if thread.method == "channel" and thread.holder in owners and thread.side == "buyer"
    ]
    for thread in open_:
        say(f"deal {thread.deal} is open, and nothing more is paid for it: its agent does not run")


def _has_some(holding: Holding) -> bool:
    ends = holding.channels
    mine = any(end.free_units or end.claimable_units or end.takeable_at_s for end in ends)
    return mine or bool(holding.unpaid_units)


def _order(owner: str) -> TakeBack:
    from coase.agents.takeback import TakeBack

    return TakeBack(secrets.token_hex(8), owner)


def _unfinished(place: Place) -> list[TakeBack]:
    """Return the orders in a journal that are not done: the same again goes on with them."""
    from coase.agents.takeback import TakeBack

    found: dict[str, TakeBack] = {}
    for record in place.journal.owners_records if place.journal is not None else ():
        if record.kind == "takeback":
            found[record.deal] = TakeBack.from_json(record.data)
        elif record.kind == "takenback":
            found.pop(record.deal, None)
    return list(found.values())


async def _alone(network: Network, path: Path, orders: list[TakeBack]) -> list[str]:
    """Make one pass without a node, and return what was refused."""
    from coase.agents.takeback import TakeBacks
    from coase.agents.wiring import instead_of_node
    from coase.agents.withdrawal import identity_in
    from coase.escrow.backends.evm.channels import EvmChannels

    async with instead_of_node(network, path) as (journal, keys, settlement):
        takebacks = TakeBacks(
            settlement,
            await EvmChannels.beside(settlement, contract=network.channels),
            journal,
            identity_of=lambda owner: identity_in(keys, path, owner),
            now_ms=lambda: time.time_ns() // 1_000_000,
            first=network.from_block,
        )
        return [line for order in orders for line in (await takebacks.perform(order)).refused]


async def _by_node(path: Path, order: TakeBack, holder: str) -> None:
    """Lay the order down for the node that has the key, and wait for its first pass."""
    import anyio

    from coase.agents.withdrawal import place_order, take_back

    place_order(path, order)
    lying, taken = path / "orders" / f"{order.id}.json", path / "orders" / f"{order.id}.json-taken"
    try:
        with anyio.move_on_after(TAKEN_MAX_S):
            while lying.exists():  # noqa: ASYNC110
                await anyio.sleep(POLL_S)
    finally:
        back = take_back(path, order)
    if back:
        raise ConfigurationError(
            f"{path} is held by {holder}, which takes no orders: nothing was done; stop it first"
        )
    with anyio.move_on_after(PASS_MAX_S):
        while taken.exists():  # noqa: ASYNC110
            await anyio.sleep(POLL_S)
        return
    raise ChainUnavailable(
        f"it is under way in {holder}, and not in a block yet; see: coase wallet"
    )
