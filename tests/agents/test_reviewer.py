"""Registering, saying what came of deals, and hearing it: on a real chain, across a restart."""

from __future__ import annotations

import json
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

import anyio
import pytest

from coase.agents import Agent, Price
from coase.agents.collector import ALL_CLAIMS
from coase.agents.compute.echo import EchoCompute
from coase.agents.compute.market import MarketCompute
from coase.agents.compute.ports import Prompt
from coase.agents.experience import Experience
from coase.agents.inference import inference_agent
from coase.agents.notes import Note
from coase.agents.profile import Directory, Profile
from coase.agents.reputation import Readings, reader_of
from coase.agents.reviewer import Reviewer
from coase.agents.wishes import WISHES_DIRECTORY, Wish, wishes_in
from coase.escrow.feedback import Flaw, GiveFeedback, data_uri, from_data_uri
from coase.protocol.errors import ConfigurationError
from coase.protocol.identity import keccak256
from tests.agents.realmarket import LONG, buy, real_market, scribe

if TYPE_CHECKING:
    from pathlib import Path

    from coase.agents.node import Node
    from coase.escrow.feedback import FeedbackEntry
    from coase.escrow.ports import Registries
    from tests.agents.realmarket import RealMarket

WAIT_MAX_S = 60


def reviewer_of(node: Node, directory: Path | None = None) -> Reviewer:
    """A node's reviewer that works only when it is told to."""
    assert node.registries is not None
    reviewer = Reviewer(node, node.registries, registers=True, directory=directory)
    node.runtime.observers.append(reviewer.observe)
    return reviewer


async def worked(node: Node, reviewer: Reviewer) -> None:
    with anyio.fail_after(WAIT_MAX_S):
        await reviewer.work()
        await on_disk(node)


async def on_disk(node: Node) -> None:
    await node.journal.durable(node.journal.append([]))


def to_be_said(node: Node, agent: Agent) -> list[Note]:
    records = node.journal.open_records(agent.address)
    return [Note.from_record(one) for one in records if one.kind == "feedback"]


def transactions(market: RealMarket, agent: Agent) -> int:
    return int(market.dev.engine.state().get_nonce(bytes.fromhex(agent.address[2:])))


async def heard_by_others(market: RealMarket, node: Node, again: Agent, seller: str) -> None:
    """A buyer who has no dealings of his own hears what another said, once he is offered something.

    Who said it hears nothing new.
    """
    reviewer = reviewer_of(node, market.home)
    late = Agent("late", by_rounds=True, profile=Profile(feedback=False))
    await market.join(node, late)
    assert await buy(late, "who are you?") > 0
    assert await buy(again, "and once more") > 0
    await worked(node, reviewer)
    assert late.buying is not None
    assert again.buying is not None
    good, bad = late.buying.experience.book.heard(seller)
    assert good > 0
    assert bad == 0
    # It is remembered: whoever runs for a moment only would hear it too late each time.
    late.buying.experience = Experience()
    await worked(node, reviewer_of(node, market.home))
    assert late.buying.experience.book.heard(seller) == (good, bad)
    # Who said it has it in his own book already.
    assert again.buying.experience.book.heard(seller) == (0, 0)
    await market.rest(node)


async def wished_by_the_owner(market: RealMarket, node: Node, agent: Agent) -> None:
    """The owner of a node that runs says what is registered of its agent, or hears why not."""
    assert node.registries is not None
    reviewer = reviewer_of(node, market.home)
    good = Wish("1", agent.address, Profile(uri="https://scribe.example/file.json"))
    for wish in (good, Wish("2", "0x" + "99" * 20, Profile())):
        wish.place(market.home)
    (market.home / WISHES_DIRECTORY / "3.wish.json").write_text("[" * 60_000)
    await worked(node, reviewer)
    assert good.answer(market.home) == ""
    record = await Directory(node.registries).owned_by(agent.address)
    assert record is not None
    assert record.uri == good.profile.uri
    assert [wish.id for wish in wishes_in(market.home)] == ["2"]  # Another's, who may come yet.


