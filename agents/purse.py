"""What one agent may spend: its budget, what is promised or locked of it, and what is gone.

A purse is asked before an accept is signed and again before money is locked, so a limit holds
where the key signs, whatever a strategy or a model decides. It keeps nothing of its own on disk:
what it holds follows from the deals in the journal, open and closed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from coase.escrow.book import Balance, Book, SpendEnvelope, SpendLimits, Stage
from coase.escrow.voucher import Fund
from coase.protocol.effects import Dispute, Open
from coase.protocol.errors import BudgetExhausted, ConfigurationError
from coase.protocol.messages import STREAMED
from coase.protocol.states import BOUND, Role, State
from coase.protocol.types import ZERO_BYTES32, AgentId, Asset, How, Money

from .history import charge_of_row

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coase.escrow.voucher import ChannelCall
    from coase.protocol.effects import Call
    from coase.protocol.session import Thread
    from coase.protocol.terms import Terms

# An ended lock takes about a kilobyte of memory, and an agent may live for years.
ENDED_MAX: Final = 10_000
_DECIMAL: Final = re.compile(r"[0-9]{1,38}(\.[0-9]{1,36})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much an agent may spend, in decimal text of whole tokens; None is no such limit.

    A deal counts with its price and with the bond that disputing it would take. Hours and days
    slide. What comes back, comes back to every limit.

    :raises ConfigurationError: if a limit is no plain decimal such as ``"0.5"``
    """

    total: str | None = None
    per_deal: str | None = None
    per_counterparty: str | None = None
    """With one counterparty: what is still open, and what was spent within a day."""
    per_hour: str | None = None
    per_day: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            text = getattr(self, field.name)
            if text is not None and not (isinstance(text, str) and _DECIMAL.fullmatch(text)):
                raise ConfigurationError(
                    f"budget: {field.name} is {text!r}; write a plain decimal in quotes such as"
                    " '0.5', or None for no limit"
                )

    @classmethod
    def of(cls, budget: Budget | str | None) -> Budget:
        """Return a budget; text is its total, None is one without limits."""
        return budget if isinstance(budget, Budget) else cls(total=budget)

    def limits(self, asset: Asset) -> SpendLimits:
        """Return the limits in units of ``asset``.

        :raises ConfigurationError: if one is finer than the asset's smallest unit
        """

        def units(text: str | None) -> int | None:
            return None if text is None else asset.money(text).units

        return SpendLimits(
            per_deal_units=units(self.per_deal),
            per_counterparty_units=units(self.per_counterparty),
            per_hour_units=units(self.per_hour),
            per_day_units=units(self.per_day),
            in_all_units=units(self.total),
        )


class OpenPurse:
    """A purse without limits, and the base of those that have some."""

    @property
    def limited(self) -> bool:
        """Whether there is any limit at all."""
        return False

    def require(self, deal: str, units: int) -> None:
        """Return if a key may sign ``units`` of ``deal`` away: asked at the key, when it signs.

        :raises BudgetExhausted: if the purse did not set so much aside for it
        """

    def held(self) -> dict[str, int]:
        """Return what is promised or locked now, deal by deal."""
        return {}

    def paused(self, *, now_ms: int) -> str:
        """Return why nothing can be bought now, or nothing if something can."""
        return ""

    def check(self, *, now_ms: int, account: str = "") -> None:
        """Return if anything at all may be bought now.

        :raises BudgetExhausted: if some limit has nothing left
        """

    def reserve(
        self, deal: str, units: int, counterparty: AgentId, *, now_ms: int, account: str = ""
    ) -> None:
        """Set ``units`` aside for ``deal``; the same deal again changes nothing.

        :raises BudgetExhausted: if a limit is reached; nothing was set aside
        """

    def lock(self, deal: str, *, now_ms: int) -> None:
        """Note that what was set aside goes into the escrow now. Safe to repeat.

        :raises BudgetExhausted: if nothing was set aside for ``deal``
        """

    def spend(self, deal: str, units: int, *, now_ms: int) -> None:
        """Note that ``deal`` is over and cost ``units``; the rest is free again."""
        self.release(deal, now_ms=now_ms)

    def release(self, deal: str, *, now_ms: int) -> None:
        """Give all back that was set aside for ``deal``, if anything was."""

    def rooms(self, counterparty: AgentId, *, now_ms: int, account: str = "") -> dict[str, int]:
        """Return what each limit that concerns a deal with ``counterparty`` has left."""
        return {}

    def shortfall(
        self, units: int, counterparty: AgentId, *, now_ms: int, account: str = ""
    ) -> BudgetExhausted | None:
        """Return which limit does not cover ``units``, or None if all do."""
        return None

    def recall(self, threads: Iterable[Thread], summaries: Iterable[Mapping[str, Any]]) -> None:
        """Take in what is promised, locked and spent according to the journal."""
        for thread in threads:
            if thread.side is Role.BUYER and thread.accept_id:
                units, at_ms = exposure(thread.agreed_terms), accepted_ms(thread)
                self.reserve(
                    thread.deal,
                    units,
                    thread.counterparty,
                    now_ms=at_ms,
                    account=thread.charge.account,
                )


