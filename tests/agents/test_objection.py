"""A dispute by hand: opened, answered and ruled over three lives of a node, and its whole file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import pytest

from coase.agents import Agent
from coase.agents.casefile import case_file, messages_of, on_chain, read_deal, waiting_for
from coase.agents.node import Node
from coase.agents.objection import (
    Objector,
    object_to,
    require_answerable,
    require_objectionable,
    until,
)
from coase.agents.wiring import view_settlement
from coase.protocol.errors import ConfigurationError, DealFailed
from coase.protocol.session import evidence_hash
from coase.protocol.states import Role, State
from coase.protocol.types import ZERO_ADDRESS, How
from coase.tools.cli import dispute_command
from coase.tools.cli.app import out
from coase.tools.cli.journals import deals_in
from tests.agents.realmarket import ARBITER, LONG, RealMarket, buy, real_market, scribe

if TYPE_CHECKING:
    from coase.protocol.session import Thread

WAIT_S = 90
WHY = "it is in the wrong language"


class Undecided(Agent):
    """A buyer that never finishes to look at what it got."""

    async def check(self, thread: Thread) -> str:
        await anyio.sleep_forever()
        return ""


async def delivered(market: RealMarket) -> str:
    """Make a deal whose result is on chain and not judged, and end the node; return its id."""
    async with market.node() as node:
        buyer = Undecided("reader")
        await market.join(node, scribe("writer"), buyer)
        async with anyio.create_task_group() as group:
            group.start_soon(buy, buyer, "hello there")
            assert buyer.seat is not None
            with anyio.fail_after(WAIT_S):
                while True:
                    found = [
                        thread
                        for thread in buyer.seat.desk.threads.values()
                        if thread.state is State.DELIVERED and thread.result is not None
                    ]
                    if found:
                        break
                    await anyio.sleep(0.05)
            group.cancel_scope.cancel()
    return found[0].deal


def side(market: RealMarket, deal: str, role: str) -> tuple[Thread, list[Any]]:
    """One side of the deal, out of the journal."""
    path = market.place("swarm") / "journal.sqlite"
    (row,) = (r for r in deals_in(path) if r["deal"] == deal and r["side"] == role)
    return read_deal(path, row["agent"], deal)


@pytest.mark.anyio
async def test_a_dispute_by_hand_over_three_lives_of_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COASE_HOME", str(tmp_path))
    monkeypatch.delenv("COASE_NETWORK", raising=False)
    async with real_market(tmp_path) as market:
        deal = await delivered(market)
        thread, _ = side(market, deal, "buyer")
        assert waiting_for(thread)["who"] == "you"
        require_objectionable(thread)
        with pytest.raises(ConfigurationError, match="only its buyer may object"):
            require_objectionable(side(market, deal, "seller")[0])
        with pytest.raises(ConfigurationError, match="its seller answers"):
            require_answerable(thread)
        over = replace(side(market, deal, "seller")[0], state=State.REFUNDED)
        with pytest.raises(ConfigurationError, match=r"is over \(refunded\): nothing is left"):
            require_answerable(over)

        # The buyer objects; the seller is not there.
        async with market.node() as node:
            objector = Objector("reader", deal=deal, why=WHY)
            await market.join(node, objector)
            assert (await object_to(objector, deal, wait_s=WAIT_S)).state is State.DISPUTED
        with pytest.raises(ConfigurationError, match="in dispute already"):
            require_objectionable(side(market, deal, "buyer")[0])

        # The seller comes back and answers by itself.
        thread, _ = side(market, deal, "seller")
        require_answerable(thread)
        async with market.node() as node:
            writer = scribe("writer")
            await market.join(node, writer)
            thread = await until(writer, deal, (State.ANSWERED,), wait_s=WAIT_S)
            with pytest.raises(ConfigurationError, match="is answered: the arbiter has to rule"):
                require_answerable(thread)

        # Both show what they have, and the arbiter finds that the result fits its schema.
        async with market.node() as node:
            await market.join(node, scribe("writer"), Agent("reader"))
            await market.rest(node)
        thread, records = side(market, deal, "buyer")
        assert thread.verdict == WHY
        await the_whole_file(market, thread, records)
        with pytest.raises(ConfigurationError, match=r"is over \(settled\)"):
            require_objectionable(thread)
        await the_command_shows_it(thread)


async def the_whole_file(market: RealMarket, thread: Thread, records: list[Any]) -> None:
    told = case_file(thread, records)
    terms = thread.agreed_terms
    assert told["terms"]["arbiter"] == ARBITER.address
    assert told["hashes"]["terms"] == "0x" + thread.job_id.hex()
    assert told["hashes"]["result"] == told["hashes"]["on_chain"] != ""
    assert told["hashes"]["evidence"] == "0x" + evidence_hash(thread).hex()
    assert json.loads(told["evidence"]["task"])["text"] == "hello there"
    said = {message.kind: message for message in messages_of(records)}
    assert said["task"].ours
    assert said["task"].answered_by == (said["result"].id,)  # That is how one knows it came.
    assert said["accept"].answered_by == (said["agreed"].id,)
    settlement = await view_settlement(market.network)
    chain = await on_chain(settlement, thread.job_id)
    await settlement.close()
    kinds = [event["kind"] for event in chain["events"]]
    assert kinds == ["opened", "submitted", "disputed", "answered", "ruled", "settled"]
    assert chain["events"][2]["evidence"] == told["hashes"]["evidence"]
    assert (chain["phase"], chain["how"]) == ("closed", "ruled")
    assert chain["ruling"]["to_seller_units"] == str(terms.price_units)
    assert chain["to_seller_units"] == str(terms.price_units)
    assert waiting_for(thread) == {}


async def the_command_shows_it(thread: Thread) -> None:
    row = await dispute_command._find(thread.deal[:10], None, "buyer")
    assert row["side"] == "buyer"
    assert (await dispute_command._find(thread.deal, None, "seller"))["side"] == "seller"
    with pytest.raises(ConfigurationError, match="no deal begins with 'ffffff'"):
        await dispute_command._find("ffffff", None, "buyer")
    found = await dispute_command._file(Path(row["journal"]), row["agent"], row["deal"])
    assert json.loads(json.dumps(found)) == found
    assert found["chain"]["ruling"]["to_seller_units"] == str(thread.agreed_terms.price_units)
    with out.capture() as printed:
        dispute_command._show(found)
    shown = printed.get()
    for words in (WHY, "disputed", "ruled:", "closed, ruled", "hello there", thread.deal):
        assert words in shown
    with pytest.raises(ConfigurationError, match=r"is over \(settled\)"):
        await dispute_command._act(Path(row["journal"]), row["agent"], row["deal"], "x", "", 1)


@pytest.mark.anyio
async def test_an_arbiter_that_was_away_rules_by_what_was_shown_to_its_earlier_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with real_market(tmp_path) as market:
        deal = await delivered(market)
        async with market.node() as node:
            objector = Objector("reader", deal=deal, why=WHY)
            await market.join(node, objector)
            await object_to(objector, deal, wait_s=WAIT_S)
            with anyio.fail_after(WAIT_S):  # The buyer shows what it got, and is heard.
                while not node.journal.open_records(ARBITER.address):  # noqa: ASYNC110
                    await anyio.sleep(0.05)

        async def nobody(*_: object) -> None:
            """The arbiter is not there when the seller answers, and hears nothing of it."""

        with monkeypatch.context() as patch:
            patch.setattr(Node, "add_arbiter", nobody)
            async with market.node() as node:
                writer = scribe("writer")
                await market.join(node, writer)
                await until(writer, deal, (State.ANSWERED,), wait_s=WAIT_S)

        # Now it is back, and nobody else: it waits for the other side in vain, and rules.
        thread, _ = side(market, deal, "buyer")
        assert market.dev.manual is not None
        async with market.node() as node:
            market.dev.manual.time_s = market.dev.engine.head.time_s + LONG.rule_s // 2
            market.dev.engine.seal()
            with anyio.fail_after(WAIT_S):
                while True:
                    view = (await node.settlement.jobs([thread.job_id]))[thread.job_id]
                    if view.how is not How.OPEN:
                        break
                    await anyio.sleep(0.05)
        assert view.how is How.RULED
        assert view.to_seller_units == thread.agreed_terms.price_units


@pytest.mark.anyio
async def test_what_is_in_the_way_of_an_objection_is_said(tmp_path: Path) -> None:
    async with real_market(tmp_path) as market:
        deal = await delivered(market)
        thread, _ = side(market, deal, "buyer")
        nobody = replace(thread, terms=replace(thread.agreed_terms, arbiter=ZERO_ADDRESS))
        for changed, words in (
            (nobody, "name no arbiter"),
            (replace(thread, verdict="good"), "you have accepted the result"),
            (replace(thread, state=State.AGREED), "nothing is locked"),
            (replace(thread, state=State.REFUNDED), r"is over \(refunded\)"),
        ):
            with pytest.raises(ConfigurationError, match=words):
                require_objectionable(changed)
        sold = replace(thread, side=Role.SELLER, state=State.DISPUTED, result=None)
        with pytest.raises(ConfigurationError, match="no result in this journal"):
            require_answerable(sold)
        with pytest.raises(ConfigurationError, match="holds no deal"):
            read_deal(market.place("swarm") / "journal.sqlite", thread.holder, "00" * 16)
        with pytest.raises(ConfigurationError, match="no journal can be read"):
            read_deal(tmp_path / "nowhere.sqlite", thread.holder, deal)
        async with market.node() as node:
            objector = Objector("reader", deal=deal, why=WHY)
            await node.add(objector)
            with pytest.raises(DealFailed, match=r"not in 0 s: it is delivered; repeat"):
                await until(objector, deal, (State.ANSWERED,), wait_s=0)
