"""The small vocabulary that everything else is written in: ids, assets, money, chain views."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from enum import IntEnum
from typing import Annotated, Final

from pydantic import StringConstraints

from .errors import AssetMismatch, ConfigurationError

AgentId = str
"""An agent's address: ``0x`` and 40 lower-case hex digits of its secp256k1 key."""

UNITS_MAX: Final = 2**128 - 1  # The escrow stores amounts as uint128.
ZERO_ADDRESS: Final = "0x" + "0" * 40
ZERO_BYTES32: Final = b"\0" * 32

AddressText = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{40}\z")]
Bytes32Text = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{64}\z")]
SignatureText = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{130}\z")]
IdText = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}\z")]
UnitsText = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,38})\z")]
"""Decimal text, since JSON numbers lose units above 2**53."""
NetText = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,31}\z")]
CapabilityText = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,31}-[0-9a-f]{8}\z")]

_DECIMAL = re.compile(r"^[0-9]{1,38}(\.[0-9]{1,36})?$")


@dataclass(frozen=True, slots=True)
class Asset:
    """An ERC-20 token on one chain. Symbol and decimals are for people and do not identify it."""

    chain_id: int
    token: str
    symbol: str = field(default="COASE", compare=False)
    decimals: int = field(default=6, compare=False)

    def money(self, amount: str | int | Decimal) -> Money:
        """Return ``amount`` of whole tokens as money; text or int, never a float.

        :raises ConfigurationError: if it is no number, negative, or finer than the smallest unit
        """
        text = str(amount)
        if isinstance(amount, float) or not _DECIMAL.match(text):
            raise ConfigurationError(
                f"{amount!r} is no amount of {self.symbol}: write a plain decimal such as '0.02'"
            )
        try:
            units = Decimal(text).scaleb(self.decimals)
        except InvalidOperation as error:  # pragma: no cover - the pattern excludes it
            raise ConfigurationError(f"{amount!r} is no amount of {self.symbol}") from error
        if units != units.to_integral_value():
            raise ConfigurationError(
                f"{amount} {self.symbol} is finer than its smallest unit (10^-{self.decimals})"
            )
        if int(units) > UNITS_MAX:
            raise ConfigurationError(f"{amount} {self.symbol} is more than the escrow can hold")
        return Money(self, int(units))


@dataclass(frozen=True, slots=True)
class Money:
    """A whole number of an asset's smallest unit."""

    asset: Asset
    units: int

    def _same(self, other: Money) -> None:
        if other.asset != self.asset:
            raise AssetMismatch(self.asset, other.asset)

    def __add__(self, other: Money) -> Money:
        self._same(other)
        return Money(self.asset, self.units + other.units)

    def __sub__(self, other: Money) -> Money:
        self._same(other)
        return Money(self.asset, self.units - other.units)

    def __lt__(self, other: Money) -> bool:
        self._same(other)
        return self.units < other.units

    def __le__(self, other: Money) -> bool:
        self._same(other)
        return self.units <= other.units

    def share(self, parts: int, *, of: int) -> Money:
        """Return ``parts / of`` of it, rounded down: the dust stays where it was."""
        return Money(self.asset, self.units * parts // of)

    def __str__(self) -> str:
        return f"{units_to_text(self.units, self.asset.decimals)} {self.asset.symbol}"


def units_to_text(units: int, decimals: int) -> str:
    """Write ``units`` as a decimal of whole tokens, without an exponent and without loss."""
    sign, whole = ("-", -units) if units < 0 else ("", units)
    digits = str(whole).rjust(decimals + 1, "0")
    if decimals == 0:
        return sign + digits
    fraction = digits[-decimals:].rstrip("0")
    return sign + digits[:-decimals] + ("." + fraction if fraction else "")


class Phase(IntEnum):
    """Where a deal stands on chain; the numbers are the contract's own."""

    NONE = 0
    WORKING = 1
    DELIVERED = 2
    DISPUTED = 3
    ANSWERED = 4
    CLOSED = 16
    CANCELLED = 31


class How(IntEnum):
    """How a deal was closed on chain; the numbers are the contract's own."""

    OPEN = 0
    SETTLED = 1
    UNDELIVERED = 2
    DECLINED = 3
    SILENT_BUYER = 4
    SILENT_SELLER = 5
    RULED = 6
    SILENT_ARBITER = 7


@dataclass(frozen=True, slots=True)
class JobView:
    """What the chain says of one deal, at the confirmation depth that was asked for."""

    phase: Phase = Phase.NONE
    clock_s: int = 0
    """deliver_by while working; time of submission, dispute or answer after that."""
    deliverable: bytes = ZERO_BYTES32
    how: How = How.OPEN
    to_seller_units: int = 0
    to_buyer_units: int = 0
    tx_hash: str = ""
    """The transaction that brought about this phase, as far as known."""


@dataclass(frozen=True, slots=True)
class Head:
    """The newest block that counts."""

    number: int
    time_s: int