class Purse(OpenPurse):
    """A purse with the limits of one budget, and of all purses above it."""

    def __init__(
        self,
        budget: Budget,
        asset: Asset,
        *,
        name: str = "agent",
        parent: SpendEnvelope | None = None,
    ) -> None:
        self.asset = asset
        self.book = Book()
        self.envelope = SpendEnvelope(asset, budget.limits(asset), name=name, parent=parent)
        self.accounts: dict[str, SpendEnvelope] = {}
        """Of those within this purse that have limits of their own, below its own."""
        self._open: dict[str, _Held] = {}
        self._count = 0
        self._ended = 0
        self._changes = 0
        if self.limits.in_all_units is not None:
            self.book.deposit("budget", Money(asset, self.limits.in_all_units))

    @property
    def limits(self) -> SpendLimits:
        """The limits of this purse alone."""
        return self.envelope.limits

    @property
    def limited(self) -> bool:
        """Whether there is any limit, of this purse, above it, or of one of its accounts."""
        return any(own.limited for own in (self.envelope, *self.accounts.values()))

    def change(self, budget: Budget) -> None:
        """Keep to another budget from now on; what is spent and promised counts against it.

        :raises ConfigurationError: if a limit is finer than the asset's smallest unit
        """
        limits = budget.limits(self.asset)
        if limits == self.limits:
            return
        self.envelope.change(limits)
        self._changes += 1
        balance, name = self.balance, f"budget {self._changes}"
        total = limits.in_all_units
        # Without a total nothing waits in the book, nor with less than is promised already.
        wanted = balance.spent_units + balance.locked_units if total is None else total
        more = wanted - balance.deposited_units
        if more > 0:
            self.book.deposit(name, Money(self.asset, more))
        elif less := min(-more, balance.available_units):
            self.book.withdraw(name, Money(self.asset, less))

    def set_account(self, name: str, budget: Budget) -> None:
        """Keep the account ``name`` to ``budget`` from now on; what it spent counts against it.

        :raises ConfigurationError: if a limit is finer than the asset's smallest unit
        """
        self._account(name).change(budget.limits(self.asset))

    def held_by(self, account: str) -> int:
        """Return what is promised or locked now by one account."""
        return sum(held.units for held in self._open.values() if held.account == account)

    def used_by(self, account: str) -> int:
        """Return what one account has spent so far, with what it has promised."""
        return self._account(account).used_units

    def _account(self, name: str) -> SpendEnvelope:
        """Return the limits of an account; one that nobody has named has none of its own."""
        if not name:
            return self.envelope
        if name not in self.accounts:
            self.accounts[name] = SpendEnvelope(
                self.asset, SpendLimits(), name=f"account {name}", parent=self.envelope
            )
        return self.accounts[name]

    @property
    def balance(self) -> Balance:
        """What is available, promised or locked, and spent; without a total nothing waits."""
        return self.book.balance(self.asset)

    def held(self) -> dict[str, int]:
        """Return what is promised or locked now, deal by deal."""
        return {deal: held.units for deal, held in self._open.items()}

    @property
    def open_units(self) -> int:
        """What is promised or locked now, in all."""
        return sum(self.held().values())

    def check(self, *, now_ms: int, account: str = "") -> None:
        """Return if anything at all may be bought now.

        :raises BudgetExhausted: if some limit has nothing left
        """
        short = self.shortfall(1, "", now_ms=now_ms, account=account)
        if short is not None:
            raise short

    def reserve(
        self, deal: str, units: int, counterparty: AgentId, *, now_ms: int, account: str = ""
    ) -> None:
        """Set ``units`` aside for ``deal``; the same deal again changes nothing.

        :raises BudgetExhausted: if a limit is reached; nothing was set aside
        """
        if deal in self._open:
            return
        held, amount = self._next(deal, units, account), Money(self.asset, units)
        self._account(account).reserve(
            held.lock_id, amount, counterparty=counterparty, now_s=now_ms // 1_000
        )
        self._hold(deal, held)

    def lock(self, deal: str, *, now_ms: int) -> None:
        """Note that what was set aside goes into the escrow now. Safe to repeat.

        :raises BudgetExhausted: if nothing was set aside for ``deal``
        """
        held = self._open.get(deal)
        if held is None:
            raise BudgetExhausted(limit=f"reserved for {deal}", asked_units=1, left_units=0)
        self.book.lock(held.lock_id, Money(self.asset, held.units))

    def require(self, deal: str, units: int) -> None:
        """Return if a key may sign ``units`` of ``deal`` away: asked at the key, when it signs.

        :raises BudgetExhausted: if the purse did not set so much aside for it
        """
        held = self._open.get(deal)
        left = held.units if held is not None else 0
        if units > left:
            raise BudgetExhausted(limit=f"reserved for {deal}", asked_units=units, left_units=left)

    def paused(self, *, now_ms: int) -> str:
        """Return why nothing can be bought now, or nothing if something can."""
        pause = self.envelope.pause(now_s=now_ms // 1_000)
        if pause is None:
            return ""
        if pause.until_s is None:
            return f"{pause.limit} is spent"
        moment = datetime.fromtimestamp(pause.until_s, tz=UTC)
        return f"{pause.limit} is spent until {moment:%Y-%m-%dT%H:%M:%SZ}"

    def spend(self, deal: str, units: int, *, now_ms: int) -> None:
        """Note that ``deal`` is over and cost ``units``; the rest is free again."""
        held = self._open.pop(deal, None)
        if held is None:
            return
        spent = Money(self.asset, units)
        self._account(held.account).settle(held.lock_id, spent, now_s=now_ms // 1_000)
        if units:
            self.book.post(held.lock_id, spent)
        else:
            self.book.void(held.lock_id)
        self._ended += 1
        if self._ended >= ENDED_MAX:
            self._carry_over()

    def release(self, deal: str, *, now_ms: int) -> None:
        """Give all back that was set aside for ``deal``, if anything was."""
        self.spend(deal, 0, now_ms=now_ms)

    def rooms(self, counterparty: AgentId, *, now_ms: int, account: str = "") -> dict[str, int]:
        """Return what each limit that concerns a deal with ``counterparty`` has left."""
        envelope = self._account(account)
        return envelope.rooms(counterparty=counterparty, now_s=now_ms // 1_000)

    def shortfall(
        self, units: int, counterparty: AgentId, *, now_ms: int, account: str = ""
    ) -> BudgetExhausted | None:
        """Return which limit does not cover ``units``, or None if all do."""
        for name, left in self.rooms(counterparty, now_ms=now_ms, account=account).items():
            if units > left:
                return BudgetExhausted(limit=name, asked_units=units, left_units=max(left, 0))
        return None

    def recall(self, threads: Iterable[Thread], summaries: Iterable[Mapping[str, Any]]) -> None:
        """Take in what is promised, locked and spent according to the journal.

        What was promised under another budget counts against this one, however small it is now.
        """
        past = {
            t.deal: _Spend(
                accepted_ms(t),
                t.deal,
                t.counterparty,
                exposure(t.agreed_terms),
                None,
                locked=t.state in BOUND - {State.AGREED},
                account=t.charge.account,
            )
            for t in threads
            if t.side is Role.BUYER and t.accept_id
        }
        past |= {s.deal: s for row in summaries if (s := _spend_of(row)) is not None}
        for spend in sorted(past.values(), key=lambda spend: (spend.at_ms, spend.deal)):
            held = self._next(spend.deal, spend.units, spend.account)
            amount, at_s = Money(self.asset, held.units), spend.at_ms // 1_000
            envelope = self._account(spend.account)
            envelope.recall(held.lock_id, amount, counterparty=spend.counterparty, now_s=at_s)
            self._hold(spend.deal, held)
            if spend.locked:
                self.lock(spend.deal, now_ms=spend.at_ms)
            if spend.spent_units is not None:
                self.spend(spend.deal, spend.spent_units, now_ms=spend.at_ms)

    def _carry_over(self) -> None:
        """Begin a new book with the balance of the old one, which nobody looks up any more."""
        old, balance = self.book, self.balance
        self.book, self._ended = Book(), 0
        self.book.deposit("carried over", Money(self.asset, balance.deposited_units))
        spent = Money(self.asset, balance.spent_units)
        self.book.lock("spent before", spent)
        self.book.post("spent before", spent)
        for held in self._open.values():
            lock = old.find(held.lock_id)
            locked = lock is not None and lock.stage is Stage.LOCKED
            again = self.book.lock if locked else self.book.reserve
            again(held.lock_id, Money(self.asset, held.units))

    def _next(self, deal: str, units: int, account: str) -> _Held:
        # A deal may be given up and taken again, and each time is a lock of its own.
        self._count += 1
        return _Held(f"{deal} {self._count}", units, account)

    def _hold(self, deal: str, held: _Held) -> None:
        short = held.units - self.balance.available_units
        if short > 0:
            # No total, or a promise older than it: the limits have spoken already.
            self.book.deposit(f"cover {held.lock_id}", Money(self.asset, short))
        self.book.reserve(held.lock_id, Money(self.asset, held.units))
        self._open[deal] = held


@dataclass(frozen=True, slots=True)
class _Held:
    """What is set aside for one deal, and under which id of the book."""

    lock_id: str
    units: int
    account: str


@dataclass(frozen=True, slots=True)
class _Spend:
    """One deal of the past: when it was accepted, what it held, and what it cost if it is over."""

    at_ms: int
    deal: str
    counterparty: AgentId
    units: int
    spent_units: int | None
    locked: bool = False
    account: str = ""


def exposure(terms: Terms) -> int:
    """Return the most that a deal can take from its buyer: the price, and the bond of a dispute.

    A rate contract takes nothing by itself.
    """
    if terms.work.task == ZERO_BYTES32 and terms.work.settlement in STREAMED:
        return 0
    return terms.price_units + terms.bond_units


def permit(purse: OpenPurse, deal: str, call: Call | ChannelCall, *, now_ms: int) -> None:
    """Return if a key may sign ``call``, as far as its purse is concerned.

    :raises BudgetExhausted: if it would lock more than was set aside for the deal, or put more
        into a channel than could be spent with its seller
    """
    match call:
        case Open():
            purse.require(deal, call.terms.price_units)
        case Dispute():
            purse.require(deal, exposure(call.terms))
        case Fund() if rooms := purse.rooms(call.config.receiver, now_ms=now_ms):
            left = purse.held().get(deal, 0) + max(0, min(rooms.values()))
            if call.units > left:
                name = "deposit with one seller"
                raise BudgetExhausted(limit=name, asked_units=call.units, left_units=left)


def accepted_ms(thread: Thread) -> int:
    """Return when the buyer accepted, or when the thread began if it did not."""
    return next((e.at_ms for e in thread.history if e.move == "accept"), thread.opened_ms)


def spent_on(*, price_units: int, bond_units: int, to_buyer_units: int, how: How) -> int:
    """Return what a deal that was closed on chain cost its buyer.

    Where an arbiter ruled, the buyer pays of the arbiter's fee, which is a bond, as large a
    part as it lost of the price.
    """
    if how is How.OPEN:
        return 0
    lost = bond_units - bond_units * to_buyer_units // price_units if how is How.RULED else 0
    return price_units - to_buyer_units + lost


def spent_in(thread: Thread) -> int:
    """Return what a thread that is over cost its buyer."""
    if thread.terms is None:
        return 0
    return spent_on(
        price_units=thread.terms.price_units,
        bond_units=thread.terms.bond_units,
        to_buyer_units=thread.view.to_buyer_units,
        how=thread.view.how,
    )


def _spend_of(row: Mapping[str, Any]) -> _Spend | None:
    """Return what the summary of a closed deal tells, or None if we bought nothing in it."""
    if row["side"] != Role.BUYER:
        return None
    at_ms = next((entry[0] for entry in row["history"] if entry[3] == "accept"), None)
    if at_ms is None:
        return None
    price, bond = int(row["price_units"]), int(row.get("bond_units", 0))
    spent = spent_on(
        price_units=price,
        bond_units=bond,
        to_buyer_units=int(row["to_buyer_units"]),
        how=How[row["how"].upper()],
    )
    account = charge_of_row(row).account
    return _Spend(at_ms, row["deal"], row["counterparty"], price + bond, spent, account=account)


def spent_in_row(row: Mapping[str, Any]) -> int | None:
    """Return what a deal cost its buyer by the summary of it; None if we did not buy in it."""
    spend = _spend_of(row)
    return spend.spent_units if spend is not None else None


def rows_of(summaries: Iterable[tuple[AgentId, str, bytes]]) -> list[dict[str, Any]]:
    """Return the summaries of a journal as what they say."""
    return [json.loads(data) for _, _, data in summaries if data]
