"""The ledger against the escrow's own rules: whatever becomes of a deal, the accounts say it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.agents.ledger import COIN, TOKEN, Account, deals_of, ledger_of
from coase.escrow.backends.evm.moves import ChainFacts, Mined, Move
from coase.escrow.lifecycle import Job, apply
from coase.escrow.ports import ChainEvent, chain_terms
from coase.protocol.effects import Answer, Call, Dispute, Open, Poke, Rule, Settle, Submit
from coase.protocol.terms import Domain, Terms, Work
from coase.protocol.types import Phase

BUYER, SELLER, ARBITER, TOKEN_AT, ESCROW, BANK = ("0x" + c * 40 for c in "123456")
DOMAIN = Domain(31337, ESCROW)
START_S = 1_000
FUNDS = 10_000


def terms_of(price: int, bond: int, default: int) -> Terms:
    return Terms(
        buyer=BUYER,
        seller=SELLER,
        asset=TOKEN_AT,
        price_units=price,
        work=Work("echo-00000000"),
        arbiter=ARBITER,
        bond_units=bond,
        default_to_seller_units=default,
        lock_by_s=START_S + 50,
        deliver_by_s=START_S + 100,
        dispute_s=100,
        answer_s=100,
        rule_s=100,
        nonce=1,
    )


class Tale:
    """A deal that goes by the escrow's rules, and what a chain would tell of it."""

    def __init__(self, terms: Terms) -> None:
        self.terms, self.job, self.now_s = terms, Job(), START_S
        self.events: list[ChainEvent] = []
        self.moves: list[Move] = []
        self.held = dict.fromkeys((BUYER, SELLER, ARBITER), 0)
        for who in (BUYER, SELLER):
            self._move("0xgift" + who[-1], BANK, who, FUNDS)

    def _move(self, tx: str, source: str, to: str, units: int) -> None:
        index = len(self.moves)
        self.moves.append(Move(index, index, self.now_s, tx, source, to, units))
        for who, change in ((source, -units), (to, units)):
            if who in self.held:
                self.held[who] += change

    def go(self, call: Call, caller: str, *, blocked: str = "") -> None:
        """Make a step of the deal; whoever is ``blocked`` is not paid out."""
        self.now_s += 10
        step = apply(
            self.job,
            call,  # type: ignore[arg-type]
            caller=caller,
            now_s=self.now_s,
            domain=DOMAIN,
            asset=TOKEN_AT,
            verify=lambda *_: True,
        )
        self.job, tx = step.job, f"0x{len(self.events)}"
        for told in step.events:
            event = ChainEvent(
                kind=told.kind,
                job_id=b"job",
                block=len(self.events),
                log_index=0,
                time_s=self.now_s,
                tx_hash=tx,
                terms=chain_terms(self.terms) if told.kind == "opened" else None,
                to_seller_units=told.to_seller_units,
                to_buyer_units=told.to_buyer_units,
            )
            self.events.append(event)
        if step.pull is not None:
            self._move(tx, step.pull.owner, ESCROW, step.pull.units)
        for payout in step.payouts:
            if payout.to != blocked:
                self._move(tx, ESCROW, payout.to, payout.units)

    def facts(self, **more: Any) -> ChainFacts:
        nothing = dict.fromkeys(self.held, 0)
        facts = ChainFacts(
            head=99,
            time_s=self.now_s,
            units=self.held,
            wei=nothing,
            owed_units=nothing,
            nonces=nothing,
            held_units=0,
            events=tuple(self.events),
            moves=tuple(self.moves),
        )
        return replace(facts, **more)


ENDS = ("settle", "silent buyer", "silent seller", "ruled", "silent arbiter", "undelivered")


