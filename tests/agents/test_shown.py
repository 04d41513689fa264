"""A buyer sees a result while it is made; what it sees binds nobody and may be anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coase.agents import Agent, Job, Price
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.ports import Prompt
from coase.agents.job import Shown
from coase.agents.wares import Completion, Inference
from tests.agents.market import SHORT, Market, market

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from coase.agents.steps import Notice

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Market]:
    async with market(tmp_path) as running:
        yield running


def writer(name: str = "writer", compute: EchoCompute | None = None) -> Agent:
    seller = Agent(name, compute=compute or EchoCompute())

    @seller.offers("inference", price=Price.per_task("0.02"), windows=SHORT)
    async def write(task: Inference, job: Job) -> Completion:
        written = await job.complete(Prompt.ask(task.prompt), show=True)
        used = written.usage
        return Completion(
            text=written.text,
            model="echo",
            input_tokens=used.input_tokens,
            output_tokens=used.output_tokens,
        )

    return seller


async def test_the_text_is_seen_in_order_before_the_result_is_there(place: Market) -> None:
    seller, buyer = writer(), Agent("buyer")
    await place.join(seller, buyer)
    seen: list[str] = []
    kinds: list[str] = []

    def note(_: str, notice: Notice) -> None:
        if notice.kind in ("chunk", "heard:result"):
            kinds.append(notice.kind)

    place.node.runtime.observers.append(note)
    text = " ".join(f"word{number}" for number in range(100))
    bought = await buyer.purchase(
        "inference",
        Inference(prompt=text),
        returns=Completion,
        max_price="0.05",
        on_text=seen.append,
    )
    assert len(seen) > 1
    shown = "".join(seen)
    assert shown
    assert bought.result.text.startswith(shown)
    assert kinds == ["chunk"] * len(seen) + ["heard:result"]
    await place.node.at_rest()
    assert place.chain.held() == 0


async def test_what_is_shown_is_not_journalled_and_not_acknowledged(place: Market) -> None:
    seller, buyer = writer(), Agent("buyer")
    await place.join(seller, buyer)
    assert seller.seat is not None
    assert buyer.seat is not None
    desk = seller.seat.desk
    deals: list[str] = []

    def note(_: str, notice: Notice) -> None:
        if notice.kind == "chunk":
            deals.append(notice.deal)

    place.node.runtime.observers.append(note)
    await buyer.purchase(
        "inference", Inference(prompt="a b c d e f g h " * 9), returns=Completion, max_price="0.05"
    )
    assert deals
    assert "chunk" not in {letter.kind for letter in desk.dead}
    assert desk.counts.get("nack_received", 0) == 0
    kinds = {
        record.kind
        for agent in (seller, buyer)
        for record in place.node.journal.open_records(agent.address)
    }
    assert "chunk" not in kinds


async def test_a_seller_may_show_nothing_after_its_result_and_to_strangers_never(
    place: Market,
) -> None:
    seller, buyer, stranger = writer(), Agent("buyer"), Agent("stranger")
    await place.join(seller, buyer, stranger)
    assert seller.seat is not None
    assert buyer.seat is not None
    assert stranger.seat is not None
    bought = await buyer.purchase(
        "inference", Inference(prompt="hello"), returns=Completion, max_price="0.05"
    )
    desk = seller.seat.desk
    assert not desk.show(bought.deal, 0, "more", 1, now_ms=place.node.runtime.now_ms())
    assert not stranger.seat.desk.show(bought.deal, 0, "more", 1, now_ms=0)


def test_after_a_gap_nothing_more_is_passed_on() -> None:
    seen: list[str] = []
    shown = Shown(seen.append)
    for number, text in ((0, "a"), (1, "b"), (1, "again"), (3, "d"), (0, "anew"), (2, "c")):
        shown.take(number, text)
    assert seen == ["a", "b", "c"]
