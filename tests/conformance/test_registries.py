"""The registries in memory and on the embedded chain, and feedback bound to real payments."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from coase.escrow.backends.devchain_node import DevNode
from coase.escrow.backends.evm.channels import EvmChannels
from coase.escrow.backends.evm.registries import EvmRegistries
from coase.escrow.backends.evm.settlement import EvmSettlement
from coase.escrow.backends.memory_registries import MemoryRegistries, RegistryBooks
from coase.escrow.feedback import (
    Counted,
    FeedbackFile,
    Flaw,
    GiveFeedback,
    PaymentProof,
    Reader,
    RevokeFeedback,
    data_uri,
    first_uses,
    from_data_uri,
    read_entry,
    registration_file,
    registry_name,
)
from coase.escrow.ports import MemoryTxStore
from coase.escrow.voucher import (
    ChannelConfig,
    Claim,
    ClaimAll,
    Fund,
    Voucher,
    voucher_digest,
)
from coase.protocol.effects import Open, Poke, Settle
from coase.protocol.errors import ConfigurationError
from coase.protocol.identity import keccak256
from coase.protocol.terms import Terms, Work, settlement_digest
from tests.conformance.registries_suite import (
    BUYER,
    SELLER,
    WALLET,
    RegistriesSuite,
    RegistriesWorld,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

START_S: Final = 1_800_000_000
POLL_S: Final = 0.002
COIN_WEI: Final = 10**18
RESULT: Final = keccak256(b"result")


class MemoryWorld(RegistriesWorld):
    """Books in memory."""

    def __init__(self) -> None:
        self.books = RegistryBooks(time_s=START_S)
        self.registries = MemoryRegistries(
            self.books, chain_id=31337, identity="0x" + "01" * 20, reputation="0x" + "02" * 20
        )

    async def now_s(self) -> int:
        return self.books.time_s

    async def close(self) -> None:
        await self.registries.close()


class EvmWorld(RegistriesWorld):
    """The embedded chain in this process; each call is sealed as it comes."""

    def __init__(self) -> None:
        self.node = DevNode(manual_time_s=START_S, seed=b"registries")
        self.store = MemoryTxStore()

    async def start(self) -> None:
        await self.node.serve()
        for who in (SELLER, BUYER, WALLET):
            self.node.give(bytes.fromhex(who.address[2:]), 10_000, COIN_WEI)
        self.node.engine.seal()
        self.registries: EvmRegistries = await EvmRegistries.connect(
            self.node.url, factory=self.node.factory, store=self.store, poll_s=POLL_S
        )

    async def now_s(self) -> int:
        return self.node.engine.head.time_s

    async def close(self) -> None:
        await self.registries.close()
        await self.node.close()

    # -- payments ----------------------------------------------------------------------------

    async def deal(self, nonce: int, *, units: int = 60, seller: str = "") -> PaymentProof:
        """A deal between buyer and seller, and where its end is in the log."""
        settlement = await EvmSettlement.connect(
            self.node.url, escrow=self.node.escrow, store=self.store, poll_s=POLL_S
        )
        now_s = await self.now_s()
        terms = Terms(
            buyer=BUYER.address,
            seller=SELLER.address,
            asset=self.node.token,
            price_units=100,
            work=Work("echo-00000000"),
            lock_by_s=now_s + 300,
            deliver_by_s=now_s + 600,
            dispute_s=60,
            nonce=nonce,
        )
        domain = settlement.domain
        job_id = terms.digest(domain)
        await settlement.perform(f"open/{nonce}", Open(terms, SELLER.sign(job_id)), BUYER)
        if units:
            digest = settlement_digest(domain, job_id, RESULT, units)
            paid = Settle(terms, RESULT, units, b"", SELLER.sign(digest))
            receipt = await settlement.perform(f"settle/{nonce}", paid, BUYER)
        else:
            assert self.node.manual is not None
            self.node.manual.time_s = terms.deliver_by_s + 1
            receipt = await settlement.perform(f"poke/{nonce}", Poke(terms), BUYER)
        events, _ = await settlement.events(receipt.block)
        (end,) = (event for event in events if event.kind == "settled")
        await settlement.close()
        return PaymentProof(
            payer=BUYER.address,
            payee=seller or SELLER.address,
            chain_id=self.node.engine.chain_id,
            tx_hash=receipt.tx_hash,
            contract=self.node.escrow,
            log_index=end.log_index,
            job_id=job_id,
        )

    async def claim(self, units: int) -> PaymentProof:
        """A channel from the buyer to the wallet, claimed up to ``units``."""
        channels = await EvmChannels.connect(
            self.node.url, token=self.node.token, store=self.store, poll_s=POLL_S
        )
        config = ChannelConfig(
            BUYER.address,
            BUYER.address,
            WALLET.address,
            WALLET.address,
            self.node.token,
            900,
        )
        channel_id = config.channel_id(channels.domain)
        await channels.perform("fund", Fund(config, 100, bytes(32), 2**40), BUYER)
        signature = BUYER.sign(voucher_digest(channels.domain, channel_id, units))
        row = Claim(config, Voucher(channel_id, units, signature), units)
        receipt = await channels.perform(f"claim/{units}", ClaimAll((row,)), WALLET)
        events, _ = await channels.events(receipt.block)
        await channels.close()
        return PaymentProof(
            payer=BUYER.address,
            payee=WALLET.address,
            chain_id=self.node.engine.chain_id,
            tx_hash=receipt.tx_hash,
            contract=channels.domain.contract,
            log_index=events[-1].log_index,
            channel=config,
        )

    async def say(self, name: str, agent_id: int, proof: PaymentProof) -> None:
        """Give feedback with that proof."""
        registries = self.registries
        file = FeedbackFile(
            registry=registry_name(proof.chain_id, registries.domain.contract),
            agent_id=agent_id,
            client=BUYER.address,
            created_at="2027-01-15T08:00:00Z",
            value=80,
            decimals=0,
            proof=proof,
            tag1="starred",
        )
        data = file.encode()
        call = GiveFeedback(agent_id, 80, 0, "starred", "", "", data_uri(data), keccak256(data))
        await registries.perform(name, call, BUYER)

    async def read(self, agent_id: int) -> list[Counted | Flaw]:
        """Read all feedback of an agent back and check it, as a stranger would."""
        reader = Reader(
            chain_id=self.node.engine.chain_id,
            registry=self.registries.domain.contract,
            tokens=frozenset((self.node.token,)),
        )
        found: list[Counted | Flaw] = []
        for entry in await self.registries.feedback(agent_id):
            data = from_data_uri(entry.uri) or b""
            proof = FeedbackFile.decode(data).proof
            log = await self.registries.payment(proof.tx_hash, proof.log_index)
            block = log.block if log is not None else None
            agent = await self.registries.agent(agent_id, block=block)
            paid_to = agent.paid_to if agent is not None else ""
            found.append(read_entry(entry, data, log, paid_to=paid_to, reader=reader))
        return found


class TestMemoryRegistries(RegistriesSuite):
    """The memory twin."""

    @pytest.fixture
    async def world(self) -> AsyncIterator[RegistriesWorld]:
        world = MemoryWorld()
        yield world
        await world.close()


class TestEvmRegistries(RegistriesSuite):
    """The contracts, and feedback that is bound to what the chain really paid."""

    @pytest.fixture
    async def world(self) -> AsyncIterator[RegistriesWorld]:
        world = EvmWorld()
        await world.start()
        yield world
        await world.close()

    async def test_a_file_on_chain(self, world: EvmWorld) -> None:
        name = registry_name(31337, world.registries.domain.contract)
        file = registration_file(
            name="Summer",
            description="Sums up.",
            services={"A2A": "https://agent.example/card.json"},
            registrations=[(0, name)],
            x402=True,
        )
        agent_id = await world.registries.register("mine", data_uri(file), SELLER)
        agent = await world.registries.agent(agent_id)
        assert agent is not None
        assert from_data_uri(agent.uri) == file

    async def test_feedback_of_a_deal_counts_once(self, world: EvmWorld) -> None:
        agent_id = await world.registries.register("mine", "", SELLER)
        proof = await world.deal(1)
        await world.say("one", agent_id, proof)
        await world.say("again", agent_id, proof)
        found = await world.read(agent_id)
        counted = [one for one in found if isinstance(one, Counted)]
        assert len(counted) == 2
        (first,) = first_uses(counted)
        assert first.entry.index == 1
        assert (first.log.to_seller_units, first.complains) == (60, False)
        assert (first.token, first.log.buyer) == (world.node.token, BUYER.address)
        await world.registries.perform("back", RevokeFeedback(agent_id, 1), BUYER)
        assert (await world.read(agent_id))[0] is Flaw.REVOKED

    async def test_a_seller_who_did_not_deliver_can_be_complained_of(self, world: EvmWorld) -> None:
        agent_id = await world.registries.register("mine", "", SELLER)
        await world.say("one", agent_id, await world.deal(1, units=0))
        (counted,) = await world.read(agent_id)
        assert isinstance(counted, Counted)
        assert counted.complains

    async def test_feedback_of_a_claim_goes_to_the_linked_wallet(self, world: EvmWorld) -> None:
        agent_id = await world.registries.register("mine", "", SELLER)
        before = await world.claim(10)
        link = await world.link(agent_id, WALLET, deadline_s=await world.now_s() + 200)
        await world.registries.perform("link", link, SELLER)
        after = await world.claim(30)
        await world.say("before", agent_id, before)
        await world.say("after", agent_id, after)
        early, counted = await world.read(agent_id)
        assert early is Flaw.OTHER_PAYEE  # At that block the agent had another wallet.
        assert isinstance(counted, Counted)
        assert counted.log.to_seller_units == 20

    async def test_payments_of_others_do_not_count(self, world: EvmWorld) -> None:
        agent_id = await world.registries.register("mine", "", SELLER)
        proof = await world.deal(1)
        for name, changed in {
            "another log": replace(proof, log_index=proof.log_index - 1),
            "another contract": replace(proof, contract=world.node.token),
            "another chain": replace(proof, chain_id=1),
            "another seller": replace(proof, payee=WALLET.address),
            "another deal": replace(proof, job_id=keccak256(b"x")),
        }.items():
            await world.say(name, agent_id, changed)
        assert await world.read(agent_id) == [
            Flaw.NO_PAYMENT,
            Flaw.UNTRUSTED_CONTRACT,
            Flaw.FILE_DISAGREES,
            Flaw.OTHER_PAYEE,
            Flaw.OTHER_PAYMENT,
        ]

    async def test_a_payment_counts_when_it_is_final(self, world: EvmWorld) -> None:
        proof = await world.deal(1)
        world.registries.confirmations = 2
        for _ in range(2):
            assert await world.registries.payment(proof.tx_hash, proof.log_index) is None
            world.node.engine.seal()
        assert await world.registries.payment(proof.tx_hash, proof.log_index) is not None
        world.registries.factory = world.node.token  # Not one to ask.
        log = await world.registries.payment(proof.tx_hash, proof.log_index)
        assert log is not None
        assert not log.is_trusted

    async def test_registries_are_looked_for(self, world: EvmWorld) -> None:
        with pytest.raises(ConfigurationError, match="no reputation registry"):
            await EvmRegistries.connect(
                world.node.url,
                factory=world.node.factory,
                store=world.store,
                reputation=world.node.token,
            )