@given(
    price=st.integers(1, 5_000),
    parts=st.tuples(*[st.integers(0, 1_000)] * 3),
    end=st.sampled_from(ENDS),
    steps=st.integers(0, 4),
)
def test_the_accounts_say_what_the_escrow_does_at_every_step(
    price: int, parts: tuple[int, int, int], end: str, steps: int
) -> None:
    bond, default, share = (price * part // 1_000 for part in parts)
    terms = terms_of(price, bond, default)
    tale = Tale(terms)
    for call, caller in story(terms, end, share)[: steps + 1]:
        if isinstance(call, Poke):
            tale.now_s += 200
        tale.go(call, caller)
    facts = tale.facts()
    ledger = ledger_of(facts, escrow=ESCROW)
    (deal,) = deals_of(facts.events).values()
    assert ledger.unbalanced() == []
    assert deal.phase == tale.job.phase
    assert deal.is_live == (tale.job.locked_units > 0)
    sides = (BUYER, SELLER, ARBITER)
    for who in sides:
        assert ledger.sum(who, Account.WALLET) == facts.units[who]
        held = deal.locked_units(who) + deal.bond_units(who)
        assert ledger.sum(who, Account.ESCROW) == held
    assert sum(deal.locked_units(who) + deal.bond_units(who) for who in sides) == (
        tale.job.locked_units
    )
    if not deal.is_live:
        assert ledger.sum(BUYER, Account.PURCHASES) == tale.job.to_seller_units
        assert ledger.sum(SELLER, Account.SALES) == -tale.job.to_seller_units
        assert sum(ledger.sum(who, Account.ARBITRATION) for who in sides) == 0
        assert ledger.sum(ARBITER, Account.ARBITRATION) == -(bond if end == "ruled" else 0)
        assert all(deal.claimable_units(who, now_s=10**9) == 0 for who in sides)


def story(terms: Terms, end: str, share: int) -> list[tuple[Call, str]]:
    """The steps of a deal up to one of its ends."""
    beginning: list[tuple[Call, str]] = [(Open(terms, b"s"), BUYER)]
    if end == "undelivered":
        return [*beginning, (Poke(terms), BANK)]
    beginning.append((Submit(terms, b"r" * 32), SELLER))
    if end == "settle":
        return [*beginning, (Settle(terms, b"r" * 32, share, b"b", b"s"), BUYER)]
    if end == "silent buyer":
        return [*beginning, (Poke(terms), BANK)]
    beginning.append((Dispute(terms, b"e" * 32), BUYER))
    if terms.bond_units:
        if end == "silent seller":
            return [*beginning, (Poke(terms), BANK)]
        beginning.append((Answer(terms, b"e" * 32), SELLER))
    if end == "ruled":
        return [*beginning, (Rule(terms, share, 0, b"e" * 32), ARBITER)]
    return [*beginning, (Poke(terms), BANK)]


@pytest.mark.parametrize(
    ("end", "claims"),
    [
        ("undelivered", {BUYER: 900}),
        ("silent buyer", {SELLER: 900}),
        ("silent seller", {BUYER: 900 + 90}),
        ("silent arbiter", {BUYER: 600 + 90, SELLER: 300 + 90}),
    ],
)
def test_what_silence_gives_is_claimable_once_its_time_has_come(
    end: str, claims: dict[str, int]
) -> None:
    terms = terms_of(900, 90, 300)
    tale = Tale(terms)
    *steps, (poke, _) = story(terms, end, 0)
    for call, caller in steps:
        tale.go(call, caller)
    (deal,) = deals_of(tale.events).values()
    for who in (BUYER, SELLER, ARBITER):
        assert deal.claimable_units(who, now_s=deal.limit_s) == 0
        assert deal.claimable_units(who, now_s=deal.limit_s + 1) == claims.get(who, 0)
    before = dict(tale.held)
    tale.now_s = deal.limit_s
    tale.go(poke, BANK)
    gained = {who: units - before[who] for who, units in tale.held.items()}
    assert {who: units for who, units in gained.items() if units} == claims


def test_what_could_not_be_paid_out_stays_in_the_escrows_account() -> None:
    terms = terms_of(900, 0, 0)
    tale = Tale(terms)
    tale.go(Open(terms, b"s"), BUYER)
    tale.go(Submit(terms, b"r" * 32), SELLER)
    tale.go(Settle(terms, b"r" * 32, 900, b"b", b"s"), BUYER, blocked=SELLER)
    ledger = ledger_of(tale.facts(), escrow=ESCROW)
    assert ledger.sum(SELLER, Account.ESCROW) == 900
    assert ledger.sum(SELLER, Account.SALES) == -900
    assert ledger.sum(SELLER, Account.WALLET) == FUNDS


def test_fees_and_coin_are_booked_and_what_came_in_explains_the_rest() -> None:
    tale = Tale(terms_of(900, 0, 0))
    paid = Mined("0xa", 1, START_S + 5, BUYER, 0, True, 21, BANK, 500)
    failed = replace(paid, tx_hash="0xb", nonce=1, ok=False)
    strangers = replace(paid, tx_hash="0xc", sender=BANK)
    facts = tale.facts(
        wei={BUYER: 1_000, SELLER: 7, ARBITER: 0},
        mined={mined.tx_hash: mined for mined in (paid, failed, strangers)},
    )
    ledger = ledger_of(facts, escrow=ESCROW, withdrawals={"0xa": BUYER})
    assert ledger.unbalanced() == []
    assert ledger.sum(BUYER, Account.WALLET, COIN) == 1_000
    assert ledger.sum(BUYER, Account.GAS, COIN) == 42
    assert ledger.sum(BUYER, Account.WITHDRAWN, COIN) == 500
    assert ledger.sum(BUYER, Account.RECEIVED, COIN) == -1_542
    assert ledger.sum(SELLER, Account.RECEIVED, COIN) == -7
    assert ledger.sum(BANK, Account.GAS, COIN) == 0


def test_a_key_that_is_older_than_the_escrow_begins_with_what_it_had() -> None:
    tale = Tale(terms_of(900, 0, 0))
    facts = tale.facts(units={BUYER: FUNDS + 33, SELLER: FUNDS, ARBITER: 0})
    assert ledger_of(facts, escrow=ESCROW).sum(BUYER, Account.WALLET) == FUNDS
    ledger = ledger_of(facts, escrow=ESCROW, older=frozenset((BUYER,)))
    assert ledger.sum(BUYER, Account.WALLET, TOKEN) == FUNDS + 33
    assert ledger.unbalanced() == []


def test_a_deal_that_is_open_is_nobodys_gain() -> None:
    terms = terms_of(900, 90, 300)
    tale = Tale(terms)
    tale.go(Open(terms, b"s"), BUYER)
    (deal,) = deals_of(tale.events).values()
    assert (deal.phase, deal.other(BUYER), deal.other(SELLER)) == (Phase.WORKING, SELLER, BUYER)
    ledger = ledger_of(tale.facts(), escrow=ESCROW)
    for account in (Account.SALES, Account.PURCHASES, Account.ARBITRATION):
        assert ledger.sum(BUYER, account) == ledger.sum(SELLER, account) == 0
