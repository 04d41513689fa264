"""What every backend of the ports of stakes and of panels promises: one suite for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import pytest

from coase.escrow.panel import Constitution
from coase.escrow.stake import (
    ACK_S,
    NO_STAKE,
    UNBOND_S,
    Allow,
    Allowance,
    CloseSlice,
    Deposit,
    Release,
    Stake,
    StakeCall,
    Unbond,
    WithdrawStake,
)
from coase.protocol.effects import (
    Answer,
    Call,
    ClaimRefund,
    Decline,
    Dispute,
    Poke,
    Rule,
    Submit,
)
from coase.protocol.errors import CallReverted, LocalProtocolError
from coase.protocol.identity import keccak256
from coase.protocol.terms import Terms, ack_digest, ruling_digest
from coase.protocol.types import ZERO_ADDRESS, AgentId, Phase
from tests.conformance.settlement_world import (
    DELIVERABLE,
    EVIDENCE,
    Stage,
    World,
    drive,
    new_effect_id,
)

if TYPE_CHECKING:
    from coase.escrow.ports import Panel, Receipt, StakeRegistry

INPUT: Final = keccak256(b"the input")
BONDED_UNITS: Final = 500
ALLOWED_UNITS: Final = 400
STAKE_UNITS: Final = 60
PENALTY_UNITS: Final = 25
MEMBERS: Final = ("first", "second", "third")


class StakeWorld(World):
    """A world with a vault in the deals' own token, and a factory of panels."""

    registry: StakeRegistry

    async def panel(self, constitution: Constitution) -> Panel:
        """Return the port of that panel."""
        raise NotImplementedError


@dataclass
class StakeStage(Stage):
    """Parties with money, of whom the seller has stake and lets the escrow reserve some of it."""

    serial: count[int] = field(default_factory=lambda: count(100))
    others_held: int = 0
    """What the vault held before: a world may serve several stages."""

    @property
    def registry(self) -> StakeRegistry:
        assert isinstance(self.world, StakeWorld)
        return self.world.registry

    async def bond(self) -> None:
        """Let the seller deposit, at times that do not depend on how many calls that takes."""
        self.others_held = await self.registry.held()
        await self.call(Deposit(BONDED_UNITS), "seller", at_s=self.start_s + 10)
        allow = Allow(self.settlement.asset.token, ALLOWED_UNITS)
        await self.call(allow, "seller", at_s=self.start_s + 20)
        self.start_s += 20

    async def call(self, call: StakeCall, role: str, *, at_s: int | None = None) -> Receipt:
        """Perform a call on the vault in a block at ``at_s``, or one second after the newest."""
        return await self.call_as(new_effect_id(), call, role, at_s=at_s)

    async def call_as(
        self, effect_id: str, call: StakeCall, role: str, *, at_s: int | None = None
    ) -> Receipt:
        await self._set_time(at_s)
        who = self.who(role)
        return await drive(self.world, lambda: self.registry.perform(effect_id, call, who))

    async def refuses(
        self, error: str, call: StakeCall, role: str, *, at_s: int | None = None
    ) -> None:
        """Perform a call on the vault and expect it to be refused with ``error``."""
        with pytest.raises(CallReverted) as caught:
            await self.call(call, role, at_s=at_s)
        assert caught.value.error == error

    async def _set_time(self, at_s: int | None) -> None:
        head = await self.settlement.head()
        await self.world.set_time(head.time_s + 1 if at_s is None else at_s)

    async def staked(self, **changes: Any) -> Terms:
        """Return terms with a stake that can be opened now."""
        self.start_s = (await self.settlement.head()).time_s
        own: dict[str, Any] = {
            "vault": self.registry.vault,
            "stake_units": STAKE_UNITS,
            "nonce": next(self.serial),
        }
        return self.terms(**(own | changes))

    def ack(self, terms: Terms, *, by: str = "seller", task: bytes = INPUT) -> CloseSlice:
        digest = ack_digest(self.settlement.domain, self.id_of(terms), task)
        return CloseSlice(terms, INPUT, self.who(by).sign(digest))

    async def held(self) -> int:
        """Return what the vault holds of this stage's money."""
        return await self.registry.held() - self.others_held

    async def seller_stake(self) -> Stake:
        return await self.registry.stake(self.who("seller").address)

    async def slice_of(self, terms: Terms) -> int:
        return await self.registry.slice_units(self.id_of(terms))

    # -- panels --------------------------------------------------------------------------------

    async def panel(self, threshold: int = 2) -> Panel:
        assert isinstance(self.world, StakeWorld)
        members = [self.who(name).address for name in MEMBERS]
        for member in members:
            await self.world.mint(member, 0)
        return await self.world.panel(Constitution.of(threshold, members))

    def signed(self, ruling: Rule, *names: str) -> dict[AgentId, bytes]:
        digest = ruling_digest(
            self.settlement.domain,
            self.id_of(ruling.terms),
            ruling.to_seller_units,
            ruling.penalty_units,
            ruling.evidence,
        )
        return {self.who(name).address: self.who(name).sign(digest) for name in names}

    async def rule(self, panel: Panel, ruling: Rule, *names: str, by: str = "stranger") -> Receipt:
        await self._set_time(None)
        signatures, who = self.signed(ruling, *names), self.who(by)
        effect_id = new_effect_id()
        return await drive(self.world, lambda: panel.rule(effect_id, ruling, signatures, who))

    async def panel_refuses(self, error: str, panel: Panel, ruling: Rule, *names: str) -> None:
        with pytest.raises(CallReverted) as caught:
            await self.rule(panel, ruling, *names)
        assert caught.value.error == error


