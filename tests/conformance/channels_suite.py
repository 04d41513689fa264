"""What every backend of the channels port promises, and the attacks that its rules must survive."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import pytest

from coase.escrow.accounts import (
    BuyerChannel,
    BuyerLimits,
    Fault,
    SellerChannel,
    SellerPolicy,
    VoucherRefused,
)
from coase.escrow.claims import Claimable, ClaimPolicy, GasPrice, Reason, plan_claims
from coase.escrow.voucher import (
    AskWithdrawal,
    ChannelCall,
    ChannelConfig,
    ChannelView,
    Claim,
    ClaimAll,
    Fund,
    GiveBack,
    PayOut,
    TakeWithdrawal,
    Voucher,
    voucher_digest,
)
from coase.protocol.errors import CallReverted, LocalProtocolError
from coase.protocol.identity import Identity, keccak256

if TYPE_CHECKING:
    from coase.escrow.ports import Channels

BUYER, SELLER, THIEF = (Identity(keccak256(name)) for name in (b"buyer", b"seller", b"thief"))
DELAY_S: Final = 900
START_UNITS: Final = 10_000
DEADLINE_S: Final = 2**40 - 1


class ChannelsWorld(ABC):
    """A backend under test, with three people who have money, and a clock."""

    channels: Channels

    @abstractmethod
    async def pass_time(self, seconds: int) -> None:
        """Let chain time pass; the next block is so much later."""

    @abstractmethod
    async def close(self) -> None:
        """Put everything away."""

    def config(self, number: int = 0, **changes: object) -> ChannelConfig:
        """The channel from buyer to seller with that salt."""
        one = ChannelConfig(
            payer=BUYER.address,
            payer_authorizer=BUYER.address,
            receiver=SELLER.address,
            receiver_authorizer=SELLER.address,
            token=self.channels.asset.token,
            withdraw_delay_s=DELAY_S,
            salt=number.to_bytes(32, "big"),
        )
        return replace(one, **changes)  # type: ignore[arg-type]

    def row(self, config: ChannelConfig, units: int, *, most: int | None = None) -> Claim:
        """A claim by a voucher of the buyer's."""
        most = units if most is None else most
        channel_id = config.channel_id(self.channels.domain)
        signature = BUYER.sign(voucher_digest(self.channels.domain, channel_id, most))
        return Claim(config, Voucher(channel_id, most, signature), units)

    async def do(self, name: str, call: ChannelCall, who: Identity) -> None:
        """Perform a call that must go through."""
        await self.channels.perform(name, call, who)

    async def fund(self, config: ChannelConfig, units: int, name: str = "") -> None:
        """Deposit; the name tells deposits apart."""
        name = f"fund/{config.salt.hex()}/{name}"
        await self.do(name, Fund(config, units, keccak256(name.encode()), DEADLINE_S), BUYER)

    async def view(self, config: ChannelConfig) -> ChannelView:
        """What the chain says of one channel."""
        channel_id = config.channel_id(self.channels.domain)
        return (await self.channels.views([channel_id]))[channel_id]

    async def conserved(self) -> None:
        """No unit was made or lost."""
        held = [await self.channels.balance(who.address) for who in (BUYER, SELLER, THIEF)]
        assert sum(held) + await self.channels.held() == 3 * START_UNITS


POLICY = SellerPolicy(
    tokens=frozenset(), chunk_max_units=10, exposure_max_units=20, withdraw_delay_min_s=DELAY_S
)
LIMITS = BuyerLimits(deposit_max_units=1000, chunk_max_units=10, exposure_max_units=20)


