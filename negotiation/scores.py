"""What a buyer remembers of sellers: integers that decay, one record per seller and capability.

A seller that does not confirm an accept, or does not deliver, looks dearer in the next ranking,
and after each silence in a row it is left alone for twice as long. So the cheapest seller that
never answers costs a few accepts and not minutes. Records are kept per capability, because a
block that holds everywhere is a way to shut somebody out, and they fade, because machines mend.

What others say counts too, a little: enough to tell two strangers apart, and less than one job.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from coase.protocol.types import AgentId

HALF_LIFE_MS: Final = 30 * 60 * 1_000  # A restart or a new model mends most failures by then.
HALVES_MAX: Final = 40  # Nothing of a millionth is left after so many.
REST_FIRST_MS: Final = 5_000  # As long as an accept waits for its confirmation.
REST_MAX_MS: Final = 10 * 60 * 1_000
RECORDS_MAX: Final = 10_000  # About 3 MB; the one that was touched longest ago goes first.
WHOLE: Final = 1_000_000
PRIOR_BAD: Final = 50_000  # A stranger counts as failing once in twenty: the weight of one job.
HEARD_MAX: Final = WHOLE // 2
"""What all others together say of a seller weighs at most half as much as one job of one's own."""
FAILURE_MAX_PERMILLE: Final = 950  # Expected cost divides by what is left to a thousand.


class Outcome(StrEnum):
    """What came of an accept or of a deal, as the buyer saw it."""

    DELIVERED = "delivered"
    DECLINED = "declined"
    """Said no to an accept, in time: costs little, since the next one can be asked at once."""
    SILENT = "silent"
    """Did not confirm an accept before its ``agree_by``."""
    UNDELIVERED = "undelivered"
    DISPUTE_LOST = "dispute_lost"


_BAD: Final = MappingProxyType(
    {
        Outcome.DELIVERED: 0,
        Outcome.DECLINED: WHOLE // 10,
        Outcome.SILENT: WHOLE,
        Outcome.UNDELIVERED: 2 * WHOLE,
        Outcome.DISPUTE_LOST: 4 * WHOLE,
    }
)


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One seller's record for one capability: weights in millionths, as of ``at_ms``."""

    seller: AgentId
    capability: str
    good: int = 0
    bad: int = 0
    silences: int = 0
    """Accepts in a row that were not answered."""
    rest_until_ms: int = 0
    at_ms: int = 0


def decayed(weight: int, age_ms: int, *, half_life_ms: int = HALF_LIFE_MS) -> int:
    """Return what is left of ``weight``: half after each half-life, and in between a line."""
    if age_ms <= 0:
        return weight
    halves, rest_ms = divmod(age_ms, half_life_ms)
    if halves > HALVES_MAX:
        return 0
    weight >>= halves
    return weight - weight * rest_ms // (2 * half_life_ms)


@dataclass(frozen=True, slots=True, repr=False)
class Scorebook:
    """All records of one buyer. Every change returns a new book; ``rows`` is what to keep."""

    _rows: Mapping[tuple[AgentId, str], ScoreRow] = field(
        default_factory=lambda: MappingProxyType({})
    )
    _heard: Mapping[AgentId, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))

    @classmethod
    def of(cls, rows: Iterable[ScoreRow]) -> Scorebook:
        """Return the book of these rows, as they were kept. What others said is heard anew."""
        return cls(MappingProxyType({(row.seller, row.capability): row for row in rows}))

    def rows(self) -> tuple[ScoreRow, ...]:
        """Return all rows, in a fixed order."""
        return tuple(self._rows[key] for key in sorted(self._rows))

    def __repr__(self) -> str:
        return f"Scorebook({len(self._rows)} records)"

    def record(
        self, seller: AgentId, capability: str, outcome: Outcome, *, now_ms: int
    ) -> Scorebook:
        """Return the book with one more outcome."""
        row = self._now(seller, capability, now_ms)
        if outcome is Outcome.SILENT:
            silences = row.silences + 1
            rest_ms = min(REST_FIRST_MS << min(silences - 1, 16), REST_MAX_MS)
            row = replace(row, silences=silences, rest_until_ms=now_ms + rest_ms)
        else:  # Any answer ends the silence, also a no.
            row = replace(row, silences=0, rest_until_ms=0)
        good = WHOLE if outcome is Outcome.DELIVERED else 0
        row = replace(row, good=row.good + good, bad=row.bad + _BAD[outcome])
        rows = dict(self._rows)
        rows[seller, capability] = row
        if len(rows) > RECORDS_MAX:
            del rows[min(rows, key=lambda key: (rows[key].at_ms, key))]
        return Scorebook(MappingProxyType(rows), self._heard)

    def hear(self, seller: AgentId, *, good: int, bad: int) -> Scorebook:
        """Return the book with what others say of a seller, in place of what they said before.

        Both are in millionths; together they count for at most ``HEARD_MAX``.
        """
        total = good + bad
        if total > HEARD_MAX:
            good, bad = good * HEARD_MAX // total, bad * HEARD_MAX // total
        heard = dict(self._heard)
        heard.pop(seller, None)
        if total:
            heard[seller] = (good, bad)
        if len(heard) > RECORDS_MAX:
            del heard[next(iter(heard))]
        return Scorebook(self._rows, MappingProxyType(heard))

    def heard(self, seller: AgentId) -> tuple[int, int]:
        """Return what others say of a seller, good and bad, as it counts."""
        return self._heard.get(seller, (0, 0))

    def failure_permille(self, seller: AgentId, capability: str, *, now_ms: int) -> int:
        """Return how often this seller is expected to fail, from 0 to 950 of a thousand."""
        row = self._now(seller, capability, now_ms)
        heard_good, heard_bad = self.heard(seller)
        weight = row.good + row.bad + heard_good + heard_bad + WHOLE
        bad = row.bad + heard_bad + PRIOR_BAD
        return min(bad * 1_000 // weight, FAILURE_MAX_PERMILLE)

    def rests_until_ms(self, seller: AgentId, capability: str) -> int:
        """Return until when this seller is left alone; 0 if it never was silent."""
        row = self._rows.get((seller, capability))
        return row.rest_until_ms if row is not None else 0

    def _now(self, seller: AgentId, capability: str, now_ms: int) -> ScoreRow:
        row = self._rows.get((seller, capability))
        if row is None:
            return ScoreRow(seller, capability, at_ms=now_ms)
        age_ms = now_ms - row.at_ms
        if age_ms <= 0:  # A clock that was set back must not make a record stronger or younger.
            return row
        return replace(
            row, good=decayed(row.good, age_ms), bad=decayed(row.bad, age_ms), at_ms=now_ms
        )