async def staged(world: World) -> StakeStage:
    """Return a stage on ``world`` whose seller has bonded."""
    stage = await StakeStage.begin(world)
    assert isinstance(stage, StakeStage)
    await stage.bond()
    return stage


class StakeSuite:
    """Subclass it and give a ``world`` fixture."""

    pytestmark = pytest.mark.anyio

    async def test_bonding_and_unbonding(self, world: StakeWorld) -> None:
        stage = await staged(world)
        registry, seller = stage.registry, stage.who("seller").address
        assert registry.asset == stage.settlement.asset
        assert registry.domain == stage.settlement.domain
        assert await stage.seller_stake() == Stake(free_units=BONDED_UNITS)
        assert await registry.allowance(seller) == Allowance(0, ALLOWED_UNITS)
        assert await stage.held() == BONDED_UNITS
        assert await registry.stake(stage.who("buyer").address) == NO_STAKE
        for error, call in (
            ("BadAmount", Deposit(0)),
            ("BadAmount", Deposit(2**128 - BONDED_UNITS)),
            ("ERC20InsufficientBalance", Deposit(501)),
            ("BadAmount", Unbond(0)),
            ("NotEnoughFree", Unbond(BONDED_UNITS + 1)),
            ("BadAmount", Allow(stage.settlement.asset.token, 2**128)),
            ("NothingToRelease", Release()),
            ("NothingOwed", WithdrawStake(seller)),
        ):
            await stage.refuses(error, call, "seller")
        at_s = (await stage.settlement.head()).time_s + 5
        await stage.call(Unbond(100), "seller", at_s=at_s)
        due_s = at_s + UNBOND_S
        assert await stage.seller_stake() == Stake(400, 0, 100, due_s)
        await stage.refuses("StillUnbonding", Release(), "seller", at_s=due_s - 1)
        await stage.call(Release(), "seller", at_s=due_s)
        assert await stage.seller_stake() == Stake(400)
        assert await stage.gains() == {"seller": -400}
        assert await stage.held() == 400

    async def test_a_repeated_call_is_one_call(self, world: StakeWorld) -> None:
        stage = await staged(world)
        effect_id = new_effect_id()
        first = await stage.call_as(effect_id, Unbond(10), "seller")
        again = await stage.call_as(effect_id, Unbond(10), "seller")
        assert first == again
        assert (await stage.seller_stake()).unbonding_units == 10
        with pytest.raises(LocalProtocolError):
            await stage.call_as(effect_id, Unbond(11), "seller")

    async def test_a_deal_opens_with_its_slice_or_not_at_all(self, world: StakeWorld) -> None:
        stage = await staged(world)
        first = await stage.staked()
        await stage.do(stage.opening(first), "buyer")
        assert await stage.slice_of(first) == STAKE_UNITS
        assert await stage.seller_stake() == Stake(BONDED_UNITS - STAKE_UNITS, STAKE_UNITS)
        left = ALLOWED_UNITS - STAKE_UNITS
        for error, changes in (
            ("NotAllowedToReserve", {"stake_units": left + 1}),
            ("NoReason", {"vault": stage.who("stranger").address}),
            ("BadStake", {"stake_units": 0}),
            ("BadStake", {"vault": ZERO_ADDRESS}),
        ):
            terms = await stage.staked(**changes)
            await stage.refused(error, stage.opening(terms), "buyer")
            assert (await stage.view(terms)).phase is Phase.NONE
        await stage.call(Unbond(BONDED_UNITS - 2 * STAKE_UNITS + 1), "seller")
        second = await stage.staked()
        await stage.refused("NotEnoughFree", stage.opening(second), "buyer")
        # Every deal has a slice of its own, up to what is allowed and what is free.
        third = await stage.staked(stake_units=STAKE_UNITS - 1)
        await stage.do(stage.opening(third), "buyer")
        assert (await stage.seller_stake()).free_units == 0
        assert (await stage.seller_stake()).reserved_units == 2 * STAKE_UNITS - 1
        assert await stage.gains() == {"buyer": -200, "seller": -BONDED_UNITS}

    async def test_who_loses_a_slice_and_when(self, world: StakeWorld) -> None:
        """Each end of a deal, with and without the acknowledgement: the whole table."""
        stage = await staged(world)
        for name, acked, lost in (
            ("settled", True, 0),
            ("undelivered", True, STAKE_UNITS),
            ("undelivered", False, None),
            ("declined", True, STAKE_UNITS),
            ("declined", False, None),
            ("silent buyer", True, 0),
            ("silent seller", False, STAKE_UNITS),
            ("ruled", False, PENALTY_UNITS),
            ("silent arbiter", True, 0),
        ):
            before = await stage.seller_stake()
            buyer_before = (await stage.balances())["buyer"]
            terms = await self.ended(stage, name)
            closing = stage.ack(terms) if acked else CloseSlice(terms)
            returned = (await stage.balances())["buyer"] - buyer_before
            if lost is None:
                # Only the acknowledgement, and only the seller's own of the very input.
                for wrong in (
                    closing,
                    stage.ack(terms, by="buyer"),
                    stage.ack(terms, task=DELIVERABLE),
                ):
                    await stage.refuses("AckNeeded", wrong, "seller")
                limit_s = terms.deliver_by_s + ACK_S
                await stage.refuses("AckNeeded", closing, "buyer", at_s=limit_s)
                await stage.call(stage.ack(terms), "buyer", at_s=limit_s + 1)
            else:
                await stage.call(closing, "stranger")
            slashed = lost or 0
            after = await stage.seller_stake()
            assert after == replace(before, free_units=before.free_units - slashed), name
            gained = (await stage.balances())["buyer"] - buyer_before - returned
            assert gained == slashed, name
            assert await stage.slice_of(terms) == 0
            await stage.refuses("NothingReserved", closing, "seller")
        assert await stage.held() == (await stage.seller_stake()).bonded_units

    @staticmethod
    async def ended(stage: StakeStage, name: str) -> Terms:
        """Open a deal with a stake and bring it to that end."""
        terms = await stage.staked(price_units=10, bond_units=2, default_to_seller_units=4)
        await stage.do(stage.opening(terms), "buyer")
        await stage.refuses("DealIsOpen", stage.ack(terms), "buyer")

        async def steps(*calls: tuple[Call, str]) -> None:
            for call, role in calls:
                await stage.do(call, role)

        async def silence() -> None:
            await stage.do(Poke(terms), "stranger", at_s=await stage.limit_s(terms) + 1)

        submit, dispute = (
            (Submit(terms, DELIVERABLE), "seller"),
            (Dispute(terms, EVIDENCE), "buyer"),
        )
        answer = (Answer(terms, EVIDENCE), "seller")
        match name:
            case "settled":
                await steps((stage.settling(terms, 3, signed_by=("seller",)), "buyer"))
            case "declined":
                await steps((Decline(terms), "seller"))
            case "undelivered":
                await silence()
            case "silent buyer":
                await steps(submit)
                await silence()
            case "silent seller":
                await steps(submit, dispute)
                await silence()
            case "silent arbiter":
                await steps(submit, dispute, answer)
                await silence()
            case _:
                ruling = Rule(terms, 5, PENALTY_UNITS, EVIDENCE)
                await steps(submit, dispute, answer, (ruling, "arbiter"))
        return terms

    async def test_expiry_frees_nothing(self, world: StakeWorld) -> None:
        stage = await staged(world)
        terms = await stage.staked()
        await stage.do(stage.opening(terms), "buyer")
        refund = ClaimRefund(stage.id_of(terms))
        await stage.do(refund, "stranger", at_s=terms.deliver_by_s + ACK_S + 1)
        await stage.refuses("DealIsOpen", CloseSlice(terms), "seller")
        await stage.do(Poke(terms), "stranger")
        await stage.call(CloseSlice(terms), "seller")
        assert await stage.seller_stake() == Stake(BONDED_UNITS)

    async def test_a_buyer_who_cannot_be_paid_is_owed(self, world: StakeWorld) -> None:
        if not world.can_block:
            pytest.skip("this token pays everybody")
        stage = await staged(world)
        buyer = stage.who("buyer").address
        terms = await self.ended(stage, "ruled")
        await world.block(buyer, blocked=True)
        await stage.call(CloseSlice(terms), "stranger")
        assert await stage.seller_stake() == Stake(BONDED_UNITS - PENALTY_UNITS)
        assert await stage.registry.owed(buyer) == PENALTY_UNITS
        assert await stage.held() == BONDED_UNITS
        await world.block(buyer, blocked=False)
        before = (await stage.balances())["buyer"]
        await stage.call(WithdrawStake(buyer), "stranger")
        assert (await stage.balances())["buyer"] == before + PENALTY_UNITS
        assert await stage.registry.owed(buyer) == 0

    async def test_a_fork_takes_a_slash_back(self, world: StakeWorld) -> None:
        if not world.can_reorg:
            pytest.skip("this chain does not fork")
        stage = await staged(world)
        terms = await stage.staked()
        await stage.do(stage.opening(terms), "buyer")
        await stage.do(Poke(terms), "stranger", at_s=terms.deliver_by_s + 1)
        before = await stage.seller_stake(), await stage.balances()
        await stage.call(stage.ack(terms), "buyer")
        assert (await stage.seller_stake()).bonded_units == BONDED_UNITS - STAKE_UNITS
        await world.reorg(1, drop=True)
        assert (await stage.seller_stake(), await stage.balances()) == before
        assert await stage.slice_of(terms) == STAKE_UNITS

    # -- panels --------------------------------------------------------------------------------

    async def test_a_panel_rules_when_enough_agree(self, world: StakeWorld) -> None:
        stage = await staged(world)
        panel = await stage.panel()
        terms = await stage.staked(arbiter=panel.address, bond_units=11)
        assert not await panel.is_deployed()
        await self.answered(stage, terms)
        ruling = Rule(terms, 30, PENALTY_UNITS, EVIDENCE)
        await stage.panel_refuses("TooFew", panel, ruling, "second")
        assert await panel.is_deployed()
        other = replace(ruling, to_seller_units=31)
        mixed = stage.signed(ruling, "first") | stage.signed(other, "third")
        with pytest.raises(CallReverted) as caught:
            await drive(
                world,
                lambda: panel.rule(new_effect_id(), ruling, mixed, stage.who("stranger")),
            )
        assert caught.value.error == "BadSignature"
        assert caught.value.values == (stage.who("third").address,)
        await stage.panel_refuses(
            "PenaltyAboveStake", panel, replace(ruling, penalty_units=61), *MEMBERS
        )

        # A member who brings another's signature makes two. What does not divide is the first's.
        await stage.rule(panel, ruling, "first", by="third")
        await stage.panel_refuses("WrongPhase", panel, ruling, *MEMBERS)
        first, second = sorted(stage.who(name).address for name in ("first", "third"))
        balance = stage.settlement.balance
        assert (await balance(first), await balance(second)) == (6, 5)
        assert await balance(stage.who("second").address) == await balance(panel.address) == 0
        await stage.call(CloseSlice(terms), "stranger")
        assert await stage.seller_stake() == Stake(BONDED_UNITS - PENALTY_UNITS)

    async def test_nobody_else_rules_for_a_panel(self, world: StakeWorld) -> None:
        stage = await staged(world)
        panel = await stage.panel()
        terms = await stage.staked(arbiter=panel.address)
        await self.answered(stage, terms)
        own = await stage.staked()
        await self.answered(stage, own)
        await stage.refused("BadSignature", Rule(terms, 30, 0, EVIDENCE), "arbiter")
        # Nor a panel for another arbiter, whatever its members sign.
        await stage.panel_refuses("BadSignature", panel, Rule(own, 30, 0, EVIDENCE), *MEMBERS)
        assert (await stage.view(own)).phase is (await stage.view(terms)).phase is Phase.ANSWERED
        await stage.do(Poke(terms), "stranger", at_s=await stage.limit_s(terms) + 1)
        assert await stage.settlement.balance(panel.address) == 0

    async def test_a_member_who_cannot_be_paid_is_owed(self, world: StakeWorld) -> None:
        if not world.can_block:
            pytest.skip("this token pays everybody")
        stage = await staged(world)
        panel = await stage.panel()
        terms = await stage.staked(arbiter=panel.address)
        await self.answered(stage, terms)
        member = stage.who("second").address
        assert await panel.owed(member) == 0
        await world.block(member, blocked=True)
        await stage.rule(panel, Rule(terms, 30, 0, EVIDENCE), "first", "second")
        assert await panel.owed(member) == 5
        await world.block(member, blocked=False)
        who = stage.who("stranger")
        await drive(world, lambda: panel.withdraw(new_effect_id(), member, who))
        assert await panel.owed(member) == 0
        assert await stage.settlement.balance(member) == 5

    @staticmethod
    async def answered(stage: StakeStage, terms: Terms) -> None:
        for call, role in (
            (stage.opening(terms), "buyer"),
            (Submit(terms, DELIVERABLE), "seller"),
            (Dispute(terms, EVIDENCE), "buyer"),
            (Answer(terms, EVIDENCE), "seller"),
        ):
            await stage.do(call, role)
