"""The runtime: performs what desks ask for, over a real transport, chain, journal and clock.

Records are journalled in groups; effects that bind or cost are performed when their group is on
disk, all others at once. Everything here may be killed at any point: whatever was owed is
derived again from the journal and the chain.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from coase.escrow.advice import advice, explained
from coase.protocol.errors import (
    CallReverted,
    ChainUnavailable,
    CoaseError,
    JournalFailed,
    LocalProtocolError,
)
from coase.protocol.session import Thread
from coase.protocol.types import AgentId, Head

from .steps import DoCheck, DoWork, Effect, Notice, OnChain, OnChannel, Publish, Step, Transmit
from .supervisor import attempt, supervise, tell

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from coase.escrow.ports import Channels, Receipt, Settlement
    from coase.escrow.voucher import ChannelCall
    from coase.protocol.effects import Call
    from coase.protocol.identity import Identity
    from coase.protocol.ports import Transport

    from .desk import Desk
    from .ports import Journal

log = logging.getLogger(__name__)

CHAIN_POLL_S: Final = 0.2  # A local block a second is seen within a fifth of it.
CHAIN_RETRY_MS: Final = 1_000
CALL_REPEAT_MS: Final = 6_000  # A call that went through shows in the view long before.
SLEEP_MAX_S: Final = 0.5
GOODBYE_MAX_S: Final = 1.0
FULL_LOOK_S: Final = 5.0
BLOCK_S: Final = 12  # The slowest chain that matters; with it the block at depth is never newer.


@dataclass(frozen=True, slots=True)
class Done:
    """What a seller's handler made, and what it used."""

    result: str
    to_seller_units: int
    usage: dict[str, int] = field(default_factory=dict)


Worker = Callable[[Thread], Awaitable[Done]]
Checker = Callable[[Thread], Awaitable[str]]
Observer = Callable[[AgentId, Notice], None]


@dataclass(slots=True)
class Seat:
    """One agent at work in a node."""

    name: str
    desk: Desk
    identity: Identity
    worker: Worker | None = None
    checker: Checker | None = None
    capabilities: tuple[str, ...] = ()
    restore: Callable[[], None] = lambda: None
    permit: Callable[[str, Call | ChannelCall], None] = lambda deal, call: None
    """Raises if the key may not sign a call: the last word before it does."""


def clock_ms() -> int:
    """Return the wall clock in Unix milliseconds."""
    return time.time_ns() // 1_000_000


