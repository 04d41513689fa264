"""The money of one plan: taken before anything is asked for, given back when it was not needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import anyio

from coase.protocol.errors import BookOutOfBalance, BudgetExhausted

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


PLAN_LIMIT: Final = "plan"
"""The name by which an error says that it was the plan's money that ran out."""


class Pot:
    """So many units and never one more, for as many pieces at once as ask for some.

    What is held or spent never exceeds the total, whatever happens in which order. A total of
    None is no limit.
    """

    def __init__(self, total_units: int | None) -> None:
        self.total_units = total_units
        self.spent_units = 0
        """What is gone, and what may be gone though nobody knows yet."""
        self._held: set[Hold] = set()
        self._changed = anyio.Event()

    @property
    def held_units(self) -> int:
        """What is set aside at this moment."""
        return sum(hold.units for hold in self._held)

    @property
    def left_units(self) -> int | None:
        """What is not spent, held or not; None without a limit."""
        return None if self.total_units is None else self.total_units - self.spent_units

    @property
    def free_units(self) -> int | None:
        """What nobody holds; None without a limit."""
        return None if self.left_units is None else self.left_units - self.held_units

    def try_hold(self, units: int) -> Hold | None:
        """Set ``units`` aside, or return None if so much is not free now."""
        free = self.free_units
        if units < 1 or (free is not None and units > free):
            return None
        hold = Hold(self, units)
        self._held.add(hold)
        return hold

    async def hold(self, wanted: Callable[[], int]) -> Hold:
        """Set as many units aside as are wanted, after others gave some back if need be.

        ``wanted`` is asked again each time; what it names is cut to what is left at all.

        :raises BudgetExhausted: if nothing is left, or nothing wanted and nobody can give back
        """
        while True:
            left, units = self.left_units, wanted()
            if left is not None:
                units = min(units, left)
            if (hold := self.try_hold(units)) is not None:
                return hold
            if units < 1 and not (self._held and left):
                raise BudgetExhausted(limit=PLAN_LIMIT, asked_units=1, left_units=left or 0)
            await self._changed.wait()

    def promised(self, units: int) -> Hold:
        """Return a hold of what an earlier run promised already, whether it is free or not."""
        hold = Hold(self, units)
        hold.bound = True
        self._held.add(hold)
        return hold

    def end(self, hold: Hold, units: int) -> None:
        """Let go of a hold of which ``units`` are spent. Safe to repeat: the first one counts.

        :raises BookOutOfBalance: if that is more than was held; nothing else can know of it
        """
        if hold not in self._held:
            return
        self._held.remove(hold)
        hold.cost_units = units
        self.spent_units += units
        self.tell()
        if not 0 <= units <= hold.units:
            raise BookOutOfBalance(hold.units, units)

    def tell(self) -> None:
        """Wake who waits for something to be given back."""
        self._changed.set()
        self._changed = anyio.Event()


class Hold:
    """Some units set aside for one purchase; what is left of them at its end goes back."""

    def __init__(self, pot: Pot, units: int) -> None:
        self._pot, self.units = pot, units
        self.bound = False
        """Whether a deal may cost what is held: then it is gone unless more is known."""
        self.cost_units = 0
        """What it came to, once it is over."""

    def bind(self, units: int) -> None:
        """Note that a deal was made that costs at most ``units``; the rest goes back at once."""
        self.bound = True
        self.units = min(self.units, units)
        self._pot.tell()

    def spend(self, units: int) -> None:
        """Note what it cost in the end."""
        self._pot.end(self, units)

    def __enter__(self) -> Hold:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pot.end(self, self.units if self.bound else 0)
