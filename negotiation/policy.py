"""Hard limits that no strategy can pass: every move goes through a policy before it leaves.

A policy is a chain of limits. Each limit may forbid a move, clamp it, grant it, or have nothing
against it. Having nothing against it is not a yes: a move leaves only if some limit of the
*money* has granted it and none has forbidden it. An empty chain refuses everything, and a chain
that nobody in it could judge raises ``PolicyExhausted``. Only ``Walk`` always passes, since
it costs nothing and binds nobody.

===================== ================================= ==============================
limit                 a counter-offer past it           an accept past it
===================== ================================= ==============================
``PriceLimit``        clamped to the limit (or stopped) stopped
``RateFloor``         clamped to the floor              stopped
``SpendLimit``        stopped                           stopped
``DeadlineLimit``     stopped                           stopped
``QualityFloor``      stopped                           stopped
``AllowedSettlement`` stopped                           stopped
``AllowedVerification`` stopped                         stopped
``ArbiterList``       stopped                           stopped
``RoundsMax``         stopped                           not concerned
``CounterpartyBlocked`` stopped                         stopped
===================== ================================= ==============================

An accept is never clamped: what is accepted is what the other side said, unit by unit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from coase.protocol.errors import ConfigurationError, LocalError
from coase.protocol.messages import ROUNDS_MAX
from coase.protocol.states import Role

from .issues import Private, Proposal
from .strategy import Accept, Counter, Move, View, Walk

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from coase.protocol.types import AgentId

    from .pricing import Rates
    from .strategy import Strategy

# A clamp may bring a move into the way of another limit, so the chain is walked again. Every
# clamp moves a price towards one end, hence a few walks settle it, or the limits contradict.
WALKS_MAX: Final = 4


class PolicyExhausted(LocalError):
    """No limit of the chain granted the move, or the limits contradict each other."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the policy came to no decision: {why}")
        self.why = why


@dataclass(frozen=True, slots=True)
class Forbidden:
    """The move must not leave. ``limit`` names what stopped it, ``why`` says so to people."""

    limit: str
    why: str


Verdict = Move | Forbidden | None
"""A move is a grant, perhaps of a clamped move; None is nothing against it."""