async def told_of_no_coin(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever is to be registered and cannot pay for it hears so, once."""
    assert node.registries is not None
    broke = scribe("broke")
    broke.profile = Profile(register=True)
    await node.add(broke)
    waiting = Reviewer(node, node.registries)
    for _ in range(3):
        await worked(node, waiting)
        waiting._due.clear()
    told = [line for line in caplog.messages if line.startswith("register waits: ")]
    assert len(told) == 1
    assert "too little of the chain's coin" in told[0]


async def forge(registries: Registries, entry: FeedbackEntry, forger: Agent) -> None:
    """Say a good word again without having paid, one that names no payment, and one elsewhere."""
    assert forger.seat is not None
    for name, uri, file_hash in (
        ("copied", entry.uri, entry.file_hash),
        ("made up", data_uri(b"{}"), keccak256(b"{}")),
        ("elsewhere", "https://a.example/file.json", bytes(32)),
    ):
        call = GiveFeedback(entry.agent_id, 100, 0, "starred", entry.tag2, "", uri, file_hash)
        await registries.perform(name, call, forger.seat.identity)


@pytest.mark.anyio
async def test_a_seller_is_registered_praised_and_known_for_it(tmp_path: Path) -> None:
    async with real_market(tmp_path) as market:
        seller, buyer = scribe("scribe"), Agent("reader", by_rounds=True)
        stranger = Agent("stranger", profile=Profile(feedback=False))
        async with market.node() as node:
            assert node.registries is not None
            await market.join(node, seller, buyer, stranger)
            reviewer = reviewer_of(node)
            await worked(node, reviewer)
            directory = Directory(node.registries)
            record = await directory.paid_to(seller.address)
            assert record is not None
            file = json.loads(from_data_uri(record.uri) or b"")
            assert file["name"] == "scribe"
            assert file["registrations"][0]["agentId"] == record.agent_id
            did = f"did:pkh:eip155:{node.network.chain_id}:{seller.address}"
            assert file["services"] == [{"name": "DID", "endpoint": did}]
            # Whoever sells nothing is not registered.
            assert await directory.paid_to(buyer.address) is None

            # Its first offer makes it known: whoever is not registered is not spoken of.
            assert await buy(buyer, "who are you?") > 0
            await market.rest(node)
            await worked(node, reviewer)
            assert to_be_said(node, buyer) == []
            assert await buy(buyer, "all is well") > 0
            assert await buy(stranger, "all is well again") > 0
            await market.rest(node)
            # It is written down, and nothing is said yet: the node may be killed now.
            await on_disk(node)
            (kept,) = to_be_said(node, buyer)
            assert (kept.seller, kept.value) == (seller.address, 100)
            assert await node.registries.feedback(record.agent_id) == []
            registered = transactions(market, seller)

        # Another life of the same node says it, once, and registers nobody again.
        again = Agent("reader", by_rounds=True)
        async with market.node() as node:
            assert node.registries is not None
            await market.join(node, again, scribe("scribe"), Agent("stranger"))
            reviewer = reviewer_of(node)
            await worked(node, reviewer)
            assert transactions(market, seller) == registered
            (entry,) = await node.registries.feedback(record.agent_id)
            assert (entry.client, entry.value, entry.tag2) == (again.address, 100, kept.capability)
            # Killed between the sending and its note of it: the same word is not said twice.
            node.journal.append([replace(kept, at_ms=kept.at_ms + 1).to_record()])
            await on_disk(node)
            reviewer = reviewer_of(node)
            await worked(node, reviewer)
            assert len(await node.registries.feedback(record.agent_id)) == 1
            assert to_be_said(node, again) == []
            await heard_by_others(market, node, again, seller.address)


@pytest.mark.anyio
async def test_what_would_not_count_is_not_paid_for_and_what_does_not_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with real_market(tmp_path) as market:
        seller = scribe("scribe")
        poor = Profile(feedback_min="0.05")
        buyer, cheap = Agent("reader"), Agent("cheap", profile=poor)
        async with market.node() as node:
            registries = node.registries
            assert registries is not None
            await market.join(node, seller, buyer, cheap)
            reviewer = reviewer_of(node)
            # Registered only after the deal: at its block nobody was paid as this agent.
            assert await buy(buyer, "too early") > 0
            await market.rest(node)
            await worked(node, reviewer)
            record = await Directory(registries).paid_to(seller.address)
            assert record is not None
            ((_, _, early),) = node.journal.summaries(buyer.address)
            early = json.loads(early)
            note = Note(
                agent=buyer.address,
                deal=early["deal"],
                seller=seller.address,
                job_id=early["job_id"],
                tx_hash=early["history"][-1][-1],
                value=100,
                capability=early["capability"],
                at_ms=early["history"][-1][0],
            )
            node.journal.append([note.to_record()])
            await on_disk(node)
            before = transactions(market, buyer)
            await worked(node, Reviewer(node, registries))
            assert to_be_said(node, buyer) == []
            assert transactions(market, buyer) == before
            assert await registries.feedback(record.agent_id) == []

            # A good word, said again by somebody who did not pay, and one that points nowhere.
            assert await buy(buyer, "in time") > 0
            assert await buy(cheap, "too little") > 0
            await market.rest(node)
            await on_disk(node)
            assert to_be_said(node, cheap) == []
            await worked(node, reviewer)
            (entry,) = await registries.feedback(record.agent_id)
            await forge(registries, entry, cheap)
            head = await node.settlement.head()
            readings = Readings(registries, reader_of(node.network))
            repute = await readings.read(record, now_s=head.time_s)
            assert [word.flaw for word in repute.words] == [
                None,
                Flaw.FILE_DISAGREES,
                Flaw.BAD_FILE,
                Flaw.UNREADABLE,
            ]
            assert repute.rating_permille == 1_000
            assert [word.weight > 0 for word in repute.words] == [True, False, False, False]
            assert repute.prior(me=buyer.address) == (0, 0)
            assert repute.prior()[0] > 0
            await wished_by_the_owner(market, node, seller)
            await told_of_no_coin(node, caplog)


@pytest.mark.anyio
async def test_what_a_channel_paid_is_said_once_it_is_claimed(tmp_path: Path) -> None:
    price = Price.per_million(input="2", output="20")
    writer = inference_agent("writer", price=price, compute=EchoCompute(), windows=LONG)
    reader = Agent("reader", budget="1")
    async with real_market(tmp_path) as market, market.node() as node:
        assert node.registries is not None
        assert node.channels is not None
        assert node.collector is not None
        await market.join(node, writer, reader)
        reviewer = reviewer_of(node)
        await worked(node, reviewer)
        prompts = MarketCompute(reader, max_price="0.04")

        async def ask(text: str) -> None:
            async with aclosing(prompts.stream(Prompt.ask(text, max_tokens=100))) as stream:
                assert [chunk async for chunk in stream]
            await market.rest(node)

        await ask("who are you?")
        await worked(node, reviewer)
        await ask("one two three")
        await ask("four five")
        # Two deals of one channel are one word, which waits for its proof, also over a restart.
        await worked(node, reviewer)
        (note,) = {one.name: one for one in to_be_said(node, reader)}.values()
        assert (note.deals, note.value, note.seller) == (2, 100, writer.address)
        record = await Directory(node.registries).paid_to(writer.address)
        assert record is not None
        assert await node.registries.feedback(record.agent_id) == []
        await node.collector.collect(policy=ALL_CLAIMS)
        again = reviewer_of(node)
        await worked(node, again)
        assert to_be_said(node, reader) == []
        head = await node.settlement.head()
        readings = Readings(node.registries, reader_of(node.network))
        (word,) = (await readings.read(record, now_s=head.time_s)).words
        assert word.counted is not None
        assert word.counted.log.channel_id == bytes.fromhex(note.deal)
        assert (word.entry.client, word.entry.value) == (reader.address, 100)
        assert word.weight > 0


def test_a_profile_that_makes_no_sense_is_refused() -> None:
    for amount in ("much", "-1", ""):
        with pytest.raises(ConfigurationError, match="feedback_min"):
            Profile(feedback_min=amount)
