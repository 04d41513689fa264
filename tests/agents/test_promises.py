"""What a journal tells of channels, and the book that follows: over streams that are lost, killed,
claimed, given back and taken back, on a chain in memory."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from coase.agents.ledger import Account, Ledger, held_at, ledger_of
from coase.agents.ports import Record
from coase.agents.promises import UNNAMED, KeptChannel, kept_channels
from coase.agents.steps import Step
from coase.escrow.backends.evm.beside import Channel, ChannelFacts
from coase.escrow.backends.evm.moves import ChainFacts, Move
from coase.escrow.voucher import AskWithdrawal, GiveBack, TakeWithdrawal
from coase.protocol.states import Role, State

from .desks import kind_of
from .test_streams import Streaming, over

if TYPE_CHECKING:
    from coase.agents.asks import Ask
    from coase.escrow.voucher import ChannelCall

BANK, ESCROW = "0x" + "b" * 40, "0x" + "44" * 20


class Counted(Streaming):
    """A market whose books are kept: every transfer is noted as a chain's log would tell it."""

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[Move] = []
        self._seen = dict(self.ledger.balances)
        for owner, units in self._seen.items():
            self._move("0xgift", BANK, owner, units)

    def _move(self, tx: str, source: str, to: str, units: int) -> None:
        now_s = self.now_ms // 1_000
        self.moves.append(Move(0, len(self.moves), now_s, tx, source, to, units))

    def note(self) -> None:
        """Note what was paid since: all of it to or from the channels' contract."""
        contract = self.ledger.domain.contract
        for owner, units in list(self.ledger.balances.items()):
            change = units - self._seen.get(owner, 0)
            if change and owner != contract:
                ends = (contract, owner) if change > 0 else (owner, contract)
                self._move(f"0x{self.ledger.number}", *ends, abs(change))
            self._seen[owner] = units

    def block(self) -> None:
        super().block()
        self.note()

    def do(self, call: ChannelCall, owner: str) -> None:
        """Send a call, and note what it moved."""
        self.ledger.execute(call, owner)
        self.note()

    def kept(self) -> list[KeptChannel]:
        """Return both ends of all channels, as their journals have them."""
        faults: list[str] = []
        seats = (self.buyer, self.seller)
        found = [one for seat in seats for one in kept_channels(seat.records, faults)]
        assert faults == []
        return found

    def facts(self) -> ChainFacts:
        """Return what a chain would say of the two."""
        owners = (self.buyer.desk.me, self.seller.desk.me)
        nothing = dict.fromkeys(owners, 0)
        configs = {one.channel_id: one.config for one in self.kept()}
        channels = ChannelFacts(
            domain=self.ledger.domain,
            channels={id_: Channel(c, self.ledger.view(id_)) for id_, c in configs.items()},
            unpaid={owner: self.ledger.unpaid(owner) for owner in owners},
            events=tuple(self.ledger.events),
            held_units=self.ledger.balances.get(self.ledger.domain.contract, 0),
        )
        return ChainFacts(
            head=self.ledger.number,
            time_s=self.ledger.time_s,
            units={owner: self.ledger.balances[owner] for owner in owners},
            wei=nothing,
            owed_units=nothing,
            nonces=nothing,
            held_units=0,
            moves=tuple(self.moves),
            channels=channels,
        )

    def book(self) -> Ledger:
        """Return the book, if it is the chain's and the journals'."""
        self.note()
        facts, kept = self.facts(), self.kept()
        book = ledger_of(facts, escrow=ESCROW, kept=kept)
        assert book.unbalanced() == []
        for owner in facts.units:
            for account, units in held_at(facts, owner).items():
                assert book.sum(owner, account) == units, (owner, account)
        for one in kept:
            claimed = self.ledger.view(one.channel_id).claimed_units
            one_sided = (1 if one.side is Role.SELLER else -1) * (one.signed_units - claimed)
            others = sum(
                (1 if k.side is Role.SELLER else -1)
                * (k.signed_units - self.ledger.view(k.channel_id).claimed_units)
                for k in kept
                if k.agent == one.agent and k is not one
            )
            assert book.sum(one.agent, Account.VOUCHERS) == one_sided + others
        return book

    def reborn(self) -> None:
        """Let the seller begin again with its journal."""
        again = self.restart(self.seller)
        again.desk.seller = self.wares(again)

    def bought(self, ask: Ask) -> int:
        """Wait for the end of a purchase, and return what it cost."""
        self.until(lambda: over(ask))
        assert ask.outcome is not None
        assert ask.outcome.state is State.SETTLED
        return ask.outcome.view.to_seller_units


@pytest.fixture
def market() -> Counted:
    return Counted()


