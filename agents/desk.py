"""The desk: everything that one agent remembers and owes, without any input or output.

A desk takes envelopes, looks at the chain, ticks of the clock and the acts of its owner, and
returns a ``Step``: the records to journal and the effects to perform once they are durable. It
is synchronous and deterministic, so that the same code runs under the real runtime and in a
simulated world with a virtual clock. Buying and selling are two halves that plug in.
"""

from __future__ import annotations

import heapq
import json
from typing import TYPE_CHECKING, Final

from coase.escrow.accounts import ViewTooOld
from coase.escrow.voucher import channels_domain
from coase.protocol.effects import Open
from coase.protocol.envelope import Message, check_times, open_body, parse_body, read_header
from coase.protocol.errors import (
    BadSignature,
    BudgetExhausted,
    LocalProtocolError,
    MalformedEnvelope,
    Refused,
    RemoteProtocolError,
)
from coase.protocol.messages import (
    AWAITED,
    BODIES,
    CHUNKS_MAX,
    ENVELOPE_LIFE_MAX_MS,
    ENVELOPE_SIZE_MAX_BYTES,
    Body,
    Chunk,
    Describe,
    Description,
    Evidence,
    Header,
    Nack,
    Request,
    Ruling,
    Voucher,
    thread_id,
)
from coase.protocol.session import (
    Duty,
    Margins,
    Thread,
    Verify,
    deadline_ms,
    duties,
    judge,
    receive,
    require_signer_of,
    say,
    see,
    tick,
)
from coase.protocol.states import BOUND, Role, State
from coase.protocol.terms import Domain, ack_digest
from coase.protocol.types import ZERO_ADDRESS, AgentId, Asset, Head, JobView

from .admission import Admission
from .delivery import Delivery
from .history import evidence_to_json, view_to_json
from .metering import fault_in_stream
from .pieces import TASK_HEAD_MAX_BYTES, TASK_SIZE_MAX_BYTES, Pieces, piece_id
from .ports import Record
from .standing import Standing
from .steps import DeadLetter, DoCheck, DoWork, Notice, OnChain, Publish, Step, Transmit
from .streams import StreamPolicy, Streams

if TYPE_CHECKING:
    from collections.abc import Callable

    from coase.escrow.voucher import ChannelView

    from .ports import Chance, Codec

ACK_DELAY_MS: Final = 200  # With an ack for everything the throughput halves.
THREADS_MAX: Final = 50_000  # Open threads of one agent; a request beyond is not answered.
DEAD_LETTERS_MAX: Final = 1_000
DUTY_ROUNDS_MAX: Final = 4  # A duty leads to another at most this often in one step.
NEVER_MS: Final = 2**62
DUTY_PAUSE_MS: Final = 1_000  # Before a duty is tried again that we ourselves may not do now.


