"""What is negotiated, and what one side privately thinks of it.

A ``Proposal`` is public: it is what offers and counter-offers say. ``Preferences`` are private.
They can be asked what a proposal is worth, but they show no value in ``repr``, and they refuse to
be copied, pickled or compared: a reservation value never leaves the process that it is in.

Utility is an integer of millionths: 0 at the reservation of every issue, 1,000,000 where every
issue stands at its aspiration, ``BEYOND`` if one issue alone is past its reservation. Nothing
makes up for that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

from coase.protocol.errors import ConfigurationError
from coase.protocol.messages import SETTLEMENTS, VERIFICATIONS
from coase.protocol.states import Role
from coase.protocol.types import UNITS_MAX, ZERO_ADDRESS

from .pricing import Rates, Tariff

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FULL: Final = 1_000_000  # One, in millionths.
BEYOND: Final = -1
DELIVER_WITHIN_MAX_S: Final = 30 * 24 * 3600  # As long as the contract lets a window be.
QUALITY_MAX: Final = 100
# The worst value that is spoken stays this far inside the reservation, and at least one step:
# whoever hears the last word of a side does not hear its limit.
SPOKEN_MARGIN_PERMILLE: Final = 10
# How far past the reservation still counts when the other side's concessions are measured.
SOFT_MIN: Final = -4 * FULL
ISSUES: Final = ("price", "deliver", "quality", "verification", "settlement", "arbiter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One side's terms, as far as they are negotiated.

    ``price_units`` is the whole price, or the cap of metered work, whose rates stand below.

    :raises ConfigurationError: if a value is out of its range
    """

    price_units: int
    deliver_within_s: int
    quality: int = 0
    verification: str = "schema"
    settlement: str = "escrow"
    arbiter: str = ZERO_ADDRESS
    input_price_units: int = 0
    cached_input_price_units: int = 0
    output_price_units: int = 0
    second_price_units: int = 0

    def __post_init__(self) -> None:
        ranges = (
            (self.price_units, UNITS_MAX),
            (self.deliver_within_s, DELIVER_WITHIN_MAX_S),
            (self.quality, QUALITY_MAX),
        )
        for value, most in ranges:
            if type(value) is not int or not 0 <= value <= most:
                raise ConfigurationError(f"a proposal holds {value!r}, which is not in 0..{most}")
        if self.verification not in VERIFICATIONS or self.settlement not in SETTLEMENTS:
            raise ConfigurationError(
                f"no such verification or settlement: {self.verification!r}, {self.settlement!r}"
            )
        _ = self.rates  # Checks them.

    @property
    def rates(self) -> Rates:
        """The metered prices."""
        return Rates(
            input_price_units=self.input_price_units,
            cached_input_price_units=self.cached_input_price_units,
            output_price_units=self.output_price_units,
            second_price_units=self.second_price_units,
        )

    @property
    def tariff(self) -> Tariff:
        """The price as a tariff: by the second or by tokens if it names such a rate, else fixed."""
        if self.second_price_units:
            return Tariff(pricing="seconds", rates=self.rates)
        if any(self.rates.all()):
            return Tariff(pricing="tokens", rates=self.rates)
        return Tariff(pricing="fixed", task_units=self.price_units)

    def at_price(self, price_units: int, rates: Rates) -> Proposal:
        """Return this proposal with another price and other rates."""
        return replace(
            self,
            price_units=price_units,
            input_price_units=rates.input_price_units,
            cached_input_price_units=rates.cached_input_price_units,
            output_price_units=rates.output_price_units,
            second_price_units=rates.second_price_units,
        )


