"""The buyer for whoever wants no more than answers within a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.agents import Agent, Budget, BudgetExhausted, Buyer, Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.gate import Limits
from coase.agents.compute.ports import Message, Prompt
from coase.agents.compute.routing import Wish
from coase.agents.compute.ways import Place
from coase.agents.config import NatsAddress, Network
from coase.agents.firm import Colleagues, FirmFile, new_firm
from coase.agents.inference import inference_agent
from coase.agents.wares import Summarise, Summary
from coase.protocol.errors import ComputeFailed, ConfigurationError, TransportUnavailable
from tests.agents.market import ESCROW, Market, market
from tests.agents.test_workers import LOOK_S, PATIENT, scribe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]

WORDS = "one two three four"


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running


async def shop(place: Market, *, seller: str = "oracle", **options: Any) -> Buyer:
    """Return a buyer of a market with a seller of inference, and with money."""
    oracle = inference_agent(
        seller,
        price=Price.per_task("0.01"),
        compute=EchoCompute(),
        strategy="fixed",
        windows=PATIENT,
    )
    wanted: dict[str, Any] = {"budget": "0.05", "max_price": "0.02", "node": place.node}
    buyer = Buyer(**wanted | options)
    await place.join(oracle, buyer.agent)
    return buyer


async def text_of(buyer: Buyer, question: Any, **options: Any) -> str:
    return "".join([chunk.text async for chunk in buyer.chat(question, **options)])


async def test_without_a_budget_the_engine_here_answers_and_nothing_is_bought() -> None:
    async with Buyer(engine=EchoCompute()) as buyer:
        assert await text_of(buyer, WORDS) == WORDS
        assert "1. the engine here with echo: answered" in buyer.explain()
        assert (buyer.spent_units, buyer.spent, buyer.left) == (0, "0", "0")
        with pytest.raises(ConfigurationError, match="no budget"):
            await buyer.hire("summarise", Summarise(text="x"), returns=Summary)
        assert (await buyer.plan().map([Prompt.ask("a"), Prompt.ask("b")])).results == ["a", "b"]
    with pytest.raises(ConfigurationError, match="async with"):
        await text_of(buyer, WORDS)


async def test_questions_come_in_any_shape() -> None:
    async with Buyer(engine="echo") as buyer:
        begun = [Message("user", WORDS), Message("assistant", "one two")]
        assert await text_of(buyer, begun) == " three four"
        plain = [{"role": "user", "content": WORDS}]
        assert await text_of(buyer, plain, system="Be short.", max_tokens=1) == "one"
        assert await text_of(buyer, Prompt.ask(WORDS, stop=("three",))) == "one two "[:-1]
        assert (await buyer.complete(WORDS)).text == WORDS


async def test_answers_are_bought_until_the_budget_is_spent_and_not_a_unit_further(
    place: Market,
) -> None:
    async with await shop(place, engine=None, budget="0.021", max_price="0.01") as buyer:
        with pytest.raises(ConfigurationError, match="nothing was answered"):
            buyer.explain()
        assert await text_of(buyer, WORDS) == WORDS
        attempts = buyer.explained()["attempts"]
        assert [(each["place"], each["outcome"]) for each in attempts] == [("market", "answered")]
        assert "it cost 0.01 COASE" in buyer.explain()
        await place.rest()  # Until then the bond of a dispute counts, too.
        assert (buyer.spent_units, buyer.spent) == (10_000, "0.01 COASE")
        assert (await buyer.complete(WORDS)).text == WORDS
        await place.rest()
        assert buyer.left == "0.001 COASE"
        with pytest.raises(BudgetExhausted):
            await buyer.complete(WORDS)
        assert place.earned(buyer.agent) == -20_000


async def test_what_the_engine_here_has_no_place_for_is_bought(place: Market) -> None:
    full = EchoCompute(limits=Limits(concurrency=1, queue_max=0), chunk_delay_s=60)
    async with await shop(place, engine=full) as buyer:
        async with anyio.create_task_group() as group:
            group.start_soon(full.complete, Prompt.ask(WORDS))
            await anyio.wait_all_tasks_blocked()
            assert await text_of(buyer, WORDS) == WORDS
            assert buyer.explained()["attempts"][-1]["place"] == "market"
            group.cancel_scope.cancel()


async def test_work_is_hired_and_planned_within_the_same_budget(place: Market) -> None:
    anna = scribe("anna")
    async with await shop(place, engine=None) as buyer:
        await place.join(anna)
        summary = await buyer.hire(
            "summarise", Summarise(text="some words"), returns=Summary, deliver_within=100
        )
        assert summary == Summary(summary="some by anna")
        await place.rest()
        worker = buyer.market("summarise", returns=Summary, look_s=LOOK_S)
        plan = buyer.plan(worker, budget="0.5", max_price="0.01")
        assert plan.pot.total_units == 40_000  # What is left of its own budget, which is less.
        notes = await plan.map([Summarise(text=f"word{number}") for number in range(2)])
        assert notes.complete
        assert plan.receipt().signer == buyer.agent.address
        await place.rest()
        assert buyer.spent_units == 30_000
        texts = buyer.plan(max_price="0.01")
        assert (await texts.map([Prompt.ask("said")])).results == ["said"]


async def test_a_network_that_is_away_is_no_fault_where_there_is_an_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COASE_HOME", str(tmp_path))
    monkeypatch.delenv("COASE_NETWORK", raising=False)
    async with Buyer(budget="1", engine=EchoCompute()) as buyer:
        assert await text_of(buyer, WORDS) == WORDS
        with pytest.raises(ConfigurationError, match="coase up"):
            await buyer.hire("summarise", Summarise(text="x"), returns=Summary)
    with pytest.raises(ConfigurationError, match="coase up"):
        await Buyer(budget="1", engine=None).__aenter__()
    away = Network(
        nats=NatsAddress(url="nats://127.0.0.1:1"),
        rpc="http://127.0.0.1:1",
        chain_id=31337,
        token="0x" + "33" * 20,
        factory="0x" + "55" * 20,
        escrow=ESCROW,
        faucet=True,
    )
    with pytest.raises(TransportUnavailable):
        await Buyer(budget="1", engine=None, network=away).__aenter__()


async def test_an_engine_that_was_asked_for_by_name_must_be_there() -> None:
    with pytest.raises(ComputeFailed, match="no Ollama"):
        await Buyer(engine="ollama", url="http://127.0.0.1:1").__aenter__()


async def test_vectors_come_from_who_makes_them() -> None:
    async with Buyer(engine=EchoCompute()) as buyer:
        assert len((await buyer.embed(["a", "b"])).vectors) == 2


def test_what_cannot_be() -> None:
    with pytest.raises(ConfigurationError, match="max_price"):
        Buyer(budget=Budget(per_hour="1"))
    with pytest.raises(ConfigurationError, match="plain decimal"):
        Buyer(budget="much")
    with pytest.raises(ConfigurationError, match="no name"):
        Buyer("no name", budget="1")


async def test_without_engine_budget_and_firm_there_are_no_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COASE_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match="without an engine, a budget or a firm"):
        await Buyer(engine=None).__aenter__()


async def test_within_a_firm_answers_and_plans_cost_nothing(place: Market, tmp_path: Path) -> None:
    place.node.firm = FirmFile(tmp_path / "firm.json")
    place.node.colleagues = Colleagues(place.node.firm)
    place.node.firm.write(new_firm("office"))
    async with await shop(place, engine=None, budget=None, max_price="") as buyer:
        assert await text_of(buyer, WORDS) == WORDS
        assert buyer.explained()["attempts"][-1]["place"] == "firm"
        assert (await buyer.plan().map([Prompt.ask("said")])).results == ["said"]
        assert buyer.spent_units == 0
    async with await shop(place, name="rich", engine=None, seller="second") as buyer:
        plan = buyer.plan(max_price="0.01")
        assert (await plan.map([Prompt.ask("said")])).results == ["said"]
        assert plan.spent_units == 0


async def test_a_wish_keeps_a_prompt_where_it_may_be_seen(place: Market) -> None:
    here = Wish(reach=Place.HERE)
    async with await shop(place, engine=None) as buyer:
        with pytest.raises(ComputeFailed, match="nobody may answer this"):
            await buyer.complete(WORDS, wish=here)
        assert buyer.spent_units == 0


async def test_an_agent_of_the_same_name_is_the_same_buyer(place: Market) -> None:
    async with await shop(place, engine=None) as buyer:
        assert await text_of(buyer, WORDS) == WORDS
        assert isinstance(buyer.agent, Agent)
        assert buyer.agent.address == place.node.agents[-1].address