def test_the_book_has_every_step_of_a_channel(market: Counted) -> None:
    buyer, seller = market.buyer.desk.me, market.seller.desk.me
    price = market.bought(market.buy())
    book = market.book()
    assert book.sum(buyer, Account.PURCHASES) == price == -book.sum(seller, Account.SALES)
    assert book.sum(seller, Account.VOUCHERS) == price
    market.claim()
    book = market.book()
    assert book.sum(seller, Account.VOUCHERS) == book.sum(buyer, Account.VOUCHERS) == 0
    assert book.sum(seller, Account.CHANNELS) == 0, "it is paid out"
    second = market.bought(market.buy())
    config = market.config()
    free = market.ledger.view(config.channel_id(market.ledger.domain)).free_units - second
    market.do(AskWithdrawal(config, free), buyer)
    market.book()
    market.do(GiveBack(config, 10), seller)
    market.ledger.time_s += config.withdraw_delay_s
    market.do(TakeWithdrawal(config), buyer)
    book = market.book()
    assert book.sum(buyer, Account.CHANNELS) == second, "that much is promised"
    market.claim()
    book = market.book()
    assert book.sum(buyer, Account.CHANNELS) == book.sum(seller, Account.CHANNELS) == 0
    assert book.sum(buyer, Account.PURCHASES) == price + second
    gained = market.facts().units[seller] - 10**9
    assert gained == price + second


@pytest.mark.parametrize("every", [2, 3])
@pytest.mark.parametrize("who", ["nobody", "seller", "buyer"])
def test_a_journal_tells_what_its_streams_know(market: Counted, who: str, every: int) -> None:
    seen = [0]

    def lost(to: str, wire: bytes) -> bool:
        seen[0] += kind_of(wire) == "voucher"
        return kind_of(wire) == "voucher" and seen[0] % every == 0

    market.lost = lost
    asks = [market.buy(), market.buy()]
    market.until(lambda: market.kinds().count("voucher") >= 4)
    if who == "seller":
        market.queue.clear()
        market.reborn()
    elif who == "buyer":
        market.queue.clear()
        market.restart(market.buyer)
    market.until(lambda: not market.buyer.desk.threads and not market.seller.desk.threads)
    market.claim()
    market.book()
    for one in market.kept():
        seat = market.buyer if one.side is Role.BUYER else market.seller
        line = seat.desk.streams.lines[one.channel_id]
        if line.buyer is not None:
            assert one.signed_units == line.buyer.signed_units
            assert one.stopped == line.buyer.stopped
        if line.seller is not None:
            assert one.voucher == line.seller.voucher
        assert sum(one.paid().values()) == one.signed_units
        assert not one.base_units
    paid = [one.paid() for one in market.kept()]
    assert {d: u for d, u in paid[0].items() if u} == {d: u for d, u in paid[1].items() if u}
    assert len(asks) == len([deal for deal in paid[0] if deal != UNNAMED])


def test_a_seller_whose_journal_is_lost_books_what_it_claims(market: Counted) -> None:
    first = market.bought(market.buy())
    market.seller.records.clear()
    market.reborn()
    second = market.bought(market.buy())
    (end,) = [one for one in market.kept() if one.side is Role.SELLER]
    assert (end.base_units, end.signed_units) == (first, first + second)
    seller, book = market.seller.desk.me, market.facts()
    ledger = ledger_of(book, escrow=ESCROW, kept=market.kept())
    assert ledger.sum(seller, Account.SALES) == -second
    market.claim()
    market.note()
    ledger = ledger_of(market.facts(), escrow=ESCROW, kept=market.kept())
    assert ledger.sum(seller, Account.SALES) == -first - second
    assert ledger.sum(seller, Account.VOUCHERS) == 0


def test_a_channel_that_is_left_pays_what_runs_and_nothing_new(market: Counted) -> None:
    first = market.buy()
    market.until(lambda: market.paid() > 0)
    channel_id = market.config().channel_id(market.ledger.domain)
    streams = market.buyer.desk.streams
    assert not streams.leave(channel_id), "a deal there is open"
    market.bought(first)
    assert streams.leave(channel_id)
    step = Step()
    streams.stop(channel_id, "home", step, now_ms=market.now_ms)
    market.perform(market.buyer, step)
    (kept,) = [one for one in market.kept() if one.side is Role.BUYER]
    assert kept.stopped == "home"
    market.bought(market.buy())
    assert [id_ for id_, line in streams.lines.items() if not line.buyer.stopped] != [channel_id]  # type: ignore[union-attr]
    assert len(streams.lines) == 2
    again = market.restart(market.buyer)
    assert again.desk.streams.lines[channel_id].buyer.stopped == "home"  # type: ignore[union-attr]


def test_records_that_do_not_follow_are_named(market: Counted) -> None:
    market.bought(market.buy())
    mine = [one for one in market.buyer.records if one.kind in ("channel", "voucher")]
    for bad in (
        mine[1:],
        [mine[0], replace(mine[1], data=b"{}")],
        [Record(mine[0].agent, mine[0].deal, "channel", 0, b'{"side":"judge"}')],
    ):
        faults: list[str] = []
        assert kept_channels(bad, faults) == []
        assert len(faults) == 1
        assert "do not follow" in faults[0]
