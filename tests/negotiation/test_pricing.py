"""Prices: decimal text to units without loss, caps that always cover, charges never above them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.negotiation.pricing import (
    MARKUP_MAX_PERMILLE,
    Markup,
    Price,
    Rates,
    Tariff,
    Usage,
)
from coase.protocol.errors import ConfigurationError
from coase.protocol.terms import Work
from coase.protocol.types import UNITS_MAX, Asset

COIN = Asset(31337, "0x" + "c0" * 20)
WEI = Asset(1, "0x" + "ee" * 20, symbol="WETH", decimals=18)


def rates() -> st.SearchStrategy[Rates]:
    rate = st.one_of(st.integers(0, 10), st.integers(0, 10**18))
    return st.builds(
        Rates,
        input_price_units=rate,
        cached_input_price_units=rate,
        output_price_units=rate,
        second_price_units=rate,
    )


def tariffs() -> st.SearchStrategy[Tariff]:
    return st.builds(
        Tariff,
        pricing=st.sampled_from(("fixed", "tokens", "seconds")),
        task_units=st.integers(0, 10**24),
        rates=rates(),
    )


def test_text_becomes_units_of_whatever_asset() -> None:
    assert Price.per_task("0.02").in_asset(COIN) == Tariff(pricing="fixed", task_units=20_000)
    assert Price.per_task("0.02").in_asset(WEI).task_units == 2 * 10**16
    tokens = Price.per_million(input="0.10", output="0.40", cached_input="0.01").in_asset(COIN)
    assert tokens.rates == Rates(
        input_price_units=100_000, cached_input_price_units=10_000, output_price_units=400_000
    )
    assert Price.per_second("0.001").in_asset(COIN).rates.second_price_units == 1_000


def test_cached_input_costs_as_much_as_input_unless_said() -> None:
    price = Price.per_million(input="0.10", output="0.40")
    assert price.in_asset(COIN).rates.cached_input_price_units == 100_000
    assert str(price) == "0.10 in, 0.40 out, a million tokens"
    assert "0.05 cached" in str(Price.per_million(input="0.1", output="1", cached_input="0.05"))


@pytest.mark.parametrize("wrong", [0.02, 1, "-1", "1e3", "", "0,02", ".5", "1.", "NaN", "\u0661"])
def test_anything_but_plain_decimal_text_is_refused(wrong: str) -> None:
    for make in (Price.per_task, Price.per_second):
        with pytest.raises(ConfigurationError, match="plain decimal"):
            make(wrong)
    with pytest.raises(ConfigurationError, match="plain decimal"):
        Price.per_million(input="1", output=wrong)


def test_a_price_finer_than_the_asset_is_refused_and_not_rounded() -> None:
    with pytest.raises(ConfigurationError, match="finer"):
        Price.per_task("0.0000001").in_asset(COIN)


def test_metered_work_has_to_have_a_limit() -> None:
    with pytest.raises(ConfigurationError, match="input_max"):
        Price.per_million(input="1", output="1").in_asset(COIN).cap_units(seconds_max=5)
    with pytest.raises(ConfigurationError, match="seconds_max"):
        Price.per_second("1").in_asset(COIN).cap_units(input_max=5)
    dear = Tariff(pricing="seconds", rates=Rates(second_price_units=UNITS_MAX))
    assert dear.cap_units(seconds_max=1) == UNITS_MAX
    with pytest.raises(ConfigurationError, match="more than an escrow"):
        dear.cap_units(seconds_max=2)


def test_the_cap_is_rounded_up_and_the_charge_down() -> None:
    tariff = Price.per_million(input="0.10", output="0.40").in_asset(COIN)
    assert tariff.cap_units(input_max=3, output_max=3) == 2  # 1.5 units
    usage = Usage(input_tokens=3, output_tokens=3)
    assert tariff.charge_units(usage, cap_units=2) == 1
    # Summed first and rounded once: 0.3 and 0.8 are 1.1.
    assert tariff.charge_units(Usage(input_tokens=3, output_tokens=2), cap_units=9) == 1


def test_a_cached_rate_above_the_fresh_one_does_not_burst_the_cap() -> None:
    tariff = Tariff(
        pricing="tokens", rates=Rates(input_price_units=10**6, cached_input_price_units=3 * 10**6)
    )
    cap = tariff.cap_units(input_max=10)
    cached = Usage(input_tokens=10, cached_input_tokens=10)
    assert tariff.charge_units(cached, cap_units=UNITS_MAX) == cap == 30


@given(tariffs(), st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**5), st.data())
def test_the_cap_covers_all_use_within_the_limits(
    tariff: Tariff, input_max: int, output_max: int, seconds_max: int, data: st.DataObject
) -> None:
    cap = tariff.cap_units(input_max=input_max, output_max=output_max, seconds_max=seconds_max)
    input_tokens = data.draw(st.integers(0, input_max))
    usage = Usage(
        input_tokens=input_tokens,
        cached_input_tokens=data.draw(st.integers(0, input_tokens)),
        output_tokens=data.draw(st.integers(0, output_max)),
        milliseconds=data.draw(st.integers(0, seconds_max * 1_000)),
    )
    charge = tariff.charge_units(usage, cap_units=UNITS_MAX)
    assert 0 <= charge <= cap
    r = tariff.rates
    exact = {
        "fixed": Fraction(tariff.task_units),
        "seconds": Fraction(usage.milliseconds * r.second_price_units, 1_000),
        "tokens": Fraction(
            (input_tokens - usage.cached_input_tokens) * r.input_price_units
            + usage.cached_input_tokens * r.cached_input_price_units
            + usage.output_tokens * r.output_price_units,
            10**6,
        ),
    }[tariff.pricing]
    assert charge == exact // 1
    assert tariff.charge_units(usage, cap_units=charge // 2) == charge // 2, "never above the cap"


@given(tariffs(), st.integers(0, 10**6), st.integers(0, 10**6))
def test_more_use_never_costs_less(tariff: Tariff, tokens: int, more: int) -> None:
    little = Usage(input_tokens=tokens, output_tokens=tokens, milliseconds=tokens)
    much = Usage(
        input_tokens=tokens + more, output_tokens=tokens + more, milliseconds=tokens + more
    )
    charges = [tariff.charge_units(usage, cap_units=UNITS_MAX) for usage in (little, much)]
    assert charges[0] <= charges[1]


def test_a_tariff_comes_back_from_agreed_work() -> None:
    tariff = Price.per_million(input="0.10", output="0.40", cached_input="0.01").in_asset(COIN)
    work = Work(
        capability="inference-00000000",
        pricing="tokens",
        input_price_units=100_000,
        cached_input_price_units=10_000,
        output_price_units=400_000,
    )
    assert Tariff.of_work(work, price_units=77) == tariff
    fixed = Work(capability="summarise-00000000")
    assert Tariff.of_work(fixed, price_units=77) == Tariff(pricing="fixed", task_units=77)
    with pytest.raises(ConfigurationError, match="by the moon"):
        Tariff.of_work(Work(capability="x-00000000", pricing="by the moon"), price_units=1)


def test_a_busy_seller_asks_for_more() -> None:
    markup = Markup(load_permille=500, job_permille=100, cold_permille=250)
    price = Price.per_task("1", markup=markup)
    assert price.asked(COIN).task_units == 1_000_000
    assert price.asked(COIN, load_permille=500).task_units == 1_250_000
    assert price.asked(COIN, load_permille=1_000, waiting=2, cold=True).task_units == 1_950_000
    assert price.asked(COIN, load_permille=10**9, waiting=10**9).task_units == 10_000_000
    assert markup.permille(load_permille=-5, waiting=-5) == 0
    assert markup.permille(waiting=10**9) == MARKUP_MAX_PERMILLE


@given(tariffs(), st.integers(0, MARKUP_MAX_PERMILLE), st.integers(0, MARKUP_MAX_PERMILLE))
def test_a_higher_mark_up_never_asks_for_less(tariff: Tariff, low: int, more: int) -> None:
    cheap, dear = tariff.marked_up(low), tariff.marked_up(low + more)
    assert tariff.marked_up(0) == tariff
    assert cheap.task_units <= dear.task_units
    assert all(a <= b for a, b in zip(cheap.rates.all(), dear.rates.all(), strict=True))


def test_the_floor_is_a_share_of_the_cap_rounded_up() -> None:
    assert Price.per_task("1").floor_units(1_001) == 1_001
    assert Price.per_task("1", floor_permille=500).floor_units(1_001) == 501
    with pytest.raises(ConfigurationError):
        Price.per_task("1", floor_permille=1_001)
    with pytest.raises(ConfigurationError):
        Price("barter")  # type: ignore[arg-type]


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="cached"):
        Usage(input_tokens=1, cached_input_tokens=2)
    for wrong in (-1, 0.5, True):
        with pytest.raises(ConfigurationError):
            Usage(output_tokens=wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError):
            Markup(load_permille=wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError):
            Rates(second_price_units=wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError):
            Tariff(pricing="fixed", task_units=wrong)  # type: ignore[arg-type]


@given(rates(), st.integers(1, 10**12), st.integers(1, 10**12), rates())
def test_rates_scale_with_the_price(r: Rates, parts: int, of: int, reference: Rates) -> None:
    up, down = r.scaled(parts, of=of, up=True), r.scaled(parts, of=of, up=False)
    for rate, high, low in zip(r.all(), up.all(), down.all(), strict=True):
        assert low <= Fraction(rate * parts, of) <= high
        assert high - low <= 1
    assert up.smallest_share(r, of) >= min(parts, of * parts // of)
    assert reference.smallest_share(Rates(), 77) == 77
