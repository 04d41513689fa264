"""``coase reputation``: what others say of an agent on the chain, and how much of it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from .app import Json, app, emit, out, perform, printable
from .wallet_commands import State, iso

if TYPE_CHECKING:
    from pathlib import Path

    from coase.agents.config import Network
    from coase.agents.reputation import Repute, Word

ABOUT_SHOWN: Final = 40
_WHY: Final = {
    "revoked": "its author took it back",
    "other_file": "its file is another than the one it names",
    "bad_file": "its file names no payment",
    "file_disagrees": "its file says something else",
    "other_chain": "it was paid on another chain",
    "no_payment": "no such payment, or it is not final yet",
    "untrusted_contract": "the contract is none that is trusted",
    "other_payment": "the payment is another",
    "other_payer": "somebody else paid",
    "other_payee": "somebody else was paid",
    "other_asset": "paid in another token",
    "paid_later": "said before it was paid",
    "not_faulted": "nothing was paid, and by no fault of the seller",
    "used_before": "this payment was counted before",
    "unreadable": "its file is not on the chain, or the endpoint has forgotten the block",
}


@app.command()
def reputation(
    agent: Annotated[str, typer.Argument(help="An agent's number or address, or a name of yours.")],
    state: State = None,
    json_: Json = False,
) -> None:
    """Show what others say of an agent: checked entry by entry, with what each weighs.

    An entry counts if the chain itself tells of the payment that it names. Those whom you have
    dealt with have a weight of their own each; all strangers share one. Your own experience comes
    first, and all this weighs less than one deal of yours.

    Example: [b]coase reputation 7[/b]
    """
    document = perform(lambda: _reputation(agent, state))
    if json_:
        emit(document)
        return
    _show(document)


async def _reputation(agent: str, state: Path | None) -> dict[str, Any]:
    from coase.agents.config import load_network
    from coase.agents.reputation import Readings, reader_of

    from .identity_commands import find, known_to, looking

    network = load_network()
    async with looking(network) as (settlement, registries):
        record = await find(network, registries, agent, state)
        known = known_to(network, state)
        head = await settlement.head()
        repute = await Readings(registries, reader_of(network)).read(
            record, known=known, now_s=head.time_s, from_block=network.from_block
        )
    return _document(network, repute, known)


def _document(network: Network, repute: Repute, known: set[str]) -> dict[str, Any]:
    good, bad = repute.prior()
    counted = [word for word in repute.words if word.counted is not None]
    return {
        "agent_id": repute.record.agent_id,
        "paid_to": repute.record.paid_to,
        "symbol": network.symbol,
        "rating_permille": repute.rating_permille,
        "counted": len(counted),
        "rejected": len(repute.words) - len(counted),
        "weight": sum(word.weight for word in counted),
        "prior": {"good_millionths": good, "bad_millionths": bad},
        "entries": [_entry(network, word, known) for word in repute.words],
    }


def _entry(network: Network, word: Word, known: set[str]) -> dict[str, Any]:
    from coase.protocol.types import units_to_text

    entry, counted = word.entry, word.counted
    paid_units = counted.log.to_seller_units if counted is not None else 0
    return {
        "client": entry.client,
        "known": entry.client in known,
        "index": entry.index,
        "value": units_to_text(entry.value, entry.decimals),
        "tags": [tag for tag in (entry.tag1, entry.tag2) if tag],
        "at": iso(entry.time_s),
        "tx": entry.tx_hash,
        "paid": units_to_text(paid_units, network.decimals) if counted is not None else "",
        "paid_units": str(paid_units) if counted is not None else "",
        "weight": word.weight,
        "flaw": word.flaw.value if word.flaw is not None else "",
        "why": _WHY.get(word.flaw.value, word.flaw.value) if word.flaw is not None else "",
    }


def _show(document: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rating = document["rating_permille"]
    told = "nobody whose word counts speaks of its work"
    if rating is not None:
        told = f"rated {rating // 10}.{rating % 10} of 100 by weight"
    out.print(
        f"agent {document['agent_id']}, paid to {document['paid_to']}: {told};"
        f" {document['counted']} entries count, {document['rejected']} do not",
        highlight=False,
        soft_wrap=True,
    )
    if not document["entries"]:
        return
    table = Table(box=box.SIMPLE_HEAD)  # Tags and numbers are strangers' own.
    for name in ("client", "says", "about", "paid", "weight", "or why it does not count"):
        right = name in ("says", "paid", "weight")
        table.add_column(name, justify="right" if right else "left")
    for row in document["entries"]:
        client = f"{row['client'][:10]}…" + (" (known)" if row["known"] else "")
        paid = f"{row['paid']} {document['symbol']}" if row["paid"] else ""
        weight = "" if row["flaw"] else str(row["weight"])
        about = ", ".join(row["tags"][1:]) or ", ".join(row["tags"])
        cells = (client, row["value"], about[:ABOUT_SHOWN], paid, weight, row["why"])
        table.add_row(*(Text(printable(cell)) for cell in cells))
    out.print(table)