class Runtime:
    """Runs the desks of one node's agents."""

    def __init__(
        self,
        transport: Transport,
        settlement: Settlement,
        journal: Journal,
        *,
        now_ms: Callable[[], int] = clock_ms,
    ) -> None:
        self.transport, self.settlement, self.journal = transport, settlement, journal
        self.now_ms = now_ms
        self.channels: Channels | None = None
        """What pays streams, where the network has it; set before ``run``."""
        self.seats: dict[AgentId, Seat] = {}
        self.observers: list[Observer] = []
        self.head = Head(0, 0)
        self.chain_error = ""
        self.poll_s = CHAIN_POLL_S
        """How often the chain is looked at; set before ``run`` where blocks take longer."""
        self._group: TaskGroup | None = None
        self._wake = anyio.Event()
        self._poll = anyio.Event()
        self._outgoing: deque[Transmit | Publish] = deque()
        self._to_send = anyio.Event()
        self._waiting: deque[tuple[int, Seat, list[Effect]]] = deque()
        self._held: dict[str, int] = {}
        self._unwatched = 0
        """The newest group that no effect waits for; if it fails, the node ends all the same."""
        self._to_commit = anyio.Event()

    # ---- life --------------------------------------------------------------------------------

    async def run(self, *, ready: Callable[[], None] = lambda: None) -> None:
        """Run until cancelled.

        :raises JournalFailed: if the disk refuses: the process must end and start again
        """
        async with anyio.create_task_group() as group:
            self._group = group
            self.head = await self._first_head()
            for seat in list(self.seats.values()):
                await self._seat(seat)
            group.start_soon(supervise, "sender", self._send_loop)
            group.start_soon(supervise, "committer", self._commit_loop)
            group.start_soon(supervise, "clock", self._clock_loop)
            group.start_soon(supervise, "chain", self._chain_loop)
            ready()

    async def _first_head(self) -> Head:
        try:
            return await self.settlement.head()
        except ChainUnavailable as error:
            self.chain_error = str(error)
            return Head(0, 0)

    async def add(self, seat: Seat) -> None:
        """Give an agent its place; it hears and acts from now on."""
        self.seats[seat.desk.me] = seat
        if self._group is not None:
            await self._seat(seat)

    async def _seat(self, seat: Seat) -> None:
        desk = seat.desk
        desk.head = self.head
        records = self.journal.open_records(desk.me)
        desk.replay(records, now_ms=self.now_ms())
        seat.restore()
        await self.transport.listen(desk.me, lambda wire: self._on_envelope(seat, wire))
        for capability in seat.capabilities:
            await self.transport.serve(
                desk.me, capability, lambda wire: self._on_envelope(seat, wire)
            )
        self.apply(seat, desk.tick(now_ms=self.now_ms()))
        self._poll.set()

    def _on_envelope(self, seat: Seat, wire: bytes) -> None:
        try:
            self.apply(seat, seat.desk.hear(wire, now_ms=self.now_ms()))
        except JournalFailed:
            # Not the transport's affair. The committer meets the same error, and ends the node.
            self._unwatched = max(self._unwatched, 1)
            self._to_commit.set()

    # ---- steps -------------------------------------------------------------------------------

    def apply(self, seat: Seat, step: Step) -> None:
        """Journal a step's records and perform its effects, at once or when they are on disk.

        :raises JournalFailed: if the journal no longer takes anything
        """
        if not step:
            return
        group = self.journal.append(step.records) if step.records else 0
        if step.closed:
            group = self.journal.close_deals(seat.desk.me, step.closed)
        if step.wait and not group:
            group = self.journal.append(())  # What it vouches for was queued before.
        effects = step.effects
        if step.wait or any(self._held.get(_deal_of(effect)) for effect in effects):
            for effect in effects:
                deal = _deal_of(effect)
                self._held[deal] = self._held.get(deal, 0) + 1
            self._waiting.append((group, seat, effects))
            self._to_commit.set()
        else:
            if group:
                self._unwatched = group
                self._to_commit.set()
            self._perform_all(seat, effects)
        self._wake.set()

    def start(self, work: Callable[..., Coroutine[Any, Any, None]], *args: Any) -> None:
        """Run ``work`` in the node's task group; it ends with the node at the latest.

        :raises LocalProtocolError: if the node does not run
        """
        if self._group is None:
            raise LocalProtocolError("the node does not run yet")
        self._group.start_soon(work, *args)

    async def look_at_means(self, seat: Seat) -> None:
        """Tell a buyer what its address holds now: it promises no more than that."""
        buyer = seat.desk.buyer
        if buyer is None:
            return
        try:
            buyer.know(await self.settlement.balance(seat.desk.me))
        except (ChainUnavailable, CallReverted) as error:
            # What was known last holds until the lock, which needs the chain to be back anyway.
            log.info("the balance of %s is not known now: %s", seat.name, error)

    async def say_goodbye(self) -> None:
        """Withdraw from all rates, so that nobody calls us in vain; it takes a moment at most."""
        try:
            for seat in self.seats.values():
                for contract in seat.desk.contracts():
                    why = "it ends its work"
                    self.apply(seat, seat.desk.stop(contract.deal, why, now_ms=self.now_ms()))
        except CoaseError as error:
            log.info("no goodbye: %s", error)  # What cannot be written down is not said.
        with anyio.move_on_after(GOODBYE_MAX_S, shield=True):
            await self._send_all()

    def nudge(self) -> None:
        """Look at the clocks and the chain soon: something has changed."""
        self._wake.set()
        self._poll.set()

    async def _commit_loop(self) -> None:
        while True:
            while self._waiting:
                group, seat, effects = self._waiting[0]
                if group:
                    await self.journal.durable(group)
                self._waiting.popleft()
                for effect in effects:
                    deal = _deal_of(effect)
                    self._held[deal] -= 1
                    if not self._held[deal]:
                        del self._held[deal]
                self._perform_all(seat, effects)
            if self._unwatched:
                group, self._unwatched = self._unwatched, 0
                await self.journal.durable(group)
                continue
            self._to_commit = anyio.Event()
            await self._to_commit.wait()

    def _perform_all(self, seat: Seat, effects: list[Effect]) -> None:
        for effect in effects:
            self._perform(seat, effect)

    def _perform(self, seat: Seat, effect: Effect) -> None:
        group = self._group
        match effect:
            case Transmit() | Publish():
                self._outgoing.append(effect)
                self._to_send.set()
            case Notice():
                self._notify(seat.desk.me, effect)
            case OnChain() if group is not None:
                group.start_soon(self._call, seat, effect)
            case OnChannel() if group is not None:
                group.start_soon(self._fund, seat, effect)
            case DoWork() if group is not None:
                group.start_soon(self._work, seat, effect.deal)
            case DoCheck() if group is not None:
                group.start_soon(self._check, seat, effect.deal)

    def _notify(self, agent: AgentId, notice: Notice) -> None:
        for observer in list(self.observers):
            # Others wait for what comes after it, so that a listener may not break this off.
            tell(partial(observer, agent, notice), name="an observer")

    async def _send_loop(self) -> None:
        while True:
            await self._send_all()
            self._to_send = anyio.Event()
            await self._to_send.wait()

    async def _send_all(self) -> None:
        while self._outgoing:
            effect = self._outgoing.popleft()
            try:
                if isinstance(effect, Transmit):
                    await self.transport.send(effect.to, effect.wire)
                else:
                    await self.transport.ask(
                        effect.capability,
                        effect.wire,
                        level=effect.level,
                        prefix=effect.prefix,
                    )
            except CoaseError as error:
                # Whoever needs an answer says it again; nothing is lost but time.
                log.warning("not sent: %s", error)

    # ---- what takes time -----------------------------------------------------------------------

    async def _call(self, seat: Seat, effect: OnChain) -> None:
        error, retry_ms = "", CALL_REPEAT_MS

        async def sign() -> Receipt:
            seat.permit(effect.deal, effect.call)
            return await self.settlement.perform(effect.effect_id, effect.call, seat.identity)

        # Whoever listens hears of it by a notice; a terminal only of what its owner can mend.
        made = await attempt(sign, name=effect.effect_id, level=logging.INFO)
        match made:
            case CallReverted():
                # The world may have moved on: the next look tells what is owed now, if anything.
                if advice(made):
                    log.warning("%s, deal %s: %s", seat.name, effect.deal[:8], explained(made))
                error, retry_ms = f"the escrow refused: {explained(made)}", CHAIN_RETRY_MS
            case ChainUnavailable():
                error, retry_ms = str(made), CHAIN_RETRY_MS
            case Exception():
                error = f"not sent: {made}"
        now_ms = self.now_ms()
        self.apply(
            seat,
            seat.desk.call_ended(effect.effect_id, error, retry_ms=retry_ms, now_ms=now_ms),
        )
        self._poll.set()

    async def _fund(self, seat: Seat, effect: OnChannel) -> None:
        """Make a deposit, which may be repeated under its id."""
        channels = self.channels
        if channels is None:
            return

        async def sign() -> Receipt:
            seat.permit(effect.deal, effect.call)
            return await channels.perform(effect.effect_id, effect.call, seat.identity)

        made = await attempt(sign, name=effect.effect_id, level=logging.INFO)
        error = ""
        if isinstance(made, Exception):
            error = (
                f"the deposit failed: {explained(made) if isinstance(made, CallReverted) else made}"
            )
        self.apply(seat, seat.desk.deposit_ended(effect.effect_id, error, now_ms=self.now_ms()))
        self._poll.set()

    async def _work(self, seat: Seat, deal: str) -> None:
        thread = seat.desk.threads.get(deal)
        worker = seat.worker
        if thread is None or worker is None:
            return
        limit_s = thread.agreed_terms.deliver_by_s - self.now_ms() // 1000
        done: Done | Exception = TimeoutError("the time to deliver has passed")
        with anyio.move_on_after(max(limit_s, 0)):
            done = await attempt(lambda: worker(thread), name=f"{seat.name}'s handler")
        self.apply(seat, self._delivery(seat, deal, done))

    def _delivery(self, seat: Seat, deal: str, done: Done | Exception) -> Step:
        """Return the step that delivers what a handler made, or declines the deal."""
        now_ms = self.now_ms()
        if isinstance(done, Done):
            try:
                return seat.desk.work_done(
                    deal,
                    result=done.result,
                    to_seller_units=done.to_seller_units,
                    usage=done.usage,
                    salt=seat.desk.chance.take(32),
                    now_ms=now_ms,
                )
            except (CoaseError, ValueError, TypeError) as error:
                # Too large, say, or text and usage that no message can carry: no result at all.
                log.warning("%s's result cannot be sent: %s", seat.name, error)
                done = error
        why = f"{type(done).__name__}: {done}"[:200]
        return seat.desk.work_failed(deal, why, now_ms=now_ms)

    async def _check(self, seat: Seat, deal: str) -> None:
        thread = seat.desk.threads.get(deal)
        checker = seat.checker
        if thread is None:
            return
        verdict: str | Exception = "good"
        if checker is not None:
            verdict = await attempt(lambda: checker(thread), name=f"{seat.name}'s check")
        if isinstance(verdict, Exception):
            verdict = f"the check failed: {verdict}"
        # A check is somebody else's code, and may return anything.
        self.apply(seat, seat.desk.checked(deal, str(verdict)[:500], now_ms=self.now_ms()))

    # ---- clocks --------------------------------------------------------------------------------

    async def _clock_loop(self) -> None:
        while True:
            now_ms = self.now_ms()
            due_ms = now_ms + int(SLEEP_MAX_S * 1000)
            for seat in list(self.seats.values()):
                next_ms = seat.desk.next_ms()
                if next_ms is None:
                    continue
                if next_ms <= now_ms:
                    self.apply(seat, seat.desk.tick(now_ms=now_ms))
                    next_ms = seat.desk.next_ms()
                if next_ms is not None:
                    # At least a millisecond: a timer that stays due must not spin.
                    due_ms = min(due_ms, max(next_ms, now_ms + 1))
            self._wake = anyio.Event()
            with anyio.move_on_after((due_ms - now_ms) / 1000):
                await self._wake.wait()

    async def _chain_loop(self) -> None:
        last_look_s = 0.0
        while True:
            asked = self._poll.is_set()
            self._poll = anyio.Event()
            try:
                head = await self.settlement.head()
                self.chain_error = ""
                late = anyio.current_time() - last_look_s > FULL_LOOK_S
                if asked or late or head != self.head:
                    last_look_s = anyio.current_time()
                    await self._look(head)
            except ChainUnavailable as error:
                self.chain_error = str(error)
                log.info("chain: %s", error)
                for seat in self.seats.values():
                    if seat.desk.buyer is not None:
                        seat.desk.buyer.know(None)
            with anyio.move_on_after(self.poll_s):
                await self._poll.wait()

    async def _look(self, head: Head) -> None:
        """Show every desk its deals as the chain has them now."""
        self.head = head
        watched = [job for seat in self.seats.values() for job in seat.desk.watched()]
        views = await self.settlement.jobs(watched) if watched else {}
        # After the deals: what was locked in between counts twice for a moment, and never not.
        async with anyio.create_task_group() as group:
            for seat in self.seats.values():
                buyer = seat.desk.buyer
                if buyer is not None and buyer.is_spending():
                    group.start_soon(self.look_at_means, seat)
        now_ms = self.now_ms()
        depth_s = head.time_s - self.settlement.confirmations * BLOCK_S
        for seat in list(self.seats.values()):
            theirs = {job: views[job] for job in seat.desk.watched() if job in views}
            step = seat.desk.look(theirs, head=head, depth_s=depth_s, now_ms=now_ms)
            self.apply(seat, step)
        await self._look_at_channels()

    async def _look_at_channels(self) -> None:
        """Show every desk those of its channels that it has to see now."""
        if self.channels is None:
            return
        wanted = {id_: None for seat in self.seats.values() for id_ in seat.desk.streams.wanted()}
        views = await self.channels.views(list(wanted)) if wanted else {}
        for seat in list(self.seats.values()):
            theirs = {id_: views[id_] for id_ in seat.desk.streams.wanted() if id_ in views}
            if theirs:
                self.apply(seat, seat.desk.look_at_channels(theirs, now_ms=self.now_ms()))


def _deal_of(effect: Effect) -> str:
    match effect:
        case Transmit():
            return effect.to
        case Publish():
            return effect.capability
        case _:
            return effect.deal
