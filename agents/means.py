"""What an agent's tokens cover: no promise, and no lock, beyond what its address holds.

A buyer that cannot post the bond cannot dispute, and who knows that need not deliver. So a deal
counts with its price until it is locked, and with its bond until no dispute can come any more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from coase.protocol.errors import BudgetExhausted
from coase.protocol.states import Role, State

from .purse import exposure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coase.protocol.session import Thread

_UNPAID: Final = frozenset((State.ACCEPTED, State.AGREED))
_UNKNOWN: Final = " (not known while the chain is away)"
_DISPUTABLE: Final = frozenset((State.LOCKED, State.DELIVERED))


class OpenMeans:
    """Means that nobody looks at, as where there is no chain to ask."""

    def know(self, units: int | None) -> None:
        """Take note of what the address holds, or with None that it cannot be told now."""

    def rooms(self) -> dict[str, int]:
        """Return what is left for another deal, price and bond together, if that is known."""
        return {}

    def check(self) -> None:
        """Return if anything at all may be bought, or if nobody knows yet.

        :raises BudgetExhausted: if nothing is left
        """

    def accept(self, units: int) -> None:
        """Return if another deal that may take ``units`` can be promised.

        :raises BudgetExhausted: if the tokens do not cover it with all that is under way, or if
            nobody knows
        """

    def open(self, thread: Thread) -> None:
        """Return if the price of a deal may go into the escrow now. Safe to repeat.

        :raises BudgetExhausted: if the tokens do not cover it and all bonds any more
        """


class Means(OpenMeans):
    """The limit that an agent's own tokens are, whatever its budget.

    ``deals`` gives what the agent has under way.
    """

    def __init__(self, deals: Callable[[], Iterable[Thread]], *, name: str) -> None:
        self._deals, self._limit = deals, f"{name}: balance"
        self._held_units: int | None = None
        self._opened: set[str] = set()

    def know(self, units: int | None) -> None:
        """Take note of what the address holds, or with None that it cannot be told now."""
        self._held_units = units

    def rooms(self) -> dict[str, int]:
        """Return what is left for another deal, price and bond together, if that is known."""
        if self._held_units is None:
            return {}
        return {self._limit: self._held_units - sum(map(_needed, self._bought()))}

    def check(self) -> None:
        """Return if anything at all may be bought, or if nobody knows yet.

        :raises BudgetExhausted: if nothing is left
        """
        if self._held_units is not None:
            self.accept(1)

    def accept(self, units: int) -> None:
        """Return if another deal that may take ``units`` can be promised.

        :raises BudgetExhausted: if the tokens do not cover it with all that is under way, or if
            nobody knows
        """
        self._require(units, self._bought())

    def open(self, thread: Thread) -> None:
        """Return if the price of a deal may go into the escrow now. Safe to repeat.

        :raises BudgetExhausted: if the tokens do not cover it and all bonds any more
        """
        deals = {deal.deal: deal for deal in self._bought()}
        self._opened &= deals.keys()
        if thread.deal not in self._opened:
            # What is agreed and not locked has no right to it yet: first come, first locked.
            others = (
                other
                for other in deals.values()
                if other.deal != thread.deal
                and (other.state not in _UNPAID or other.deal in self._opened)
            )
            self._require(exposure(thread.agreed_terms), others)
        self._opened.add(thread.deal)

    def _bought(self) -> list[Thread]:
        return [thread for thread in self._deals() if thread.side is Role.BUYER]

    def _require(self, units: int, others: Iterable[Thread]) -> None:
        if self._held_units is None:
            raise BudgetExhausted(limit=self._limit + _UNKNOWN, asked_units=units, left_units=0)
        left = self._held_units - sum(map(_needed, others))
        if units > left:
            raise BudgetExhausted(limit=self._limit, asked_units=units, left_units=max(left, 0))


def _needed(thread: Thread) -> int:
    """Return what a deal under way may still take of its buyer's tokens."""
    if thread.streamed:
        return 0  # What lies in a channel is no balance any more, and a deposit is looked at.
    if thread.state in _UNPAID:
        return exposure(thread.agreed_terms)
    if thread.state in _DISPUTABLE and thread.verdict != "good":
        return thread.agreed_terms.bond_units
    return 0
