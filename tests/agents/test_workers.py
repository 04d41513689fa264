"""Plans whose pieces are bought on a market, or made by the engine here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.agents import Agent, Job, Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.gate import Limits
from coase.agents.compute.market import MarketCompute
from coase.agents.compute.ports import Prompt
from coase.agents.inference import inference_agent
from coase.agents.plans import Plan
from coase.agents.seller import Windows
from coase.agents.wares import Summarise, Summary
from coase.agents.workers import EitherWorker, EngineWorker, HireWorker, InferenceWorker
from tests.agents.market import Market, market
from tests.agents.realmarket import FUNDS as REAL_FUNDS
from tests.agents.realmarket import real_market
from tests.agents.realmarket import scribe as real_scribe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.agents.steps import Notice

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

# Nobody's silence on the chain is waited for, and a slow machine must not make any.
PATIENT = Windows(lock_s=100, dispute_s=100, answer_s=100, rule_s=100)
LOOK_S = 0.2


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running


def scribe(name: str, price: str = "0.01", tempted: list[str] | None = None) -> Agent:
    """Summarises by the first word; whoever is tempted first lies."""
    agent = Agent(name)

    @agent.offers("summarise", price=Price.per_task(price), windows=PATIENT, deliver_within=100)
    async def summarise(task: Summarise, job: Job) -> Summary:
        if tempted is not None:
            tempted.append(name)
        lies = tempted == [name]
        return Summary(summary="a lie" if lies else f"{task.text.split()[0]} by {name}")

    return agent


def oracle(name: str, price: str = "0.01") -> Agent:
    return inference_agent(
        name, price=Price.per_task(price), compute=EchoCompute(), strategy="fixed", windows=PATIENT
    )


def hire(buyer: Agent) -> HireWorker[Summarise, Summary]:
    return HireWorker(buyer, "summarise", returns=Summary, decide_after_ms=50, look_s=LOOK_S)


def plan_of(worker: Any, **options: Any) -> Plan[Any, Any]:
    return Plan(worker, **({"budget_units": 1_000_000, "within_s": 200, "hedge": False} | options))


async def test_pieces_are_bought_from_all_sellers_and_the_receipt_names_their_deals(
    place: Market,
) -> None:
    buyer, anna, bert = Agent("buyer", budget="1"), scribe("anna"), scribe("bert", "0.02")
    await place.join(buyer, anna, bert)
    assert buyer.seat is not None
    plan = plan_of(hire(buyer), at_once=4, max_units=30_000, identity=buyer.seat.identity)
    tasks = [Summarise(text=f"word{number} of four") for number in range(4)]
    covered = await plan.map(tasks)
    assert sorted(made.seller for made in covered.made if made is not None) == sorted(
        [anna.address] * 2 + [bert.address] * 2
    )
    assert plan.spent_units == 60_000
    receipt = plan.receipt()
    keys = [part.key for part in receipt.parts]
    receipt.check(
        tasks=dict(zip(keys, tasks, strict=True)),
        results=dict(zip(keys, covered.results, strict=True)),
    )
    assert receipt.signer == buyer.address
    await place.rest()
    assert place.earned(buyer) == -receipt.total_units
    assert (place.earned(anna), place.earned(bert)) == (20_000, 40_000)
    assert all(part.deal for part in receipt.parts)


async def test_a_plan_with_a_key_buys_nothing_twice(place: Market) -> None:
    buyer, anna = Agent("buyer", budget="1"), scribe("anna")
    await place.join(buyer, anna)
    tasks = [Summarise(text=f"word{number} of two") for number in range(2)]
    first = plan_of(hire(buyer), key="digest-1", max_units=10_000)
    before = await first.map(tasks)
    await place.rest()
    again = plan_of(hire(buyer), key="digest-1", max_units=10_000, budget_units=20_000)
    after = await again.map(tasks)
    assert after == before
    assert after.complete
    assert again.spent_units == 20_000
    assert place.earned(anna) == 20_000


async def test_a_refused_result_is_accounted_for_and_made_elsewhere(
    place: Market,
) -> None:
    buyer, tempted = Agent("buyer", budget="1"), list[str]()
    await place.join(buyer, scribe("anna", tempted=tempted), scribe("bert", tempted=tempted))
    plan = plan_of(hire(buyer), max_units=10_000)
    covered = await plan.map(
        [Summarise(text="some words")],
        check=lambda made: "it lies" if "lie" in made.summary else None,
    )
    assert covered.results == [Summary(summary=f"some by {tempted[1]}")]
    assert sorted(tempted) == ["anna", "bert"]
    assert plan.spent_units == 20_000  # What the liar may yet win in the dispute counts.
    assert [part.used for part in plan.receipt().parts] == [True, False]


async def test_what_nobody_waits_for_any_more_is_not_bought(place: Market) -> None:
    buyer = Agent("buyer", budget="1")
    await place.join(buyer)
    plan = plan_of(hire(buyer), within_s=0.6)
    covered = await plan.map([Summarise(text="nobody sells this")])
    assert not covered.complete
    assert plan.spent_units == 0
    assert buyer.buying is not None
    assert not buyer.buying.is_spending()


async def test_what_nobody_sold_once_is_asked_for_again(place: Market) -> None:
    buyer = Agent("buyer", budget="1")
    await place.join(buyer)
    quick: HireWorker[Summarise, Summary] = HireWorker(
        buyer, "summarise", returns=Summary, look_s=0.1, reply_within_ms=100
    )
    tasks = [Summarise(text="some words")]
    covered = await plan_of(quick, key="k", tries=1).map(tasks)
    assert "nobody made an offer" in covered.missing[0]
    await place.join(scribe("anna"))
    assert (await plan_of(hire(buyer), key="k", tries=1).map(tasks)).complete


async def test_text_is_bought_where_the_engine_here_has_no_place(place: Market) -> None:
    buyer, anna = Agent("buyer", budget="1"), oracle("anna")
    await place.join(buyer, anna)
    here = EchoCompute(limits=Limits(concurrency=1, queue_max=0))
    local = EngineWorker(here, at_once=1)
    plan = plan_of(
        EitherWorker(local, InferenceWorker(buyer, decide_after_ms=50, look_s=LOOK_S)),
        max_units=10_000,
    )
    covered = await plan.map([Prompt.ask(f"word{number}") for number in range(3)])
    assert covered.results == ["word0", "word1", "word2"]
    parts = plan.receipt().parts
    assert {part.seller for part in parts} == {here.name, anna.address}
    assert plan.spent_units == sum(part.price_units for part in parts) > 0
    poor = plan_of(
        EitherWorker(local, InferenceWorker(buyer, decide_after_ms=50, look_s=LOOK_S)),
        budget_units=0,
    )
    assert (await poor.map([Prompt.ask("a"), Prompt.ask("b")])).results == ["a", "b"]
    assert poor.spent_units == 0


async def test_text_by_an_engine_that_buys_counts_against_the_plan(place: Market) -> None:
    buyer, anna = Agent("buyer", budget="1"), oracle("anna")
    await place.join(buyer, anna)
    worker = EngineWorker(MarketCompute(buyer, max_price="0.02"), max_units=20_000, asset="x")
    plan = plan_of(worker, budget_units=45_000, max_units=20_000, at_once=4)
    covered = await plan.map([Prompt.ask(f"word{number}") for number in range(3)])
    assert covered.complete
    assert plan.spent_units == 30_000
    assert {part.seller for part in plan.receipt().parts} == {anna.address}
    small = plan_of(worker, budget_units=19_999)
    assert not (await small.map([Prompt.ask("word")])).complete
    assert small.spent_units == 0


async def test_a_plan_that_was_cut_off_goes_on_with_the_same_deals(tmp_path: Path) -> None:
    tasks = [Summarise(text=f"word{number} of two") for number in range(2)]
    async with real_market(tmp_path) as real:
        gate, agreed = anyio.Event(), list[str]()
        async with real.node() as node, anyio.create_task_group() as group:
            buyer = Agent("buyer", budget="1", by_rounds=True)
            await real.join(node, buyer, real_scribe("anna", gate=gate))

            def notice(who: str, notice: Notice) -> None:
                if notice.kind == "chain:locked" and who == buyer.address:
                    agreed.append(notice.deal)
                    if len(set(agreed)) == 2:
                        group.cancel_scope.cancel()

            node.runtime.observers.append(notice)
            plan = plan_of(hire(buyer), key="cut", max_units=20_000)
            await plan.map(tasks)
        assert plan.spent_units == 40_000  # Nobody knows how they ended.
        async with real.node() as node:
            buyer = Agent("buyer", budget="1", by_rounds=True)
            anna = real_scribe("anna")
            await real.join(node, buyer, anna)
            again = plan_of(hire(buyer), key="cut", max_units=20_000, budget_units=40_000)
            covered = await again.map(tasks)
            assert covered.complete
            assert {part.deal for part in again.receipt().parts} == set(agreed)
            assert again.spent_units == 40_000
            await real.rest(node)
            assert await node.settlement.balance(anna.address) == REAL_FUNDS + 40_000
