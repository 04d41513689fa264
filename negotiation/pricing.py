"""How a seller prices: decimal text first, units of an asset later, and never a float.

::

    Price.per_task("0.02")
    Price.per_million(input="0.10", output="0.40", cached_input="0.01")
    Price.per_second("0.001")

A price becomes a ``Tariff`` of an asset. What is locked (``cap_units``) is rounded up, so that
full use always fits under it; what is charged (``charge_units``) is summed exactly, rounded down
once, and is never above the cap: the dust stays with the buyer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Final, Literal

from coase.protocol.errors import ConfigurationError
from coase.protocol.types import UNITS_MAX

if TYPE_CHECKING:
    from coase.protocol.terms import Work
    from coase.protocol.types import Asset

Pricing = Literal["fixed", "tokens", "seconds"]

TOKENS_PER_PRICE: Final = 1_000_000  # Token prices are quoted per million everywhere.
MS_PER_S: Final = 1_000
PERMILLE: Final = 1_000
# Ten times the list price: beyond that a seller who is busy should decline and not gouge.
MARKUP_MAX_PERMILLE: Final = 9_000

_DECIMAL = re.compile(r"(0|[1-9][0-9]{0,37})(\.[0-9]{1,36})?\Z")


def _amount(text: str, what: str) -> str:
    """Return ``text`` if it is a plain decimal.

    :raises ConfigurationError: if it is a float, negative, or written in any other way
    """
    if not isinstance(text, str) or not _DECIMAL.match(text):
        raise ConfigurationError(f"{what} is {text!r}: write a plain decimal as text, as '0.02'")
    return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Metered prices in units of the asset: per million tokens, and per second of work."""

    input_price_units: int = 0
    cached_input_price_units: int = 0
    output_price_units: int = 0
    second_price_units: int = 0

    def __post_init__(self) -> None:
        for units in self.all():
            if type(units) is not int or not 0 <= units <= UNITS_MAX:
                raise ConfigurationError(f"a rate is {units!r}, and must be of 0 to 2**128 - 1")

    def all(self) -> tuple[int, int, int, int]:
        """Return the four rates in the order of their fields."""
        return (
            self.input_price_units,
            self.cached_input_price_units,
            self.output_price_units,
            self.second_price_units,
        )

    def scaled(self, parts: int, *, of: int, up: bool) -> Rates:
        """Return every rate times ``parts / of``, rounded up or down as the caller says."""
        scaled = [
            min(-(-r * parts // of) if up else r * parts // of, UNITS_MAX) for r in self.all()
        ]
        return Rates(
            input_price_units=scaled[0],
            cached_input_price_units=scaled[1],
            output_price_units=scaled[2],
            second_price_units=scaled[3],
        )

    def smallest_share(self, reference: Rates, units: int) -> int:
        """Return ``units`` times the worst ratio of these rates to ``reference``, rounded down.

        A proposal that raises one rate and lowers another is worth its lowest rate to a seller
        who cannot know which of the two will be used.
        """
        shares = [
            mine * units // theirs
            for mine, theirs in zip(self.all(), reference.all(), strict=True)
            if theirs
        ]
        return min(shares, default=units)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What was used. ``input_tokens`` counts all of the input, the cached part included."""

    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    milliseconds: int = 0

    def __post_init__(self) -> None:
        counts = (
            self.input_tokens,
            self.cached_input_tokens,
            self.output_tokens,
            self.milliseconds,
        )
        if any(type(count) is not int or count < 0 for count in counts):
            raise ConfigurationError(f"usage is counted in whole numbers from 0 up: {counts}")
        if self.cached_input_tokens > self.input_tokens:
            raise ConfigurationError("more cached input tokens than input tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tariff:
    """A price in units of one asset: what terms carry and what both sides can compute again."""

    pricing: Pricing
    task_units: int = 0
    rates: Rates = Rates()

    def __post_init__(self) -> None:
        if type(self.task_units) is not int or not 0 <= self.task_units <= UNITS_MAX:
            raise ConfigurationError(f"{self.task_units!r} is no price in units")

    @classmethod
    def of_work(cls, work: Work, *, price_units: int) -> Tariff:
        """Return the tariff that agreed terms carry.

        :raises ConfigurationError: if the pricing is none of ours
        """
        if work.pricing not in ("fixed", "tokens", "seconds"):
            raise ConfigurationError(f"no pricing is called {work.pricing!r}")
        return cls(
            pricing=work.pricing,  # type: ignore[arg-type]
            task_units=price_units if work.pricing == "fixed" else 0,
            rates=Rates(
                input_price_units=work.input_price_units,
                cached_input_price_units=work.cached_input_price_units,
                output_price_units=work.output_price_units,
                second_price_units=work.second_price_units,
            ),
        )

    def cap_units(self, *, input_max: int = 0, output_max: int = 0, seconds_max: int = 0) -> int:
        """Return what has to be locked so that use up to these limits is always covered.

        Rounded up, and every input token counted at the dearer of its two rates.

        :raises ConfigurationError: if metered work has no limit, or the cap is more than an
            escrow holds
        """
        usage = Usage(
            input_tokens=input_max, output_tokens=output_max, milliseconds=seconds_max * MS_PER_S
        )
        if self.pricing == "tokens" and not (input_max or output_max):
            raise ConfigurationError("work priced by tokens needs input_max or output_max")
        if self.pricing == "seconds" and not seconds_max:
            raise ConfigurationError("work priced by seconds needs seconds_max")
        parts, of = self._cost(usage, cached_is_dearer=True)
        units = -(-parts // of)
        if units > UNITS_MAX:
            raise ConfigurationError(f"{units} units are more than an escrow can hold")
        return units

    def charge_units(self, usage: Usage, *, cap_units: int) -> int:
        """Return what ``usage`` costs: rounded down once, and never above ``cap_units``."""
        parts, of = self._cost(usage)
        return min(parts // of, cap_units)

    def _cost(self, usage: Usage, *, cached_is_dearer: bool = False) -> tuple[int, int]:
        """Return the exact cost as a fraction."""
        if self.pricing == "fixed":
            return self.task_units, 1
        rates = self.rates
        if self.pricing == "seconds":
            return usage.milliseconds * rates.second_price_units, MS_PER_S
        input_rate = rates.input_price_units
        if cached_is_dearer:
            input_rate = max(input_rate, rates.cached_input_price_units)
        fresh = usage.input_tokens - usage.cached_input_tokens
        parts = (
            fresh * input_rate
            + usage.cached_input_tokens * rates.cached_input_price_units
            + usage.output_tokens * rates.output_price_units
        )
        return parts, TOKENS_PER_PRICE

    def marked_up(self, markup_permille: int) -> Tariff:
        """Return the tariff with every price raised by ``markup_permille``, rounded up."""
        parts = PERMILLE + markup_permille
        return Tariff(
            pricing=self.pricing,
            task_units=min(-(-self.task_units * parts // PERMILLE), UNITS_MAX),
            rates=self.rates.scaled(parts, of=PERMILLE, up=True),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Markup:
    """How much dearer a busy seller is than an idle one, in permille of the list price.

    ``load_permille`` is added in full when every worker is busy and in part below that,
    ``job_permille`` for each job that waits, ``cold_permille`` if the model must be loaded first.
    """

    load_permille: int = 0
    job_permille: int = 0
    cold_permille: int = 0

    def __post_init__(self) -> None:
        parts = (self.load_permille, self.job_permille, self.cold_permille)
        if any(type(part) is not int or part < 0 for part in parts):
            raise ConfigurationError("a mark-up is a whole number of permille from 0 up")

    def permille(self, *, load_permille: int = 0, waiting: int = 0, cold: bool = False) -> int:
        """Return the mark-up now: load from 0 to 1000, jobs waiting, model not yet loaded."""
        load = min(max(load_permille, 0), PERMILLE)
        busy = -(-self.load_permille * load // PERMILLE)
        markup = busy + self.job_permille * max(waiting, 0) + (self.cold_permille if cold else 0)
        return min(markup, MARKUP_MAX_PERMILLE)


@dataclass(frozen=True, slots=True)
class Price:
    """What a seller asks, as decimal text of whole tokens of whatever asset is agreed later."""

    pricing: Pricing
    task: str = "0"
    input: str = "0"
    cached_input: str = "0"
    output: str = "0"
    second: str = "0"
    floor_permille: int = PERMILLE
    """The share of the price below which the seller does not go; 1000 means no haggling."""
    markup: Markup = Markup()

    def __post_init__(self) -> None:
        for name in ("task", "input", "cached_input", "output", "second"):
            _amount(getattr(self, name), f"the price of {name}")
        if self.pricing not in ("fixed", "tokens", "seconds"):
            raise ConfigurationError(f"no pricing is called {self.pricing!r}")
        if type(self.floor_permille) is not int or not 0 <= self.floor_permille <= PERMILLE:
            raise ConfigurationError("floor_permille is a whole number from 0 to 1000")

    @classmethod
    def per_task(
        cls, task: str, *, floor_permille: int = PERMILLE, markup: Markup | None = None
    ) -> Price:
        """Return one price for the whole task."""
        return cls("fixed", task=task, floor_permille=floor_permille, markup=markup or Markup())

    @classmethod
    def per_million(
        cls,
        *,
        input: str,
        output: str,
        cached_input: str | None = None,
        floor_permille: int = PERMILLE,
        markup: Markup | None = None,
    ) -> Price:
        """Return prices per million tokens; cached input costs as much as input unless said."""
        return cls(
            "tokens",
            input=input,
            output=output,
            cached_input=input if cached_input is None else cached_input,
            floor_permille=floor_permille,
            markup=markup or Markup(),
        )

    @classmethod
    def per_second(
        cls, second: str, *, floor_permille: int = PERMILLE, markup: Markup | None = None
    ) -> Price:
        """Return a price per second of work, counted in milliseconds."""
        return cls(
            "seconds", second=second, floor_permille=floor_permille, markup=markup or Markup()
        )

    def in_asset(self, asset: Asset) -> Tariff:
        """Return the list price in units of ``asset``.

        :raises ConfigurationError: if a price is finer than the asset's smallest unit
        """
        return Tariff(
            pricing=self.pricing,
            task_units=asset.money(self.task).units,
            rates=Rates(
                input_price_units=asset.money(self.input).units,
                cached_input_price_units=asset.money(self.cached_input).units,
                output_price_units=asset.money(self.output).units,
                second_price_units=asset.money(self.second).units,
            ),
        )

    def asked(
        self, asset: Asset, *, load_permille: int = 0, waiting: int = 0, cold: bool = False
    ) -> Tariff:
        """Return what to ask now: the list price and the mark-up for load, queue and loading.

        :raises ConfigurationError: if a price is finer than the asset's smallest unit
        """
        permille = self.markup.permille(load_permille=load_permille, waiting=waiting, cold=cold)
        return self.in_asset(asset).marked_up(permille)

    def floor_units(self, cap_units: int) -> int:
        """Return the lowest cap to go down to from ``cap_units``, rounded up."""
        return -(-cap_units * self.floor_permille // PERMILLE)

    def __str__(self) -> str:
        if self.pricing == "fixed":
            return f"{self.task} a task"
        if self.pricing == "seconds":
            return f"{self.second} a second"
        differs = Decimal(self.cached_input) != Decimal(self.input)
        cached = f", {self.cached_input} cached" if differs else ""
        return f"{self.input} in{cached}, {self.output} out, a million tokens"
