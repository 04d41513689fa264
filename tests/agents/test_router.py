"""The router at work: where calls go, how they go on when a leg fails, and what they tell of it."""

from __future__ import annotations

import time
from contextlib import aclosing, closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.agents import Agent, Job
from coase.agents.charges import charging
from coase.agents.compute import journey
from coase.agents.compute.calllog import CallLog
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.explain import Attempt, Explanation, told
from coase.agents.compute.gate import Limits
from coase.agents.compute.journey import Journey, Leg
from coase.agents.compute.market import MarketCompute
from coase.agents.compute.ports import Chunk, ModelInfo, Prompt, PromptRefused
from coase.agents.compute.router import ModelUnknown, RouterCompute, Unreachable
from coase.agents.compute.routing import HERE, Wish
from coase.agents.compute.ways import Place, Size
from coase.agents.firm import FirmFile, new_firm
from coase.agents.inference import Stock, inference_agent
from coase.agents.wares import Completion, Inference
from coase.protocol.errors import BudgetExhausted, ComputeFailed
from coase.protocol.session import Charge
from tests.agents.market import Market, market
from tests.agents.test_compute_market import (
    HEAD,
    PATIENT,
    WORDS,
    breaks,
    honest,
    seller_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(120)]
ASKED = Prompt.ask(WORDS, max_tokens=400)
SHORT = Prompt.ask("one two three", max_tokens=3)


