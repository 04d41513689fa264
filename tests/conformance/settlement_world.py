"""A settlement on a chain in a test's hands, and four parties with money to play their parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import anyio
import pytest

from coase.escrow.ports import FundingKind
from coase.protocol.effects import Answer, Call, Dispute, Open, Rule, Settle, Submit
from coase.protocol.errors import CallReverted, CoaseError
from coase.protocol.identity import Identity, keccak256
from coase.protocol.terms import Terms, Work, settlement_digest
from coase.protocol.types import ZERO_ADDRESS, AgentId, JobView, Phase

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from coase.escrow.ports import ChainEvent, Receipt, Settlement

CALL_WAIT_MAX_S: Final = 30  # Far above what any backend needs; a hang must end in a red test.
DELIVERABLE: Final = keccak256(b"the result")
EVIDENCE: Final = keccak256(b"the evidence")
ROLES: Final = ("buyer", "seller", "arbiter", "stranger")

LIVE: Final = (Phase.WORKING, Phase.DELIVERED, Phase.DISPUTED, Phase.ANSWERED)

_stages = count(1)
_effects = count(1)


class World(ABC):
    """A settlement on a chain that makes a block when the test says so, at the test's time.

    The same chain may serve many tests one after the other: they use names of their own and only
    ever move the time forward.
    """

    settlement: Settlement
    """With no confirmations and the funding that it takes by default."""
    can_reorg: bool = False
    can_block: bool = False

    def identity(self, name: str) -> Identity:
        """Return the key of ``name``; the same name, the same key."""
        return Identity(keccak256(b"coase/test/" + name.encode()))

    @abstractmethod
    async def mint(self, owner: AgentId, units: int) -> None:
        """Give ``owner`` token units (0 is allowed), and what it needs to send calls."""

    @abstractmethod
    async def set_time(self, time_s: int) -> None:
        """Make the next block, and every trial before sending, happen at exactly ``time_s``.

        ``time_s`` is later than the newest block.
        """

    @abstractmethod
    async def seal(self) -> None:
        """Make one block of all that is pending, at the time that was set.

        If the newest block has that time already, it is one second later.
        """

    @abstractmethod
    async def pending(self) -> int:
        """Return how many calls wait for a block."""

    @abstractmethod
    async def another(
        self, *, confirmations: int = 0, funding: FundingKind = FundingKind.AUTHORIZATION
    ) -> Settlement:
        """Return one more settlement on the same chain and the same state, as after a restart.

        The world closes it.
        """

    async def reorg(self, depth: int, *, drop: bool) -> None:
        """Undo the newest ``depth`` blocks; their calls are dropped, or wait for a block again."""
        raise NotImplementedError

    async def block(self, owner: AgentId, *, blocked: bool) -> None:
        """Let the token refuse, or not refuse any more, to pay ``owner``. May take a block."""
        raise NotImplementedError


async def perform_and_seal(
    world: World, settlement: Settlement, effect_id: str, call: Call, identity: Identity
) -> Receipt:
    """Perform ``call``, making blocks for it until it is done; what it raises, this raises."""
    return await drive(world, lambda: settlement.perform(effect_id, call, identity))


async def drive(world: World, act: Callable[[], Awaitable[Receipt]]) -> Receipt:
    """Do ``act``, making blocks for it until it is done; what it raises, this raises."""
    done: list[Receipt | CoaseError] = []

    async def run() -> None:
        try:
            done.append(await act())
        except CoaseError as error:
            done.append(error)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        with anyio.fail_after(CALL_WAIT_MAX_S):
            for turn in count():
                if done:
                    break
                if await world.pending():
                    await world.seal()
                # What needs no I/O is done after a few turns of the loop.
                await anyio.sleep(0.001 if turn > 5 else 0)
    if isinstance(done[0], CoaseError):
        raise done[0]
    return done[0]


def new_effect_id() -> str:
    """Return an id that no other call of this run has."""
    return keccak256(f"effect {next(_effects)}".encode())[:16].hex()


@dataclass
class Stage:
    """Four parties with money in a world, and terms between them."""

    world: World
    settlement: Settlement
    start_s: int
    number: int = field(default_factory=lambda: next(_stages))
    nonces: count[int] = field(default_factory=lambda: count(1))
    left_open: list[Terms] = field(default_factory=list)
    """Deals that a story leaves open on purpose, without bonds."""

    @classmethod
    async def begin(cls, world: World, *, units: int = 1000) -> Stage:
        """Give each of the four roles ``units``."""
        stage = cls(world, world.settlement, 0)
        for role in ROLES:
            await world.mint(stage.who(role).address, units)
        stage.start_s = (await world.settlement.head()).time_s
        return stage

    def who(self, role: str) -> Identity:
        return self.world.identity(f"{role}-{self.number}")

    def terms(self, **changes: Any) -> Terms:
        """Return terms that can be opened now; windows are long enough for a few blocks each."""
        start_s = self.start_s
        terms = Terms(
            buyer=self.who("buyer").address,
            seller=self.who("seller").address,
            asset=self.settlement.asset.token,
            price_units=100,
            work=Work("inference-00000000", task=keccak256(b"the task")),
            lock_by_s=start_s + 100,
            deliver_by_s=start_s + 200,
            dispute_s=30,
            nonce=next(self.nonces),
            arbiter=self.who("arbiter").address,
            bond_units=10,
            default_to_seller_units=40,
            answer_s=40,
            rule_s=50,
        )
        return replace(terms, **changes)

    def without_arbiter(self, **changes: Any) -> Terms:
        nobody = {"arbiter": ZERO_ADDRESS, "bond_units": 0, "answer_s": 0, "rule_s": 0}
        return self.terms(**nobody, **changes)

    def id_of(self, terms: Terms) -> bytes:
        return terms.digest(self.settlement.domain)

    def opening(self, terms: Terms) -> Open:
        return Open(terms, self.who("seller").sign(self.id_of(terms)))

    def settling(self, terms: Terms, to_seller: int, *, signed_by: tuple[str, ...] = ()) -> Settle:
        digest = settlement_digest(
            self.settlement.domain, self.id_of(terms), DELIVERABLE, to_seller
        )
        buyer = self.who("buyer").sign(digest) if "buyer" in signed_by else b""
        seller = self.who("seller").sign(digest) if "seller" in signed_by else b""
        return Settle(terms, DELIVERABLE, to_seller, buyer, seller)

    async def do(
        self,
        call: Call,
        role: str,
        *,
        at_s: int | None = None,
        effect_id: str = "",
        settlement: Settlement | None = None,
    ) -> Receipt:
        """Perform ``call`` in a block at exactly ``at_s``, or one second after the newest."""
        head = await self.settlement.head()
        await self.world.set_time(head.time_s + 1 if at_s is None else at_s)
        return await perform_and_seal(
            self.world,
            settlement or self.settlement,
            effect_id or new_effect_id(),
            call,
            self.who(role),
        )

    async def refused(
        self, error: str, call: Call, role: str, *, at_s: int | None = None
    ) -> CallReverted:
        """Perform ``call`` and expect the contract to refuse it with ``error``."""
        with pytest.raises(CallReverted) as caught:
            await self.do(call, role, at_s=at_s)
        assert caught.value.error == error
        return caught.value

    async def view(self, terms: Terms) -> JobView:
        job_id = self.id_of(terms)
        return (await self.settlement.jobs([job_id]))[job_id]

    async def balances(self) -> dict[str, int]:
        return {role: await self.settlement.balance(self.who(role).address) for role in ROLES}

    async def gains(self, *, of: int = 1000) -> dict[str, int]:
        """Return who is up or down by how much, those at zero left out."""
        return {role: u - of for role, u in (await self.balances()).items() if u != of}

    async def reach(self, phase: Phase, **changes: Any) -> Terms:
        """Open a deal and lead it to ``phase``, one block per step."""
        terms = self.terms(**changes)
        await self.do(self.opening(terms), "buyer")
        steps: tuple[tuple[Phase, Call, str], ...] = (
            (Phase.DELIVERED, Submit(terms, DELIVERABLE), "seller"),
            (Phase.DISPUTED, Dispute(terms, EVIDENCE), "buyer"),
            (Phase.ANSWERED, Answer(terms, EVIDENCE), "seller"),
        )
        for reached, call, role in steps:
            if reached <= phase:
                await self.do(call, role)
        assert (await self.view(terms)).phase is phase
        return terms

    async def limit_s(self, terms: Terms) -> int:
        """Return the last instant at which the act that the deal waits for is allowed."""
        view = await self.view(terms)
        windows = {
            Phase.WORKING: 0,
            Phase.DELIVERED: terms.dispute_s,
            Phase.DISPUTED: terms.answer_s,
            Phase.ANSWERED: terms.rule_s,
        }
        return view.clock_s + windows[view.phase]

    async def events(self, terms: Terms, from_block: int = 0) -> list[ChainEvent]:
        found, _ = await self.settlement.events(from_block)
        return [event for event in found if event.job_id == self.id_of(terms)]


def act_of(phase: Phase, terms: Terms) -> tuple[Call, str]:
    """Return the act that a deal in ``phase`` waits for, and whose it is."""
    acts: dict[Phase, tuple[Call, str]] = {
        Phase.WORKING: (Submit(terms, DELIVERABLE), "seller"),
        Phase.DELIVERED: (Dispute(terms, EVIDENCE), "buyer"),
        Phase.DISPUTED: (Answer(terms, EVIDENCE), "seller"),
        Phase.ANSWERED: (Rule(terms, 30, 0, EVIDENCE), "arbiter"),
    }
    return acts[phase]
