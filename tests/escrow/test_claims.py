"""When a seller claims, and what with what."""

from __future__ import annotations

from coase.escrow.claims import (
    CLAIM_GAS,
    ROW_GAS,
    Claimable,
    ClaimPolicy,
    GasPrice,
    Reason,
    plan_claims,
)
from coase.escrow.voucher import ChannelConfig, ChannelView, Claim, Voucher
from coase.protocol.types import ZERO_ADDRESS

NOW_S = 1_800_000_000
PRICE = GasPrice(wei=10**9, coin_units=10**9)  # A unit for each gas.
ALONE = CLAIM_GAS + ROW_GAS
POLICY = ClaimPolicy(value_to_cost=20, age_max_s=3600, rows_max=3)


def one(
    number: int, units: int, *, since_s: int = NOW_S, ended: bool = False, withdraw_s: int = 0
) -> Claimable:
    config = ChannelConfig(*(ZERO_ADDRESS,) * 5, 900, number.to_bytes(32, "big"))
    view = ChannelView(10**9, 7, withdraw_since_s=withdraw_s)
    claim = Claim(config, Voucher(config.salt, 7 + units, b""), 7 + units)
    return Claimable(claim, view, since_s, ended)


def planned(*ready: Claimable, price: GasPrice = PRICE) -> list[tuple[list[int], Reason]]:
    batches = plan_claims(ready, price=price, policy=POLICY, now_s=NOW_S)
    return [
        ([int.from_bytes(row.config.salt, "big") for row in batch.rows], batch.reason)
        for batch in batches
    ]


def test_gas_in_units_is_rounded_up() -> None:
    assert GasPrice(1, 1).cost_units(1) == 1
    assert GasPrice(10**9, 3_000 * 10**6).cost_units(65_000) == 195_000
    assert GasPrice(10**9, 0).cost_units(10**6) == 0


def test_small_sums_wait() -> None:
    assert planned() == []
    assert planned(one(1, 20 * ALONE - 1)) == []
    assert planned(one(1, 20 * ALONE)) == [([1], Reason.VALUE)]
    cheap = GasPrice(wei=PRICE.wei // 2, coin_units=PRICE.coin_units)
    assert planned(one(1, 10 * ALONE), price=cheap) == [([1], Reason.VALUE)]


def test_where_gas_is_free_everything_goes() -> None:
    free = GasPrice(wei=10**9, coin_units=0)
    assert planned(one(1, 1), one(2, 0), price=free) == [([1], Reason.VALUE)]


def test_age_and_the_end_of_a_stream() -> None:
    worth = ALONE + 1
    assert planned(one(1, worth, since_s=NOW_S - 3599)) == []
    assert planned(one(1, worth, since_s=NOW_S - 3600)) == [([1], Reason.AGE)]
    assert planned(one(1, worth, ended=True)) == [([1], Reason.END)]
    assert planned(one(1, ALONE, ended=True)) == []  # It would cost what it brings.


def test_who_goes_takes_along_who_is_worth_a_row() -> None:
    along, not_worth = one(2, 20 * ROW_GAS), one(3, 20 * ROW_GAS - 1)
    assert planned(along, not_worth) == []
    due = one(1, 20 * ALONE)
    assert planned(along, not_worth, due) == [([1, 2], Reason.VALUE)]


def test_a_batch_has_its_limit() -> None:
    batches = planned(*(one(number, 20 * ALONE + number) for number in range(5)))
    assert batches == [([4, 3, 2], Reason.VALUE), ([1, 0], Reason.VALUE)]


def test_what_a_withdrawal_threatens_goes_first_and_alone() -> None:
    calm = one(1, 30 * ALONE)
    late = one(2, 2 * ALONE, withdraw_s=NOW_S - 10)
    soon = one(3, 2 * ALONE, withdraw_s=NOW_S - 800)
    lost = one(4, ALONE, withdraw_s=NOW_S - 800)
    assert planned(calm, late, soon, lost) == [
        ([3], Reason.WITHDRAWAL),
        ([2], Reason.WITHDRAWAL),
        ([1], Reason.VALUE),
    ]
