"""What every backend of the registries port promises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import pytest

from coase.escrow.feedback import (
    GiveFeedback,
    LinkWallet,
    RegistryCall,
    RevokeFeedback,
    SetAgentUri,
    wallet_digest,
)
from coase.protocol.errors import CallReverted, LocalProtocolError
from coase.protocol.identity import Identity, keccak256
from coase.protocol.types import ZERO_ADDRESS

if TYPE_CHECKING:
    from coase.escrow.ports import Registries

SELLER, BUYER, WALLET = (Identity(keccak256(b"8004" + name)) for name in (b"s", b"b", b"w"))
FILE_HASH: Final = keccak256(b"a file")


def saying(agent_id: int, value: int = 80, tag1: str = "starred") -> GiveFeedback:
    """A word about an agent."""
    return GiveFeedback(agent_id, value, 0, tag1, "", "https://agent.example", "data:,", FILE_HASH)


class RegistriesWorld(ABC):
    """A backend under test."""

    registries: Registries

    @abstractmethod
    async def now_s(self) -> int:
        """Chain time."""

    @abstractmethod
    async def close(self) -> None:
        """Put everything away."""

    async def link(self, agent_id: int, wallet: Identity, *, deadline_s: int) -> LinkWallet:
        """A link that ``wallet`` has agreed to."""
        digest = wallet_digest(
            self.registries.domain, agent_id, wallet.address, SELLER.address, deadline_s
        )
        return LinkWallet(agent_id, wallet.address, deadline_s, wallet.sign(digest))


@pytest.mark.anyio
class RegistriesSuite:
    """Every promise of the port. A subclass has a fixture ``world``."""

    async def refuses(
        self, world: RegistriesWorld, error: str, call: RegistryCall, who: Identity
    ) -> None:
        with pytest.raises(CallReverted) as raised:
            await world.registries.perform(f"refused/{error}/{call}", call, who)
        assert raised.value.error == error

    async def test_an_agent_is_registered_once(self, world: RegistriesWorld) -> None:
        registries = world.registries
        assert await registries.agent(0) is None
        first = await registries.register("mine", "https://agent.example/1", SELLER)
        assert await registries.register("mine", "https://agent.example/1", SELLER) == first
        second = await registries.register("another", "", SELLER)
        assert second == first + 1
        agent = await registries.agent(first)
        assert agent is not None
        assert (agent.owner, agent.wallet) == (SELLER.address, SELLER.address)
        assert (agent.uri, agent.paid_to) == ("https://agent.example/1", SELLER.address)
        with pytest.raises(LocalProtocolError):
            await registries.register("mine", "https://agent.example/2", SELLER)

    async def test_its_owner_changes_its_file(self, world: RegistriesWorld) -> None:
        agent_id = await world.registries.register("mine", "one", SELLER)
        await self.refuses(world, "NotAuthorized", SetAgentUri(agent_id, "two"), BUYER)
        await self.refuses(world, "ERC721NonexistentToken", SetAgentUri(9, "two"), SELLER)
        await world.registries.perform("uri", SetAgentUri(agent_id, "two"), SELLER)
        agent = await world.registries.agent(agent_id)
        assert agent is not None
        assert agent.uri == "two"

    async def test_a_wallet_is_linked_by_both(self, world: RegistriesWorld) -> None:
        registries = world.registries
        agent_id = await registries.register("mine", "", SELLER)
        deadline_s = await world.now_s() + 200
        good = await world.link(agent_id, WALLET, deadline_s=deadline_s)
        forged = LinkWallet(agent_id, BUYER.address, deadline_s, good.signature)
        await self.refuses(world, "InvalidWalletSignature", forged, SELLER)
        await self.refuses(world, "NotAuthorized", good, WALLET)
        late = await world.link(agent_id, WALLET, deadline_s=deadline_s + 1000)
        await self.refuses(world, "BadDeadline", late, SELLER)
        nobody = LinkWallet(agent_id, ZERO_ADDRESS, deadline_s, good.signature)
        await self.refuses(world, "BadWallet", nobody, SELLER)
        before = await registries.perform("touch", SetAgentUri(agent_id, "x"), SELLER)
        done = await registries.perform("link", good, SELLER)
        now, then = (
            await registries.agent(agent_id),
            await registries.agent(agent_id, block=before.block),
        )
        assert now is not None
        assert then is not None
        assert (now.wallet, now.paid_to) == (WALLET.address, WALLET.address)
        assert then.wallet == SELLER.address
        assert await registries.agent(agent_id, block=done.block) == now
        assert await registries.agent(agent_id, block=0) is None

    async def test_who_is_paid_for_which_agent_is_found(self, world: RegistriesWorld) -> None:
        registries = world.registries
        first = await registries.register("mine", "", SELLER)
        second = await registries.register("theirs", "", BUYER)
        told, block = await registries.links()
        assert told == [(first, SELLER.address), (second, BUYER.address)]
        link = await world.link(first, WALLET, deadline_s=await world.now_s() + 200)
        await registries.perform("link", link, SELLER)
        assert (await registries.links(block))[0] == [(first, WALLET.address)]

    async def test_feedback_is_told_in_order(self, world: RegistriesWorld) -> None:
        registries = world.registries
        agent_id = await registries.register("mine", "", SELLER)
        other = await registries.register("other", "", SELLER)
        for name, call, who in (
            ("1", saying(agent_id), BUYER),
            ("2", saying(agent_id, -5), WALLET),
            ("3", saying(agent_id, 90, "uptime"), BUYER),
            ("4", saying(other), BUYER),
        ):
            receipt = await registries.perform(name, call, who)
        told = await registries.feedback(agent_id)
        assert [(one.client, one.index, one.value, one.tag1) for one in told] == [
            (BUYER.address, 1, 80, "starred"),
            (WALLET.address, 1, -5, "starred"),
            (BUYER.address, 2, 90, "uptime"),
        ]
        assert {(one.uri, one.file_hash, one.endpoint, one.decimals) for one in told} == {
            ("data:,", FILE_HASH, "https://agent.example", 0)
        }
        assert not any(one.is_revoked for one in told)
        (last,) = await registries.feedback(other, from_block=receipt.block)
        assert (last.block, last.tx_hash, last.time_s) == (
            receipt.block,
            receipt.tx_hash,
            receipt.time_s,
        )
        assert await registries.feedback(other, from_block=receipt.block + 1) == []

    async def test_nobody_praises_himself(self, world: RegistriesWorld) -> None:
        agent_id = await world.registries.register("mine", "", SELLER)
        await self.refuses(world, "OwnFeedback", saying(agent_id), SELLER)
        await self.refuses(world, "ERC721NonexistentToken", saying(agent_id + 7), BUYER)
        await self.refuses(world, "BadValue", saying(agent_id, 10**38 + 1), BUYER)

    async def test_an_entry_is_revoked_once_by_its_author(self, world: RegistriesWorld) -> None:
        agent_id = await world.registries.register("mine", "", SELLER)
        await world.registries.perform("say", saying(agent_id), BUYER)
        await self.refuses(world, "NoSuchFeedback", RevokeFeedback(agent_id, 1), WALLET)
        await world.registries.perform("revoke", RevokeFeedback(agent_id, 1), BUYER)
        await self.refuses(world, "AlreadyRevoked", RevokeFeedback(agent_id, 1), BUYER)
        (entry,) = await world.registries.feedback(agent_id)
        assert entry.is_revoked

    async def test_no_payment_where_there_is_none(self, world: RegistriesWorld) -> None:
        agent_id = await world.registries.register("mine", "", SELLER)
        receipt = await world.registries.perform("say", saying(agent_id), BUYER)
        for tx_hash, place in ((receipt.tx_hash, 0), ("0x" + "11" * 32, 0), ("rubbish", 1)):
            assert await world.registries.payment(tx_hash, place) is None
