"""What is held against a bought answer whatever its words are, and who may see a text at all."""

from __future__ import annotations

import pytest

from coase.agents import Agent
from coase.agents.compute import purchase as bought
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.market import MarketCompute
from coase.agents.compute.router import RouterCompute, Unreachable
from coase.agents.compute.routing import HERE, Wish
from coase.agents.compute.ways import Place
from coase.agents.inference import input_tokens_max
from coase.agents.wares import Called, Completion, Function, Inference

ASKED = Inference(prompt="Why is the sky blue?")


def made(text: str = "Because.", **more: object) -> Completion:
    fields: dict[str, object] = {"model": "m", "input_tokens": 5, "output_tokens": 2, **more}
    return Completion(text=text, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_answer_that_says_nothing_is_none(text: str) -> None:
    assert bought.unfit(made(text), ASKED) == "the answer is empty"
    assert bought.unfit(made(text, thinking="hm"), ASKED) is None


def test_tools_are_called_only_where_there_are_some() -> None:
    call = Called(name="rm", arguments="{}", id="1")
    assert "tools" in (bought.unfit(made(tool_calls=(call,)), ASKED) or "")
    tool = Function(name="rm", description="", parameters="{}")
    assert (
        bought.unfit(made("", tool_calls=(call,)), ASKED.model_copy(update={"tools": (tool,)}))
        is None
    )


def test_what_a_schema_binds_is_json_unless_it_was_cut_off() -> None:
    bound = ASKED.model_copy(update={"response_schema": '{"type": "object"}'})
    assert "no JSON" in (bought.unfit(made("this is none"), bound) or "")
    assert bought.unfit(made('{"a": 1}'), bound) is None
    assert bought.unfit(made('{"a": ', finish="length"), bound) is None


def test_a_seller_counts_no_more_tokens_than_there_can_be() -> None:
    most = input_tokens_max(ASKED)
    boast = made("Short.", input_tokens=10**9, output_tokens=10**9)
    told = bought.believed(boast, input_max=most)
    assert told.output_tokens <= 6 + bought.MARKS_MAX_TOKENS
    assert told.input_tokens < 10_000
    assert bought.believed(made(), input_max=most) == made()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "wish", [Wish(reach=Place.HERE), Wish(most_units=0), Wish(sellers=frozenset((HERE,)))]
)
async def test_texts_to_embed_go_no_further_than_they_may(wish: Wish) -> None:
    buyer = Agent("buyer")  # It has no place: whoever asked the market would hear of that.
    market = MarketCompute(buyer, max_price="0.01")
    router = RouterCompute(market=market, wish=wish)
    if wish.sellers:
        router = RouterCompute(local=EchoCompute(), market=market, wish=wish)
        assert len((await router.embed(["a text"])).vectors) == 1
        return
    with pytest.raises(Unreachable):
        await router.embed(["a secret text"])
    with pytest.raises(Unreachable):
        await RouterCompute(market=market).embed(["a secret text"], None, wish)
