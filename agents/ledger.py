"""The double-entry ledger of some keys, out of what the chain says, and vouchers, which it cannot.

Every entry is postings that add up to nothing. Of each key and asset the account ``wallet`` is what
the key holds, and ``escrow`` what the escrow holds for it: prices and bonds of open deals, and what
it owes. ``channels`` is what the channels hold for it: of its own deposits what nobody has claimed,
and what was claimed for it and not paid out; ``vouchers`` is what is signed and not claimed, which
a seller has and a buyer owes; ``stake`` is what lies in the vault. The other accounts say what for:
money in is negative there, money out positive, as an accountant expects of income and expenses.

What a voucher pays is a sale and a purchase when it is signed, as the journals have it: a claim
only turns the voucher into money. What is claimed beyond the journals' vouchers is booked then.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from coase.protocol.states import Role
from coase.protocol.types import AgentId, Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from coase.escrow.backends.evm.beside import ChannelFacts, StakeFacts
    from coase.escrow.backends.evm.moves import ChainFacts, Mined, Move
    from coase.escrow.ports import ChainEvent, ChainTerms, ChannelEvent

    from .promises import KeptChannel

_LIVE: Final = frozenset((Phase.WORKING, Phase.DELIVERED, Phase.DISPUTED, Phase.ANSWERED))
COIN: Final = "coin"
TOKEN: Final = "token"  # noqa: S105


class Account(StrEnum):
    """The accounts of one key. The first five are what it has, all others why."""

    WALLET = "wallet"
    ESCROW = "escrow"
    CHANNELS = "channels"
    VOUCHERS = "vouchers"
    STAKE = "stake"
    SALES = "sales"
    PURCHASES = "purchases"
    ARBITRATION = "arbitration"
    """What a ruling cost, or earned its arbiter."""
    SLASHED = "slashed"
    """What a seller lost of its stake, and what its buyer got of that."""
    GAS = "gas"
    RECEIVED = "received"
    """From outside of any deal: a faucet, an exchange, the owner."""
    SENT = "sent"
    """To outside of any deal, by a transaction that is not one of our withdrawals."""
    WITHDRAWN = "withdrawn"


@dataclass(frozen=True, slots=True)
class Posting:
    """One line: so much on one account of one key."""

    time_s: int
    entry: str
    """The same for all postings of one entry."""
    owner: AgentId
    account: Account
    asset: str
    """``token`` or ``coin``."""
    amount: int
    """In the smallest unit of the asset, with its sign."""
    counterparty: AgentId = ""
    job_id: bytes = b""
    tx_hash: str = ""


@dataclass(frozen=True, slots=True)
class Deal:
    """One deal as the log of the escrow tells it, and where its money is."""

    job_id: bytes
    terms: ChainTerms
    phase: Phase
    clock_s: int
    opened_tx: str
    bonds: tuple[AgentId, ...] = ()
    """Who has posted a bond."""
    to_seller_units: int = 0
    to_buyer_units: int = 0
    ruled: bool = False
    closed_s: int = 0
    closed_tx: str = ""

    @property
    def is_live(self) -> bool:
        """Whether the escrow holds its price."""
        return self.phase in _LIVE

    @property
    def limit_s(self) -> int:
        """When the outcome of silence comes, if it is open."""
        window_s = {
            Phase.DELIVERED: self.terms.dispute_s,
            Phase.DISPUTED: self.terms.answer_s,
            Phase.ANSWERED: self.terms.rule_s,
        }.get(self.phase, 0)
        return self.clock_s + window_s

    def other(self, owner: AgentId) -> AgentId:
        """Return the side that ``owner`` is not."""
        return self.terms.seller if owner == self.terms.buyer else self.terms.buyer

    def locked_units(self, owner: AgentId) -> int:
        """Return what of the price the escrow holds for ``owner``, who paid it."""
        return self.terms.price_units if self.is_live and owner == self.terms.buyer else 0

    def bond_units(self, owner: AgentId) -> int:
        """Return what bond of ``owner`` the escrow holds."""
        return self.terms.bond_units if self.is_live and owner in self.bonds else 0

    def claimable_units(self, owner: AgentId, *, now_s: int) -> int:
        """Return what silence gives to ``owner``, if its time has come: anybody may bring it."""
        if not self.is_live or now_s <= self.limit_s:
            return 0
        price = self.terms.price_units
        to_seller = {
            Phase.DELIVERED: price,
            Phase.ANSWERED: self.terms.default_to_seller_units,
        }.get(self.phase, 0)
        part = {self.terms.seller: to_seller, self.terms.buyer: price - to_seller}.get(owner, 0)
        return part + self.bond_units(owner)

    def lost_bond_units(self, owner: AgentId) -> int:
        """Return what a ruling took of the bond of ``owner``; less than nothing for the arbiter."""
        if not self.ruled:
            return 0
        bond, price = self.terms.bond_units, self.terms.price_units
        seller_lost = bond * self.to_buyer_units // price
        if owner == self.terms.arbiter:
            return -bond
        # Each side pays of the fee what it lost of the price; the dust goes with the buyer's part.
        return seller_lost if owner == self.terms.seller else bond - seller_lost


def deals_of(events: Iterable[ChainEvent]) -> dict[bytes, Deal]:
    """Return every deal that the log tells of."""
    deals: dict[bytes, Deal] = {}
    for event in events:
        if event.kind == "opened" and event.terms is not None:
            terms = event.terms
            deals[event.job_id] = Deal(
                event.job_id, terms, Phase.WORKING, terms.deliver_by_s, event.tx_hash
            )
        elif (deal := deals.get(event.job_id)) is not None:
            deals[event.job_id] = _after(deal, event)
    return deals


def _after(deal: Deal, event: ChainEvent) -> Deal:
    bond = deal.terms.bond_units
    match event.kind:
        case "submitted":
            return replace(deal, phase=Phase.DELIVERED, clock_s=event.time_s)
        case "disputed":
            phase = Phase.DISPUTED if bond else Phase.ANSWERED
            return replace(deal, phase=phase, clock_s=event.time_s, bonds=(deal.terms.buyer,))
        case "answered":
            bonds = (deal.terms.buyer, deal.terms.seller)
            return replace(deal, phase=Phase.ANSWERED, clock_s=event.time_s, bonds=bonds)
        case "ruled":
            return replace(deal, ruled=True)
        case "settled":
            return replace(
                deal,
                phase=Phase.CLOSED,
                to_seller_units=event.to_seller_units,
                to_buyer_units=event.to_buyer_units,
                closed_s=event.time_s,
                closed_tx=event.tx_hash,
            )
    return deal


@dataclass(slots=True)
class Ledger:
    """All postings of some keys, oldest first."""

    owners: frozenset[AgentId]
    postings: list[Posting] = field(default_factory=list)

    def sum(self, owner: AgentId, account: Account, asset: str = TOKEN) -> int:
        """Return the balance of one account."""
        return sum(
            line.amount
            for line in self.postings
            if (line.owner, line.account, line.asset) == (owner, account, asset)
        )

    def unbalanced(self) -> list[str]:
        """Return the entries whose postings do not add up to nothing: there must be none."""
        sums: dict[tuple[str, str], int] = {}
        for line in self.postings:
            key = line.entry, line.asset
            sums[key] = sums.get(key, 0) + line.amount
        return [entry for (entry, _), amount in sums.items() if amount]

    def post(self, line: Posting, why: Account) -> None:
        """Write ``line`` and its other half on the account ``why``."""
        self.postings += [line, replace(line, account=why, amount=-line.amount)]


def ledger_of(
    facts: ChainFacts,
    *,
    escrow: AgentId,
    withdrawals: Mapping[str, AgentId] | None = None,
    older: frozenset[AgentId] = frozenset(),
    kept: Sequence[KeptChannel] = (),
    job_ids: Mapping[str, bytes] | None = None,
) -> Ledger:
    """Return the ledger of the keys that ``facts`` are about.

    ``withdrawals`` are the hashes of transactions by which the owner took money out, and whose.
    ``kept`` are the channels as the journals have them, ``job_ids`` those of the deals that their
    vouchers pay for.
    ``older`` are keys that may have had money before the first block that was read: they begin
    with what explains what they have now.
    """
    ledger = Ledger(frozenset(facts.units))
    deals = deals_of(facts.events)
    by_tx: dict[str, list[tuple[str, Deal]]] = {}
    for event in facts.events:
        if (deal := deals.get(event.job_id)) is not None:
            by_tx.setdefault(event.tx_hash, []).append((event.kind, deal))
    ours = withdrawals or {}
    places, filled = _places(facts, escrow), _channels_by_tx(facts.channels)
    for move in facts.moves:
        for owner in dict.fromkeys((move.source, move.to)):
            if owner in ledger.owners and move.source != move.to:
                ends = _ends(facts.channels, filled.get(move.tx_hash, set()))
                told = _Told(by_tx.get(move.tx_hash, []), *ends)
                _post_move(ledger, move, owner, places, told, ours)
    for deal in deals.values():
        if deal.closed_tx:
            _post_outcome(ledger, deal)
    if facts.channels is not None:
        _post_claims(ledger, facts.channels, kept)
    for channel in kept:
        _post_vouchers(ledger, channel, job_ids or {})
    if facts.stakes is not None:
        _post_slices(ledger, facts.stakes, deals)
    for mined in facts.mined.values():
        _post_coin(ledger, mined, ours)
    for owner in sorted(older & ledger.owners):
        for account, units in held_at(facts, owner).items():
            _post_rest(ledger, owner, account, TOKEN, units, facts.time_s)
    for owner, wei in sorted(facts.wei.items()):
        # No log tells of coin that comes in: what is there and not explained has come from outside,
        # and was there before anything was done with it.
        _post_rest(ledger, owner, Account.WALLET, COIN, wei, facts.time_s)
    ledger.postings.sort(key=lambda line: line.time_s)  # Stable: halves stay together.
    return ledger


def held_at(facts: ChainFacts, owner: AgentId) -> dict[Account, int]:
    """Return what the chain says that a key has in its wallet, in channels and in the vault."""
    held = {Account.WALLET: facts.units[owner]}
    if (found := facts.channels) is not None:
        own = sum(
            one.view.free_units for one in found.channels.values() if one.config.payer == owner
        )
        held[Account.CHANNELS] = own + found.unpaid.get(owner, 0)
    if (stakes := facts.stakes) is not None and owner in stakes.stakes:
        held[Account.STAKE] = stakes.stakes[owner].bonded_units + stakes.owed.get(owner, 0)
    return held


def _places(facts: ChainFacts, escrow: AgentId) -> dict[AgentId, Account]:
    """Return whose transfers are neither income nor expense: money that moves between places."""
    found = {escrow: Account.ESCROW}
    if facts.channels is not None:
        found |= dict.fromkeys(facts.channels.takers, Account.CHANNELS)
    if facts.stakes is not None:
        found[facts.stakes.vault] = Account.STAKE
    return found


def _post_rest(
    ledger: Ledger, owner: AgentId, account: Account, asset: str, held: int, now_s: int
) -> None:
    """Post what a key holds and no posting explains, as received before all else."""
    rest = held - ledger.sum(owner, account, asset)
    if rest:
        first_s = min(
            (line.time_s for line in ledger.postings if line.owner == owner), default=now_s
        )
        line = Posting(first_s, f"{asset}/{account}/{owner}", owner, account, asset, rest)
        ledger.post(line, Account.RECEIVED)


@dataclass(frozen=True, slots=True)
class _Told:
    """What else the transaction of a transfer did."""

    deals: list[tuple[str, Deal]]
    payer: AgentId = ""
    receiver: AgentId = ""
    """The ends of the one channel that it filled or emptied."""


def _post_move(
    ledger: Ledger,
    move: Move,
    owner: AgentId,
    places: Mapping[AgentId, Account],
    told: _Told,
    withdrawals: Mapping[str, AgentId],
) -> None:
    comes = move.to == owner
    other, units = (move.source, move.units) if comes else (move.to, -move.units)
    job_id = b""
    if other in places:
        why = places[other]
        deal = _deal_behind(told.deals, owner, comes=comes) if why is Account.ESCROW else None
        if deal is not None:
            other, job_id = deal.other(owner), deal.job_id
        elif why is Account.CHANNELS and told.payer == owner:
            other = told.receiver
    elif comes:
        why = Account.RECEIVED
    else:
        ours = withdrawals.get(move.tx_hash) == owner
        why = Account.WITHDRAWN if ours else Account.SENT
    entry = f"{move.tx_hash}/{move.log_index}/{owner}"
    line = Posting(
        move.time_s, entry, owner, Account.WALLET, TOKEN, units, other, job_id, move.tx_hash
    )
    ledger.post(line, why)


def _channels_by_tx(facts: ChannelFacts | None) -> dict[str, set[bytes]]:
    """Return the channels that each transaction filled or emptied."""
    found: dict[str, set[bytes]] = {}
    for event in facts.events if facts is not None else ():
        if event.kind in ("deposited", "withdrawn", "refunded"):
            found.setdefault(event.tx_hash, set()).add(event.channel_id)
    return found


def _ends(facts: ChannelFacts | None, ids: set[bytes]) -> tuple[AgentId, AgentId]:
    """Return payer and receiver of a channel, if it is one alone."""
    if facts is None or len(ids) != 1:
        return "", ""
    config = facts.channels[next(iter(ids))].config
    return config.payer, config.receiver


def _deal_behind(told: list[tuple[str, Deal]], owner: AgentId, *, comes: bool) -> Deal | None:
    """Return the deal whose step moved money between ``owner`` and the escrow."""
    kinds = ("settled",) if comes else ("opened", "disputed", "answered")
    for kind, deal in told:
        sides = (deal.terms.buyer, deal.terms.seller, deal.terms.arbiter)
        if kind in kinds and owner in sides:
            return deal
    return None


def _post_outcome(ledger: Ledger, deal: Deal) -> None:
    """Say what a deal that is over was: a sale, a purchase, and who paid the arbiter."""
    terms, units = deal.terms, deal.to_seller_units
    shares = (
        (terms.buyer, -units, Account.PURCHASES),
        (terms.seller, units, Account.SALES),
        *((who, -deal.lost_bond_units(who), Account.ARBITRATION) for who in _sides(deal)),
    )
    for number, (owner, amount, why) in enumerate(shares):
        if owner not in ledger.owners or not amount:
            continue
        line = Posting(
            time_s=deal.closed_s,
            entry=f"{deal.job_id.hex()}/{number}/{owner}",
            owner=owner,
            account=Account.ESCROW,
            asset=TOKEN,
            amount=amount,
            counterparty=terms.arbiter if why is Account.ARBITRATION else deal.other(owner),
            job_id=deal.job_id,
            tx_hash=deal.closed_tx,
        )
        ledger.post(line, why)


def _sides(deal: Deal) -> tuple[AgentId, AgentId, AgentId]:
    return deal.terms.buyer, deal.terms.seller, deal.terms.arbiter


def _post_vouchers(ledger: Ledger, channel: KeptChannel, job_ids: Mapping[str, bytes]) -> None:
    """Post what vouchers have paid, deal by deal."""
    owner, buys = channel.agent, channel.side is Role.BUYER
    if owner not in ledger.owners:
        return
    for number, one in enumerate(channel.payments):
        line = Posting(
            time_s=one.at_ms // 1_000,
            entry=f"{channel.channel_id.hex()}/{number}/{owner}",
            owner=owner,
            account=Account.VOUCHERS,
            asset=TOKEN,
            amount=-one.units if buys else one.units,
            counterparty=channel.counterparty,
            job_id=job_ids.get(one.deal, b""),
        )
        ledger.post(line, Account.PURCHASES if buys else Account.SALES)


def _post_claims(ledger: Ledger, facts: ChannelFacts, kept: Sequence[KeptChannel]) -> None:
    """Post what was claimed: out of the payer's deposit, to the receiver's account there."""
    known = {(one.agent, one.channel_id): one for one in kept}
    for event in facts.events:
        config = facts.channels[event.channel_id].config
        if event.kind != "claimed":
            continue
        for owner, sign, why in (
            (config.payer, -1, Account.PURCHASES),
            (config.receiver, 1, Account.SALES),
        ):
            if owner not in ledger.owners:
                continue
            line = Posting(
                time_s=event.time_s,
                entry=f"{event.tx_hash}/{event.log_index}/{owner}/{why}",
                owner=owner,
                account=Account.CHANNELS,
                asset=TOKEN,
                amount=sign * event.units,
                counterparty=config.receiver if sign < 0 else config.payer,
                tx_hash=event.tx_hash,
            )
            promised = _promised(event, known.get((owner, event.channel_id)))
            for amount, account in (
                (promised, Account.VOUCHERS),
                (event.units - promised, why),
            ):
                if amount:
                    ledger.post(replace(line, amount=sign * amount), account)


def _promised(event: ChannelEvent, kept: KeptChannel | None) -> int:
    """Return what of a claim the journal has vouchers for; the rest it does not know of."""
    if kept is None:
        return 0
    first = max(event.total_units - event.units, kept.base_units)
    return max(0, min(event.total_units, kept.signed_units) - first)


def _post_slices(ledger: Ledger, facts: StakeFacts, deals: Mapping[bytes, Deal]) -> None:
    """Post what sellers lost of their stakes, and their buyers got."""
    for end in facts.ends:
        deal = deals.get(end.job_id)
        buyer = deal.terms.buyer if deal is not None else ""
        for owner, other, sign in ((end.seller, buyer, -1), (buyer, end.seller, 1)):
            if owner not in ledger.owners or not end.slashed_units:
                continue
            line = Posting(
                time_s=end.time_s,
                entry=f"{end.tx_hash}/{end.log_index}/{owner}",
                owner=owner,
                account=Account.STAKE,
                asset=TOKEN,
                amount=sign * end.slashed_units,
                counterparty=other,
                job_id=end.job_id,
                tx_hash=end.tx_hash,
            )
            ledger.post(line, Account.SLASHED)


def _post_coin(ledger: Ledger, mined: Mined, withdrawals: Mapping[str, AgentId]) -> None:
    """Post what a transaction of ours cost, and the coin that it carried."""
    owner = mined.sender
    if owner not in ledger.owners:
        return
    ours = withdrawals.get(mined.tx_hash) == owner
    moved = mined.value_wei if mined.ok and mined.to != owner else 0
    for number, (amount, why) in enumerate(
        ((mined.fee_wei, Account.GAS), (moved, Account.WITHDRAWN if ours else Account.SENT))
    ):
        if amount:
            entry = f"{mined.tx_hash}/coin/{number}"
            line = Posting(
                mined.time_s,
                entry,
                owner,
                Account.WALLET,
                COIN,
                -amount,
                mined.to if number else "",
                b"",
                mined.tx_hash,
            )
            ledger.post(line, why)