@pytest.mark.anyio
class ChannelsSuite:
    """Every promise of the port. A subclass has a fixture ``world``."""

    async def refuses(
        self, world: ChannelsWorld, error: str, call: ChannelCall, who: Identity
    ) -> None:
        before = [await world.channels.balance(one.address) for one in (BUYER, SELLER, THIEF)]
        with pytest.raises(CallReverted) as raised:
            await world.do(f"refused/{error}/{call}", call, who)
        assert raised.value.error == error
        after = [await world.channels.balance(one.address) for one in (BUYER, SELLER, THIEF)]
        assert after == before

    async def test_a_channel_that_never_was_is_all_zeros(self, world: ChannelsWorld) -> None:
        head = await world.channels.head()
        view = await world.view(world.config())
        assert replace(view, time_s=0) == ChannelView()
        assert view.time_s == head.time_s
        assert await world.channels.views([]) == {}

    async def test_a_deposit_is_made_once(self, world: ChannelsWorld) -> None:
        config = world.config()
        for _ in range(2):
            await world.fund(config, 100)
        assert (await world.view(config)).balance_units == 100
        assert await world.channels.balance(BUYER.address) == START_UNITS - 100
        assert await world.channels.held() == 100
        with pytest.raises(LocalProtocolError):
            await world.fund(config, 101)
        await world.fund(config, 50, "top-up")
        assert (await world.view(config)).balance_units == 150

    async def test_deposits_that_cannot_be(self, world: ChannelsWorld) -> None:
        salt = keccak256(b"one salt")
        good = world.config()
        for number, (error, config, units) in enumerate(
            [
                ("ZeroDeposit", good, 0),
                ("WithdrawDelayOutOfRange", world.config(withdraw_delay_s=899), 1),
                ("WithdrawDelayOutOfRange", world.config(withdraw_delay_s=30 * 86400 + 1), 1),
                ("InvalidChannel", world.config(receiver="0x" + "00" * 20), 1),
                ("ERC20InsufficientBalance", good, START_UNITS + 1),
            ]
        ):
            call = Fund(config, units, keccak256(b"%d" % number), DEADLINE_S)
            await self.refuses(world, error, call, BUYER)
        await world.do("one", Fund(good, 10, salt, DEADLINE_S), BUYER)
        await self.refuses(world, "ERC3009UsedAuthorization", Fund(good, 10, salt, 2**40), BUYER)
        with pytest.raises(LocalProtocolError):
            await world.do("not mine", Fund(good, 10, salt, DEADLINE_S), THIEF)

    async def test_claim_and_pay_out(self, world: ChannelsWorld) -> None:
        config = world.config()
        await world.fund(config, 100)
        await world.do("claim", ClaimAll((world.row(config, 30, most=40),)), SELLER)
        view = await world.view(config)
        assert (view.balance_units, view.claimed_units, view.free_units) == (100, 30, 70)
        assert await world.channels.unpaid(SELLER.address) == 30
        assert await world.channels.balance(SELLER.address) == START_UNITS
        await world.do("pay", PayOut(SELLER.address), THIEF)
        assert await world.channels.balance(SELLER.address) == START_UNITS + 30
        assert await world.channels.unpaid(SELLER.address) == 0
        await world.conserved()

    async def test_claims_that_cannot_be(self, world: ChannelsWorld) -> None:
        config = world.config()
        await world.fund(config, 100)
        good = world.row(config, 40)
        forged = replace(good, voucher=replace(good.voucher, units=41))
        for error, rows, who in [
            ("NotAuthorizedToClaim", (good,), THIEF),
            ("ClaimExceedsCeiling", (world.row(config, 41, most=40),), SELLER),
            ("ClaimExceedsBalance", (world.row(config, 101),), SELLER),
            ("InvalidSignature", (forged,), SELLER),
            ("EmptyBatch", (), SELLER),
        ]:
            await self.refuses(world, error, ClaimAll(rows), who)
        await world.do("good", ClaimAll((good,)), SELLER)
        await world.do("old", ClaimAll((world.row(config, 39),)), SELLER)
        assert (await world.view(config)).claimed_units == 40

    async def test_withdrawal_after_the_delay(self, world: ChannelsWorld) -> None:
        config = world.config()
        await world.fund(config, 100)
        await self.refuses(world, "InvalidChannel", AskWithdrawal(config, 1), SELLER)
        await self.refuses(world, "NothingToWithdraw", AskWithdrawal(config, 0), BUYER)
        await self.refuses(
            world, "WithdrawAmountExceedsAvailable", AskWithdrawal(config, 101), BUYER
        )
        await self.refuses(world, "WithdrawalNotPending", TakeWithdrawal(config), BUYER)
        await world.do("ask", AskWithdrawal(config, 80), BUYER)
        view = await world.view(config)
        assert (view.withdrawing_units, view.is_withdrawing, view.solid_units) == (80, True, 20)
        assert view.withdraw_since_s == (await world.channels.head()).time_s
        await self.refuses(world, "WithdrawalAlreadyPending", AskWithdrawal(config, 1), BUYER)
        await self.refuses(world, "WithdrawDelayNotElapsed", TakeWithdrawal(config), BUYER)
        await world.pass_time(DELAY_S)
        await self.refuses(world, "NotAuthorizedToFinalizeWithdraw", TakeWithdrawal(config), SELLER)
        await world.do("take", TakeWithdrawal(config), BUYER)
        view = await world.view(config)
        assert (view.balance_units, view.is_withdrawing) == (20, False)
        assert await world.channels.balance(BUYER.address) == START_UNITS - 20
        await world.conserved()

    async def test_refunds_lower_a_withdrawal_and_use_up_their_nonce(
        self, world: ChannelsWorld
    ) -> None:
        config = world.config()
        await world.fund(config, 100)
        await self.refuses(world, "NotAuthorizedToRefund", GiveBack(config, 1), BUYER)
        await self.refuses(world, "ZeroRefund", GiveBack(config, 0), SELLER)
        await world.do("ask", AskWithdrawal(config, 60), BUYER)
        await world.do("back", GiveBack(config, 20), SELLER)
        view = await world.view(config)
        assert (view.withdrawing_units, view.refund_nonce) == (40, 1)
        await world.do("all", GiveBack(config, 1000), SELLER)
        await world.do("none", GiveBack(config, 1), SELLER)
        view = await world.view(config)
        assert (view.balance_units, view.is_withdrawing, view.refund_nonce) == (0, False, 3)
        assert await world.channels.balance(BUYER.address) == START_UNITS

    async def test_events_tell_the_story_in_order(self, world: ChannelsWorld) -> None:
        config = world.config()
        await world.fund(config, 100)
        _, after_deposit = await world.channels.events(0)
        await world.do("claim", ClaimAll((world.row(config, 30),)), SELLER)
        await world.do("ask", AskWithdrawal(config, 50), BUYER)
        await world.pass_time(DELAY_S)
        await world.do("take", TakeWithdrawal(config), BUYER)
        await world.do("back", GiveBack(config, 5), SELLER)
        told, past = await world.channels.events(0)
        assert {one.channel_id for one in told} == {config.channel_id(world.channels.domain)}
        assert [(one.kind, one.units, one.total_units) for one in told] == [
            ("created", 0, 0),
            ("deposited", 100, 100),
            ("claimed", 30, 30),
            ("withdrawing", 50, 0),
            ("withdrawn", 50, 0),
            ("refunded", 5, 0),
        ]
        assert [one.time_s for one in told] == sorted(one.time_s for one in told)
        later, again = await world.channels.events(after_deposit)
        assert (later, again) == (told[2:], past)
        assert await world.channels.events(past) == ([], past)

    async def test_one_row_at_fault_takes_no_other_with_it(self, world: ChannelsWorld) -> None:
        configs = [world.config(number) for number in range(5)]
        for config in configs:
            await world.fund(config, 50)
        rows = [world.row(config, 40) for config in configs]
        rows[3] = world.row(configs[3], 51)
        outcome = await world.channels.claim("batch", rows, SELLER)
        assert set(outcome.claimed) == {row for row in rows if row is not rows[3]}
        assert [(row, why) for row, why in outcome.refused] == [(rows[3], "ClaimExceedsBalance()")]
        assert len(outcome.receipts) == 3  # 0-1, 2, 4
        assert await world.channels.unpaid(SELLER.address) == 160
        again = await world.channels.claim("batch", rows, SELLER)
        assert await world.channels.unpaid(SELLER.address) == 160
        assert set(again.claimed) == set(outcome.claimed)
        assert (await world.channels.claim("none", [], SELLER)).receipts == ()

    # -- stories -----------------------------------------------------------------------------

    async def ends(
        self, world: ChannelsWorld, config: ChannelConfig
    ) -> tuple[BuyerChannel, SellerChannel]:
        """Both ends of a channel that has money in it."""
        policy = replace(POLICY, tokens=frozenset((world.channels.asset.token,)))
        view, domain = await world.view(config), world.channels.domain
        buyer, _ = BuyerChannel.open(config, domain, LIMITS, view)
        seller = SellerChannel.accept(config, domain, policy, seller=SELLER.address)
        return buyer, seller.see(view)

    async def test_a_stream_is_paid_chunk_by_chunk(self, world: ChannelsWorld) -> None:
        config = world.config()
        await world.fund(config, 60)
        buyer, seller = await self.ends(world, config)
        for _ in range(5):
            now_s = (await world.channels.head()).time_s
            seller, _ = seller.send(deal_id="deal", units=10, now_s=now_s)
            assert (seller.exposed_units, buyer.exposed_units) == (10, 0)
            buyer, _ = buyer.check(deal_id="deal", units=10)
            buyer, _ = buyer.promise(deal_id="deal", units=10)
            seller, _ = seller.take(buyer.sign(BUYER), deal_id="deal", units=10, now_s=now_s)
            assert (seller.exposed_units, buyer.exposed_units) == (0, 0)
        seller, _ = seller.end("deal")
        ready = Claimable(
            claim=self.the(seller.claim),
            view=await world.view(config),
            since_s=0,
            ended=True,
        )
        price = GasPrice(await world.channels.gas_price_wei(), coin_units=0)
        batches = plan_claims([ready], price=price, policy=ClaimPolicy(), now_s=now_s)
        assert [(len(batch.rows), batch.reason) for batch in batches] == [(1, Reason.VALUE)]
        await world.channels.claim("end", batches[0].rows, SELLER)
        await world.do("pay", PayOut(SELLER.address), SELLER)
        seller = seller.see(await world.view(config))
        await world.do("rest", GiveBack(config, seller.refundable_units), SELLER)
        assert await world.channels.balance(SELLER.address) == START_UNITS + 50
        assert await world.channels.balance(BUYER.address) == START_UNITS - 50
        assert await world.channels.held() == 0

    def the(self, claim: Claim | None) -> Claim:
        """A claim that must be there."""
        assert claim is not None
        return claim

    async def test_an_armed_withdrawal_buys_nothing(self, world: ChannelsWorld) -> None:
        """Ask, wait out the delay, top up, then buy and take everything back at once."""
        config = world.config()
        await world.fund(config, 60)
        await world.do("arm", AskWithdrawal(config, 60), BUYER)
        await world.pass_time(DELAY_S + 1)
        await world.fund(config, 60, "top-up")
        buyer, seller = await self.ends(world, config)
        now_s = (await world.channels.head()).time_s
        channel_id = config.channel_id(world.channels.domain)
        voucher = world.row(config, 10).voucher  # By a buyer who does not keep to the rules.
        assert voucher.channel_id == channel_id
        with pytest.raises(VoucherRefused) as raised:
            seller.take(voucher, deal_id="deal", units=10, now_s=now_s)
        assert raised.value.fault is Fault.WITHDRAWAL_PENDING
        with pytest.raises(VoucherRefused):
            seller.send(deal_id="deal", units=10, now_s=now_s)
        assert buyer.stopped

    async def test_withdraw_and_run_is_seen_and_claimed_in_time(self, world: ChannelsWorld) -> None:
        """The buyer asks for all of it back while the seller holds a voucher."""
        config = world.config()
        await world.fund(config, 60)
        buyer, seller = await self.ends(world, config)
        now_s = (await world.channels.head()).time_s
        buyer, _ = buyer.promise(deal_id="deal", units=10)
        seller, _ = seller.take(buyer.sign(BUYER), deal_id="deal", units=10, now_s=now_s)
        await world.do("run", AskWithdrawal(config, 60), BUYER)
        await world.pass_time(seller.poll_every_s)
        view = await world.view(config)
        seller = seller.see(view)
        ready = Claimable(self.the(seller.claim), view, since_s=now_s)
        price = GasPrice(await world.channels.gas_price_wei(), coin_units=0)
        now_s = (await world.channels.head()).time_s
        (batch,) = plan_claims([ready], price=price, policy=ClaimPolicy(), now_s=now_s)
        assert (batch.rows, batch.reason) == ((ready.claim,), Reason.WITHDRAWAL)
        await world.channels.claim("rescue", batch.rows, SELLER)
        await world.pass_time(DELAY_S)
        await world.do("take", TakeWithdrawal(config), BUYER)
        await world.do("pay", PayOut(SELLER.address), SELLER)
        assert await world.channels.balance(SELLER.address) == START_UNITS + 10
        assert await world.channels.balance(BUYER.address) == START_UNITS - 10

    async def test_a_refund_in_mid_stream_ends_the_signing(self, world: ChannelsWorld) -> None:
        config = world.config()
        await world.fund(config, 60)
        buyer, _ = await self.ends(world, config)
        await world.do("back", GiveBack(config, 60), SELLER)
        buyer, records = buyer.see(await world.view(config))
        assert buyer.stopped == "the seller refunded"
        assert len(records) == 1
