"""When vouchers are turned into money, and which of them together in one transaction.

A claim costs gas, a voucher that is not claimed is at risk, and one row that fails undoes all rows
of its batch. So: what a withdrawal threatens goes at once and alone; the rest goes when it is worth
it, when it is old, or when its stream has ended, and takes others along that are worth their row.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .voucher import ChannelView, Claim

CLAIM_GAS: Final = 40_000
"""What a claim takes before its first row, the price of the transaction included."""
ROW_GAS: Final = 25_000
"""What each row takes more. Both are above what was measured: tokens and channels differ."""
COIN_WEI: Final = 10**18


class Reason(StrEnum):
    """Why a batch goes out now."""

    WITHDRAWAL = "withdrawal"
    VALUE = "value"
    AGE = "age"
    END = "end"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClaimPolicy:
    """When a seller claims."""

    value_to_cost: int = 20
    """So many times its gas a claim must bring, to go for its value alone."""
    units_min: int = 1
    """And at least so much, where gas costs nothing."""
    age_max_s: int = 24 * 3600
    rows_max: int = 100
    """2.5 million gas: a twelfth of the smallest blocks."""


@dataclass(frozen=True, slots=True)
class GasPrice:
    """What gas costs, and what a coin of the chain is worth in units of the token."""

    wei: int
    coin_units: int

    def cost_units(self, gas: int) -> int:
        """Return what ``gas`` costs in units of the token, rounded up."""
        return -(-gas * self.wei * self.coin_units // COIN_WEI)


@dataclass(frozen=True, slots=True)
class Claimable:
    """A channel with something to claim."""

    claim: Claim
    view: ChannelView
    since_s: int
    """When the oldest voucher that is not claimed was taken."""
    ended: bool = False
    """Whether no stream uses the channel any more."""

    @property
    def units(self) -> int:
        """What a claim would bring."""
        return self.claim.units - self.view.claimed_units

    @property
    def deadline_s(self) -> int:
        """From when on a pending withdrawal can take it."""
        return self.view.withdraw_since_s + self.claim.config.withdraw_delay_s


@dataclass(frozen=True, slots=True)
class ClaimBatch:
    """What goes out in one transaction."""

    rows: tuple[Claim, ...]
    reason: Reason


def plan_claims(
    ready: Iterable[Claimable], *, price: GasPrice, policy: ClaimPolicy, now_s: int
) -> list[ClaimBatch]:
    """Return the transactions to send now, the most urgent first; mostly none."""
    found = [one for one in ready if one.units > 0]
    alone_units = price.cost_units(CLAIM_GAS + ROW_GAS)
    threatened = sorted(
        (one for one in found if one.view.is_withdrawing and one.units > alone_units),
        key=lambda one: (one.deadline_s, -one.units),
    )
    batches = [ClaimBatch((one.claim,), Reason.WITHDRAWAL) for one in threatened]
    calm = [one for one in found if not one.view.is_withdrawing]
    reasons = [(one, _reason(one, alone_units, policy, now_s)) for one in calm]
    due = [reason for _, reason in reasons if reason is not None]
    if not due:
        return batches
    row_units = policy.value_to_cost * price.cost_units(ROW_GAS)
    along = [
        one for one, reason in reasons if reason or one.units >= max(row_units, policy.units_min)
    ]
    along.sort(key=lambda one: -one.units)
    for start in range(0, len(along), policy.rows_max):
        rows = along[start : start + policy.rows_max]
        if _worth(rows) > price.cost_units(CLAIM_GAS + ROW_GAS * len(rows)):
            batches.append(ClaimBatch(tuple(one.claim for one in rows), due[0]))
    return batches


def _reason(one: Claimable, alone_units: int, policy: ClaimPolicy, now_s: int) -> Reason | None:
    if one.units >= max(policy.units_min, policy.value_to_cost * alone_units):
        return Reason.VALUE
    if one.ended:
        return Reason.END
    return Reason.AGE if now_s - one.since_s >= policy.age_max_s else None


def _worth(rows: Sequence[Claimable]) -> int:
    return sum(one.units for one in rows)