class Private:
    """Base of what must not leave the process: no values in ``repr``, no copy, no pickle."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: private>"

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is private and is neither pickled nor copied")

    def __getstate__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} is private and shows no state")


class _Issue(Protocol):
    """What the arithmetic needs of one issue; numbers and choices both give it."""

    @property
    def constant(self) -> bool: ...
    def value(self, held: object) -> int: ...
    def soft(self, held: object) -> int: ...
    def start(self, theirs: object, turn: int) -> tuple[object, bool]: ...
    def opening(self) -> object: ...
    def least(self, value: int, start: object) -> object: ...


class _Range(Private):
    """A numeric issue, from the reservation to the aspiration."""

    __slots__ = ("_aspiration", "_reservation", "_sign", "_span")

    def __init__(self, name: str, pair: tuple[int, int], *, sign: int) -> None:
        if any(type(value) is not int or value < 0 for value in pair):
            raise ConfigurationError(f"{name}: aspiration and reservation are integers from 0 up")
        self._aspiration, self._reservation = pair
        self._sign = sign
        self._span = sign * (self._aspiration - self._reservation)
        if self._span < 0:
            raise ConfigurationError(f"{name}: the aspiration is worse than the reservation")

    @property
    def constant(self) -> bool:
        return self._span == 0

    def value(self, held: object) -> int:
        soft = self.soft(held)
        return BEYOND if self._over(held) else soft

    def soft(self, held: object) -> int:
        assert isinstance(held, int)
        gain = self._sign * (held - self._reservation)
        if self._span == 0:
            return FULL if gain >= 0 else SOFT_MIN
        return max(min(gain * FULL // self._span, FULL), SOFT_MIN)

    def _over(self, held: object) -> bool:
        assert isinstance(held, int)
        return self._sign * (held - self._reservation) < 0

    def _spoken(self) -> int:
        if self._span == 0:
            return self._reservation
        margin = max(1, self._span * SPOKEN_MARGIN_PERMILLE // 1_000)
        return self._reservation + self._sign * margin

    def opening(self) -> object:
        return self._aspiration

    def start(self, theirs: object, turn: int) -> tuple[object, bool]:
        # What they named themselves tells them nothing, even if it is our very limit.
        if theirs is None or self._over(theirs):
            return self._spoken(), True
        return theirs, True

    def least(self, value: int, start: object) -> object:
        assert isinstance(start, int)
        step = -(-min(value, FULL) * self._span // FULL)
        wanted = self._reservation + self._sign * step
        return wanted if self._sign * (wanted - start) > 0 else start


class _Choice(Private):
    """An issue with names for values, best first; what is not listed is not acceptable."""

    __slots__ = ("_allowed",)

    def __init__(self, name: str, allowed: Sequence[str]) -> None:
        if not allowed or len(set(allowed)) != len(allowed):
            raise ConfigurationError(f"{name}: list at least one, each once, best first")
        self._allowed = tuple(allowed)

    @property
    def constant(self) -> bool:
        return len(self._allowed) == 1

    def value(self, held: object) -> int:
        if held not in self._allowed:
            return BEYOND
        return self._value_at(self._allowed.index(str(held)))

    def _value_at(self, index: int) -> int:
        last = len(self._allowed) - 1
        return FULL if last == 0 else FULL * (last - index) // last

    def soft(self, held: object) -> int:
        return self.value(held) if held in self._allowed else -FULL

    def opening(self) -> object:
        return self._allowed[0]

    def start(self, theirs: object, turn: int) -> tuple[object, bool]:
        # Nobody knows what they allow: name one after the other, and do not trade it away.
        if theirs in self._allowed:
            return theirs, True
        return self._allowed[turn % len(self._allowed)], False

    def least(self, value: int, start: object) -> object:
        best = self._allowed.index(str(start))
        for index in range(best, -1, -1):
            if self._value_at(index) >= value:
                return self._allowed[index]
        return self._allowed[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How much each issue counts: whole numbers, of which only the proportions matter."""

    price: int = 60
    deliver: int = 20
    quality: int = 12
    verification: int = 4
    settlement: int = 4
    arbiter: int = 0

    def __post_init__(self) -> None:
        for name in ISSUES:
            weight = getattr(self, name)
            if type(weight) is not int or not 0 <= weight <= FULL:
                raise ConfigurationError(f"the weight of {name} is a whole number from 0 up")