class Desk(Delivery):
    """One agent's side of all its deals."""

    def __init__(
        self,
        codec: Codec,
        chance: Chance,
        *,
        domain: Domain,
        asset: Asset,
        margins: Margins | None = None,
        verify: Verify = require_signer_of,
    ) -> None:
        super().__init__(codec.identity.address, chance, domain=domain, encode=self._encode_out)
        self.codec, self.asset = codec, asset
        self.margins = margins or Margins()
        self.verify = verify
        self.head = Head(0, 0)
        self.on_description: Callable[[Message, Description], None] | None = None
        self.acknowledge: Callable[[Thread], bool] = lambda thread: True
        self.inbox_secret = chance.take(32)
        """Opens what is sealed to the agent outside of any deal, such as evidence."""
        self.admission = Admission()
        self.streams = Streams(self, channels_domain(domain.chain_id), StreamPolicy.of(asset))
        self.standing = Standing(self)
        self.abandoned = []
        self.vault: AgentId = ZERO_ADDRESS
        """Where stakes are, on this network."""
        self.stake_free_units: int | None = None
        """What of our own stake is free for deals; None if we put up none."""
        self._pieces = Pieces()

    # ---- what comes in -------------------------------------------------------------------

    def hear(self, wire: bytes, *, now_ms: int) -> Step:
        """Take one envelope from the network and return what it leads to.

        Nothing that comes in here raises: what is wrong is counted, dead-lettered, and answered
        with a NACK only if its sender proved who it is.
        """
        step = Step()
        try:
            header = read_header(wire)
        except MalformedEnvelope:
            self._count("malformed")
            return step
        if header.net != self.codec.net or header.to not in (self.me, "*"):
            self._count("misaddressed")
            return step
        if header.sender == self.me:
            return step
        verified = False
        try:
            stranger = self._admit(header, now_ms=now_ms)
            self.codec.authenticate(wire, header)
            verified = True
            if stranger:
                self.admission.verified(header.sender, now_ms=now_ms)
            if self._heard.knows(header.sender, header.id):
                self._again(header, step, now_ms=now_ms)
                return step
            if header.kind != "chunk":  # Its number tells a repetition, and there are many.
                self._heard.remember(header.sender, header.id, expires_ms=header.expires_ms)
            self._check_times(header, now_ms=now_ms)
            self._route(header, step, now_ms=now_ms)
        except BadSignature:
            self._count("bad_signature")
        except RemoteProtocolError as error:
            self._refuse(header, _refusal(error), step, verified=verified, now_ms=now_ms)
        except LocalProtocolError as error:
            # Our own answer was not allowed any more, say because a deadline had just passed.
            self._count("late_move")
            self._bury(header, str(error), now_ms=now_ms)
        return step

    def _admit(self, header: Header, *, now_ms: int) -> bool:
        """Return whether the sender is a stranger.

        What cannot be meant for us is refused before the costly look at its signature, and so
        is what comes from strangers in a flood: nothing is answered then.
        """
        if header.kind in ("request", "describe"):
            if self.seller is None:
                raise Refused("unsupported", "this agent sells nothing")
            if len(self.threads) >= THREADS_MAX:
                raise Refused("capacity", "too many open threads")
            if header.kind == "request" and not self.admission.funded(header.sender):
                raise Refused("funds", "a buyer that cannot pay")
        elif header.to == "*":
            raise Refused("malformed", f"{header.kind} is not for everybody")
        thread = self.threads.get(header.deal)
        if thread is not None and thread.counterparty == header.sender:
            return False
        if header.kind == "call" and self.standing.covers(header):
            return False
        if header.kind == "offer" and self.buyer is not None and not self.buyer.reads(header):
            raise Refused("capacity", "no more offers are read for this request")
        if self._outbox.awaits(header.re, header.sender):
            return False
        if not self.admission.admit(header.sender, now_ms=now_ms):
            raise Refused("capacity", "too much from strangers")
        return True

    def _check_times(self, header: Header, *, now_ms: int) -> None:
        """Return if the envelope is alive by our clock.

        Who tells us that our clock is wrong cannot be alive by it: a NACK that answers us counts
        by our question's life.
        """
        try:
            check_times(header, now_ms=now_ms)
        except Refused:
            if header.kind == "nack" and self._outbox.awaits(header.re, header.sender):
                return
            if header.expires_ms < now_ms:
                # Remembered from now on, or each replay of old bytes would be answered.
                expires_ms = now_ms + ENVELOPE_LIFE_MAX_MS
                self._heard.remember(header.sender, header.id, expires_ms=expires_ms)
            raise

    def _again(self, header: Header, step: Step, *, now_ms: int) -> None:
        """Answer a repetition with the very bytes of the first answer, if there are any."""
        self._count("repeated")
        message_id = header.id
        if header.kind == "piece":
            # Once the whole was taken, that is what its sender wants to hear.
            message_id = self._pieces.whole_of(header.sender, header.id) or header.id
        answer = self._heard.answered(header.sender, message_id, now_ms=now_ms)
        if answer:
            step.effects.append(Transmit(header.sender, answer))
            # The first answer may be waiting for the disk still.
            step.wait = True
        elif header.kind in AWAITED or header.kind in ("piece", "evidence", "chunk"):
            again = header.model_copy(update={"id": message_id})
            self._acks.setdefault((header.sender, message_id), (now_ms, again))

    def _route(self, header: Header, step: Step, *, now_ms: int) -> None:
        if header.kind not in BODIES and header.kind != "piece":
            raise Refused("unknown_kind", header.kind)
        if header.kind == "request":
            if self.seller is not None:
                request = open_body(header, header.body.encode()).body
                if isinstance(request, Request):
                    self.seller.requested(header, request, step, now_ms=now_ms)
            return
        if header.kind == "describe":
            self._describe(header, step, now_ms=now_ms)
            return
        if header.kind in ("ack", "nack", "description"):
            self._answered_plain(header, step, now_ms=now_ms)
            return
        if header.kind == "piece":
            self._piece(header, step, now_ms=now_ms)
            return
        if header.kind == "evidence":
            self._take(header, self.codec.unseal(header, self.inbox_secret), step, now_ms=now_ms)
            return
        if header.kind == "ruling":
            found = open_body(header, header.body.encode()).body
            if self.court is None or not isinstance(found, Ruling):
                raise Refused("unsupported", "this agent is no arbiter")
            self.court.ruled(header.sender, found)
            return
        if header.kind == "call" and header.deal not in self.threads:
            plain = self.standing.opened(header, step, now_ms=now_ms)
            self._take(header, plain, step, now_ms=now_ms)
            return
        thread = self._thread_for(header, now_ms=now_ms)
        if header.kind == "chunk" and not thread.streamed:
            self._chunk(header, thread, step)
            return
        self._take(header, self.codec.unseal(header, thread.secret), step, now_ms=now_ms)

    def _thread_for(self, header: Header, *, now_ms: int) -> Thread:
        thread = self.threads.get(header.deal)
        if thread is None and header.kind == "offer" and self.buyer is not None:
            thread = self.buyer.offered(header, now_ms=now_ms)
            if thread is not None and header.deal != thread_id(
                thread.request_id, self.me, header.sender
            ):
                raise Refused("unknown_deal", "the thread's id does not follow from its request")
        if thread is None:
            raise Refused("unknown_deal", header.deal)
        if thread.counterparty != header.sender:
            raise Refused("unknown_deal", "you are not a side of this thread")
        return thread

    def _take(self, header: Header, plain: bytes, step: Step, *, now_ms: int) -> None:
        """Handle a message whose body is open: move the thread, journal it, react."""
        message = open_body(header, plain)
        self._outbox.answered(message.re, by=header.sender)
        if isinstance(message.body, Evidence):
            self._show(header, message, message.body, step, now_ms=now_ms)
            return
        thread = self._thread_for(header, now_ms=now_ms)
        if header.kind == "task" and len(plain) > TASK_SIZE_MAX_BYTES + TASK_HEAD_MAX_BYTES:
            raise Refused("too_large", "with its result it could not be shown to an arbiter")
        if header.kind == "accept" and self.seller is not None:
            reason = self.seller.unable(thread, now_ms=now_ms)
            if reason:
                raise Refused(reason)
        taken = self._in_turn(thread, message, now_ms=now_ms)
        if taken is None:
            self._heard.unsay(header.sender, header.id)
            return
        moved = receive(thread, message, now_ms=now_ms, verify=self.verify)
        taken(step, now_ms)
        first = thread.deal not in self.threads
        self._put(moved)
        if first:
            self._record_thread(moved, step, now_ms=now_ms)
        self._record(step, moved, "heard", message, now_ms=now_ms)
        if message.kind in AWAITED and message.kind not in ("accept", "agreed"):
            # Whoever paid the last waits for nothing but this.
            delay_ms = 0 if moved.over else ACK_DELAY_MS
            self._acks[(header.sender, header.id)] = (now_ms + delay_ms, header)
        step.effects.append(Notice("heard:" + message.kind, moved.deal, moved))
        if isinstance(message.body, Chunk):
            self._delivered(header, moved, message.body, step, now_ms=now_ms)
        half = self.buyer if moved.side is Role.BUYER else self.seller
        if half is not None:
            half.heard(moved, message, step, now_ms=now_ms)
        self.pursue(moved.deal, step, now_ms=now_ms)

    def _show(
        self, header: Header, message: Message, evidence: Evidence, step: Step, *, now_ms: int
    ) -> None:
        """Journal what a side of a dispute shows its arbiter, and only then acknowledge it."""
        if self.court is None:
            raise Refused("unsupported", "this agent is no arbiter")
        case = self.court.take(header.sender, evidence)
        if not case:
            # The chain may not have shown us that dispute yet; its side says it again.
            self._heard.unsay(header.sender, header.id)
            return
        record = Record(self.me, case, "evidence", now_ms, evidence_to_json(message))
        step.records.append(record)
        self._acks[(header.sender, header.id)] = (now_ms, header)

    def _chunk(self, header: Header, thread: Thread, step: Step) -> None:
        """Show a part of a result that is being made; nothing depends on it."""
        buying = thread.side is Role.BUYER and thread.state in BOUND and thread.result is None
        if not buying or header.seq >= CHUNKS_MAX:
            return
        body = open_body(header, self.codec.unseal(header, thread.secret)).body
        if isinstance(body, Chunk):
            step.effects.append(Notice("chunk", thread.deal, thread, body.text, header.seq))

    def _in_turn(
        self, thread: Thread, message: Message, *, now_ms: int
    ) -> Callable[[Step, int], None] | None:
        """Return what takes a payment, or nothing for it; None if it has to be said again later."""
        body = message.body
        if isinstance(body, Chunk) and body.at > len(thread.shown):
            return None  # The one before it is on its way still.
        if isinstance(body, Voucher):
            try:
                return self.streams.taking(thread, body, now_ms=now_ms)
            except ViewTooOld:
                return None  # As soon as the chain was asked.
        return lambda step, now_ms: None

    def _delivered(
        self, header: Header, thread: Thread, chunk: Chunk, step: Step, *, now_ms: int
    ) -> None:
        """Look at a chunk that costs something: it is paid if it counts what it has."""
        self._heard.remember(header.sender, header.id, expires_ms=header.expires_ms)
        fault = fault_in_stream(thread)
        if fault:
            self._put(judge(thread, fault))
            self._record_data(step, thread, "judged", fault.encode(), now_ms=now_ms)
            step.effects.append(Notice("bad_result", thread.deal, self.threads[thread.deal], fault))
            return
        step.effects.append(Notice("chunk", thread.deal, thread, chunk.text, thread.chunks - 1))
        if not thread.owed_units:  # No voucher will tell the seller that it came.
            self._acks[(header.sender, header.id)] = (now_ms, header)

    def _answered_plain(self, header: Header, step: Step, *, now_ms: int) -> None:
        message = open_body(header, header.body.encode())
        if isinstance(message.body, Description):
            if self.on_description is not None:
                self.on_description(message, message.body)
            return
        known = self._outbox.answered(message.re, by=header.sender)
        if known is not None and known.message.kind in ("voucher", "settle"):
            self._paid(header, message.body, step, now_ms=now_ms)
        if known is not None and known.message.kind in ("task", "call"):
            self._task_taken(header, message.body, step, now_ms=now_ms)
        if not isinstance(message.body, Nack):
            return
        self._count("nack_received")
        if message.body.reason == "clock":
            ahead_ms = now_ms - message.body.now_ms
            step.effects.append(Notice("clock", header.deal, detail=f"ours is {ahead_ms} ms ahead"))
        sent = known.message.kind if known is not None else "message"
        self._bury(header, f"{sent}: {message.body.reason} {message.body.detail}", now_ms=now_ms)
        thread = self.threads.get(header.deal)
        if thread is None or thread.counterparty != header.sender:
            return
        if thread.state is State.ACCEPTED and message.re == thread.accept_id:
            self._put(receive(thread, message, now_ms=now_ms, verify=self.verify))
            self._record(step, self.threads[thread.deal], "heard", message, now_ms=now_ms)
            self.close_if_over(thread.deal, step, now_ms=now_ms)
        elif sent == "call":
            self._uncalled(thread, message.body, step, now_ms=now_ms)

    def _piece(self, header: Header, step: Step, *, now_ms: int) -> None:
        thread = self.threads.get(header.deal)
        secret = thread.secret if thread is not None else self.inbox_secret
        if thread is not None and thread.counterparty != header.sender:
            raise Refused("unknown_deal", "you are not a side of this thread")
        if thread is None and self.court is None:
            raise Refused("unknown_deal", header.deal)
        if thread is not None and thread.state not in BOUND:
            raise Refused("wrong_state", "nothing before the agreement is as large")
        whole = self._pieces.add(header, self.codec.unseal(header, secret), now_ms=now_ms)
        # An ack says that the piece is here; until the whole is taken it may yet be lost.
        self._acks[(header.sender, header.id)] = (now_ms, header)
        if whole is None:
            return
        if self._heard.knows(header.sender, whole.header.id):
            self._again(whole.header, step, now_ms=now_ms)
            return
        whole_id = whole.header.id
        self._heard.remember(header.sender, whole_id, expires_ms=header.expires_ms)
        try:
            self._take(whole.header, whole.plain, step, now_ms=now_ms)
        except RemoteProtocolError as error:
            self._refuse(whole.header, _refusal(error), step, verified=True, now_ms=now_ms)
        if not self._heard.knows(header.sender, whole_id):
            for seq in range(whole.count):  # It was not taken: let all of it come again.
                self._heard.unsay(header.sender, piece_id(whole_id, seq))

    def _describe(self, header: Header, step: Step, *, now_ms: int) -> None:
        body = open_body(header, header.body.encode()).body
        if not isinstance(body, Describe) or self.seller is None:
            return
        for description in self.seller.describe(body.name, header.id):
            plain = description.model_dump_json().encode()
            wire = self._encode(
                "description", self._id(), header.sender, header.deal, header.id, plain, "", now_ms
            )
            step.effects.append(Transmit(header.sender, wire))

    def _refuse(
        self, header: Header, refusal: Refused, step: Step, *, verified: bool, now_ms: int
    ) -> None:
        self._count(f"refused_{refusal.reason}")
        if not verified:
            return
        self._bury(header, str(refusal), now_ms=now_ms)
        if header.kind in ("ack", "nack", "request", "describe", "description", "chunk", "ruling"):
            return
        plain = json.dumps(
            {"reason": refusal.reason, "detail": refusal.detail[:200], "now_ms": now_ms},
            separators=(",", ":"),
        ).encode()
        wire = self._encode(
            "nack", self._id(), header.sender, header.deal, header.id, plain, "", now_ms
        )
        self._heard.answer(header.sender, header.id, wire, now_ms=now_ms)
        step.effects.append(Transmit(header.sender, wire))

    # ---- what goes out -------------------------------------------------------------------

    def say(
        self,
        deal: str,
        kind: str,
        body: dict[str, object],
        step: Step,
        *,
        now_ms: int,
        re: str = "",
        until_ms: int = 0,
        message_id: str = "",
    ) -> Message:
        """Make our own move in a thread, journal it, and send it; ``until_ms`` repeats it.

        :raises LocalProtocolError: if the move is not allowed now; nothing was sent
        """
        thread = self.threads[deal]
        plain = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
        parsed = parse_body(kind, plain)
        message = self._message(thread, kind, parsed, plain, re, message_id, now_ms=now_ms)
        moved = say(thread, message, now_ms=now_ms)
        self._dispatch(message, moved.their_key, until_ms, step, now_ms=now_ms)
        self._put(moved)
        self._record(step, moved, "said", message, now_ms=now_ms, until_ms=until_ms)
        if kind in AWAITED or kind == "chunk":
            step.wait = True  # A chunk goes out when the voucher before it is on the disk.
        step.effects.append(Notice("said:" + kind, deal, moved))
        return message

    def tell(
        self,
        to: AgentId,
        kind: str,
        body: dict[str, object],
        *,
        now_ms: int,
        key: str = "",
        deal: str = "",
        until_ms: int = 0,
    ) -> Step:
        """Say something outside of any thread, as to an arbiter; ``until_ms`` repeats it."""
        step = Step()
        plain = json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()
        message_id = self._id()
        message = Message(
            kind=kind,
            id=message_id,
            sender=self.me,
            to=to,
            deal=deal or message_id,
            re="",
            sent_ms=now_ms,
            expires_ms=now_ms + ENVELOPE_LIFE_MAX_MS,
            body=parse_body(kind, plain),
            plain=plain,
        )
        self._dispatch(message, key, until_ms, step, now_ms=now_ms)
        return step

    def ask_who(self, name: str, *, now_ms: int) -> Step:
        """Ask everybody who sells ``name``, a name or an id, to describe it; all if empty."""
        message_id = self._id()
        plain = json.dumps({"name": name}).encode()
        wire = self._encode("describe", message_id, "*", message_id, "", plain, "", now_ms)
        return Step(effects=[Publish(name or "any", wire, 0, "-")])

    def _message(
        self,
        thread: Thread,
        kind: str,
        body: Body,
        plain: bytes,
        re: str,
        message_id: str,
        *,
        now_ms: int,
    ) -> Message:
        return Message(
            kind=kind,
            id=message_id or self._id(),
            sender=self.me,
            to=thread.counterparty,
            deal=thread.deal,
            re=re,
            sent_ms=now_ms,
            expires_ms=now_ms + ENVELOPE_LIFE_MAX_MS,
            body=body,
            plain=plain,
        )

    def _encode_out(
        self, message: Message, kind: str, id_: str, plain: bytes, key: str, **more: int
    ) -> bytes:
        return self._encode(kind, id_, message.to, message.deal, message.re, plain, key, **more)

    def _encode(
        self,
        kind: str,
        message_id: str,
        to: str,
        deal: str,
        re: str,
        plain: bytes,
        key: str,
        now_ms: int,
        seq: int = 0,
    ) -> bytes:
        wire = self.codec.encode(
            kind=kind,
            message_id=message_id,
            to=to,
            deal=deal,
            re=re,
            sent_ms=now_ms,
            expires_ms=now_ms + ENVELOPE_LIFE_MAX_MS,
            plain=plain,
            key=key,
            seq=seq,
        )
        if len(wire) > ENVELOPE_SIZE_MAX_BYTES:
            raise LocalProtocolError(f"{kind} makes an envelope of {len(wire)} bytes")
        return wire

    # ---- the clock and the chain -----------------------------------------------------------

    def tick(self, *, now_ms: int) -> Step:
        """Do what has become due by ``now_ms``: lapses, repetitions, acks, halves' own timers."""
        step = Step()
        self.give_up_abandoned(step, now_ms=now_ms)
        while self._timers and self._timers[0][0] <= now_ms:
            _, deal = heapq.heappop(self._timers)
            thread = self.threads.get(deal)
            if thread is None:
                continue
            lapsed = tick(thread, now_ms=now_ms)
            if lapsed is not thread:
                self._put(lapsed)
                self._record_data(step, lapsed, "tick", b"", now_ms=now_ms)
                self.close_if_over(deal, step, now_ms=now_ms)
            elif (due := deadline_ms(thread)) is not None and due > now_ms:
                heapq.heappush(self._timers, (due, deal))
        self._repeat(step, now_ms=now_ms)
        self._send_acks(step, now_ms=now_ms)
        for half in (self.buyer, self.seller):
            if half is not None:
                half.ticked(step, now_ms=now_ms)
        while self._agenda and self._agenda[0][0] <= now_ms:
            deal = heapq.heappop(self._agenda)[1]
            self.pursue(deal, step, now_ms=now_ms)
        self._heard.forget(now_ms=now_ms)
        return step

    def _repeat(self, step: Step, *, now_ms: int) -> None:
        again, late = self._outbox.due(now_ms=now_ms)
        if again:
            self.counts["resent"] = self.counts.get("resent", 0) + len(again)
            # On a slow disk the first time may not have been yet.
            step.wait = True
        step.effects.extend(again)
        for message in late:
            letter = DeadLetter(now_ms, message.kind, message.to, "nobody answered in time")
            self._keep_dead(letter)

    def _send_acks(self, step: Step, *, now_ms: int) -> None:
        for key, (due_ms, header) in list(self._acks.items()):
            if due_ms > now_ms:
                continue
            del self._acks[key]
            thread = self.threads.get(header.deal)
            last = thread is None and header.kind in ("voucher", "settle")
            body: dict[str, object] = {"level": "done" if last else "taken", "signature": ""}
            taken = thread is not None and thread.side is Role.SELLER and thread.task is not None
            if header.kind == "task" and taken and thread and self.acknowledge(thread):
                digest = ack_digest(self.domain, thread.job_id, thread.agreed_terms.work.task)
                body["signature"] = "0x" + self.codec.sign(digest).hex()
            plain = json.dumps(body, separators=(",", ":")).encode()
            wire = self._encode(
                "ack", self._id(), header.sender, header.deal, header.id, plain, "", now_ms
            )
            self._heard.answer(header.sender, header.id, wire, now_ms=now_ms)
            step.effects.append(Transmit(header.sender, wire))
            # What an ack vouches for is journalled in an earlier group, or in this one.
            step.wait = True

    def next_ms(self) -> int | None:
        """Return when ``tick`` should be called next, or None if nothing is due."""
        times = [due for due, _ in self._acks.values()]
        times += [self._timers[0][0]] if self._timers else []
        times += [self._agenda[0][0]] if self._agenda else []
        sources = (self._outbox, self.buyer, self.seller)
        more = [source.next_ms() for source in sources if source is not None]
        times += [due for due in more if due is not None]
        return min(times) if times else None

    def watched(self) -> list[bytes]:
        """Return the ids of the deals whose place on chain matters now."""
        bound = [self.threads[deal] for deal in self._bound]
        return [thread.job_id for thread in bound if not thread.streamed]

    def look(self, views: dict[bytes, JobView], *, head: Head, depth_s: int, now_ms: int) -> Step:
        """Take what the chain says of our deals, and do what follows from it.

        ``head`` is the newest block; ``depth_s`` the time of the block at which ``views`` stand.
        """
        step = Step()
        self.head = head
        for job_id, view in views.items():
            thread = self.threads.get(self.jobs.get(job_id, ""))
            if thread is None:
                continue
            seen = see(thread, view, chain_s=depth_s, now_ms=now_ms)
            if seen is not thread:
                self._put(seen)
                data = view_to_json(view, depth_s)
                self._record_data(step, seen, "saw", data, now_ms=now_ms)
                if seen.state is not thread.state:
                    step.effects.append(Notice("chain:" + seen.state, seen.deal, seen))
        for deal in list(self._bound):
            thread = self.threads[deal]
            if thread.streamed:
                late = see(thread, thread.view, chain_s=depth_s, now_ms=now_ms)
                if late is not thread:
                    self.saw(late, thread.view, depth_s, step, now_ms=now_ms)
            self.pursue(deal, step, now_ms=now_ms)
        for job_id in views:
            self.close_if_over(self.jobs.get(job_id, ""), step, now_ms=now_ms)
        return step

    def look_at_channels(self, views: dict[bytes, ChannelView], *, now_ms: int) -> Step:
        """Take what the chain says of our channels, and begin the deals that waited for it."""
        step = Step()
        self.streams.look(views, step, now_ms=now_ms)
        for deal in list(self._bound):
            if self.threads[deal].streamed:
                self.pursue(deal, step, now_ms=now_ms)
        return step

    def deposit_ended(self, effect_id: str, error: str, *, now_ms: int) -> Step:
        """Take the end of a deposit into a channel."""
        step = Step()
        self.streams.deposit_ended(effect_id, error, step, now_ms=now_ms)
        return step

    def saw(self, thread: Thread, view: JobView, depth_s: int, step: Step, *, now_ms: int) -> None:
        """Keep a thread that a look has moved."""
        self._put(thread)
        self._record_data(step, thread, "saw", view_to_json(view, depth_s), now_ms=now_ms)
        step.effects.append(Notice("chain:" + thread.state, thread.deal, thread))

    # ---- duties ------------------------------------------------------------------------------

    def call_ended(self, effect_id: str, error: str, *, retry_ms: int, now_ms: int) -> Step:
        """Take the end of a call to the chain; it is made again while it is still owed.

        A call that went through stays out until the chain shows it at the depth we trust.
        """
        step = Step()
        self._retry[effect_id] = now_ms + retry_ms
        heapq.heappush(self._agenda, (now_ms + retry_ms, effect_id.split(":", 1)[0]))
        if error:
            self._count("chain_errors")
            step.effects.append(Notice("chain_error", effect_id.split(":", 1)[0], detail=error))
        return step

    def _work(self, deal: str, step: Step, *, now_ms: int) -> None:
        """Perform what the thread's holder owes now, each duty once until it is due again."""
        for _ in range(DUTY_ROUNDS_MAX):  # What is said may bring about the next duty.
            thread = self.threads.get(deal)
            if thread is None or deal not in self._bound:
                return
            if thread.streamed and thread.state is State.AGREED:
                self.streams.consider(thread, step, now_ms=now_ms)
                thread = self.threads[deal]
            owed = duties(thread, now_ms=now_ms, chain_s=self.head.time_s, margins=self.margins)
            if not any([self._perform(thread, duty, step, now_ms=now_ms) for duty in owed]):
                return

    def _perform(self, thread: Thread, duty: Duty, step: Step, *, now_ms: int) -> bool:
        """Do one duty; return whether it moved the thread."""
        effect_id = self._effect_id(thread, duty.name)
        if self._retry.get(effect_id, 0) > now_ms:
            return False
        first = effect_id not in self._retry
        self._retry[effect_id] = NEVER_MS
        if isinstance(duty.call, Open) and (why := self._unpaid(thread, now_ms=now_ms)):
            # Money may yet come. If not, the agreement lapses, and nothing was locked.
            self._retry[effect_id] = now_ms + DUTY_PAUSE_MS
            heapq.heappush(self._agenda, (now_ms + DUTY_PAUSE_MS, thread.deal))
            if first:
                step.effects.append(Notice("budget_exhausted", thread.deal, thread, why))
            return False
        if duty.call is not None:
            step.wait = True
            step.effects.append(OnChain(effect_id, thread.deal, duty.call))
            return False
        match duty.name:
            case "work":
                # What nobody has paid for, a crash may forget: then it is begun again.
                step.wait = step.wait or not thread.streamed
                step.effects.append(DoWork(thread.deal))
            case "check":
                step.effects.append(DoCheck(thread.deal))
            case "say:evidence":
                step.effects.append(Notice("evidence", thread.deal, thread))
            case name if name.startswith("say:"):
                return self._perform_say(thread, name, step, now_ms=now_ms)
        return False

    def _unpaid(self, thread: Thread, *, now_ms: int) -> str:
        """Return why the price of a deal must not be locked now, or nothing if it may be."""
        try:
            if self.buyer is not None:
                self.buyer.opening(thread, now_ms=now_ms)
        except BudgetExhausted as error:
            return str(error)
        return ""

    def _perform_say(self, thread: Thread, duty: str, step: Step, *, now_ms: int) -> bool:
        try:
            match duty.split(":"):
                case ["say", "settle"]:
                    self._say_settle(thread, step, now_ms=now_ms)
                case ["say", "withdraw"]:
                    self._say_withdraw(thread, step, now_ms=now_ms)
                case ["say", "voucher", _]:
                    self._say_voucher(thread, step, now_ms=now_ms)
                case _ if self.buyer is not None:
                    self.buyer.send_task(thread, step, now_ms=now_ms)
        except LocalProtocolError as error:
            # One deal that is stuck must not stop the desk; silence has an outcome for it.
            self._retry[self._effect_id(thread, duty)] = now_ms + DUTY_PAUSE_MS
            heapq.heappush(self._agenda, (now_ms + DUTY_PAUSE_MS, thread.deal))
            self._count("late_move")
            self._keep_dead(DeadLetter(now_ms, duty, thread.counterparty, str(error)))
            return False
        return True


def _refusal(error: RemoteProtocolError) -> Refused:
    """Return what a NACK says of ``error``."""
    return error if isinstance(error, Refused) else Refused("wrong_state", str(error)[:200])
