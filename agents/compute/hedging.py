"""The budget for second requests: a share of what is spent, so that it cannot grow by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PERMILLE: Final = 1_000
HEDGE_PERMILLE: Final = 100


@dataclass(slots=True)
class Hedges:
    """What may be paid for answers that nobody reads since another was quicker.

    What one of them may cost is held before it is asked for, so that many at once do not pass
    the budget either.
    """

    left_units: int = 0
    permille: int = HEDGE_PERMILLE
    _dust: int = 0
    _begun: bool = False

    def begin(self, units: int) -> None:
        """Allow so much before anything was spent; only the first time counts."""
        if not self._begun:
            self._begun = True
            self.left_units += units

    def earn(self, spent_units: int) -> None:
        """Take note that so much was spent on answers that were read."""
        whole = spent_units * self.permille + self._dust
        self.left_units += whole // PERMILLE
        self._dust = whole % PERMILLE

    def hold(self, units: int) -> bool:
        """Set ``units`` aside and return True; or return False if there is not so much."""
        if units > self.left_units:
            return False
        self.left_units -= units
        return True

    def settle(self, held_units: int, lost_units: int) -> None:
        """Give back what was held and not lost."""
        self.left_units += max(held_units - lost_units, 0)
