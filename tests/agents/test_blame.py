"""Whose fault it is that there is no answer: the caller's, or that of sellers, who are named."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from coase.agents import Agent, Job, Price
from coase.agents.compute.blame import NoOffer, carried, in_words, refusal, summed, told
from coase.agents.compute.explain import Attempt
from coase.agents.compute.market import MarketCompute
from coase.agents.compute.ports import ModelInfo, Prompt, PromptTooLong, Unsupported
from coase.agents.compute.router import RouterCompute
from coase.agents.compute.ways import Place
from coase.agents.wares import Completion, Inference  # noqa: TC001 - read by offers.
from coase.protocol.errors import ComputeFailed
from tests.agents.market import market
from tests.agents.realmarket import LONG, real_market
from tests.agents.test_bought_prompts import seller_of as listed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.timeout(120)]
STOPPED = "the deal ended refunded: the price came back: the seller stopped: "
LATE = Attempt(
    seller="0x" + "ab" * 20, place=Place.MARKET, model="m", outcome="failed", why="it fell silent"
)


def moody() -> Agent:
    """Return a seller that finds long prompts too long, and has no ideas for others."""
    seller = Agent("moody")

    @seller.offers("inference", price=Price.per_million(input="2", output="8"), windows=LONG)
    async def write(task: Inference, job: Job) -> Completion:
        if "long" in task.prompt:
            raise PromptTooLong("9 tokens do not fit")
        raise ValueError("no ideas today")

    return seller


def said(kind: str) -> Attempt:
    return replace(LATE, why=f"{STOPPED}{kind}: not this one (deal 0a1b)")


@pytest.mark.anyio
async def test_what_all_sellers_refuse_is_the_callers_fault_and_else_they_are_named(
    tmp_path: Path,
) -> None:
    there, buyer = moody(), Agent("buyer", budget="1")
    async with real_market(tmp_path) as place, place.node() as node:
        await place.join(node, there, buyer)
        bought = MarketCompute(buyer, max_price="0.5", decide_after_ms=50, reply_within_ms=1_000)
        router = RouterCompute(market=bought)
        with pytest.raises(PromptTooLong, match=f"{there.address[:10]}: it stopped: 9 tokens"):
            await router.complete(Prompt.ask("so long", max_tokens=40))
        assert router.book.cools_until_ms(there.address) == 0
        with pytest.raises(NoOffer, match=f"{there.address[:10]}: it stopped: no ideas today; no"):
            await router.complete(Prompt.ask("short", max_tokens=40))
        assert router.book.cools_until_ms(there.address) > 0
        await router.close()
        await place.rest(node)


@pytest.mark.anyio
async def test_a_prompt_over_the_context_of_all_sellers_is_too_long_before_anybody_is_asked(
    tmp_path: Path,
) -> None:
    model = ModelInfo(name="m", context_tokens=500, capabilities=("completion", "embedding"))
    buyer = Agent("buyer", budget="1")
    async with market(tmp_path) as place:
        await place.join(listed("small", model), buyer)
        router = RouterCompute(market=MarketCompute(buyer, max_price="0.5", reply_within_ms=300))
        with pytest.raises(PromptTooLong, match="the largest one is of 500"):
            await router.complete(Prompt.ask("long " * 500))
        assert buyer.buying is not None
        assert not buyer.buying.asks
        with pytest.raises(PromptTooLong, match="no model in reach embeds more than 500"):
            await router.embed(["long " * 500])
        await router.close()


def test_one_seller_alone_is_not_believed_that_it_is_the_prompt() -> None:
    error = ComputeFailed("no seller delivered")
    one = summed(error, [said("PromptTooLong"), LATE])
    assert type(one) is ComputeFailed
    assert str(one).count("0xabababab") == 2
    assert type(summed(error, [said("PromptTooLong")] * 2)) is PromptTooLong
    assert type(summed(error, [said("PromptTooLong"), said("PromptRefused")])) is Unsupported
    assert summed(error, []) is error
    answered = replace(LATE, outcome="answered")
    assert summed(error, [answered]) is error


def test_reasons_are_told_without_the_words_for_machines() -> None:
    assert refusal(said("Unsupported").why) == "Unsupported"
    assert refusal(said("ValueError").why) == refusal("PromptTooLong: at all") == ""
    assert in_words(said("ValueError").why) == "it stopped: not this one"
    assert in_words("") == "it did not say why"
    assert told([LATE] * 6).endswith("; and 2 more")
    assert told([replace(LATE, seller="here")]) == "the engine here: it fell silent"


def test_who_failed_at_first_is_not_forgotten_when_nobody_offers_again() -> None:
    first, second = NoOffer("nobody sells it"), NoOffer("nobody sells it")
    first.tried = (LATE,)
    assert str(second) == "nobody sells it"
    carried(second, first)
    assert str(second).startswith("no answer could be bought: 0xabababab: it fell silent; nobody")
    carried(ValueError(), first)
