"""What every transport promises, whatever carries the bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from coase.protocol.errors import ConfigurationError, LocalProtocolError
from coase.protocol.messages import ENVELOPE_SIZE_MAX_BYTES
from coase.protocol.ports import Transport
from coase.protocol.subjects import LEVELS, WHOLE, prefixes

OpenTransport = Callable[[], Awaitable[Transport]]

ALICE, BOB, CAROL = (f"0x{digit * 40}" for digit in "abc")
INFERENCE, SUMMARISE = "inference-0123abcd", "summarise-0123abcd"
_DEADLINE_S = 30


class Mailbox:
    """Keeps what a callback was given, and waits for more of it."""

    def __init__(self) -> None:
        self.all: list[bytes] = []
        self._more = asyncio.Event()

    def __call__(self, envelope: bytes) -> None:
        self.all.append(envelope)
        self._more.set()

    async def has(self, count: int) -> list[bytes]:
        async with asyncio.timeout(_DEADLINE_S):
            while len(self.all) < count:
                self._more.clear()
                await self._more.wait()
        return self.all


@pytest.mark.anyio
class TransportSuite:
    """A subclass gives the fixture ``open_transport``: transports of one network, in order."""

    async def test_an_envelope_reaches_its_addressee_alone(
        self, open_transport: OpenTransport
    ) -> None:
        sender, receiver = await open_transport(), await open_transport()
        bobs, carols = Mailbox(), Mailbox()
        await receiver.listen(BOB, bobs)
        await receiver.listen(CAROL, carols)
        await sender.send(BOB, b"for Bob")
        await sender.send(CAROL, b"for Carol")
        assert await carols.has(1) == [b"for Carol"]
        assert await bobs.has(1) == [b"for Bob"]

    async def test_what_arrives_is_what_was_sent_byte_for_byte(
        self, open_transport: OpenTransport
    ) -> None:
        sender, receiver = await open_transport(), await open_transport()
        inbox = Mailbox()
        await receiver.listen(BOB, inbox)
        sent = [b"", b"\0", b"\r\n", b"MSG a 1 5\r\nhello\r\n", bytes(range(256)) * 256]
        assert len(sent[-1]) == ENVELOPE_SIZE_MAX_BYTES
        for envelope in sent:
            await sender.send(BOB, envelope)
        assert await inbox.has(len(sent)) == sent

    async def test_a_burst_arrives_whole(self, open_transport: OpenTransport) -> None:
        sender, receiver = await open_transport(), await open_transport()
        inbox = Mailbox()
        await receiver.listen(BOB, inbox)
        sent = [number.to_bytes(4, "big") * 64 for number in range(3000)]
        for envelope in sent:
            await sender.send(BOB, envelope)
        assert await inbox.has(len(sent)) == sent
        assert sender.health().sent == len(sent)
        assert receiver.health().received == len(sent)

    async def test_an_agent_may_send_to_itself_and_to_nobody(
        self, open_transport: OpenTransport
    ) -> None:
        transport = await open_transport()
        inbox = Mailbox()
        await transport.listen(ALICE, inbox)
        await transport.send(CAROL, b"nobody listens there")
        await transport.send(ALICE, b"to myself")
        assert await inbox.has(1) == [b"to myself"]

    async def test_whoever_listens_again_replaces_the_callback(
        self, open_transport: OpenTransport
    ) -> None:
        sender, receiver = await open_transport(), await open_transport()
        old, new = Mailbox(), Mailbox()
        await receiver.listen(BOB, old)
        await receiver.listen(BOB, new)
        await sender.send(BOB, b"once")
        assert await new.has(1) == [b"once"]
        assert old.all == []

    async def test_listening_is_in_force_when_the_call_returns(
        self, open_transport: OpenTransport
    ) -> None:
        sender, receiver = await open_transport(), await open_transport()
        inbox = Mailbox()
        agents = [f"0x{number:040x}" for number in range(100)]
        for agent in agents:
            await receiver.listen(agent, inbox)
            await sender.send(agent, agent.encode())
        assert sorted(await inbox.has(len(agents))) == [agent.encode() for agent in agents]

    @pytest.mark.parametrize("level", LEVELS)
    async def test_a_request_reaches_the_sellers_of_its_shard_once(
        self, open_transport: OpenTransport, level: int
    ) -> None:
        buyer, sellers = await open_transport(), await open_transport()
        requests: dict[str, Mailbox] = {agent: Mailbox() for agent in (ALICE, BOB, CAROL)}
        for agent, inbox in requests.items():
            await sellers.serve(agent, INFERENCE, inbox)
        mine = dict(prefixes(BOB))[level]
        await buyer.ask(INFERENCE, b"request", level=level, prefix=mine)
        await buyer.ask(INFERENCE, b"fence", level=0, prefix=WHOLE)
        for agent, inbox in requests.items():
            heard = [b"request"] if dict(prefixes(agent))[level] == mine else []
            assert await inbox.has(len(heard) + 1) == [*heard, b"fence"]

    async def test_a_request_for_one_capability_is_not_heard_by_sellers_of_another(
        self, open_transport: OpenTransport
    ) -> None:
        buyer, seller = await open_transport(), await open_transport()
        inference, summaries = Mailbox(), Mailbox()
        await seller.serve(ALICE, INFERENCE, inference)
        await seller.serve(ALICE, SUMMARISE, summaries)
        await buyer.ask(INFERENCE, b"infer", level=0, prefix=WHOLE)
        await buyer.ask(SUMMARISE, b"sum up", level=0, prefix=WHOLE)
        assert await summaries.has(1) == [b"sum up"]
        assert await inference.has(1) == [b"infer"]

    async def test_sellers_on_two_transports_all_hear_a_request(
        self, open_transport: OpenTransport
    ) -> None:
        first, second = await open_transport(), await open_transport()
        alices, bobs = Mailbox(), Mailbox()
        await first.serve(ALICE, INFERENCE, alices)
        await second.serve(BOB, INFERENCE, bobs)
        await first.ask(INFERENCE, b"anybody?", level=0, prefix=WHOLE)
        assert await alices.has(1) == [b"anybody?"]
        assert await bobs.has(1) == [b"anybody?"]

    async def test_a_forgotten_agent_hears_nothing_and_its_neighbour_goes_on(
        self, open_transport: OpenTransport
    ) -> None:
        sender, receiver = await open_transport(), await open_transport()
        gone, stays = Mailbox(), Mailbox()
        for agent, inbox in ((ALICE, gone), (BOB, stays)):
            await receiver.listen(agent, inbox)
            await receiver.serve(agent, INFERENCE, inbox)
        await receiver.forget(ALICE)
        await receiver.forget(ALICE)  # Safe to repeat.
        await sender.send(ALICE, b"to the forgotten")
        await sender.ask(INFERENCE, b"to both", level=0, prefix=WHOLE)
        await sender.send(BOB, b"fence")
        assert await stays.has(2) == [b"to both", b"fence"]
        assert gone.all == []

    async def test_a_forgotten_agent_may_come_back(self, open_transport: OpenTransport) -> None:
        sender, receiver = await open_transport(), await open_transport()
        inbox = Mailbox()
        for round_number in range(3):
            await receiver.listen(BOB, inbox)
            await sender.send(BOB, b"here again")
            await inbox.has(round_number + 1)
            await receiver.forget(BOB)
        assert inbox.all == [b"here again"] * 3

    async def test_an_oversize_envelope_is_refused_before_it_is_sent(
        self, open_transport: OpenTransport
    ) -> None:
        transport = await open_transport()
        inbox = Mailbox()
        await transport.listen(BOB, inbox)
        too_large = bytes(ENVELOPE_SIZE_MAX_BYTES + 1)
        with pytest.raises(LocalProtocolError, match="65537 bytes"):
            await transport.send(BOB, too_large)
        with pytest.raises(LocalProtocolError, match="65537 bytes"):
            await transport.ask(INFERENCE, too_large, level=0, prefix=WHOLE)
        await transport.send(BOB, b"small")
        assert await inbox.has(1) == [b"small"]
        assert transport.health().sent == 1

    async def test_names_that_are_none_are_refused(self, open_transport: OpenTransport) -> None:
        transport = await open_transport()
        with pytest.raises(LocalProtocolError):
            await transport.send("0x*", b"")
        with pytest.raises(LocalProtocolError):
            await transport.listen(">", Mailbox())
        with pytest.raises(ConfigurationError):
            await transport.serve(ALICE, "*", Mailbox())
        with pytest.raises(LocalProtocolError):
            await transport.ask(INFERENCE, b"", level=4, prefix="*")
        assert transport.health().sent == 0

    @pytest.mark.parametrize("error", [ValueError("bad"), asyncio.CancelledError()])
    async def test_a_callback_that_fails_stops_nothing(
        self, open_transport: OpenTransport, error: BaseException
    ) -> None:
        sender, receiver = await open_transport(), await open_transport()
        inbox = Mailbox()

        def fails(envelope: bytes) -> None:
            inbox(envelope)
            raise error

        neighbour = Mailbox()
        await receiver.listen(BOB, fails)
        await receiver.serve(BOB, INFERENCE, fails)
        await receiver.serve(CAROL, INFERENCE, neighbour)
        await sender.send(BOB, b"one")
        await sender.ask(INFERENCE, b"two", level=0, prefix=WHOLE)
        await sender.send(BOB, b"three")
        assert sorted(await inbox.has(3)) == [b"one", b"three", b"two"]
        assert await neighbour.has(1) == [b"two"]
        assert receiver.health().callback_errors == 3
        assert type(error).__name__ in receiver.health().errors[-1]

    async def test_a_closed_transport_delivers_nothing_and_says_so(
        self, open_transport: OpenTransport
    ) -> None:
        sender, receiver = await open_transport(), await open_transport()
        inbox, fence = Mailbox(), Mailbox()
        await receiver.listen(BOB, inbox)
        await sender.listen(ALICE, fence)
        await receiver.close()
        await receiver.close()  # Safe to repeat.
        await receiver.forget(BOB)
        assert not receiver.health().connected
        await sender.send(BOB, b"too late")
        await sender.send(ALICE, b"fence")
        await fence.has(1)
        assert inbox.all == []
        for call in (
            receiver.send(ALICE, b""),
            receiver.ask(INFERENCE, b"", level=0, prefix=WHOLE),
            receiver.listen(BOB, inbox),
            receiver.serve(BOB, INFERENCE, inbox),
        ):
            with pytest.raises(LocalProtocolError, match="closed"):
                await call

    async def test_what_was_sent_before_closing_arrives(
        self, open_transport: OpenTransport
    ) -> None:
        sender, receiver = await open_transport(), await open_transport()
        inbox = Mailbox()
        await receiver.listen(BOB, inbox)
        for number in range(50):
            await sender.send(BOB, bytes((number,)) * 1024)
        await sender.close()
        assert len(await inbox.has(50)) == 50