class Limit(Private, ABC):
    """One hard limit. Shows no value in ``repr``: what is the most one pays is private."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """What ``Forbidden.limit`` says."""
        return type(self).__name__

    @abstractmethod
    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        """Return a grant, a clamped counter-offer, a refusal, or None for nothing against it."""

    def stop(self, why: str) -> Forbidden:
        """Return the refusal that names this limit."""
        return Forbidden(self.name, why)


class Policy(Private):
    """A chain of limits through which every outgoing move has to go."""

    __slots__ = ("_limits",)

    def __init__(self, limits: Iterable[Limit]) -> None:
        self._limits = tuple(limits)

    def check(self, move: Move, view: View) -> Move | Forbidden:
        """Return the move as it may leave, perhaps clamped, or what forbids it.

        :raises PolicyExhausted: if no limit granted it, or clamps chase each other
        """
        if isinstance(move, Walk):
            return move
        if not isinstance(move, (Accept, Counter)):
            return Forbidden("Policy", f"{type(move).__name__} is no move")
        if not self._limits:
            return Forbidden("Policy", "the policy holds no limit, and so allows nothing")
        if isinstance(move, Accept) and (stopped := _stale(move, view)) is not None:
            return stopped
        for _ in range(WALKS_MAX):
            judged = self._walk(move, view)
            if isinstance(judged, Forbidden) or judged == move:
                return judged
            if not isinstance(judged, Counter):
                return Forbidden("Policy", "a limit tried to change what is accepted")
            move = judged
        raise PolicyExhausted("the limits clamp the move to and fro")

    def _walk(self, move: Accept | Counter, view: View) -> Move | Forbidden:
        granted = False
        now: Accept | Counter = move
        for limit in self._limits:
            verdict = limit.judge(now.proposal, now, view)
            if isinstance(verdict, Forbidden):
                return verdict
            if verdict is None:
                continue
            if isinstance(verdict, Walk) or type(verdict) is not type(now):
                return Forbidden(limit.name, "the limit answered with another kind of move")
            granted, now = True, verdict
        if not granted:
            raise PolicyExhausted("no limit of the money judged the move")
        return now


def decide(strategy: Strategy, policy: Policy, view: View) -> Move | Forbidden:
    """Return the strategy's next move as the policy lets it leave: the one way out.

    An opening is a ``Counter`` too, which answers nothing.

    :raises PolicyExhausted: if no limit granted the move
    """
    opens = view.last_of_theirs is None
    move = Counter(strategy.opening(view)) if opens else strategy.reply(view)
    return policy.check(move, view)


def _stale(move: Accept, view: View) -> Forbidden | None:
    """Return why what is accepted does not stand, or None if it does."""
    last = view.last_of_theirs
    if last is None or last.proposal != move.proposal:
        return Forbidden("Policy", "only the counterparty's last proposal can be accepted")
    if view.now_ms >= last.valid_until_ms:
        return Forbidden("Policy", "the proposal lapsed before it was accepted")
    return None


def _at_price(proposal: Proposal, price_units: int) -> Proposal:
    """Return the proposal at another price, its rates in proportion."""
    if not proposal.price_units:
        return proposal.at_price(price_units, proposal.rates)
    rates = proposal.rates.scaled(price_units, of=proposal.price_units, up=True)
    return proposal.at_price(price_units, rates)


class PriceLimit(Limit):
    """The most that a buyer pays or the least that a seller takes, for one deal. Judges money.

    With ``clamp`` a counter-offer past it leaves at the limit; the counterparty then hears the
    limit, as the price of going on. Without, it is stopped.

    :raises ConfigurationError: if the limit is no whole number from 0 up
    """

    __slots__ = ("_clamp", "_role", "_units")

    def __init__(self, role: Role, units: int, *, clamp: bool = True) -> None:
        if type(units) is not int or units < 0:
            raise ConfigurationError("a price limit is a whole number of units from 0 up")
        if role not in (Role.BUYER, Role.SELLER):
            raise ConfigurationError("a price limit is a buyer's or a seller's")
        self._role, self._units, self._clamp = role, units, clamp

    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        """Grant what is within the limit; clamp or stop what is past it."""
        if view.role is not self._role:
            return self.stop(f"this limit is not for a {view.role}")
        price = proposal.price_units
        past = price > self._units if self._role is Role.BUYER else price < self._units
        if not past:
            return move
        if isinstance(move, Counter) and self._clamp:
            return Counter(_at_price(proposal, self._units))
        return self.stop("the price is past the limit")


class RateFloor(Limit):
    """The least that a seller takes per million tokens and per second. Not a grant by itself."""

    __slots__ = ("_floor",)

    def __init__(self, floor: Rates) -> None:
        self._floor = floor

    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        """Stop an accept of a rate below its floor; raise a counter-offer's rates to it."""
        pairs = list(zip(proposal.rates.all(), self._floor.all(), strict=True))
        if all(rate >= floor for rate, floor in pairs):
            return None
        if isinstance(move, Accept):
            return self.stop("a metered price is below its floor")
        input_units, cached_units, output_units, second_units = (max(pair) for pair in pairs)
        raised = type(self._floor)(
            input_price_units=input_units,
            cached_input_price_units=cached_units,
            output_price_units=output_units,
            second_price_units=second_units,
        )
        return Counter(proposal.at_price(proposal.price_units, raised))


class BudgetView(Protocol):
    """What a spend limit reads: how much each of its limits has left."""

    def left_units(self, counterparty: AgentId) -> Mapping[str, int]:
        """Return the units left of each limit that concerns a deal with ``counterparty``."""
        ...


class Budget(Private):
    """A budget as it stands: a fixed view for one decision."""

    __slots__ = ("_left",)

    def __init__(self, left: Mapping[str, int]) -> None:
        self._left = dict(left)

    def left_units(self, counterparty: AgentId) -> Mapping[str, int]:
        """Return the units left of each limit."""
        return self._left


