"""The audit: journal, book and chain held against each other, and every difference by its name.

It can run beside a node that works. The journal is read, then the chain at one block, then the
journal again: what the first reading says must be on the chain already, and what is on the chain
must be in the second, since a node writes down what it does before it does it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from coase.escrow.backends.evm.moves import order_of
from coase.escrow.presets import preset_of
from coase.protocol.errors import BookOutOfBalance, CoaseError
from coase.protocol.messages import STREAMED
from coase.protocol.states import Role, State
from coase.protocol.types import AgentId, Asset, Phase

from .audit_channels import ChannelAudit, Finding
from .ledger import TOKEN, Account, Deal, Ledger, deals_of, ledger_of
from .purse import Budget, Purse
from .snapshot import WITHDRAWAL
from .wallet import (
    NOWHERE_ELSE,
    Place,
    Reach,
    channels_of,
    imported_of,
    job_ids_of,
    read_facts,
    read_places,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from coase.escrow.backends.evm.moves import ChainFacts, Mined
    from coase.escrow.backends.evm.settlement import EvmSettlement
    from coase.protocol.session import Thread

    from .snapshot import Closed, KeptTx, Snapshot

NONCES_NAMED_MAX: Final = 8
_ON_CHAIN: Final = frozenset((State.LOCKED, State.DELIVERED, State.DISPUTED, State.ANSWERED))


@dataclass(slots=True)
class Report:
    """What an audit found."""

    block: int
    keys: int = 0
    deals: int = 0
    channels: int = 0
    transactions: int = 0
    postings: int = 0
    differences: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)
    """What agrees, but not yet, or cannot be told apart from what is good."""


async def audit(
    settlement: EvmSettlement, paths: Iterable[Path], *, reach: Reach = NOWHERE_ELSE
) -> Report:
    """Return what does not agree between the nodes in ``paths`` and their chain.

    ``reach`` says where else than in wallet and escrow the keys may have money.

    :raises ChainUnavailable: if the chain does not answer
    :raises ConfigurationError: if a journal cannot be read at all
    """
    paths = list(paths)
    places = read_places(paths, deep=True)
    facts = await read_facts(settlement, places, moves=True, reach=reach)
    later = read_places(paths)
    return compare(
        places,
        later,
        facts,
        asset=settlement.asset,
        escrow=settlement.domain.contract,
        older=imported_of(places) if reach.first else frozenset(),
    )


def compare(
    places: list[Place],
    later: list[Place],
    facts: ChainFacts,
    *,
    asset: Asset,
    escrow: AgentId,
    older: frozenset[AgentId] = frozenset(),
) -> Report:
    """Return what does not agree between journals, read before and after, and ``facts``.

    ``older`` are keys that may have had money before the first block that was read.
    """
    deals = deals_of(facts.events)
    journals = [place.journal for place in places if place.journal is not None]
    withdrawals = {tx: who for journal in journals for tx, who in journal.withdrawals().items()}
    kept = channels_of(places)
    ledger = ledger_of(
        facts,
        escrow=escrow,
        withdrawals=withdrawals,
        older=older,
        kept=kept,
        job_ids=job_ids_of(places),
    )
    report = Report(
        facts.head,
        keys=len(facts.units),
        deals=sum(len(journal.closed) + len(journal.bound()) for journal in journals),
        channels=len({one.channel_id for one in kept}),
        transactions=sum(len(journal.transactions) for journal in journals),
        postings=len(ledger.postings),
    )
    bad, notes = report.differences, report.notes
    bad += _twice(places)
    for journal in journals:
        bad += [Finding("journal", f"{journal.path}: {fault}") for fault in journal.faults]
        for closed in journal.closed:
            bad += _closed(closed, deals)
        for thread in journal.bound():
            _bound(thread, deals, bad, notes)
        bad += _transactions(journal, facts)
        bad += _withdrawals(journal, facts)
    bad += _unknown_deals(later, deals)
    _nonces(later, facts, bad, notes)
    _unsent(ledger, later, asset.chain_id, bad, notes)
    bad += _ledger(ledger, deals, facts)
    ChannelAudit(places, later, facts, deals, ledger, asset, bad, notes).run()
    for place in places:
        bad += _book(place, deals, asset)
    return report


def _twice(places: list[Place]) -> Iterator[Finding]:
    """A key lives on one node: two would sign over each other."""
    seen: dict[AgentId, Place] = {}
    for place in places:
        for owner in place.names:
            if (other := seen.setdefault(owner, place)) is not place:
                yield Finding("keys", f"the key is in {other.path} and in {place.path}", owner)


# ---- deals -------------------------------------------------------------------------------------


def _closed(closed: Closed, deals: dict[bytes, Deal]) -> Iterator[Finding]:
    """A deal that is over: by its own records, and by the chain."""
    row, owner = closed.row, closed.agent
    again = json.loads(closed.again) if closed.again is not None else row
    # An older version may have said less, or something that nobody says any more.
    names = [name for name in row if name in again and again[name] != row[name]]
    if names:
        told = "; ".join(f"{n} is {_short(row[n])}, not {_short(again[n])}" for n in names)
        what = f"the summary does not follow from its records: {told}"
        yield Finding("journal", what, owner, closed.deal)
    deal = deals.get(bytes.fromhex(row["job_id"])) if row["job_id"] else None
    if row.get("method") in STREAMED:
        return  # No escrow ever hears of it; see ``ChannelAudit``.
    for fault in _against_chain(row, owner, deal):
        yield Finding("chain", fault, owner, closed.deal)


def _against_chain(row: dict[str, Any], owner: AgentId, deal: Deal | None) -> Iterator[str]:
    never = row["how"] == "open"
    if deal is None:
        if not never:
            yield f"the journal says {row['state']}, and the chain has no such deal"
        return
    if never:
        yield f"the journal says that it never was locked, and the chain has it {_phase(deal)}"
        return
    if deal.is_live:
        yield f"the journal says {row['state']}, and on the chain it is {_phase(deal)}"
        return
    terms = deal.terms
    side = terms.buyer if row["side"] == "buyer" else terms.seller
    for what, ours, theirs in (
        ("own side", owner, side),
        ("counterparty", row["counterparty"], deal.other(side)),
        ("price", row["price_units"], terms.price_units),
        ("bond", row["bond_units"], terms.bond_units),
        ("seller's part", row["to_seller_units"], deal.to_seller_units),
        ("buyer's part", row["to_buyer_units"], deal.to_buyer_units),
        ("ruling", row["how"] == "ruled", deal.ruled),
    ):
        if ours != theirs:
            yield f"the {what} is {ours} in the journal and {theirs} on the chain"


def _bound(
    thread: Thread, deals: dict[bytes, Deal], bad: list[Finding], notes: list[Finding]
) -> None:
    """A deal that is open: the chain may be ahead of the journal, and never behind it."""
    if thread.streamed:
        return
    deal = deals.get(thread.job_id)
    if deal is None and thread.state in _ON_CHAIN:
        what = f"the journal says {thread.state}, and the chain has no such deal"
        bad.append(Finding("chain", what, thread.holder, thread.deal))
    elif deal is not None and not deal.is_live:
        what = "it is over on the chain; the node takes note of that when it runs"
        notes.append(Finding("journal", what, thread.holder, thread.deal))


def _unknown_deals(places: list[Place], deals: dict[bytes, Deal]) -> Iterator[Finding]:
    """Every deal of ours on the chain has to be in the journal of the node that has the key."""
    known: dict[AgentId, set[bytes]] = {}
    for place in places:
        names = set(place.journal.deal_names()) if place.journal is not None else set()
        for owner in place.owners:
            known.setdefault(owner, set()).update(names)
    for deal in deals.values():
        for owner in (deal.terms.buyer, deal.terms.seller):
            if owner in known and deal.job_id not in known[owner]:
                yield Finding(
                    "journal",
                    f"the chain has a deal over {deal.terms.price_units} units, {_phase(deal)},"
                    " that the journal does not know",
                    owner,
                    deal.job_id.hex(),
                )


# ---- transactions ------------------------------------------------------------------------------


def _transactions(journal: Snapshot, facts: ChainFacts) -> Iterator[Finding]:
    """What was kept is what was signed; and of each nonce that is used up, one is in a block."""
    by_nonce: dict[tuple[AgentId, int], list[KeptTx]] = {}
    for tx in journal.transactions:
        by_nonce.setdefault((tx.sender, tx.nonce), []).append(tx)
        if (fault := _kept_fault(tx)) is not None:
            yield Finding("journal", f"{tx.effect_id}: {fault}", tx.sender)
    for (sender, nonce), kept in by_nonce.items():
        if nonce >= facts.nonces.get(sender, 0):
            continue  # It may still come.
        if not any(tx.tx_hash in facts.mined for tx in kept):
            what = f"nonce {nonce} is used up by another transaction than {kept[-1].effect_id}"
            yield Finding("chain", what, sender)


def _kept_fault(tx: KeptTx) -> str | None:
    if not tx.is_whole:
        return f"the transaction kept under {tx.tx_hash} is another one"
    try:
        nonce = order_of(tx.raw)[0]
    except ValueError:
        return f"what is kept under {tx.tx_hash} is no transaction"
    return None if nonce == tx.nonce else f"its nonce is {nonce}, not {tx.nonce}"


def _nonces(
    places: list[Place], facts: ChainFacts, bad: list[Finding], notes: list[Finding]
) -> None:
    """Every transaction of a key has to be in the journal of its node."""
    known: dict[AgentId, set[int]] = {owner: set() for owner in facts.nonces}
    imported = imported_of(places)
    for place in places:
        for tx in place.journal.transactions if place.journal is not None else ():
            known.setdefault(tx.sender, set()).add(tx.nonce)
    for owner, count in facts.nonces.items():
        missing = sorted(set(range(count)) - known[owner])
        if not missing:
            continue
        named = ", ".join(map(str, missing[:NONCES_NAMED_MAX]))
        more = ", …" if len(missing) > NONCES_NAMED_MAX else ""
        what = (
            f"{len(missing)} transactions of this key are on the chain and not in the journal"
            f" (nonces {named}{more})"
        )
        # A key that was made elsewhere may have been used there.
        (notes if owner in imported else bad).append(Finding("chain", what, owner))


def _unsent(
    ledger: Ledger, places: list[Place], chain_id: int, bad: list[Finding], notes: list[Finding]
) -> None:
    """What left a key outside of any deal has to be a transaction of a journal.

    A signature alone can move tokens, by an allowance or an authorisation that somebody else sends.
    """
    known = {
        tx.tx_hash
        for place in places
        for tx in (place.journal.transactions if place.journal is not None else ())
    }
    preset, imported = preset_of(chain_id), imported_of(places)
    ours = (preset.channels, preset.erc3009_collector, preset.permit2_collector) if preset else ()
    for line in ledger.postings:
        if line.account is not Account.SENT or line.asset != TOKEN or line.tx_hash in known:
            continue
        if line.counterparty in ours:
            continue  # What a channel takes it was signed for, and it gives back what is left.
        what = (
            f"{line.amount} units went to {line.counterparty} by a transaction that none of these"
            f" nodes sent ({line.tx_hash})"
        )
        (notes if line.owner in imported else bad).append(Finding("chain", what, line.owner))


def _withdrawals(journal: Snapshot, facts: ChainFacts) -> Iterator[Finding]:
    """What the owner took out is what was ordered, once."""
    orders = {
        (record.agent, record.deal): json.loads(record.data)
        for record in journal.owners_records
        if record.kind == "withdraw"
    }
    for record in journal.owners_records:
        if record.kind == "withdrawn" and (record.agent, record.deal) not in orders:
            yield Finding("journal", f"{record.deal} was paid, and not ordered", record.agent)
    ended = {
        (record.agent, record.deal): json.loads(record.data).get("tx", "")
        for record in journal.owners_records
        if record.kind == "withdrawn"
    }
    paid: dict[tuple[AgentId, str], list[Mined]] = {}
    for tx in journal.transactions:
        mined = facts.mined.get(tx.tx_hash)
        if tx.effect_id.startswith(WITHDRAWAL) and mined is not None and mined.ok:
            paid.setdefault((tx.sender, tx.effect_id.partition("@")[0]), []).append(mined)
    for (owner, name), found in paid.items():
        order = orders.get((owner, name))
        if order is None:
            yield Finding("journal", f"{name} was paid, and not ordered", owner)
            continue
        if len(found) > 1:
            yield Finding("chain", f"{name} was paid {len(found)} times", owner)
        for mined in found:
            went = _went(mined, owner, order["asset"], facts)
            if (order["to"], int(order["units"])) not in went:
                what = f"{name} was to pay {order['units']} units to {order['to']}, and did not"
                yield Finding("chain", what, owner)
    for (owner, name), tx_hash in ended.items():
        if tx_hash and (owner, name) not in paid:
            yield Finding("chain", f"{name} is paid by the journal, not by the chain", owner)


def _went(mined: Mined, owner: AgentId, asset: str, facts: ChainFacts) -> list[tuple[str, int]]:
    """Return to whom a transaction of a withdrawal paid how much."""
    if asset == "coin":
        return [(mined.to, mined.value_wei)]
    return [
        (move.to, move.units)
        for move in facts.moves
        if move.tx_hash == mined.tx_hash and move.source == owner
    ]


# ---- money -------------------------------------------------------------------------------------


def _ledger(ledger: Ledger, deals: dict[bytes, Deal], facts: ChainFacts) -> Iterator[Finding]:
    """The postings add up to nothing, and of each key to what it holds."""
    for entry in ledger.unbalanced():
        yield Finding("book", f"the postings of {entry} do not add up to nothing")
    ours = 0
    for owner, units in facts.units.items():
        booked = ledger.sum(owner, Account.WALLET)
        if booked != units:
            what = f"the key holds {units} units, and all its transfers make {booked}"
            yield Finding("book", what, owner)
        held = facts.owed_units[owner] + sum(
            deal.locked_units(owner) + deal.bond_units(owner) for deal in deals.values()
        )
        booked = ledger.sum(owner, Account.ESCROW)
        if booked != held:
            what = (
                f"the escrow holds {held} units for the key by the deals that are open, and"
                f" {booked} by what was paid in and out"
            )
            yield Finding("book", what, owner)
        ours += held
    if facts.held_units < ours:
        what = f"the escrow has {facts.held_units} units, and owes {ours} to these keys alone"
        yield Finding("chain", what)


def _book(place: Place, deals: dict[bytes, Deal], asset: Asset) -> Iterator[Finding]:
    """The purse of each agent, as a start would make it: it balances, and spent what was paid."""
    journal = place.journal
    for owner in place.owners if journal is not None else ():
        assert journal is not None
        rows = [closed.row for closed in journal.closed if closed.agent == owner]
        threads = [thread for thread in journal.threads if thread.holder == owner]
        purse = Purse(Budget(), asset, name=place.names.get(owner, "agent"))
        try:
            purse.recall(threads, rows)
            purse.book.audit()
        except BookOutOfBalance as error:
            yield Finding("book", str(error), owner)
            continue
        except (CoaseError, ValueError, KeyError) as error:
            yield Finding("book", f"the purse cannot be made from the journal: {error}", owner)
            continue
        paid, vouchers = 0, _paid_by_voucher(journal, owner)
        for row in rows:
            deal = deals.get(bytes.fromhex(row["job_id"])) if row["job_id"] else None
            if row["side"] == "buyer" and row.get("method") in STREAMED:
                paid += vouchers.get(row["deal"], 0)
            elif row["side"] == "buyer" and deal is not None and not deal.is_live:
                paid += deal.to_seller_units + deal.lost_bond_units(owner)
        if purse.balance.spent_units != paid:
            what = (
                f"the purse says that {purse.balance.spent_units} units are spent, and the chain"
                f" and the vouchers have {paid}"
            )
            yield Finding("book", what, owner)
        for thread in threads:
            deal = deals.get(thread.job_id) if thread.job_id else None
            locked = deal.locked_units(owner) if deal is not None else 0
            locked += vouchers.get(thread.deal, 0)
            if locked > purse.held().get(thread.deal, 0):
                what = f"{locked} units are locked, and the purse did not set them aside"
                yield Finding("book", what, owner, thread.deal)


def _paid_by_voucher(journal: Snapshot, owner: AgentId) -> dict[str, int]:
    """Return what a buyer has signed away for each deal."""
    found: dict[str, int] = {}
    for channel in journal.channels:
        if channel.agent == owner and channel.side is Role.BUYER:
            for deal, units in channel.paid().items():
                found[deal] = found.get(deal, 0) + units
    return found


def _phase(deal: Deal) -> str:
    return "closed" if deal.phase is Phase.CLOSED else deal.phase.name.lower()


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"
