"""A principal's funds never change their sum, and no limit gives way."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from coase.escrow.book import (
    DAY_S,
    HOUR_S,
    Balance,
    Book,
    LockEndedOtherwise,
    LockExistsWithDifferentAmount,
    LockNotFound,
    Outcome,
    PostExceedsLock,
    SpendEnvelope,
    SpendLimits,
    Stage,
)
from coase.protocol.errors import (
    AssetMismatch,
    BookOutOfBalance,
    BudgetExhausted,
    LocalProtocolError,
)
from coase.protocol.types import Asset, Money

COASE = Asset(31337, "0x" + "70" * 20)
USDC = Asset(8453, "0x" + "71" * 20)
ANN, BOB = "0x" + "a0" * 20, "0x" + "b0" * 20


def coase(units: int) -> Money:
    return Money(COASE, units)


@pytest.fixture
def book() -> Book:
    book = Book()
    book.deposit("start", coase(1000))
    return book


# -------------------------------------------------------------------------------------- the book


def test_a_deal_from_reservation_to_settlement(book: Book) -> None:
    assert book.reserve("deal", coase(300)) is Outcome.DONE
    assert book.balance(COASE) == Balance(700, 300, 0, 1000)
    assert book.lock("deal", coase(300)) is Outcome.DONE
    assert book.balance(COASE) == Balance(700, 300, 0, 1000)
    assert book.post("deal", coase(120)) is Outcome.DONE
    assert book.balance(COASE) == Balance(880, 0, 120, 1000)
    book.audit()


def test_a_refund_gives_all_of_it_back(book: Book) -> None:
    book.lock("deal", coase(300))
    assert book.void("deal") is Outcome.DONE
    assert book.balance(COASE) == Balance(1000, 0, 0, 1000)
    found = book.find("deal")
    assert found is not None
    assert found.stage is Stage.VOIDED


def test_the_same_call_twice_changes_nothing(book: Book) -> None:
    for call, move_id, units in (
        (book.deposit, "more", 5),
        (book.withdraw, "less", 7),
        (book.reserve, "deal", 300),
        (book.lock, "deal", 300),
        (book.post, "deal", 120),
    ):
        assert call(move_id, coase(units)) is Outcome.DONE
        before = book.balance(COASE)
        assert call(move_id, coase(units)) is Outcome.EXISTS
        assert book.balance(COASE) == before
    book.lock("other", coase(1))
    book.void("other")
    assert book.void("other") is Outcome.EXISTS
    # Replayed from its beginning, a finished deal stays finished.
    assert book.reserve("deal", coase(300)) is Outcome.EXISTS
    assert book.lock("deal", coase(300)) is Outcome.EXISTS
    book.audit()


def test_the_same_id_with_other_content_is_an_error(book: Book) -> None:
    book.lock("deal", coase(300))
    with pytest.raises(LockExistsWithDifferentAmount):
        book.lock("deal", coase(301))
    with pytest.raises(LockExistsWithDifferentAmount):
        book.reserve("deal", Money(USDC, 300))
    with pytest.raises(LockExistsWithDifferentAmount):
        book.deposit("start", coase(999))
    with pytest.raises(LockExistsWithDifferentAmount):
        book.withdraw("start", coase(1000))
    with pytest.raises(LockNotFound):
        book.post("another", coase(1))
    with pytest.raises(LockNotFound):
        book.void("another")
    with pytest.raises(PostExceedsLock):
        book.post("deal", coase(301))
    with pytest.raises(AssetMismatch):
        book.post("deal", Money(USDC, 1))
    book.post("deal", coase(300))
    with pytest.raises(LockEndedOtherwise):
        book.post("deal", coase(299))
    with pytest.raises(LockEndedOtherwise):
        book.void("deal")
    assert book.balance(COASE) == Balance(700, 0, 300, 1000)


def test_a_voided_lock_cannot_be_spent_even_in_part(book: Book) -> None:
    book.lock("deal", coase(300))
    book.void("deal")
    for units in (0, 1):
        with pytest.raises(LockEndedOtherwise):
            book.post("deal", coase(units))


def test_what_is_not_there_cannot_be_locked(book: Book) -> None:
    book.reserve("deal", coase(900))
    for call in (book.reserve, book.lock, book.withdraw):
        with pytest.raises(BudgetExhausted) as caught:
            call("next", coase(101))
        assert (caught.value.asked_units, caught.value.left_units) == (101, 100)
    assert book.lock("next", coase(100)) is Outcome.DONE
    with pytest.raises(BudgetExhausted):
        book.lock("dollars", Money(USDC, 1))


def test_amounts_are_not_negative(book: Book) -> None:
    for call in (book.deposit, book.withdraw, book.reserve, book.lock):
        with pytest.raises(LocalProtocolError):
            call("x", coase(-1))
    book.lock("deal", coase(3))
    with pytest.raises(LocalProtocolError):
        book.post("deal", coase(-1))


def test_a_book_that_does_not_add_up_says_so(book: Book) -> None:
    book.lock("deal", coase(3))
    good = book.balance(COASE)
    book._balances[COASE] = replace(good, available_units=good.available_units + 1)
    with pytest.raises(BookOutOfBalance):
        book.lock("next", coase(1))
    # The sums may agree and the entries not.
    book._balances[COASE] = replace(good, available_units=998, locked_units=2)
    with pytest.raises(BookOutOfBalance):
        book.audit()


class BookMachine(RuleBasedStateMachine):
    """Any calls in any order: sums hold, and a naive list of entries agrees."""

    def __init__(self) -> None:
        super().__init__()
        self.book = Book()
        self.transfers = 0
        self.deposited = {COASE: 0, USDC: 0}
        self.locks: dict[str, tuple[Money, int | None]] = {}

    assets = st.sampled_from([COASE, USDC])
    ids = st.sampled_from(["a", "b", "c", "d"])
    units = st.integers(0, 40)

    @rule(asset=assets, units=units)
    def deposit(self, asset: Asset, units: int) -> None:
        self.transfers += 1
        self.book.deposit(f"in {self.transfers}", Money(asset, units))
        self.deposited[asset] += units

    @rule(lock_id=ids, asset=assets, units=units, reserve=st.booleans())
    def hold(self, lock_id: str, asset: Asset, units: int, reserve: bool) -> None:
        amount = Money(asset, units)
        call = self.book.reserve if reserve else self.book.lock
        free = self.book.balance(asset).available_units
        if lock_id in self.locks and self.locks[lock_id][0] != amount:
            with pytest.raises(LockExistsWithDifferentAmount):
                call(lock_id, amount)
        elif lock_id in self.locks:
            call(lock_id, amount)
        elif units > free:
            with pytest.raises(BudgetExhausted):
                call(lock_id, amount)
        else:
            assert call(lock_id, amount) is Outcome.DONE
            self.locks[lock_id] = (amount, None)

    @rule(lock_id=ids, units=units)
    def post(self, lock_id: str, units: int) -> None:
        amount, spent = self.locks.get(lock_id, (coase(0), None))
        if lock_id in self.locks and spent == units:
            assert self.book.post(lock_id, Money(amount.asset, units)) is Outcome.EXISTS
        elif lock_id not in self.locks or spent is not None or units > amount.units:
            with pytest.raises((LockNotFound, LockEndedOtherwise, PostExceedsLock)):
                self.book.post(lock_id, Money(amount.asset, units))
        else:
            self.book.post(lock_id, Money(amount.asset, units))
            self.locks[lock_id] = (amount, units)

    @invariant()
    def it_adds_up(self) -> None:
        self.book.audit()
        for asset, deposited in self.deposited.items():
            own = [(m.units, s) for m, s in self.locks.values() if m.asset == asset]
            locked = sum(units for units, spent in own if spent is None)
            spent = sum(spent for _, spent in own if spent is not None)
            assert self.book.balance(asset) == Balance(
                deposited - locked - spent, locked, spent, deposited
            )


TestBookMachine = BookMachine.TestCase


# ----------------------------------------------------------------------------------- the envelope


def envelope(**limits: int) -> SpendEnvelope:
    return SpendEnvelope(COASE, SpendLimits(**limits))


def test_without_limits_there_is_no_limit() -> None:
    free = envelope()
    assert free.left_units(counterparty=ANN, now_s=0) is None
    free.reserve("a", coase(10**30), counterparty=ANN, now_s=0)


@pytest.mark.parametrize(
    ("limit", "name"),
    [
        ("per_deal_units", "per deal"),
        ("per_counterparty_units", "per counterparty"),
        ("per_hour_units", "per hour"),
        ("per_day_units", "per day"),
        ("in_all_units", "in all"),
    ],
)
def test_each_limit_says_its_name_and_counts_nothing(limit: str, name: str) -> None:
    spending = envelope(**{limit: 100})
    with pytest.raises(BudgetExhausted) as caught:
        spending.reserve("a", coase(101), counterparty=ANN, now_s=0)
    assert caught.value.limit == f"agent: {name}"
    assert caught.value.left_units == 100
    assert spending.left_units(counterparty=ANN, now_s=0) == 100
    spending.reserve("a", coase(100), counterparty=ANN, now_s=0)
    assert spending.left_units(counterparty=ANN, now_s=0) == (100 if limit[:8] == "per_deal" else 0)


def test_the_hour_slides() -> None:
    spending = envelope(per_hour_units=100)
    spending.reserve("a", coase(60), counterparty=ANN, now_s=1000)
    spending.reserve("b", coase(40), counterparty=ANN, now_s=2000)
    for now_s in (2000, 1000 + HOUR_S - 1):
        with pytest.raises(BudgetExhausted):
            spending.reserve("c", coase(1), counterparty=ANN, now_s=now_s)
    spending.reserve("c", coase(60), counterparty=ANN, now_s=1000 + HOUR_S)
    # A clock that goes back gives nothing back.
    assert spending.left_units(counterparty=ANN, now_s=0) == 0
    assert spending.left_units(counterparty=ANN, now_s=2000 + HOUR_S) == 40


def test_a_clock_that_goes_back_shortens_no_hour() -> None:
    spending = envelope(per_hour_units=100)
    assert spending.left_units(counterparty=ANN, now_s=5000) == 100
    spending.reserve("a", coase(100), counterparty=ANN, now_s=1000)
    assert spending.left_units(counterparty=ANN, now_s=5000 + HOUR_S - 1) == 0


@pytest.mark.parametrize(
    ("limit", "span_s"), [("per_hour_units", HOUR_S), ("per_day_units", DAY_S)]
)
def test_what_left_its_window_gives_nothing_back(limit: str, span_s: int) -> None:
    spending = envelope(**{limit: 100})
    spending.reserve("a", coase(80), counterparty=ANN, now_s=0)
    assert spending.left_units(counterparty=ANN, now_s=span_s) == 100
    spending.settle("a", coase(10), now_s=span_s)
    assert spending.left_units(counterparty=ANN, now_s=span_s) == 100


def test_only_what_was_spent_in_the_end_counts() -> None:
    spending = envelope(per_hour_units=100, per_day_units=100, per_counterparty_units=100)
    spending.reserve("a", coase(100), counterparty=ANN, now_s=0)
    assert spending.settle("a", coase(30), now_s=5) is Outcome.DONE
    assert spending.settle("a", coase(30), now_s=5) is Outcome.EXISTS
    assert spending.left_units(counterparty=ANN, now_s=5) == 70
    spending.reserve("b", coase(70), counterparty=ANN, now_s=5)
    spending.release("b", now_s=6)
    assert spending.left_units(counterparty=ANN, now_s=6) == 70
    assert spending.left_units(counterparty=ANN, now_s=DAY_S) == 100


def test_an_open_deal_weighs_on_its_counterparty_until_it_is_closed() -> None:
    spending = envelope(per_counterparty_units=100, per_day_units=1000)
    spending.reserve("a", coase(80), counterparty=ANN, now_s=0)
    assert spending.left_units(counterparty=BOB, now_s=0) == 100
    assert spending.left_units(counterparty=ANN, now_s=3 * DAY_S) == 20
    spending.settle("a", coase(80), now_s=3 * DAY_S)
    assert spending.left_units(counterparty=ANN, now_s=3 * DAY_S) == 100


def test_the_sum_of_all_never_comes_back() -> None:
    spending = envelope(in_all_units=100)
    spending.reserve("a", coase(60), counterparty=ANN, now_s=0)
    spending.settle("a", coase(50), now_s=0)
    assert spending.left_units(counterparty=ANN, now_s=100 * DAY_S) == 50
    # Forgotten one by one, remembered in the sum.
    with pytest.raises(LockNotFound):
        spending.settle("a", coase(50), now_s=100 * DAY_S)


def test_ids_stand_for_one_deal() -> None:
    spending = envelope(per_day_units=100)
    assert spending.reserve("a", coase(10), counterparty=ANN, now_s=0) is Outcome.DONE
    assert spending.reserve("a", coase(10), counterparty=ANN, now_s=0) is Outcome.EXISTS
    for units, counterparty in ((11, ANN), (10, BOB)):
        with pytest.raises(LockExistsWithDifferentAmount):
            spending.reserve("a", coase(units), counterparty=counterparty, now_s=0)
    with pytest.raises(PostExceedsLock):
        spending.settle("a", coase(11), now_s=0)
    spending.settle("a", coase(9), now_s=0)
    with pytest.raises(LockEndedOtherwise):
        spending.settle("a", coase(10), now_s=0)
    with pytest.raises(LockNotFound):
        spending.release("b", now_s=0)
    assert spending.left_units(counterparty=ANN, now_s=0) == 91


def test_a_swarm_shares_the_limits_above_it() -> None:
    root = SpendEnvelope(COASE, SpendLimits(per_day_units=100), name="swarm")
    limits = SpendLimits(per_day_units=80)
    first = SpendEnvelope(COASE, limits, name="first", parent=root)
    second = SpendEnvelope(COASE, limits, name="second", parent=root)
    first.reserve("a", coase(70), counterparty=ANN, now_s=0)
    with pytest.raises(BudgetExhausted, match="swarm: per day"):
        second.reserve("b", coase(31), counterparty=ANN, now_s=0)
    with pytest.raises(BudgetExhausted, match="first: per day"):
        first.reserve("c", coase(11), counterparty=ANN, now_s=0)
    # A refusal above counts nothing below.
    assert second.left_units(counterparty=ANN, now_s=0) == 30
    second.reserve("b", coase(30), counterparty=ANN, now_s=0)
    first.release("a", now_s=1)
    assert root.left_units(counterparty=ANN, now_s=1) == 70
    assert second.left_units(counterparty=ANN, now_s=1) == 50
    with pytest.raises(LockExistsWithDifferentAmount):
        first.reserve("b", coase(30), counterparty=ANN, now_s=1)


def test_an_envelope_is_of_one_asset() -> None:
    spending = envelope(per_day_units=100)
    with pytest.raises(AssetMismatch):
        spending.reserve("a", Money(USDC, 1), counterparty=ANN, now_s=0)
    spending.reserve("a", coase(1), counterparty=ANN, now_s=0)
    with pytest.raises(AssetMismatch):
        spending.settle("a", Money(USDC, 1), now_s=0)
    with pytest.raises(AssetMismatch):
        SpendEnvelope(USDC, SpendLimits(), parent=spending)
    with pytest.raises(LocalProtocolError):
        spending.reserve("b", coase(-1), counterparty=ANN, now_s=0)


def test_what_cost_nothing_is_forgotten_without_a_trace() -> None:
    spending = envelope(per_hour_units=100, per_day_units=150, per_counterparty_units=90)
    for name in ("a", "b"):
        spending.reserve(name, coase(0), counterparty=ANN, now_s=0)
        spending.settle(name, coase(0), now_s=0)
    spending.reserve("c", coase(5), counterparty=ANN, now_s=DAY_S // 2)
    assert spending.left_units(counterparty=ANN, now_s=DAY_S + 1) == 85
    assert spending.left_units(counterparty=ANN, now_s=2 * DAY_S) == 85
    assert spending.left_units(counterparty=BOB, now_s=2 * DAY_S) == 90


STEPS = st.lists(
    st.tuples(
        st.integers(0, DAY_S // 3), st.integers(0, 60), st.booleans(), st.sampled_from([ANN, BOB])
    ),
    max_size=30,
)


@given(steps=STEPS)
def test_no_window_ever_holds_more_than_its_limit(steps: list[tuple[int, int, bool, str]]) -> None:
    """Against a list of everything that went through, counted again each time."""
    spending = envelope(per_hour_units=100, per_day_units=150, per_counterparty_units=90)
    told: list[list[int | str | bool]] = []  # at, units, counterparty, open
    now_s = 0
    for number, (wait_s, units, closes, counterparty) in enumerate(steps):
        now_s += wait_s
        hour = sum(int(t[1]) for t in told if int(t[0]) > now_s - HOUR_S)
        day = sum(int(t[1]) for t in told if int(t[0]) > now_s - DAY_S)
        theirs = sum(
            int(t[1]) for t in told if t[2] == counterparty and (int(t[0]) > now_s - DAY_S or t[3])
        )
        room = min(100 - hour, 150 - day, 90 - theirs)
        assert spending.left_units(counterparty=counterparty, now_s=now_s) == room
        if units > room:
            with pytest.raises(BudgetExhausted):
                spending.reserve(str(number), coase(units), counterparty=counterparty, now_s=now_s)
            continue
        spending.reserve(str(number), coase(units), counterparty=counterparty, now_s=now_s)
        if closes:
            spending.settle(str(number), coase(units // 2), now_s=now_s)
        told.append([now_s, units // 2 if closes else units, counterparty, not closes])
