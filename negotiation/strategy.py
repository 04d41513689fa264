"""How a side negotiates: alternating offers with a deadline, over several issues at once.

A strategy is a pure function of a ``View``: the same view gives the same move on every machine.
It answers with ``Accept``, ``Counter`` or ``Walk``, and never proposes or accepts anything past a
reservation. The terms of art follow the literature: a bidding curve in time, an estimate of
what the counterparty cares for, and an acceptance rule (AC_next: take what is at least as good
as what one would propose next).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Context, Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from coase.protocol.errors import ConfigurationError, LocalProtocolError
from coase.protocol.messages import ROUNDS_MAX
from coase.protocol.states import Role

from .issues import BEYOND, FULL, Preferences, Private, Proposal

if TYPE_CHECKING:
    from coase.protocol.types import AgentId

# The curve ends here: what is left carries the last word, its answer and the confirmation of
# that, as long as a message takes less than a twentieth of the time.
LAST_WORD_PERMILLE: Final = 800
# Beyond these the curve is a step, and the exponent would only cost digits.
E_MIN_PERMILLE: Final = 10
E_MAX_PERMILLE: Final = 100_000
# ln and exp of this context are correctly rounded, so every machine gets the same digits; 28 of
# them leave 22 to spare over the millionths that are kept.
_CONTEXT: Final = Context(prec=28, rounding=ROUND_HALF_EVEN)


@dataclass(frozen=True, slots=True)
class Turn:
    """One proposal of a thread: whose, what, when, and how long it stands."""

    by: Role
    proposal: Proposal
    at_ms: int
    valid_until_ms: int = 2**53 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """All that a strategy may know of its thread. ``seed`` breaks ties and nothing else.

    ``rounds_left`` counts the proposals that this side may still make and have answered. A buyer
    therefore has one fewer than a seller: a seller says yes to a counter-offer by offering the
    same terms, for which it needs a round of its own.
    """

    role: Role
    history: tuple[Turn, ...] = ()
    started_ms: int
    deadline_ms: int
    now_ms: int
    rounds_left: int = ROUNDS_MAX
    seed: int = 0
    counterparty: AgentId = ""
    capability: str = ""

    @classmethod
    def of_thread(
        cls,
        role: Role,
        history: tuple[Turn, ...],
        *,
        started_ms: int,
        deadline_ms: int,
        now_ms: int,
        seed: int = 0,
        counterparty: AgentId = "",
        capability: str = "",
    ) -> View:
        """Return the view with ``rounds_left`` counted from the history."""
        made = sum(1 for turn in history if turn.by is role)
        rounds = ROUNDS_MAX - 1 if role is Role.BUYER else ROUNDS_MAX
        return cls(
            role=role,
            history=history,
            started_ms=started_ms,
            deadline_ms=deadline_ms,
            now_ms=now_ms,
            rounds_left=max(rounds - made, 0),
            seed=seed,
            counterparty=counterparty,
            capability=capability,
        )

    @property
    def mine(self) -> tuple[Proposal, ...]:
        """My own proposals, oldest first."""
        return tuple(turn.proposal for turn in self.history if turn.by is self.role)

    @property
    def theirs(self) -> tuple[Proposal, ...]:
        """The counterparty's proposals, oldest first."""
        return tuple(turn.proposal for turn in self.history if turn.by is not self.role)

    @property
    def last_of_theirs(self) -> Turn | None:
        """The counterparty's last proposal: the only one that can be accepted."""
        return next((turn for turn in reversed(self.history) if turn.by is not self.role), None)

    @property
    def progress(self) -> int:
        """How far the thread has come, in millionths: by time or by rounds, whichever is more.

        It is full at the last proposal that can still be answered, and at four fifths of the time.
        """
        span_ms = max((self.deadline_ms - self.started_ms) * LAST_WORD_PERMILLE // 1_000, 1)
        by_time = (self.now_ms - self.started_ms) * FULL // span_ms
        made = len(self.mine)
        last = made + self.rounds_left - 1  # How many stand before the last one.
        by_rounds = made * FULL // last if last > 0 else FULL
        return max(0, min(FULL, max(by_time, by_rounds)))


@dataclass(frozen=True, slots=True)
class Accept:
    """Yes to the counterparty's last proposal, which is repeated here."""

    proposal: Proposal


@dataclass(frozen=True, slots=True)
class Counter:
    """Another proposal."""

    proposal: Proposal


@dataclass(frozen=True, slots=True)
class Walk:
    """No, and the end of the thread. The reason is for people and holds no value of ours."""

    reason: str


Move = Accept | Counter | Walk


@lru_cache(maxsize=4096)
def concession(progress: int, e_permille: int) -> int:
    """Return t^(1/e) in millionths, to the nearest, the same on every machine."""
    if progress <= 0:
        return 0
    if progress >= FULL:
        return FULL
    exponent = _CONTEXT.divide(Decimal(1_000), Decimal(e_permille))
    log = _CONTEXT.ln(_CONTEXT.divide(Decimal(progress), Decimal(FULL)))
    power = _CONTEXT.exp(_CONTEXT.multiply(log, exponent))
    return int(_CONTEXT.to_integral_value(_CONTEXT.multiply(power, Decimal(FULL))))


class Strategy(Private, ABC):
    """Decides one side's moves. Holds preferences and no other state."""

    __slots__ = ("_preferences",)

    def __init__(self, preferences: Preferences) -> None:
        self._preferences = preferences

    @abstractmethod
    def opening(self, view: View) -> Proposal:
        """Return the first proposal of this side.

        :raises LocalProtocolError: if the view is the other side's
        """

    @abstractmethod
    def reply(self, view: View) -> Move:
        """Return the answer to the counterparty's last proposal.

        :raises LocalProtocolError: if the view is the other side's or holds nothing to answer
        """

    def utility(self, proposal: Proposal) -> int:
        """Return what the proposal is worth to this side, to rank several; never sent."""
        return self._preferences.utility(proposal)

    def _check(self, view: View) -> None:
        if view.role is not self._preferences.role:
            raise LocalProtocolError(f"a view of the {view.role} was given to the other side")

    def _answerable(self, view: View) -> Proposal | Walk:
        """Return what is to be answered, or the reason why there is nothing more to say."""
        self._check(view)
        last = view.last_of_theirs
        if last is None:
            raise LocalProtocolError("there is no proposal to reply to: open the thread instead")
        if view.now_ms >= view.deadline_ms:
            return Walk("deadline")
        if view.role is Role.SELLER and view.rounds_left <= 0:
            return Walk("rounds")  # A seller's yes is an offer, and there is none left.
        return last.proposal


class FixedPrice(Strategy):
    """One price, take it or leave it; the other issues are free within the preferences.

    ``price_value`` says where the price stands: at 1,000,000 it is the aspiration, and towards 0
    it comes near the reservation.

    :raises ConfigurationError: if ``price_value`` is out of its range
    """

    __slots__ = ("_price_units",)

    def __init__(self, preferences: Preferences, *, price_value: int = FULL) -> None:
        super().__init__(preferences)
        if not 0 <= price_value <= FULL:
            raise ConfigurationError("price_value is from 0 to 1,000,000")
        self._price_units = preferences.price_at(price_value)

    def opening(self, view: View) -> Proposal:
        """Return the price, and every other issue at its aspiration."""
        self._check(view)
        return self._preferences.at_fixed_price(self._price_units)

    def reply(self, view: View) -> Move:
        """Accept what is acceptable at this price or better, else say the price again."""
        theirs = self._answerable(view)
        if isinstance(theirs, Walk):
            return theirs
        acceptable = self._preferences.acceptable(theirs)
        if acceptable and self._preferences.at_least_price(theirs, self._price_units):
            return Accept(theirs)
        if view.rounds_left <= 0:
            return Walk("rounds")
        turn = view.seed + len(view.mine)
        mine = self._preferences.at_fixed_price(self._price_units, toward=theirs, turn=turn)
        return Counter(mine)


class Conceding(Strategy):
    """Base of the strategies that concede: they differ only in the utility that they insist on."""

    __slots__ = ()

    @abstractmethod
    def target(self, view: View) -> int:
        """Return the utility to insist on now, in millionths; it never rises within a thread."""

    def opening(self, view: View) -> Proposal:
        """Return every issue at its aspiration."""
        self._check(view)
        return self._preferences.opening()

    def reply(self, view: View) -> Move:
        """Accept by AC_next, else propose what is worth the target and nearest to theirs."""
        theirs = self._answerable(view)
        if isinstance(theirs, Walk):
            return theirs
        target = self.target(view)
        worth = self._preferences.utility(theirs)
        # What we proposed ourselves stays good, also when they say it back later.
        if worth != BEYOND and (worth >= target or theirs in view.mine):
            return Accept(theirs)
        if view.rounds_left <= 0:
            return Walk("rounds")
        mine = self._preferences.proposal_at(
            target, toward=theirs, order=self._order(view), turn=view.seed + len(view.mine)
        )
        return Counter(mine)

    def _order(self, view: View) -> list[str]:
        """Return the issues in the order in which to ask for more.

        First what counts most for us against what it seems to cost them. An issue on which they
        have moved far seems cheap to them; before they have moved, only our own weights count.
        """
        preferences = self._preferences
        theirs = view.theirs
        first, last = preferences.soft_values(theirs[0]), preferences.soft_values(theirs[-1])
        issues = preferences.traded()

        def key(index: int) -> tuple[int, int]:
            name = issues[index]
            moved = min(abs(last[name] - first[name]), FULL)
            cost = FULL + FULL // 4 - moved  # From a quarter to five quarters.
            return -(preferences.weight(name) * FULL // cost), (index + view.seed) % len(issues)

        return [issues[index] for index in sorted(range(len(issues)), key=key)]


class TimeDependent(Conceding):
    """Concedes along u(t) = u_min + (1 - u_min)(1 - t^(1/e)).

    ``e_permille`` below 1000 holds out and gives way late (Boulware), 1000 is a straight line,
    above it gives way early (conceder). ``floor`` is u_min in millionths, 0 for the reservation.

    :raises ConfigurationError: if e or the floor is out of its range
    """

    __slots__ = ("_e_permille", "_floor")

    def __init__(self, preferences: Preferences, *, e_permille: int = 500, floor: int = 0) -> None:
        super().__init__(preferences)
        if not E_MIN_PERMILLE <= e_permille <= E_MAX_PERMILLE:
            raise ConfigurationError(
                f"e_permille is from {E_MIN_PERMILLE} (Boulware) to {E_MAX_PERMILLE} (conceder)"
            )
        if not 0 <= floor <= FULL:
            raise ConfigurationError("the floor is a utility from 0 to 1,000,000")
        self._e_permille, self._floor = e_permille, floor

    def target(self, view: View) -> int:
        """Return the point of the curve for the time or the rounds that are used up."""
        given = concession(view.progress, self._e_permille)
        return self._floor + (FULL - self._floor) * (FULL - given) // FULL


class Reciprocating(Conceding):
    """Tit for tat: gives as much as it got, measured by what it is worth to itself.

    ``goodwill`` is given in every round whatever they do, or two of this kind would stand still;
    no more than ``step_max`` is given in one round. Near the end it follows a late Boulware
    curve down, so that a deal which is there to be made is made.

    :raises ConfigurationError: if goodwill or step_max is out of its range
    """

    __slots__ = ("_goodwill", "_step_max")

    E_PERMILLE: Final = 100

    def __init__(
        self, preferences: Preferences, *, goodwill: int = 20_000, step_max: int = 150_000
    ) -> None:
        super().__init__(preferences)
        if not 0 <= goodwill <= step_max <= FULL:
            raise ConfigurationError("0 <= goodwill <= step_max <= 1,000,000 must hold")
        self._goodwill, self._step_max = goodwill, step_max

    def target(self, view: View) -> int:
        """Return what is left after giving back what the counterparty has given so far."""
        worth = [self._preferences.soft_utility(proposal) for proposal in view.theirs]
        got = max(worth) - worth[0] if worth else 0
        rounds = len(view.mine)
        mirrored = FULL - got - self._goodwill * rounds
        bounded = max(mirrored, FULL - self._step_max * max(rounds, 1), 0)
        return min(bounded, FULL - concession(view.progress, self.E_PERMILLE))
