"""What a desk remembers: its threads, what it said and heard, and how that outlives a crash."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

from coase.protocol.messages import ENVELOPE_LIFE_MAX_MS, Header
from coase.protocol.session import (
    Thread,
    acknowledged,
    deadline_ms,
    fail,
    judge,
    receive,
    say,
    see,
    taken,
    tick,
)
from coase.protocol.states import BOUND, Role, State

from .heard import Heard
from .history import (
    evidence_from_json,
    message_from_json,
    message_to_json,
    summary,
    thread_from_json,
    thread_to_json,
    view_from_json,
)
from .outbox import Outbox
from .ports import Chance, Record
from .slices import Slices
from .steps import Buyer, Court, DeadLetter, Notice, Seller, Step, Transmit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coase.protocol.envelope import Message
    from coase.protocol.terms import Domain
    from coase.protocol.types import AgentId

    from .standing import Standing
    from .streams import Streams

DEAD_LETTERS_MAX: Final = 1_000
STREAM_RECORDS: Final = frozenset(("channel", "voucher", "deposit", "deposited"))


class Memory:
    """The part of a desk that is a fold of its journal."""

    def __init__(
        self, me: AgentId, chance: Chance, *, domain: Domain, encode: Callable[..., bytes]
    ) -> None:
        self.me, self.chance, self.domain = me, chance, domain
        self.threads: dict[str, Thread] = {}
        self.jobs: dict[bytes, str] = {}
        self.buyer: Buyer | None = None
        self.seller: Seller | None = None
        self.court: Court | None = None
        self.streams: Streams
        self.standing: Standing
        self.slices = Slices(me)
        self.dead: list[DeadLetter] = []
        self.counts: dict[str, int] = {}
        self._outbox = Outbox(encode)
        self._heard = Heard()
        self._acks: dict[tuple[AgentId, str], tuple[int, Header]] = {}
        self._retry: dict[str, int] = {}
        self._timers: list[tuple[int, str]] = []
        self._agenda: list[tuple[int, str]] = []
        """When a deal that both have signed may owe something new, by the wall clock."""
        self._bound: dict[str, None] = {}
        self.working: dict[str, set[str]] = {}
        """By capability, the deals that we sold and have not delivered: what capacity counts."""

    def open_thread(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        """Begin a thread, as a seller does with its first offer."""
        self._put(thread)
        self._record_thread(thread, step, now_ms=now_ms)

    def _put(self, thread: Thread) -> None:
        self.threads[thread.deal] = thread
        if thread.job_id:
            self.jobs[thread.job_id] = thread.deal
        if thread.side is Role.SELLER:
            self._count_work(thread)
        if thread.state in BOUND:
            if thread.deal not in self._bound:
                heapq.heappush(self._agenda, (0, thread.deal))
            self._bound[thread.deal] = None
        else:
            self._bound.pop(thread.deal, None)
            due = deadline_ms(thread)
            if due is not None:
                heapq.heappush(self._timers, (due, thread.deal))

    def _count_work(self, thread: Thread) -> None:
        deals = self.working.setdefault(thread.request.capability, set())
        open_ = thread.state in (State.AGREED, State.LOCKED) and thread.result is None
        if open_ and not thread.is_contract:
            deals.add(thread.deal)
        else:
            deals.discard(thread.deal)

    def bound(self) -> list[str]:
        """Return the ids of the deals that both have signed and that are not over.

        A rate contract is none: nothing is due under it before it is called.
        """
        return [deal for deal in self._bound if not self.threads[deal].is_contract]

    def contracts(self, counterparty: AgentId = "") -> list[Thread]:
        """Return the rate contracts that are in force, all or those with one counterparty."""
        threads = (self.threads[deal] for deal in self._bound)
        return [
            thread
            for thread in threads
            if thread.is_contract and counterparty in ("", thread.counterparty)
        ]

    def was_shown(self, deal: str) -> bool:
        """Return whether the arbiter of an open deal has taken our evidence."""
        return self._outbox.was_shown(deal)

    def close_if_over(self, deal: str, step: Step, *, now_ms: int) -> None:
        """Take a thread that is over out of memory, and write its summary."""
        thread = self.threads.get(deal)
        if thread is None or not thread.over:
            return
        del self.threads[deal]
        self.jobs.pop(thread.job_id, None)
        self._bound.pop(deal, None)
        for effect_id in [e for e in self._retry if e.startswith(deal)]:
            del self._retry[effect_id]
        self._outbox.drop_deal(deal)
        step.closed.append((deal, summary(thread)))
        self.streams.ended(thread, step, now_ms=now_ms)
        self.slices.ended(thread, step, now_ms=now_ms)
        self.standing.ended(thread)
        half = self.buyer if thread.side is Role.BUYER else self.seller
        if half is not None:
            half.ended(thread, step, now_ms=now_ms)
        step.effects.append(Notice("ended", deal, thread))

    def _record_thread(self, thread: Thread, step: Step, *, now_ms: int) -> None:
        self._record_data(step, thread, "thread", thread_to_json(thread), now_ms=now_ms)

    def _record(
        self,
        step: Step,
        thread: Thread,
        kind: str,
        message: Message,
        *,
        now_ms: int,
        until_ms: int = 0,
    ) -> None:
        data = message_to_json(message, until_ms)
        self._record_data(step, thread, kind, data, now_ms=now_ms)

    def _record_data(
        self, step: Step, thread: Thread, kind: str, data: bytes, *, now_ms: int
    ) -> None:
        step.records.append(Record(self.me, thread.deal, kind, now_ms, data))

    def replay(self, records: Iterable[Record], *, now_ms: int) -> None:
        """Fold the journal: after this the desk stands where it stood when it was killed.

        What was said and not answered is sent again; what the chain or the handler owed is
        derived anew by ``tick`` and ``look``.
        """
        for record in records:
            if record.kind == "thread":
                opened = thread_from_json(record, self.me, self.domain)
                self._put(opened)
                if opened.side is Role.SELLER:
                    expires_ms = opened.request.reply_by_ms
                    self._heard.remember(
                        opened.counterparty, opened.request_id, expires_ms=expires_ms
                    )
                continue
            if record.kind == "evidence" and self.court is not None:
                sender, message_id, evidence = evidence_from_json(record)
                expires_ms = now_ms + ENVELOPE_LIFE_MAX_MS
                self._heard.remember(sender, message_id, expires_ms=expires_ms)
                self.court.recall(sender, evidence)
                continue
            if record.kind == "slice":
                self.slices.recall(record)
                continue
            if record.kind in STREAM_RECORDS:
                self.streams.recall(record)
                continue
            thread = self.threads.get(record.deal)
            if thread is None:
                continue
            match record.kind:
                case "said" | "heard":
                    self._replay_message(thread, record, now_ms=now_ms)
                case "saw":
                    view, chain_s = view_from_json(record.data)
                    self._put(see(thread, view, chain_s=chain_s, now_ms=record.at_ms))
                case "tick":
                    self._put(tick(thread, now_ms=record.at_ms))
                case "judged":
                    self._put(judge(thread, record.data.decode()))
                case "failed":
                    self._put(fail(thread, record.data.decode()))
                case "taken":
                    self._put(taken(thread, record.data, verify=lambda *_: None))
                case "acked":
                    self._put(acknowledged(thread, now_ms=record.at_ms))

    def _replay_message(self, thread: Thread, record: Record, *, now_ms: int) -> None:
        message, until_ms = message_from_json(record, thread)
        if message.sender == self.me:
            moved = say(thread, message, now_ms=record.at_ms)
            self._put(moved)
            again = Step()
            self._dispatch(message, moved.their_key, until_ms, again, now_ms=now_ms)
            return
        # Its sender may have renewed the envelope since, so count its life from now.
        expires_ms = now_ms + ENVELOPE_LIFE_MAX_MS
        self._heard.remember(message.sender, message.id, expires_ms=expires_ms)
        self._outbox.answered(message.re, by=message.sender)
        self._put(receive(thread, message, now_ms=record.at_ms, verify=lambda *_: None))

    def _dispatch(
        self, message: Message, key: str, until_ms: int, step: Step, *, now_ms: int
    ) -> None:
        """Send ``message`` now, and again until it is answered or ``until_ms`` passes."""
        wires = self._outbox.send(message, key, until_ms, now_ms=now_ms)
        step.effects.extend(Transmit(message.to, wire) for wire in wires)
        if message.re:
            self._acks.pop((message.to, message.re), None)
            if len(wires) == 1:
                self._heard.answer(message.to, message.re, wires[0], now_ms=now_ms)

    def _id(self) -> str:
        return self.chance.take(16).hex()

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1

    def _bury(self, header: Header, reason: str, *, now_ms: int) -> None:
        self._keep_dead(DeadLetter(now_ms, header.kind, header.sender, reason))

    def _keep_dead(self, letter: DeadLetter) -> None:
        self.dead.append(letter)
        del self.dead[:-DEAD_LETTERS_MAX]
