"""Deals with a stake: a slice each, free again after good work, lost by silence and by rulings."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import anyio
import pytest

from coase.agents import Agent, Job, Price
from coase.agents.guarantor import Guarantor
from coase.agents.keeper import Keeper
from coase.agents.seller import stake_units
from coase.agents.wares import Summarise, Summary
from coase.escrow.backends.memory import MemorySettlement
from coase.escrow.backends.memory_stake import MemoryStakeRegistry, MemoryVault
from coase.protocol.errors import ConfigurationError, DealFailed
from coase.protocol.identity import Identity

from .market import FUNDS, SHORT, Market, market

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.anyio
VAULT = "0x" + "77" * 20
STAKE = 1_000_000


class Staked:
    """A market with a vault, and what it takes to wait for it."""

    def __init__(self, place: Market, vault: MemoryVault, guarantor: Guarantor) -> None:
        self.place, self.vault, self.guarantor = place, vault, guarantor

    async def until(self, done: object) -> None:
        assert callable(done)
        with anyio.fail_after(60):
            while not done():
                for seat in list(self.place.node.runtime.seats.values()):
                    await self.guarantor.close_slices(seat)
                await anyio.sleep(0.05)


@asynccontextmanager
async def staked(folder: Path) -> AsyncIterator[Staked]:
    async with market(folder) as place:
        vault = MemoryVault(place.chain, VAULT)
        settlement = place.node.settlement
        assert isinstance(settlement, MemorySettlement)
        registry = MemoryStakeRegistry(vault, settlement)
        place.node.stake = registry
        guarantor = place.node.guarantor = Guarantor(place.node.runtime, registry)
        yield Staked(place, vault, guarantor)


def scribe(name: str = "scribe", *, stake: str = "1") -> Agent:
    agent = Agent(name, stake=stake)

    @agent.offers("summarise", price=Price.per_task("0.1"), deliver_within=3, windows=SHORT)
    async def summarise(task: Summarise, job: Job) -> Summary:
        if "sleep" in task.text:
            await anyio.sleep_forever()
        if "lie" in task.text:
            return Summary.model_construct(summary="")
        return Summary(summary=task.text)

    return agent


async def put_up(place: Staked, agent: Agent) -> None:
    assert agent.seat is not None
    await place.guarantor.put_up(agent.seat, STAKE)


async def buy(buyer: Agent, text: str) -> Summary:
    return await buyer.hire(
        "summarise",
        Summarise(text=text),
        returns=Summary,
        max_price="0.2",
        deliver_within=10,
        stake_permille=2_000,
    )


async def test_good_work_frees_its_slice(tmp_path: Path) -> None:
    async with staked(tmp_path) as place:
        seller, buyer = scribe(), Agent("buyer")
        await place.place.join(seller, buyer)
        await put_up(place, seller)
        assert place.vault.stake(seller.address).free_units == STAKE
        assert (await buy(buyer, "well")).summary == "well"
        await place.place.rest()
        await place.until(lambda: not place.vault.stake(seller.address).reserved_units)
        assert place.vault.stake(seller.address).free_units == STAKE
        place.vault.check()


async def test_a_keeper_frees_what_nobody_else_does(tmp_path: Path) -> None:
    async with staked(tmp_path) as place:
        seller, buyer = scribe(), Agent("buyer")
        await place.place.join(seller, buyer)
        await put_up(place, seller)
        await buy(buyer, "well")
        await place.place.rest()
        for agent in (seller, buyer):  # Their own nodes are away.
            assert agent.seat is not None
            agent.seat.desk.slices.open.clear()
        node = place.place.node
        keeper = Keeper(
            node.settlement,
            Identity(b"\x51" * 32),
            node.journal,
            now_ms=lambda: 1_000,
            grace_s=0,
            stake=node.stake,
        )
        assert place.vault.stake(seller.address).reserved_units
        with anyio.fail_after(60):
            while place.vault.stake(seller.address).reserved_units:
                await keeper.look()
        assert place.vault.stake(seller.address).free_units == STAKE
        assert await keeper.look() == []


async def test_a_seller_who_took_the_task_and_sleeps_loses_its_slice(tmp_path: Path) -> None:
    async with staked(tmp_path) as place:
        seller, buyer = scribe(), Agent("buyer")
        await place.place.join(seller, buyer)
        await put_up(place, seller)
        with pytest.raises(DealFailed):
            await buy(buyer, "sleep")
        await place.place.rest()
        await place.until(lambda: place.vault.stake(seller.address).bonded_units < STAKE)
        assert place.vault.stake(seller.address).bonded_units == STAKE - 200_000
        assert place.place.chain.balance(buyer.address) == FUNDS + 200_000
        place.vault.check()


async def test_rubbish_costs_the_slice_by_the_arbiters_ruling(tmp_path: Path) -> None:
    async with staked(tmp_path) as place:
        seller, buyer = scribe(), Agent("buyer")
        await place.place.join(seller, buyer)
        await put_up(place, seller)
        with pytest.raises(DealFailed, match="schema"):
            await buy(buyer, "lie")
        await place.place.rest()
        await place.until(lambda: place.vault.stake(seller.address).bonded_units < STAKE)
        assert place.vault.stake(seller.address).bonded_units == STAKE - 200_000
        # The bond of a dispute that it won came back; the arbiter's fee is what the seller posted.
        assert place.place.chain.balance(buyer.address) == FUNDS + 200_000
        place.vault.check()


async def test_who_has_not_enough_at_stake_makes_no_offer(tmp_path: Path) -> None:
    async with staked(tmp_path) as place:
        rich, poor, buyer = scribe("rich"), scribe("poor", stake=""), Agent("buyer")
        await place.place.join(poor, buyer)
        with pytest.raises(DealFailed, match="nobody"):
            await buy(buyer, "hello")
        await place.place.join(rich)
        await put_up(place, rich)
        assert (await buy(buyer, "hello")).summary == "hello"
        await place.place.rest()


async def test_what_is_not_staked_any_more_comes_back_after_its_delay(tmp_path: Path) -> None:
    async with staked(tmp_path) as place:
        seller = scribe()
        await place.place.join(seller)
        await put_up(place, seller)
        await put_up(place, seller)  # Nothing is put up twice.
        assert place.vault.stake(seller.address).free_units == STAKE
        assert seller.seat is not None
        await place.guarantor.put_up(seller.seat, 0)
        left = place.vault.stake(seller.address)
        assert (left.free_units, left.unbonding_units) == (0, STAKE)
        assert seller.seat.desk.stake_free_units == 0
        assert left.unbond_at_s - place.place.node.runtime.head.time_s > 6 * 24 * 3600


async def test_a_stake_is_asked_for_where_there_is_a_vault(tmp_path: Path) -> None:
    async with market(tmp_path) as place:
        buyer = Agent("buyer")
        await place.join(buyer)
        with pytest.raises(ConfigurationError, match="vault"):
            await buy(buyer, "hello")
        with pytest.raises(ConfigurationError, match="vault"):
            await place.join(scribe())


def test_a_stake_is_rounded_up() -> None:
    from .desks import Market as Desks

    made = Desks()
    made.ask("x", stake_permille=1)
    request = next(iter(made.buying.asks.values())).request
    assert [stake_units(units, request) for units in (0, 1, 999, 1_000, 1_001)] == [0, 1, 1, 1, 2]