class Faulty(EchoCompute):
    """An engine that breaks after so many tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        """Yield the first words, and fail."""
        async with aclosing(super().stream(prompt)) as chunks:
            written = 0
            async for chunk in chunks:
                if written == self.tokens:
                    raise ComputeFailed("the engine fell over")
                written += 1
                yield chunk


class Stuck(EchoCompute):
    """An engine that never shows a token; ``ended`` tells that nobody waits any more."""

    def __init__(self) -> None:
        super().__init__()
        self.ended = anyio.Event()

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
        """Yield nothing."""
        try:
            await anyio.sleep_forever()
        finally:
            self.ended.set()
        yield Chunk()


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running


async def ask(
    router: RouterCompute, prompt: Prompt = ASKED, wish: Wish | None = None
) -> tuple[str, Explanation]:
    """Return the whole text and what its last chunk tells."""
    async with aclosing(router.stream(prompt, wish)) as stream:
        chunks = [chunk async for chunk in stream]
    explanation, last = chunks[-1].explanation, chunks[-1]
    assert explanation is not None
    assert chunks[0].explanation is not None
    assert chunks[0].explanation.call == explanation.call
    assert last.usage is not None
    assert sum(chunk.tokens for chunk in chunks) == last.usage.output_tokens
    return "".join(chunk.text for chunk in chunks), explanation


def gone(explanation: Explanation) -> list[tuple[str, str]]:
    return [(attempt.seller, attempt.outcome) for attempt in explanation.attempts]


async def buyer_in(place: Market, *sellers: Agent, **options: Any) -> MarketCompute:
    buyer = Agent("buyer")
    await place.join(*sellers, buyer)
    return MarketCompute(buyer, **{"max_price": "0.05", "reply_within_ms": 1_000, **options})


# ---- Where it goes ---------------------------------------------------------------------------


async def test_what_is_here_and_free_is_made_here_and_says_why(place: Market) -> None:
    bought = await buyer_in(place, seller := honest())
    router = RouterCompute(local=EchoCompute(), market=bought)
    text, explanation = await ask(router)
    assert text == WORDS
    assert gone(explanation) == [(HERE, "answered")]
    assert explanation.outcome == "answered"
    assert explanation.ranking[0].why == "the least expected cost"
    assert (explanation.paid_units, place.earned(seller)) == (0, 0)
    await router.close()


async def test_what_is_learnt_of_a_slow_engine_makes_the_next_call_go_elsewhere(
    place: Market,
) -> None:
    bought = await buyer_in(place, seller := honest(price="0.0001"))
    router = RouterCompute(local=EchoCompute(), market=bought)
    await bought.models()
    await ask(router)
    way = router.book.way(HERE, "echo")
    assert way is not None
    way.token_us = 60_000_000  # A minute for each token: as if it had been seen.
    router.book.learn(way.listing, now_ms=way.heard_ms)
    text, explanation = await ask(router)
    assert text == WORDS
    assert gone(explanation) == [(seller.address, "answered")]
    assert explanation.paid_units == 100
    assert [choice.seller for choice in explanation.ranking] == [seller.address, HERE]
    await router.close()


async def test_a_prompt_stays_where_its_policy_wants_it_even_if_that_fails(
    place: Market,
) -> None:
    bought = await buyer_in(place, seller := honest())
    router = RouterCompute(local=Faulty(3), market=bought)
    await bought.models()
    with pytest.raises(ComputeFailed, match="fell over"):
        await ask(router, wish=Wish(reach=Place.HERE))
    only_market = RouterCompute(market=bought)
    with pytest.raises(PromptRefused):
        await ask(only_market, wish=Wish(reach=Place.HERE))
    with pytest.raises(Unreachable, match="1 not among the sellers allowed"):
        await ask(only_market, wish=Wish(sellers=frozenset({"0x" + "1" * 40})))
    with pytest.raises(Unreachable, match="another region"):
        await ask(only_market, wish=Wish(regions=frozenset({"eu"})))
    await place.rest()
    assert place.earned(seller) == 0
    await router.close()


async def test_a_callers_wish_widens_nothing_that_the_router_narrows(place: Market) -> None:
    bought = await buyer_in(place, seller := honest())
    router = RouterCompute(market=bought, wish=Wish(banned=frozenset({seller.address})))
    with pytest.raises(ComputeFailed):
        await ask(router, wish=Wish(sellers=frozenset({seller.address})))
    await place.rest()
    assert place.earned(seller) == 0
    await router.close()


async def test_sellers_that_are_named_are_taken_and_those_banned_are_not(place: Market) -> None:
    cheap, dear = honest("cheap", "0.01"), honest("dear", "0.04")
    bought = await buyer_in(place, cheap, dear)
    router = RouterCompute(market=bought)
    for wish in (
        Wish(sellers=frozenset({dear.address})),
        Wish(banned=frozenset({cheap.address})),
    ):
        _, explanation = await ask(router, wish=wish)
        assert gone(explanation) == [(dear.address, "answered")]
    await place.rest()
    assert place.earned(cheap) == 0
    await router.close()


async def test_the_firm_serves_whom_no_stranger_may_and_takes_nothing(
    place: Market, tmp_path: Path
) -> None:
    place.node.firm = FirmFile(tmp_path / "firm.json")
    place.node.firm.write(new_firm("home"))
    bought = await buyer_in(place, seller := honest(), settlements=("none", "escrow"))
    router = RouterCompute(market=bought)
    text, explanation = await ask(router, wish=Wish(reach=Place.FIRM))
    assert text == WORDS
    assert explanation.paid_units == 0
    way = next(iter(router.book))
    assert way.listing.place is Place.FIRM
    # Known by now to be of the firm, it is taken by whoever may go to the market as well.
    _, explanation = await ask(router)
    assert gone(explanation) == [(seller.address, "answered")]
    assert explanation.paid_units == 0
    assert way.price_millionths(Size(10, 10)) == 0
    place.node.firm.forget()
    with pytest.raises(PromptRefused):
        await ask(router, wish=Wish(reach=Place.FIRM))
    await place.rest()
    assert place.earned(seller) == 0
    await router.close()


# ---- Models ----------------------------------------------------------------------------------


def stocked(name: str, model: str, price: str) -> Agent:
    class Named(EchoCompute):
        async def models(self) -> list[ModelInfo]:
            return [ModelInfo(name=model)]

        async def stream(self, prompt: Prompt) -> AsyncGenerator[Chunk, None]:
            async with aclosing(super().stream(replace(prompt, model=None))) as chunks:
                async for chunk in chunks:
                    yield chunk

    from coase.agents import Price

    return inference_agent(
        name,
        price=Price.per_task(price),
        compute=Named(),
        stock=Stock([ModelInfo(name=model)]),
        strategy="fixed",
        windows=PATIENT,
    )


async def test_models_are_tried_in_the_order_of_the_request(place: Market) -> None:
    bought = await buyer_in(place, big := stocked("big", "big", "0.02"))
    router = RouterCompute(local=EchoCompute(), market=bought)
    prompt = Prompt.ask(WORDS, max_tokens=400, model="missing")
    with pytest.raises(ModelUnknown, match="'missing'"):
        await ask(router, prompt)
    _, explanation = await ask(router, prompt, Wish(models=("big:latest", "echo")))
    assert explanation.models == ("big", "echo")
    assert gone(explanation) == [(big.address, "answered")]
    _, explanation = await ask(router, prompt, Wish(models=("big", "echo"), most_units=5))
    assert gone(explanation) == [(HERE, "answered")]
    assert explanation.refused["too dear"] == 1
    await router.close()


async def test_a_model_that_somebody_brings_along_is_found_when_it_is_asked_for(
    place: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coase.agents.compute.router.FRESH_MAX_S", 0)
    bought = await buyer_in(place, stocked("small", "small", "0.01"))
    router = RouterCompute(market=bought)
    await bought.models()
    await place.join(big := stocked("big", "big", "0.02"))
    _, explanation = await ask(router, Prompt.ask(WORDS, max_tokens=400, model="big"))
    assert gone(explanation) == [(big.address, "answered")]
    with pytest.raises(ModelUnknown, match="there is: big, small"):
        await ask(router, Prompt.ask(WORDS, model="huge"))
    _, explanation = await ask(router, Prompt.ask(WORDS, model="huge"), Wish(models=("auto",)))
    assert explanation.outcome == "answered"
    await router.close()


async def test_a_seller_that_has_gone_is_asked_once_and_then_left_alone(
    place: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coase.agents.compute.purchase.ASKED_REPLY_MS", 300)
    bought = await buyer_in(place, there := honest(price="0.04"))
    router = RouterCompute(market=bought)
    await bought.models()
    nobody = "0x" + "9" * 40
    known = next(iter(router.book)).listing
    router.book.learn(replace(known, seller=nobody, fixed_units=10), now_ms=time.time_ns() // 10**6)
    for waits in (True, False):
        _, explanation = await ask(router)
        assert explanation.ranking[0].seller == (nobody if waits else there.address)
        assert gone(explanation) == [(there.address, "answered")]
    assert explanation.refused["cooling down after a failure"] == 1
    way = router.book.way(nobody, known.model)
    assert way is not None
    assert way.failures == 0
    await router.close()


# ---- Going on --------------------------------------------------------------------------------


async def test_an_engine_that_falls_over_in_mid_answer_is_replaced_by_a_seller(
    place: Market,
) -> None:
    bought = await buyer_in(place, seller := honest())
    router = RouterCompute(local=Faulty(20), market=bought)
    await bought.models()
    text, explanation = await ask(router)
    assert text == WORDS
    assert gone(explanation) == [(HERE, "failed"), (seller.address, "answered")]
    assert router.book.cools_until_ms(HERE) > 0
    await router.close()


async def test_sellers_that_fail_are_replaced_by_the_engine_here(place: Market) -> None:
    bought = await buyer_in(place, seller := seller_of(breaks))
    local = EchoCompute()
    router = RouterCompute(local=local, market=bought)
    await bought.models()
    await ask(router)
    way = router.book.way(HERE, "echo")
    assert way is not None
    way.token_us = 60_000_000
    router.book.learn(way.listing, now_ms=way.heard_ms)
    text, explanation = await ask(router)
    assert text == WORDS
    assert text.startswith(HEAD)
    assert gone(explanation) == [(seller.address, "failed"), (HERE, "answered")]
    await place.rest()
    assert place.earned(seller) == 0
    # It cools down: the next call does not even ask it.
    _, explanation = await ask(router)
    assert gone(explanation) == [(HERE, "answered")]
    assert explanation.refused["cooling down after a failure"] == 1
    await router.close()


async def test_a_deadline_ends_it(place: Market) -> None:
    stuck = Stuck()
    router = RouterCompute(local=stuck)
    with pytest.raises(ComputeFailed, match="1 expected too late"):
        await ask(router, wish=Wish(deadline_ms=50))
    assert not stuck.ended.is_set()
    with pytest.raises(ComputeFailed, match="not there within 600 ms"):
        await ask(router, SHORT, wish=Wish(deadline_ms=600))
    assert stuck.ended.is_set()
    await router.close()


async def test_a_busy_engine_is_passed_over_and_not_blamed(place: Market) -> None:
    bought = await buyer_in(place, seller := honest())
    local = EchoCompute(limits=Limits(concurrency=1, queue_max=0), chunk_delay_s=0.01)
    router = RouterCompute(local=local, market=bought)
    async with aclosing(router.stream(Prompt.ask(WORDS, max_tokens=400))) as held:
        await anext(held)
        _, explanation = await ask(router)
        assert gone(explanation)[-1] == (seller.address, "answered")
    assert router.book.cools_until_ms(HERE) == 0
    await router.close()


async def test_no_money_left_is_said_even_where_the_engine_here_was_busy_besides(
    place: Market,
) -> None:
    buyer = Agent("buyer", budget="0.0004")
    await place.join(honest(price="0.0005"), buyer)
    bought = MarketCompute(buyer, max_price="0.05")
    await bought.models()
    local = EchoCompute(limits=Limits(concurrency=1, queue_max=0), chunk_delay_s=0.01)
    router = RouterCompute(local=local, market=bought)
    await ask(router)
    way = router.book.way(HERE, "echo")
    assert way is not None
    way.token_us = 60_000_000  # So that it is bought first, and made here where that fails.
    router.book.learn(way.listing, now_ms=way.heard_ms)
    async with aclosing(router.stream(ASKED)) as held:
        first = await anext(held)  # Nothing is left, so that it is made here after all.
        assert first.text == "word0"
        with pytest.raises(BudgetExhausted):
            await ask(router)
    await router.close()


# ---- Two at once -----------------------------------------------------------------------------


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journey, "HEDGE_HERE_MIN_MS", 50)
    monkeypatch.setattr("coase.agents.compute.routing.HEDGE_MIN_MS", 50)
    monkeypatch.setattr("coase.agents.compute.routing.HEDGE_DEVIATIONS", 0)


@pytest.mark.usefixtures("soon")
async def test_a_late_first_token_is_bought_beside_within_a_budget(place: Market) -> None:
    bought = await buyer_in(place, seller := honest(price="0.02"))
    stuck = Stuck()
    router = RouterCompute(local=stuck, market=bought)
    await bought.models()
    before = 2 * 50_000
    text, explanation = await ask(router)
    assert text == WORDS
    assert stuck.ended.is_set()
    assert sorted(gone(explanation)) == [(seller.address, "answered"), (HERE, "too late")]
    assert before - 20_000 <= router.hedges.left_units <= before - 20_000 + 2_000
    await place.rest()
    assert place.earned(seller) == 20_000
    await router.close()


@pytest.mark.usefixtures("soon")
async def test_without_a_budget_for_it_there_is_no_second_request(
    place: Market, monkeypatch: pytest.MonkeyPatch
) -> None:
    bought = await buyer_in(place, seller := honest(price="0.02"))
    stuck = Stuck()
    router = RouterCompute(local=stuck, market=bought)
    await bought.models()
    router.hedges.begin(19_999)
    looked, held = anyio.Event(), Journey._held

    def watched(self: Journey, first: Leg, second: Leg) -> int | None:
        looked.set()
        return held(self, first, second)

    monkeypatch.setattr(Journey, "_held", watched)
    async with anyio.create_task_group() as group:
        group.start_soon(ask, router)
        await looked.wait()
        await anyio.wait_all_tasks_blocked()
        assert bought.agent.buying is not None
        assert not bought.agent.buying.asks
        group.cancel_scope.cancel()
    assert stuck.ended.is_set()
    assert router.hedges.left_units == 19_999
    await place.rest()
    assert place.earned(seller) == 0
    await router.close()


@pytest.mark.usefixtures("soon")
async def test_two_sellers_at_once_are_paid_within_the_budget_for_it(place: Market) -> None:
    hold = anyio.Event()

    async def waits(task: Inference, job: Job) -> Completion:
        await hold.wait()
        return Completion(text=WORDS, model="", input_tokens=1, output_tokens=60)

    slow, quick = seller_of(waits, "slow"), honest("quick", "0.04")
    bought = await buyer_in(place, slow, quick)
    router = RouterCompute(market=bought)
    await bought.models()
    text, explanation = await ask(router)
    assert text == WORDS
    assert gone(explanation)[-1] == (quick.address, "answered")
    # What the late one may still cost, if it had agreed by then, is taken off the budget at once.
    late = (slow.address, "too late") in gone(explanation)
    assert router.hedges.left_units == 2 * 50_000 + 4_000 - 10_000 * late
    hold.set()
    await place.rest()
    assert place.earned(quick) == 40_000
    assert place.earned(slow) in (0, 10_000)
    await router.close()


# ---- What is kept ----------------------------------------------------------------------------


async def test_what_was_learnt_and_why_is_there_after_a_restart(
    place: Market, tmp_path: Path
) -> None:
    bought = await buyer_in(place, seller := honest())
    with closing(CallLog(tmp_path)) as calls:
        router = RouterCompute(market=bought, calls=calls)
        with charging(Charge("", "call-17")):
            await ask(router)
        await router.close()
    with closing(CallLog(tmp_path)) as calls:
        kept = calls.find("call-1")
        assert kept is not None
        assert kept["outcome"] == "answered"
        assert kept["paid_units"] == "20000"
        assert kept["attempts"][0]["seller"] == seller.address
        lines = "\n".join(told(kept))
        assert f"1. {seller.address}: answered" in lines
        assert "it cost 0.02" in lines
        router = RouterCompute(market=bought, calls=calls)
        way = router.book.way(seller.address, "")
        assert way is not None
        assert way.seen == 1


async def test_what_failed_is_kept_too(place: Market, tmp_path: Path) -> None:
    with closing(CallLog(tmp_path)) as calls:
        router = RouterCompute(local=Faulty(3), calls=calls)
        with pytest.raises(ComputeFailed):
            await ask(router)
        (kept,) = calls.latest(5)
        assert kept["outcome"] == "failed: the engine fell over"
        assert kept["attempts"][0]["outcome"] == "failed"


def test_what_is_not_settled_yet_is_told() -> None:
    attempt = Attempt(
        seller="0x1",
        place=Place.MARKET,
        model="m",
        outcome="failed",
        why="it fell silent",
        price_units=1_500,
        paid_units=None,
    )
    made = Explanation(call="c", at_ms=1, attempts=(attempt,), symbol="COASE", decimals=6)
    text = "\n".join(told(made.shown()))
    assert "it cost 0 COASE, and at most 0.0015 COASE more, which is not settled" in text
    assert "1. 0x1 with m: failed (it fell silent)" in text


def test_a_log_that_cannot_be_written_costs_no_answer(tmp_path: Path) -> None:
    calls = CallLog(tmp_path)
    calls.close()
    calls.save({})
    assert calls.learnt() == {}


def test_a_beginning_that_several_calls_have_is_refused(tmp_path: Path) -> None:
    from coase.protocol.errors import ConfigurationError

    with closing(CallLog(tmp_path)) as calls:
        for call in ("ab1", "ab2", "a_c", "ab"):
            calls.keep(Explanation(call=call, at_ms=1))
        exact = calls.find("ab")
        assert exact is not None
        assert exact["call"] == "ab"
        found = calls.find("a_")
        assert found is not None
        assert found["call"] == "a_c"
        assert calls.find("x") is None
        with pytest.raises(ConfigurationError, match="several"):
            calls.find("a")
        assert [row["call"] for row in calls.latest(2)] == ["ab", "a_c"]