class Preferences(Private):
    """One side's private view of an issue space: what it hopes for and what it cannot accept.

    Pairs are (aspiration, reservation). A buyer wants less price, a shorter time and a higher
    quality, a seller the opposite of each. Choices are listed best first. An issue whose two ends
    meet is a condition and not a wish: it has to hold, and carries no utility.

    A seller of metered work gives its ``rates`` and the cap that they lead to: a proposal is then
    worth no more than its worst rate, whatever cap it names.

    :raises ConfigurationError: if an aspiration is worse than its reservation
    """

    __slots__ = ("_cap_units", "_issues", "_rates", "_weights", "_weights_sum", "role")

    def __init__(
        self,
        role: Role,
        *,
        price_units: tuple[int, int],
        deliver_within_s: tuple[int, int],
        quality: tuple[int, int] = (0, 0),
        verifications: Sequence[str] = ("schema",),
        settlements: Sequence[str] = ("escrow",),
        arbiters: Sequence[str] = (ZERO_ADDRESS,),
        weights: Weights | None = None,
        rates: Rates | None = None,
        cap_units: int = 0,
    ) -> None:
        if role not in (Role.BUYER, Role.SELLER):
            raise ConfigurationError("only a buyer and a seller have preferences")
        less = -1 if role is Role.BUYER else 1
        self.role = role
        self._issues: dict[str, _Issue] = {
            "price": _Range("price", price_units, sign=less),
            "deliver": _Range("deliver", deliver_within_s, sign=less),
            "quality": _Range("quality", quality, sign=-less),
            "verification": _Choice("verification", verifications),
            "settlement": _Choice("settlement", settlements),
            "arbiter": _Choice("arbiter", arbiters),
        }
        weights = weights or Weights()
        self._weights: Mapping[str, int] = MappingProxyType(
            {
                name: 0 if issue.constant else getattr(weights, name)
                for name, issue in self._issues.items()
            }
        )
        self._weights_sum = sum(self._weights.values())
        if rates is not None and cap_units <= 0:
            raise ConfigurationError("metered rates come with the cap that they lead to")
        self._rates, self._cap_units = rates, cap_units

    def price_of(self, proposal: Proposal) -> int:
        """Return what the proposal's price counts for: for a seller never above its rates."""
        if self._rates is None:
            return proposal.price_units
        worth = proposal.rates.smallest_share(self._rates, self._cap_units)
        return min(proposal.price_units, worth)

    def utility(self, proposal: Proposal) -> int:
        """Return 0 to 1,000,000, or ``BEYOND`` if any issue is past its reservation."""
        values = self._values(proposal)
        if BEYOND in values.values():
            return BEYOND
        return self._mean(values)

    def acceptable(self, proposal: Proposal) -> bool:
        """Return whether no issue is past its reservation."""
        return self.utility(proposal) != BEYOND

    def soft_utility(self, proposal: Proposal) -> int:
        """Return a utility that goes on below zero, to measure how far the other side came."""
        held = self._held(proposal)
        return self._mean({name: issue.soft(held[name]) for name, issue in self._issues.items()})

    def soft_values(self, proposal: Proposal) -> Mapping[str, int]:
        """Return what each issue that carries utility is worth by itself, also below zero."""
        held = self._held(proposal)
        return {name: self._issues[name].soft(held[name]) for name in self.traded()}

    def traded(self) -> tuple[str, ...]:
        """Return the issues that carry utility."""
        return tuple(name for name, weight in self._weights.items() if weight)

    def weight(self, issue: str) -> int:
        """Return an issue's weight; 0 for a condition."""
        return self._weights[issue]

    def opening(self) -> Proposal:
        """Return the proposal with every issue at its aspiration."""
        return self._proposal({name: issue.opening() for name, issue in self._issues.items()}, None)

    def proposal_at(
        self, target: int, *, toward: Proposal, order: Sequence[str], turn: int = 0
    ) -> Proposal:
        """Return a proposal worth at least ``target``, as near to ``toward`` as can be.

        It starts from what they said, brought inside our own limits, and asks for more issue by
        issue in ``order`` until it is worth the target. ``turn`` counts through our choices
        where theirs is none of ours. It is never past a reservation, and says no reservation
        value that they did not say first.
        """
        theirs = self._held(toward)
        held: dict[str, object] = {}
        fixed = set()
        for name, issue in self._issues.items():
            held[name], movable = issue.start(theirs[name], turn)
            if not movable:
                fixed.add(name)
        values = {name: self._issues[name].value(held[name]) for name in self._issues}
        missing = target * self._weights_sum - self._sum(values)
        for name in order:
            weight = self._weights[name]
            if missing <= 0 or not weight or name in fixed:
                continue
            issue, value = self._issues[name], values[name]
            held[name] = issue.least(min(value - (-missing // weight), FULL), held[name])
            missing -= weight * (issue.value(held[name]) - value)
        return self._proposal(held, toward)

    def price_at(self, value: int) -> int:
        """Return the price that is worth ``value`` millionths by itself, but no reservation."""
        price = self._issues["price"]
        floor, _ = price.start(None, 0)
        units = price.least(value, floor)
        assert isinstance(units, int)
        return units

    def at_fixed_price(
        self, price_units: int, *, toward: Proposal | None = None, turn: int = 0
    ) -> Proposal:
        """Return their proposal at our price, with the rest inside our own limits.

        Without a proposal of theirs the rest stands at its aspiration.
        """
        if toward is None:
            held = {name: issue.opening() for name, issue in self._issues.items()}
        else:
            theirs = self._held(toward)
            held = {name: i.start(theirs[name], turn)[0] for name, i in self._issues.items()}
        return self._proposal({**held, "price": price_units}, toward)

    def at_least_price(self, proposal: Proposal, price_units: int) -> bool:
        """Return whether the proposal's price is as good for us as ``price_units``."""
        price = self.price_of(proposal)
        return price <= price_units if self.role is Role.BUYER else price >= price_units

    def _held(self, proposal: Proposal) -> dict[str, object]:
        return {
            "price": self.price_of(proposal),
            "deliver": proposal.deliver_within_s,
            "quality": proposal.quality,
            "verification": proposal.verification,
            "settlement": proposal.settlement,
            "arbiter": proposal.arbiter,
        }

    def _values(self, proposal: Proposal) -> dict[str, int]:
        held = self._held(proposal)
        return {name: issue.value(held[name]) for name, issue in self._issues.items()}

    def _sum(self, values: Mapping[str, int]) -> int:
        return sum(self._weights[name] * value for name, value in values.items())

    def _mean(self, values: Mapping[str, int]) -> int:
        return self._sum(values) // self._weights_sum if self._weights_sum else FULL

    def _proposal(self, held: Mapping[str, object], toward: Proposal | None) -> Proposal:
        price = held["price"]
        deliver, quality = held["deliver"], held["quality"]
        assert isinstance(price, int)
        assert isinstance(deliver, int)
        assert isinstance(quality, int)
        proposal = Proposal(
            price_units=price,
            deliver_within_s=deliver,
            quality=quality,
            verification=str(held["verification"]),
            settlement=str(held["settlement"]),
            arbiter=str(held["arbiter"]),
        )
        if self._rates is not None:
            # Up: rounded down, our own rates could fall below our own price.
            rates = self._rates.scaled(price, of=self._cap_units, up=True)
            return proposal.at_price(price, rates)
        if toward is not None and toward.price_units:
            # Up here too: the cap bounds what is paid, and rates rounded to nothing buy nothing.
            rates = toward.rates.scaled(price, of=toward.price_units, up=True)
            return proposal.at_price(price, rates)
        return proposal