class SpendLimit(Limit):
    """The budget: no counter-offer and no accept for more than any limit of it has left.

    Judges money. It stops and never clamps, or a counterparty could ask high and read off
    what is left. The signer checks again when it signs; this is the earlier of the two.
    """

    __slots__ = ("_budget",)

    def __init__(self, budget: BudgetView) -> None:
        self._budget = budget

    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        """Grant what every limit still covers; name the first that does not."""
        if view.role is not Role.BUYER:
            return None  # A seller spends nothing, and needs a price limit to be granted.
        left = self._budget.left_units(view.counterparty)
        if not left:
            return self.stop("the budget names no limit")
        for name in sorted(left):
            if proposal.price_units > left[name]:
                return self.stop(f"the limit {name!r} does not cover the price")
        return move


class DeadlineLimit(Limit):
    """A buyer's latest or a seller's earliest time of delivery, in seconds from the agreement."""

    __slots__ = ("_seconds",)

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds

    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        """Stop what is later than a buyer's limit, or sooner than a seller's."""
        late = proposal.deliver_within_s > self._seconds
        if view.role is Role.BUYER:
            return self.stop("delivery would be later than the limit") if late else None
        soon = proposal.deliver_within_s < self._seconds
        return self.stop("delivery would be due sooner than the limit") if soon else None


class QualityFloor(Limit):
    """The lowest grade that a buyer takes, or the highest that a seller promises."""

    __slots__ = ("_quality",)

    def __init__(self, quality: int) -> None:
        self._quality = quality

    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        """Stop a grade below a buyer's floor, or above what a seller can promise."""
        if view.role is Role.BUYER:
            low = proposal.quality < self._quality
            return self.stop("the grade is below the floor") if low else None
        high = proposal.quality > self._quality
        return self.stop("the grade is more than can be promised") if high else None


class AllowedSettlement(Limit):
    """The ways of paying that are allowed."""

    __slots__ = ("_allowed",)

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)

    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        """Stop every other way of paying."""
        if proposal.settlement in self._allowed:
            return None
        return self.stop(f"settlement {proposal.settlement!r} is not allowed")


class AllowedVerification(Limit):
    """The kinds of verification that are allowed."""

    __slots__ = ("_allowed",)

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)

    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        """Stop every other verification."""
        if proposal.verification in self._allowed:
            return None
        return self.stop(f"verification {proposal.verification!r} is not allowed")


class ArbiterList(Limit):
    """Who may decide a dispute. The zero address stands for nobody, if it is listed."""

    __slots__ = ("_allowed",)

    def __init__(self, allowed: Collection[AgentId]) -> None:
        self._allowed = frozenset(allowed)

    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        """Stop every other arbiter."""
        return None if proposal.arbiter in self._allowed else self.stop("the arbiter is not listed")


class RoundsMax(Limit):
    """How many proposals a side makes in one thread; by then it has said enough."""

    __slots__ = ("_rounds",)

    def __init__(self, rounds: int = ROUNDS_MAX) -> None:
        self._rounds = rounds

    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        """Stop a proposal beyond the last. An accept is no proposal."""
        if isinstance(move, Accept) or len(view.mine) < self._rounds:
            return None
        return self.stop(f"{self._rounds} proposals have been made")


class CounterpartyBlocked(Limit):
    """Who is not dealt with, for which capability.

    A block holds for one capability and never for a whole agent: a block that holds everywhere
    is a way to shut a competitor out.
    """

    __slots__ = ("_blocked",)

    def __init__(self, blocked: Collection[tuple[AgentId, str]]) -> None:
        self._blocked = frozenset(blocked)

    def judge(self, proposal: Proposal, move: Accept | Counter, view: View) -> Verdict:
        """Stop every move towards a counterparty that is blocked for this capability."""
        if (view.counterparty, view.capability) in self._blocked:
            return self.stop("the counterparty is blocked for this capability")
        return None
