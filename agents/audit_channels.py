"""The part of an audit that looks at channels and stakes: every difference in words, with what to
do about it.

What the chain says was read between two readings of the journals. A node writes down what it signs
before it signs, and what it sends before it sends: so a claim is covered by the second reading, and
what the first one relies on is on the chain already.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import BadSignature
from coase.protocol.states import Role
from coase.protocol.types import AgentId, units_to_text

from .ledger import Account, held_at

if TYPE_CHECKING:
    from collections.abc import Iterator

    from coase.escrow.backends.evm.beside import Channel, ChannelFacts, StakeFacts
    from coase.escrow.backends.evm.moves import ChainFacts
    from coase.escrow.ports import ChannelEvent
    from coase.protocol.types import Asset

    from .ledger import Deal, Ledger
    from .promises import KeptChannel
    from .snapshot import KeptTx, Snapshot
    from .wallet import Place

TAKE_BACK: Final = "coase withdraw --channels"
_TEXT_MAX: Final = 2**37  # Seconds; a time beyond it is none.


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that does not agree, or that is worth to be known."""

    where: str
    """``journal``, ``book``, ``chain`` or ``keys``: what to look at first."""
    what: str
    owner: AgentId = ""
    deal: str = ""
    channel: str = ""


@dataclass(slots=True)
class ChannelAudit:
    """Looks at the channels and stakes of some nodes; what it finds is in its two lists."""

    places: list[Place]
    """The nodes as they were before the chain was read."""
    later: list[Place]
    """The same after it."""
    facts: ChainFacts
    deals: dict[bytes, Deal]
    ledger: Ledger
    asset: Asset
    bad: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)

    def run(self) -> None:
        """Look at everything."""
        for journal in _journals(self.places):
            self._payments(journal)
        if self.facts.channels is not None:
            self._channels(self.facts.channels)
            self._held(self.facts.channels)
        elif any(journal.channels for journal in _journals(self.places)):
            what = "there are channels in the journals, and the network names no contract of any"
            self.notes.append(Finding("journal", what))
        if self.facts.stakes is not None:
            self._stakes(self.facts.stakes)
        self._booked()

    # ---- journal against journal ---------------------------------------------------------------

    def _payments(self, journal: Snapshot) -> None:
        """What vouchers pay is what the deals say that was paid."""
        paid: dict[tuple[AgentId, str], int] = {}
        for channel in journal.channels:
            for deal, units in channel.paid().items():
                key = (channel.agent, deal)
                paid[key] = paid.get(key, 0) + units
        told = {
            (row.agent, row.deal): row.row["to_seller_units"]
            for row in journal.closed
            if row.row.get("method") == "channel"
        }
        told |= {
            (one.holder, one.deal): one.paid_units
            for one in journal.bound()
            if one.method == "channel"
        }
        for agent, deal in dict.fromkeys((*told, *paid)):
            if not deal:
                continue  # What a voucher pays beyond all deals.
            vouchers, said = paid.get((agent, deal), 0), told.get((agent, deal))
            if said is None:
                what = (
                    f"vouchers over {self._text(vouchers)} pay for a deal that the journal does"
                    " not know: lines of it are missing"
                )
            elif said != vouchers:
                what = (
                    f"the deal says that {self._text(said)} were paid, and the vouchers booked to"
                    f" it make {self._text(vouchers)}"
                )
            else:
                continue
            self.bad.append(Finding("journal", what, agent, deal))

    # ---- channels --------------------------------------------------------------------------------

    def _channels(self, facts: ChannelFacts) -> None:
        later = {
            (one.agent, one.channel_id): one
            for journal in _journals(self.later)
            for one in journal.channels
        }
        sent = {
            tx.tx_hash: tx
            for journal in _journals([*self.places, *self.later])
            for tx in journal.transactions
        }
        for journal in _journals(self.places):
            for kept in journal.channels:
                self._kept(kept, later.get((kept.agent, kept.channel_id), kept), facts)
                self._deposits(kept, facts, sent)
                payers = later.get((kept.config.payer, kept.channel_id))
                if kept.side is Role.SELLER and payers is not None:
                    self._both(kept, payers)
        ours = set(self.facts.units)
        for channel_id, channel in facts.channels.items():
            payer = channel.config.payer
            if payer not in ours:
                continue
            if (payer, channel_id) not in later and channel.view.free_units:
                self._unknown(channel_id, channel, sent, facts)
            self._strange(channel_id, channel, sent, facts)

    def _kept(self, kept: KeptChannel, later: KeptChannel, facts: ChannelFacts) -> None:
        """One end of a channel, by its journal and by the chain."""
        side = kept.config.payer if kept.side is Role.BUYER else kept.config.receiver
        if kept.config.channel_id(facts.domain) != kept.channel_id or side != kept.agent:
            what = "what is kept under this id is another channel: the journal was changed"
            self._found(self.bad, "journal", what, kept)
            return
        channel = facts.channels.get(kept.channel_id)
        if channel is None:
            return  # Of another token: no deal of this network uses it.
        view, text = channel.view, self._text
        if kept.voucher is not None:
            self._signature(kept, facts)
        claimed = view.claimed_units
        if claimed > later.signed_units:
            known = "has signed" if kept.side is Role.BUYER else "has vouchers for"
            todo = (
                f"; its key signed elsewhere, or lines are missing: take the rest back with"
                f" {TAKE_BACK}"
                if kept.side is Role.BUYER
                else "; lines of it are missing"
            )
            what = (
                f"{text(claimed)} were claimed, and the journal {known} {text(later.signed_units)}"
                f" only{todo}"
            )
            self._found(self.bad, "journal", what, kept)
        if kept.signed_units > view.balance_units:
            short = kept.signed_units - view.balance_units
            todo = (
                f"sell nothing more to {kept.counterparty} until it has deposited that"
                if kept.side is Role.SELLER
                else "put nothing more into it: the seller was promised what is not there"
            )
            what = (
                f"vouchers go up to {text(kept.signed_units)}, and the channel holds"
                f" {text(view.balance_units)}: {text(short)} of them cannot be claimed; {todo}"
            )
            self._found(self.bad, "chain", what, kept)
        if kept.side is Role.SELLER:
            self._threatened(kept, channel)
            return
        if view.refund_nonce != kept.refund_nonce and not later.stopped:
            what = "the seller gave money back; nothing is signed there any more once the node sees"
            self._found(self.notes, "chain", what, kept)

    def _both(self, kept: KeptChannel, payers: KeptChannel) -> None:
        """Both ends are ours: what the seller holds, the buyer has promised."""
        if kept.signed_units > payers.signed_units:
            what = (
                f"the seller holds a voucher over {self._text(kept.signed_units)}, and the buyer's"
                f" journal has promised {self._text(payers.signed_units)}: lines of it are missing,"
                f" so take the rest back with {TAKE_BACK} before it signs on"
            )
            self._found(self.bad, "journal", what, payers)

    def _signature(self, kept: KeptChannel, facts: ChannelFacts) -> None:
        assert kept.voucher is not None
        try:
            signer = kept.voucher.signer(facts.domain)
        except BadSignature as error:
            signer = str(error)
        if signer != kept.config.payer_authorizer:
            what = (
                f"the voucher over {self._text(kept.voucher.units)} is not signed by"
                f" {kept.config.payer_authorizer}: nobody can claim it; the journal was changed"
            )
            self._found(self.bad, "journal", what, kept)

    def _threatened(self, kept: KeptChannel, channel: Channel) -> None:
        """A withdrawal that the other side has asked for: what of our vouchers it would take."""
        view, text = channel.view, self._text
        if not view.is_withdrawing:
            return
        takeable = _time(view.withdraw_since_s + channel.config.withdraw_delay_s)
        asked = f"the buyer takes back {text(view.withdrawing_units)}, from {takeable} on"
        worth = min(kept.signed_units, view.balance_units)
        lost = worth - max(view.solid_units, view.claimed_units)
        if lost > 0:
            what = (
                f"{asked}, and vouchers over {text(worth - view.claimed_units)} are not claimed:"
                f" {text(lost)} of them will be lost; claim now: {TAKE_BACK}, or start the node"
            )
            self._found(self.bad, "chain", what, kept)
        else:
            what = f"{asked}; all that is signed is covered, and nothing more is sold through it"
            self._found(self.notes, "chain", what, kept)

    def _deposits(self, kept: KeptChannel, facts: ChannelFacts, sent: dict[str, KeptTx]) -> None:
        """Every deposit that the journal has is on the chain."""
        made = {
            event.tx_hash
            for event in facts.events
            if event.channel_id == kept.channel_id and event.kind == "deposited"
        }
        for effect_id in sorted(kept.deposited):
            txs = [tx for tx in sent.values() if tx.effect_id == effect_id]
            if any(tx.tx_hash in made for tx in txs):
                continue
            if any(tx.nonce >= self.facts.nonces.get(tx.sender, 0) for tx in txs):
                continue  # It may still come, at the depth that is read here.
            units = kept.deposits.get(effect_id, 0)
            what = (
                f"the journal says that {self._text(units)} were deposited, and the chain has no"
                " such deposit: see that the network file names the chain that it was made on"
            )
            self._found(self.bad, "chain", what, kept)

    def _unknown(
        self,
        channel_id: bytes,
        channel: Channel,
        sent: dict[str, KeptTx],
        facts: ChannelFacts,
    ) -> None:
        """Money of ours in a channel of which no journal tells."""
        config, view = channel.config, channel.view
        ordered = view.is_withdrawing and self._asked(channel_id, facts, sent)
        if ordered:
            return  # It is on its way back; ``_strange`` says so.
        what = (
            f"a channel with {config.receiver} holds {self._text(view.free_units)} of this key, and"
            f" the journal does not know it: take it back with {TAKE_BACK}"
        )
        self._tell(channel_id, config.payer, "journal", what)

    def _strange(
        self,
        channel_id: bytes,
        channel: Channel,
        sent: dict[str, KeptTx],
        facts: ChannelFacts,
    ) -> None:
        """What was done with a channel that our keys pay into, by whom we do not know."""
        config, view = channel.config, channel.view
        for event in facts.events:
            if event.channel_id != channel_id or event.kind != "deposited":
                continue
            if event.tx_hash not in sent:
                what = (
                    f"{self._text(event.units)} were deposited by a transaction that none of these"
                    f" nodes sent ({event.tx_hash}): if it was not you, another has this key"
                )
                self._tell(channel_id, config.payer, "chain", what)
        if not view.is_withdrawing:
            return
        takeable_s = view.withdraw_since_s + config.withdraw_delay_s
        amount, when = self._text(view.withdrawing_units), _time(takeable_s)
        if self._asked(channel_id, facts, sent):
            due = takeable_s <= self.facts.time_s
            who = f"the node takes it then, or {TAKE_BACK}"
            what = f"{amount} can be taken back {'now' if due else f'from {when} on'}: {who}"
            self.notes.append(Finding("chain", what, config.payer, channel=channel_id.hex()))
            return
        what = (
            f"a withdrawal of {amount}, due {when}, was asked for by a transaction that none of"
            " these nodes sent: if it was not you, another has this key"
        )
        self._tell(channel_id, config.payer, "chain", what)

    def _asked(self, channel_id: bytes, facts: ChannelFacts, sent: dict[str, KeptTx]) -> bool:
        asked: list[ChannelEvent] = [
            event
            for event in facts.events
            if event.channel_id == channel_id and event.kind == "withdrawing"
        ]
        return bool(asked) and asked[-1].tx_hash in sent

    def _held(self, facts: ChannelFacts) -> None:
        """The contract has at least what it owes to our keys."""
        ours = sum(one.view.free_units for one in facts.channels.values())
        ours += sum(facts.unpaid.values())
        if facts.held_units < ours:
            what = (
                f"the channels' contract has {self._text(facts.held_units)}, and owes"
                f" {self._text(ours)} in the channels of these keys alone"
            )
            self.bad.append(Finding("chain", what))
        for owner, units in facts.unpaid.items():
            if units:
                what = (
                    f"{self._text(units)} were claimed and not paid out yet: a node that runs"
                    f" fetches them, or {TAKE_BACK}"
                )
                self.notes.append(Finding("chain", what, owner))

    # ---- stakes ----------------------------------------------------------------------------------

    def _stakes(self, facts: StakeFacts) -> None:
        """What the vault keeps reserved is what open deals need."""
        ours = sum(stake.bonded_units for stake in facts.stakes.values()) + sum(facts.owed.values())
        if facts.held_units < ours:
            what = f"the vault has {self._text(facts.held_units)}, and owes {self._text(ours)}"
            self.bad.append(Finding("chain", what))
        for owner, stake in facts.stakes.items():
            need = sum(
                deal.terms.stake_units
                for deal in self.deals.values()
                if deal.is_live and deal.terms.seller == owner and deal.terms.vault == facts.vault
            )
            reserved, text = stake.reserved_units, self._text
            if need > reserved:
                what = (
                    f"open deals stand on {text(need)} of stake, and the vault keeps"
                    f" {text(reserved)} reserved"
                )
                self.bad.append(Finding("chain", what, owner))
            elif reserved > need:
                what = (
                    f"{text(reserved - need)} of stake are reserved for deals that are over:"
                    " closing their slices frees them"
                )
                self.notes.append(Finding("chain", what, owner))
            if stake.unbonding_units and stake.unbond_at_s <= self.facts.time_s:
                what = f"{text(stake.unbonding_units)} of stake are unbonded and can be released"
                self.notes.append(Finding("chain", what, owner))

    # ---- the book --------------------------------------------------------------------------------

    def _booked(self) -> None:
        """The accounts of channels and vault are what these hold for each key."""
        names = {Account.CHANNELS: "channels hold", Account.STAKE: "vault holds"}
        for owner in self.facts.units:
            for account, units in held_at(self.facts, owner).items():
                booked = self.ledger.sum(owner, account)
                if account in names and booked != units:
                    what = (
                        f"the {names[account]} {self._text(units)} for the key, and"
                        f" {self._text(booked)} by what was paid in and out"
                    )
                    self.bad.append(Finding("book", what, owner))

    # ---- words -----------------------------------------------------------------------------------

    def _text(self, units: int) -> str:
        return f"{units_to_text(units, self.asset.decimals)} {self.asset.symbol}"

    def _found(self, into: list[Finding], where: str, what: str, kept: KeptChannel) -> None:
        into.append(Finding(where, what, kept.agent, channel=kept.channel_id.hex()))

    def _tell(self, channel_id: bytes, owner: AgentId, where: str, what: str) -> None:
        """Name what nobody here did; a key that was made elsewhere may have been used there."""
        imported = any(owner in place.imported for place in self.places)
        into = self.notes if imported else self.bad
        into.append(Finding(where, what, owner, channel=channel_id.hex()))


def _journals(places: list[Place]) -> Iterator[Snapshot]:
    return (place.journal for place in places if place.journal is not None)


def _time(time_s: int) -> str:
    if not 0 <= time_s < _TEXT_MAX:
        return "a time far away"
    return datetime.fromtimestamp(time_s, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
