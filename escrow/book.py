"""A principal's funds in two phases, and the limits within which an agent may spend them.

Funds move available -> locked -> spent, or back to available. Every move has an id that the caller
made: the same id with the same content is told as ``Outcome.EXISTS`` and changes nothing, so that
a journal may be replayed over it; the same id with other content is an error. After every move
available + locked + spent is what was deposited, or the book raises and is not to be used again.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from coase.protocol.errors import (
    AssetMismatch,
    BookOutOfBalance,
    BudgetExhausted,
    LocalProtocolError,
)
from coase.protocol.types import AgentId, Asset, Money

HOUR_S: Final = 3600
DAY_S: Final = 24 * HOUR_S


class Outcome(Enum):
    """Whether a call moved something, or had been made before."""

    DONE = "done"
    EXISTS = "exists"


class Stage(Enum):
    """How far a lock has come."""

    RESERVED = "reserved"
    """Promised to a counterparty, not yet on chain: it lapses when the agreement does."""
    LOCKED = "locked"
    """In the escrow: only a settlement or a refund ends it."""
    POSTED = "posted"
    VOIDED = "voided"


class LockExistsWithDifferentAmount(LocalProtocolError):
    """One id was used for two amounts."""

    def __init__(self, lock_id: str, held: Money, asked: Money) -> None:
        super().__init__(f"{lock_id!r} stands for {held}, not for {asked}")
        self.lock_id, self.held, self.asked = lock_id, held, asked


class LockNotFound(LocalProtocolError):
    """A post or a void of a lock that was never made."""

    def __init__(self, lock_id: str) -> None:
        super().__init__(f"there is no lock {lock_id!r}")
        self.lock_id = lock_id


class LockEndedOtherwise(LocalProtocolError):
    """A lock that was posted or voided was to be ended a second time, and differently."""

    def __init__(self, lock_id: str, stage: Stage, spent: Money) -> None:
        super().__init__(f"{lock_id!r} is {stage.value} already, with {spent} spent")
        self.lock_id, self.stage, self.spent = lock_id, stage, spent


class PostExceedsLock(LocalProtocolError):
    """More was to be spent than had been locked."""

    def __init__(self, lock_id: str, held: Money, asked: Money) -> None:
        super().__init__(f"{lock_id!r} holds {held} and {asked} were to be spent")
        self.lock_id, self.held, self.asked = lock_id, held, asked


@dataclass(frozen=True, slots=True)
class Lock:
    """One two-phase move: what it holds, and what of it was spent in the end."""

    amount: Money
    stage: Stage
    spent_units: int = 0


@dataclass(frozen=True, slots=True)
class Balance:
    """The funds of one asset; the first three always add up to the last."""

    available_units: int = 0
    locked_units: int = 0
    spent_units: int = 0
    deposited_units: int = 0


class Book:
    """Double entry for the funds of one principal, in any number of assets."""

    __slots__ = ("_balances", "_locks", "_transfers")

    def __init__(self) -> None:
        self._balances: dict[Asset, Balance] = {}
        self._locks: dict[str, Lock] = {}
        self._transfers: dict[str, Money] = {}

    def balance(self, asset: Asset) -> Balance:
        """Return the funds in ``asset``."""
        return self._balances.get(asset, Balance())

    def find(self, lock_id: str) -> Lock | None:
        """Return the lock of that id, ended or not."""
        return self._locks.get(lock_id)

    def deposit(self, transfer_id: str, amount: Money) -> Outcome:
        """Add ``amount`` to what is available: funds given, or earned.

        :raises LockExistsWithDifferentAmount: if that id stands for another amount
        """
        return self._transfer(transfer_id, amount, amount.units)

    def withdraw(self, transfer_id: str, amount: Money) -> Outcome:
        """Take ``amount`` of what is available out of the book.

        :raises BudgetExhausted: if so much is not available
        :raises LockExistsWithDifferentAmount: if that id stands for another amount
        """
        return self._transfer(transfer_id, amount, -amount.units)

    def _transfer(self, transfer_id: str, amount: Money, change: int) -> Outcome:
        _check_units(amount)
        signed = Money(amount.asset, change)
        if (seen := self._transfers.get(transfer_id)) is not None:
            if seen != signed:
                raise LockExistsWithDifferentAmount(transfer_id, seen, signed)
            return Outcome.EXISTS
        if change < 0:
            self._check_available(amount)
        self._move(amount.asset, available=change, deposited=change)
        self._transfers[transfer_id] = signed
        return Outcome.DONE

    def reserve(self, lock_id: str, amount: Money) -> Outcome:
        """Set ``amount`` aside for an agreement that is not yet on chain.

        :raises BudgetExhausted: if so much is not available
        :raises LockExistsWithDifferentAmount: if that id stands for another amount
        """
        return self._hold(lock_id, amount, Stage.RESERVED)

    def lock(self, lock_id: str, amount: Money) -> Outcome:
        """Note that ``amount`` is in the escrow; what was reserved under that id becomes locked.

        :raises BudgetExhausted: if it was not reserved and so much is not available
        :raises LockExistsWithDifferentAmount: if that id stands for another amount
        """
        return self._hold(lock_id, amount, Stage.LOCKED)

    def _hold(self, lock_id: str, amount: Money, stage: Stage) -> Outcome:
        _check_units(amount)
        if (seen := self._locks.get(lock_id)) is not None:
            if seen.amount != amount:
                raise LockExistsWithDifferentAmount(lock_id, seen.amount, amount)
            if seen.stage is not Stage.RESERVED or stage is Stage.RESERVED:
                return Outcome.EXISTS
            self._locks[lock_id] = replace(seen, stage=stage)
            return Outcome.DONE
        self._check_available(amount)
        self._move(amount.asset, available=-amount.units, locked=amount.units)
        self._locks[lock_id] = Lock(amount, stage)
        return Outcome.DONE

    def post(self, lock_id: str, spent: Money) -> Outcome:
        """End a lock: ``spent`` is gone, the rest is available again.

        :raises LockNotFound: if there is no such lock
        :raises PostExceedsLock: if it holds less
        :raises LockEndedOtherwise: if it was voided, or posted with another amount
        """
        _check_units(spent)
        return self._end(lock_id, spent, Stage.POSTED)

    def void(self, lock_id: str) -> Outcome:
        """End a lock with nothing spent: all of it is available again.

        :raises LockNotFound: if there is no such lock
        :raises LockEndedOtherwise: if it was posted
        """
        return self._end(lock_id, None, Stage.VOIDED)

    def _end(self, lock_id: str, spent: Money | None, stage: Stage) -> Outcome:
        lock = self._locks.get(lock_id)
        if lock is None:
            raise LockNotFound(lock_id)
        spent = Money(lock.amount.asset, 0) if spent is None else spent
        if not spent <= lock.amount:
            raise PostExceedsLock(lock_id, lock.amount, spent)
        if lock.stage in (Stage.POSTED, Stage.VOIDED):
            if (lock.stage, lock.spent_units) != (stage, spent.units):
                before = Money(spent.asset, lock.spent_units)
                raise LockEndedOtherwise(lock_id, lock.stage, before)
            return Outcome.EXISTS
        held = lock.amount.units
        self._move(spent.asset, available=held - spent.units, locked=-held, spent=spent.units)
        self._locks[lock_id] = replace(lock, stage=stage, spent_units=spent.units)
        return Outcome.DONE

    def audit(self) -> None:
        """Return if the totals are those of all single entries; walks over all of them.

        :raises BookOutOfBalance: if they are not
        """
        found: dict[Asset, Balance] = {}
        for signed in self._transfers.values():
            was = found.get(signed.asset, Balance())
            total = was.deposited_units + signed.units
            found[signed.asset] = replace(was, deposited_units=total)
        for lock in self._locks.values():
            was = found.get(lock.amount.asset, Balance())
            held = lock.amount.units if lock.stage in (Stage.RESERVED, Stage.LOCKED) else 0
            found[lock.amount.asset] = replace(
                was,
                locked_units=was.locked_units + held,
                spent_units=was.spent_units + lock.spent_units,
            )
        for asset, balance in self._balances.items():
            sums = found.get(asset, Balance())
            for entries, total in (
                (sums.deposited_units, balance.deposited_units),
                (sums.locked_units, balance.locked_units),
                (sums.spent_units, balance.spent_units),
            ):
                if entries != total:
                    raise BookOutOfBalance(entries, total)
            _check_balance(balance)

    def _check_available(self, amount: Money) -> None:
        left = self.balance(amount.asset).available_units
        if amount.units > left:
            raise BudgetExhausted(limit="available", asked_units=amount.units, left_units=left)

    def _move(
        self, asset: Asset, *, available: int, locked: int = 0, spent: int = 0, deposited: int = 0
    ) -> None:
        was = self.balance(asset)
        after = Balance(
            was.available_units + available,
            was.locked_units + locked,
            was.spent_units + spent,
            was.deposited_units + deposited,
        )
        _check_balance(after)
        self._balances[asset] = after


def _check_units(amount: Money) -> None:
    if amount.units < 0:
        raise LocalProtocolError(f"{amount} is no amount to move")


def _check_balance(balance: Balance) -> None:
    parts = (balance.available_units, balance.locked_units, balance.spent_units)
    if sum(parts) != balance.deposited_units or min(parts) < 0:
        raise BookOutOfBalance(balance.deposited_units, sum(parts))


@dataclass(frozen=True, slots=True)
class SpendLimits:
    """How much may be spent; nothing means no limit of that kind."""

    per_deal_units: int | None = None
    per_counterparty_units: int | None = None
    """With one counterparty: what is still open, and what was spent within a day."""
    per_hour_units: int | None = None
    per_day_units: int | None = None
    in_all_units: int | None = None


@dataclass(slots=True)
class _Spend:
    spend_id: str
    asked_units: int
    units: int
    counterparty: AgentId
    at_s: int
    is_open: bool = True
    in_hour: bool = True
    in_day: bool = True


@dataclass(frozen=True, slots=True)
class Pause:
    """Why spending stands still, and from when on time alone makes room again."""

    limit: str
    until_s: int | None


def _time_of(spend: _Spend) -> int:
    return spend.at_s


class _Meter:
    """What was spent under one set of limits."""

    def __init__(self, name: str, limits: SpendLimits) -> None:
        self.name = name
        self.limits = limits
        self.spends: dict[str, _Spend] = {}
        self.hour: deque[_Spend] = deque()
        self.day: deque[_Spend] = deque()
        self.hour_units = 0
        self.day_units = 0
        self.all_units = 0
        self.with_units: dict[AgentId, int] = {}
        self.now_s = 0

    def rooms(self, counterparty: AgentId) -> list[tuple[str, int]]:
        limits = self.limits
        used = (
            ("per deal", limits.per_deal_units, 0),
            (
                "per counterparty",
                limits.per_counterparty_units,
                self.with_units.get(counterparty, 0),
            ),
            ("per hour", limits.per_hour_units, self.hour_units),
            ("per day", limits.per_day_units, self.day_units),
            ("in all", limits.in_all_units, self.all_units),
        )
        return [(name, limit - units) for name, limit, units in used if limit is not None]

    def more_at_s(self, name: str) -> int | None:
        """Return when time alone gives a limit something back, or None if it never does."""
        window, length_s = {"per hour": (self.hour, HOUR_S), "per day": (self.day, DAY_S)}.get(
            name, (None, 0)
        )
        # A limit of 0 has nothing to give back.
        return window[0].at_s + length_s if window else None

    def check(self, units: int, counterparty: AgentId) -> None:
        for name, left in self.rooms(counterparty):
            if units > left:
                raise BudgetExhausted(
                    limit=f"{self.name}: {name}", asked_units=units, left_units=max(0, left)
                )

    def count(
        self, spend_id: str, units: int, counterparty: AgentId, *, at_s: int | None = None
    ) -> None:
        """Count a spend of now, or of a past time: the one of several purses may come late."""
        at_s = self.now_s if at_s is None else min(at_s, self.now_s)
        spend = _Spend(spend_id, units, units, counterparty, at_s)
        self.spends[spend_id] = spend
        spend.in_hour = at_s > self.now_s - HOUR_S
        spend.in_day = at_s > self.now_s - DAY_S
        if spend.in_hour:
            insort(self.hour, spend, key=_time_of)
            self.hour_units += units
        if spend.in_day:
            insort(self.day, spend, key=_time_of)
            self.day_units += units
        self.all_units += units
        self._add_with(counterparty, units)

    def close(self, spend_id: str, spent_units: int) -> None:
        spend = self.spends[spend_id]
        back = spend.units - spent_units
        spend.units, spend.is_open = spent_units, False
        self.hour_units -= back if spend.in_hour else 0
        self.day_units -= back if spend.in_day else 0
        self.all_units -= back
        self._add_with(spend.counterparty, -back)
        if not spend.in_day:
            self._forget(spend)

    def _forget(self, spend: _Spend) -> None:
        self._add_with(spend.counterparty, -spend.units)
        del self.spends[spend.spend_id]

    def _add_with(self, counterparty: AgentId, units: int) -> None:
        """Keep a sum for each counterparty with whom anything was spent, and no others."""
        units += self.with_units.pop(counterparty, 0)
        if units:
            self.with_units[counterparty] = units

    def advance(self, now_s: int) -> None:
        self.now_s = max(self.now_s, now_s)
        while self.hour and self.hour[0].at_s <= self.now_s - HOUR_S:
            spend = self.hour.popleft()
            spend.in_hour = False
            self.hour_units -= spend.units
        while self.day and self.day[0].at_s <= self.now_s - DAY_S:
            spend = self.day.popleft()
            spend.in_day = False
            self.day_units -= spend.units
            if not spend.is_open:
                self._forget(spend)


class SpendEnvelope:
    """Limits on the spending of one agent, enforced where its key signs.

    An envelope may have a parent: what is spent here is spent there as well, so that a swarm shares
    its principal's limits however deep the delegation goes. Ids are unique within the whole tree.
    Hours and days slide; a clock that goes back never loosens a limit. Spending that was closed
    more than a day ago is forgotten, except in the sum of all.
    """

    __slots__ = ("asset", "meters")

    def __init__(
        self,
        asset: Asset,
        limits: SpendLimits,
        *,
        name: str = "agent",
        parent: SpendEnvelope | None = None,
    ) -> None:
        if parent is not None and parent.asset != asset:
            raise AssetMismatch(parent.asset, asset)
        self.asset: Asset = asset
        self.meters: tuple[_Meter, ...] = (
            _Meter(name, limits),
            *(parent.meters if parent is not None else ()),
        )

    def reserve(
        self, spend_id: str, amount: Money, *, counterparty: AgentId, now_s: int
    ) -> Outcome:
        """Count ``amount`` against every limit from here up to the root, or against none.

        :raises BudgetExhausted: with the name of the limit that it would break; nothing is counted
        :raises LockExistsWithDifferentAmount: if that id stands for another deal in the tree
        """
        self._check_amount(amount)
        content = (amount.units, counterparty)
        seen = self.meters[0].spends.get(spend_id)
        if seen is not None and (seen.asked_units, seen.counterparty) == content:
            return Outcome.EXISTS
        for meter in self.meters:
            # In a meter above it is another branch's, whatever its content.
            if (seen := meter.spends.get(spend_id)) is not None:
                held = Money(self.asset, seen.asked_units)
                raise LockExistsWithDifferentAmount(spend_id, held, amount)
        for meter in self.meters:
            meter.advance(now_s)
            meter.check(amount.units, counterparty)
        for meter in self.meters:
            meter.count(spend_id, amount.units, counterparty)
        return Outcome.DONE

    def recall(self, spend_id: str, amount: Money, *, counterparty: AgentId, now_s: int) -> None:
        """Count what was promised in an earlier life, at ``now_s``, whatever the limits are now.

        Spends of several agents of a tree may be recalled one agent after the other.

        :raises LockExistsWithDifferentAmount: if that id is known in the tree already
        """
        self._check_amount(amount)
        for meter in self.meters:
            if (seen := meter.spends.get(spend_id)) is not None:
                held = Money(self.asset, seen.asked_units)
                raise LockExistsWithDifferentAmount(spend_id, held, amount)
        for meter in self.meters:
            meter.advance(now_s)
            meter.count(spend_id, amount.units, counterparty, at_s=now_s)

    def settle(self, spend_id: str, spent: Money, *, now_s: int) -> Outcome:
        """Close what was reserved: only ``spent`` of it counts from now on.

        :raises LockNotFound: if nothing was reserved under that id, or it is forgotten already
        :raises PostExceedsLock: if less was reserved
        :raises LockEndedOtherwise: if it was closed with another amount
        """
        self._check_amount(spent)
        found = self.meters[0].spends.get(spend_id)
        if found is None:
            raise LockNotFound(spend_id)
        if spent.units > found.asked_units:
            raise PostExceedsLock(spend_id, Money(self.asset, found.asked_units), spent)
        if not found.is_open:
            if found.units != spent.units:
                before = Money(self.asset, found.units)
                raise LockEndedOtherwise(spend_id, Stage.POSTED, before)
            return Outcome.EXISTS
        for meter in self.meters:
            meter.advance(now_s)
            meter.close(spend_id, spent.units)
        return Outcome.DONE

    def release(self, spend_id: str, *, now_s: int) -> Outcome:
        """Close what was reserved with nothing spent; raises as ``settle`` does."""
        return self.settle(spend_id, Money(self.asset, 0), now_s=now_s)

    def change(self, limits: SpendLimits) -> None:
        """Set other limits from now on; what was spent or promised counts against them as it is."""
        self.meters[0].limits = limits

    @property
    def limits(self) -> SpendLimits:
        """The limits of this envelope alone."""
        return self.meters[0].limits

    @property
    def used_units(self) -> int:
        """What was spent here so far, with what is promised."""
        return self.meters[0].all_units

    @property
    def limited(self) -> bool:
        """Whether there is any limit, here or above."""
        return any(meter.limits != SpendLimits() for meter in self.meters)

    def pause(self, *, now_s: int) -> Pause | None:
        """Return why nothing at all can be spent now, or None if something can.

        A limit on one deal or counterparty stops nobody from trading with others, unless it is 0.
        """
        for meter in self.meters:
            meter.advance(now_s)
            for name, left in meter.rooms(""):
                if left <= 0:
                    return Pause(f"{meter.name}: {name}", meter.more_at_s(name))
        return None

    def left_units(self, *, counterparty: AgentId, now_s: int) -> int | None:
        """Return how much one more deal with ``counterparty`` may cost now; nothing: no limit."""
        rooms = self.rooms(counterparty=counterparty, now_s=now_s)
        return max(0, min(rooms.values())) if rooms else None

    def rooms(self, *, counterparty: AgentId, now_s: int) -> dict[str, int]:
        """Return what each limit has left for a deal with ``counterparty``, by its name.

        Less than nothing is left where more was recalled than a limit now allows.
        """
        rooms: dict[str, int] = {}
        for meter in self.meters:
            meter.advance(now_s)
            for name, left in meter.rooms(counterparty):
                name = f"{meter.name}: {name}"
                rooms[name] = min(left, rooms.get(name, left))
        return rooms

    def _check_amount(self, amount: Money) -> None:
        if amount.asset != self.asset:
            raise AssetMismatch(self.asset, amount.asset)
        _check_units(amount)
