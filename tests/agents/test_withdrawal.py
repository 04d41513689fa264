"""Money out: to the right address, once, whenever the process dies, and past no one's limits but
the owner's own."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.agents import Agent, Budget
from coase.agents.audit import audit
from coase.agents.backends.sqlite import SqliteJournal
from coase.agents.wiring import open_settlement
from coase.agents.withdrawal import (
    Order,
    Outcome,
    Withdrawals,
    checked_address,
    checksum_address,
    place_order,
    placed,
    take_back,
)
from coase.escrow.backends.keystore import open_keyring
from coase.protocol.errors import ChainUnavailable, ConfigurationError, LocalProtocolError
from coase.protocol.types import ZERO_ADDRESS
from tests.agents.realmarket import COIN, FUNDS, RealMarket, real_market, scribe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.escrow.backends.evm.chain import EvmChain

OWNER_AT = "0x" + "0d" * 20


# ---- addresses ---------------------------------------------------------------------------------

# The examples of EIP-55 itself.
EXAMPLES = (
    "0x52908400098527886E0F7030069857D2E4169EE7",
    "0xde709f2102306220921060314715629080e2fb77",
    "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
    "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
    "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
    "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
)


@pytest.mark.parametrize("address", EXAMPLES)
def test_the_checksum_is_that_of_the_standard(address: str) -> None:
    assert checksum_address(address.lower()) == address
    assert checked_address(address) == address.lower()
    assert checked_address(address.lower()) == address.lower()


@pytest.mark.parametrize("address", EXAMPLES[2:])
def test_one_letter_of_another_case_is_a_mistake(address: str) -> None:
    for place in range(2, 42):
        other = address[:place] + address[place].swapcase() + address[place + 1 :]
        if other != address:
            with pytest.raises(ConfigurationError, match="checksum"):
                checked_address(other)
    with pytest.raises(ConfigurationError, match="main chain"):
        checked_address(address.lower(), strict=True)
    assert checked_address(address, strict=True) == address.lower()


@pytest.mark.parametrize("text", ["", "0x12", "x" * 42, "0x" + "g" * 40, ZERO_ADDRESS, "alice.eth"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigurationError):
        checked_address(text)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../../x"},
        {"id": ""},
        {"to": "0x12"},
        {"owner": "me"},
        {"asset": "shares"},
        {"units": "0"},
        {"units": "-1"},
        {"units": str(2**128)},
        {"units": None},
    ],
)
def test_a_file_that_is_no_order(tmp_path: Path, change: dict[str, Any]) -> None:
    good = Order("a1", OWNER_AT, "token", OWNER_AT, 5)
    assert Order.from_json(good.to_json()) == good
    with pytest.raises(ValueError, match=r"order|int"):
        Order.from_json(json.dumps({**json.loads(good.to_json()), **change}))


# ---- paid once ---------------------------------------------------------------------------------


class Died(BaseException):
    """The process was killed here."""


class Till:
    """A key with money and a journal, opened anew for every life of the process."""

    def __init__(self, market: RealMarket) -> None:
        self.market, self.path = market, market.place("till")
        self.key = open_keyring(self.path).derive("till")

    async def life(self, order: Order, **breaks: Any) -> Outcome:
        """Run a process that performs ``order``; ``breaks`` replaces methods of its parts."""
        journal = SqliteJournal(self.path / "journal.sqlite")
        settlement = await open_settlement(self.market.network, journal)
        try:
            for name, broken in breaks.items():
                target = settlement.chain.store if name == "save" else settlement.chain
                setattr(target, name, broken(getattr(target, name)))
            withdrawals = Withdrawals(
                settlement, journal, identity_of=lambda _: self.key, now_ms=lambda: 7
            )
            return await withdrawals.perform(order)
        finally:
            await settlement.close()
            await journal.close()

    async def held(self, address: str) -> tuple[int, int]:
        """Return token units and coin of an address."""
        journal = SqliteJournal(self.path / "journal.sqlite")
        settlement = await open_settlement(self.market.network, journal)
        try:
            return await settlement.balance(address), await settlement.chain.coin(address)
        finally:
            await settlement.close()
            await journal.close()


@pytest.fixture
async def market(tmp_path: Path) -> AsyncIterator[RealMarket]:
    async with real_market(tmp_path) as running:
        yield running


@pytest.fixture
async def till(market: RealMarket) -> Till:
    till = Till(market)
    await market.fund(till.key.address)
    return till


def dies_before(real: Any) -> Any:
    async def broken(*_: Any, **__: Any) -> Any:
        raise Died

    return broken


def dies_after(real: Any) -> Any:
    async def broken(*args: Any, **more: Any) -> Any:
        await real(*args, **more)
        raise Died

    return broken


@pytest.mark.anyio
@pytest.mark.parametrize("asset", ["token", "coin"])
@pytest.mark.parametrize(
    "breaks",
    [{"send": dies_before}, {"save": dies_before}, {"save": dies_after}, {"send": dies_after}],
    ids=["ordered", "signed", "kept", "paid"],
)
async def test_whenever_it_dies_it_is_paid_once(
    till: Till, breaks: dict[str, Any], asset: str
) -> None:
    order = Order("one", till.key.address, asset, OWNER_AT, 1234)
    before = (await till.held(OWNER_AT))[asset == "coin"]
    with pytest.raises(Died):
        await till.life(order, **breaks)
    first = await till.life(order)
    assert first.tx_hash
    assert await till.life(order) == first
    assert (await till.held(OWNER_AT))[asset == "coin"] == before + 1234
    with pytest.raises(LocalProtocolError, match="stands for another withdrawal"):
        await till.life(Order("one", till.key.address, asset, OWNER_AT, 1235))
    assert (await till.held(OWNER_AT))[asset == "coin"] == before + 1234


@pytest.mark.anyio
async def test_the_chain_that_is_away_leaves_it_open_and_refusals_do_not(till: Till) -> None:
    def away(real: Any) -> Any:
        async def broken(*_: Any, **__: Any) -> Any:
            raise ChainUnavailable("gone fishing")

        return broken

    order = Order("two", till.key.address, "token", OWNER_AT, 10)
    with pytest.raises(ChainUnavailable):
        await till.life(order, send=away)
    journal = SqliteJournal(till.path / "journal.sqlite")
    assert [bytes(row[0]) for row in journal.read("SELECT data FROM records WHERE open = 1")]
    await journal.close()
    assert (await till.life(order)).tx_hash
    much = Order("three", till.key.address, "token", OWNER_AT, FUNDS)
    refused = await till.life(much)
    assert not refused.tx_hash
    assert "InsufficientBalance" in refused.why
    await till.market.fund(till.key.address)
    assert (await till.life(much)).tx_hash, "what was refused may be tried again"
    assert (await till.held(OWNER_AT))[0] == FUNDS + 10


@pytest.mark.anyio
async def test_a_node_that_runs_takes_orders_and_goes_on_with_them(market: RealMarket) -> None:
    async with market.node() as node:
        # No budget at all: that binds the agent, and not its owner.
        agent = Agent("miser", budget=Budget(total="0", per_day="0"))
        await market.join(node, agent, scribe("seller"))
        order = Order("live", agent.address, "token", OWNER_AT, 77)
        place = market.place("swarm")
        place_order(place, order)
        place_order(place, order)
        (place / "orders" / "zz.json").write_text("garbage")
        with anyio.fail_after(60):
            while await node.settlement.balance(OWNER_AT) != 77 or placed(place):  # noqa: ASYNC110
                await anyio.sleep(0.05)
        assert not (place / "orders" / "zz.json").exists()
    later = Order("later", agent.address, "coin", OWNER_AT, 5)
    place_order(place, later)
    assert placed(place) == [later]
    async with market.node() as node:
        assert await settled(node.settlement.chain, 5)  # type: ignore[attr-defined]
        assert await node.settlement.balance(OWNER_AT) == 77
        report = await audit(node.settlement, [place])  # type: ignore[arg-type]
    assert report.differences == []


async def settled(chain: EvmChain, wei: int) -> bool:
    with anyio.fail_after(60):
        while await chain.coin(OWNER_AT) != wei:  # noqa: ASYNC110
            await anyio.sleep(0.05)
    return True


def test_an_order_that_nobody_took_is_taken_back(tmp_path: Path) -> None:
    order = Order("a", OWNER_AT, "token", OWNER_AT, COIN)
    place_order(tmp_path, order)
    assert (tmp_path / "orders" / "a.json").stat().st_mode & 0o777 == 0o600
    assert take_back(tmp_path, order)
    assert not take_back(tmp_path, order)
    assert placed(tmp_path) == []
