"""A thread and the deal that may follow: the sans-I/O core, the same code for both sides.

A ``Thread`` is a fold of its history: what was said, what was heard, what the chain showed and
which deadlines passed. ``receive``, ``say``, ``see`` and ``tick`` take the old thread and return
a new one, and raise if the move is not allowed; they change nothing, read no clock and draw no
chance. ``duties`` then tells from the thread alone what its holder owes the world now: since it
is derived and not remembered, a crash cannot lose a duty and a repetition cannot double one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from .effects import Answer, Call, Dispute, Open, Poke, Submit
from .effects import Decline as DeclineCall
from .effects import Settle as SettleCall
from .errors import LocalProtocolError, Refused, RemoteProtocolError
from .identity import keccak256, require_signer
from .messages import (
    CHUNKS_MAX,
    LOCK_BY_MAX_S,
    ROUNDS_MAX,
    STREAMED,
    WINDOW_MAX_S,
    Accept,
    Agreed,
    Chunk,
    Counter,
    Nack,
    Offer,
    Request,
    Result,
    Settle,
    Task,
    Voucher,
    Withdraw,
    commitment,
)
from .states import BOUND, TERMINAL, Role, State, advance
from .terms import Domain, Terms, ack_digest, settlement_digest
from .types import UNITS_MAX, ZERO_ADDRESS, ZERO_BYTES32, How, JobView, Phase

if TYPE_CHECKING:
    from .envelope import Message

Verify = Callable[[bytes, bytes, str], None]
"""Raises BadSignature unless the signature on a digest is the signer's."""

_STATE_PHASE: Final = {
    Phase.NONE: "none",
    Phase.WORKING: "working",
    Phase.DELIVERED: "delivered",
    Phase.DISPUTED: "disputed",
    Phase.ANSWERED: "answered",
    Phase.CANCELLED: "cancelled",
}


NOTHING_ON_CHAIN: Final = JobView()


@dataclass(frozen=True, slots=True)
class Margins:
    """How long before a deadline on chain its holder acts, and other patience. Seconds.

    ``chain_s`` is CONTRACTS m: blocks to confirm + clock skew + the longest halt to survive.
    """

    chain_s: int = 2
    settle_patience_ms: int = 4_000
    """How long the seller waits for the buyer's signature before it submits on chain."""
    halt_s: int = 20
    """How long a part may be away, as after a kill, without costing the holder a dispute: windows
    that it could miss meanwhile are not accepted."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a deal's history, for people: when, in which state it left the deal, by what."""

    at_ms: int
    state: State
    role: Role
    move: str
    price_units: int = 0
    tx_hash: str = ""


@dataclass(frozen=True, slots=True)
class Charge:
    """For whom, within the holder, a deal is made. No counterparty hears of it."""

    account: str = ""
    """Which account within the holder's purse pays; nothing: the purse by itself."""
    reference: str = ""
    """What it is for there, such as the id of a call."""

    def __bool__(self) -> bool:
        """Return whether it says anything."""
        return bool(self.account or self.reference)


NO_CHARGE: Final = Charge()


@dataclass(frozen=True, slots=True)
class Thread:
    """One buyer, one seller, and all that was said between them about one request."""

    deal: str
    side: Role
    """The holder's role; the counterparty has the other one."""
    holder: str
    counterparty: str
    request_id: str
    request: Request
    domain: Domain
    secret: bytes = field(repr=False, default=b"")
    """The holder's X25519 secret for this deal."""
    their_key: str = ""
    state: State = State.REQUESTED
    opened_ms: int = 0
    rounds: int = 0
    proposal_id: str = ""
    terms: Terms | None = None
    valid_until_ms: int = 0
    accept_id: str = ""
    agree_by_ms: int = 0
    job_id: bytes = b""
    """The digest of the accepted terms: the deal's id on chain."""
    seller_signature: bytes = b""
    view: JobView = NOTHING_ON_CHAIN
    task_id: str = ""
    task: Task | None = field(repr=False, default=None)
    result_id: str = ""
    result: Result | None = field(repr=False, default=None)
    result_ms: int = 0
    settle: Settle | None = None
    verdict: str = ""
    """The buyer's: ``good``, or what is wrong with the result. Empty until it was checked."""
    ack: bytes = field(repr=False, default=b"")
    """The seller's signature that it has the task: without it silence costs it no stake."""
    failed: str = ""
    """The seller's: why it cannot deliver. It then declines."""
    shown: str = field(repr=False, default="")
    """What was delivered in chunks, where they cost something."""
    due_units: int = 0
    """What it costs so far."""
    paid_units: int = 0
    """What vouchers have paid of it."""
    chunks: int = 0
    last_id: str = ""
    """The id of the chunk or voucher that the next one answers."""
    contract: str = ""
    """The rate contract under which it was called for; nothing: it was agreed by itself."""
    number: int = 0
    """Which call of that contract it is."""
    why: str = ""
    """Why the thread ended, where the state alone does not tell."""
    history: tuple[Entry, ...] = ()
    charge: Charge = NO_CHARGE

    @property
    def agreed_terms(self) -> Terms:
        """The last proposed terms; only to be asked for once there are some."""
        if self.terms is None:
            raise LocalProtocolError(f"no terms were proposed in thread {self.deal}")
        return self.terms

    @property
    def method(self) -> str:
        """How the proposed terms are paid."""
        return self.terms.work.settlement if self.terms is not None else "escrow"

    @property
    def streamed(self) -> bool:
        """Whether there is no escrow: what is delivered is paid as it comes, or not at all."""
        return self.method in STREAMED

    @property
    def is_contract(self) -> bool:
        """Whether it is a rate contract: its task is named later, call by call."""
        return self.streamed and self.agreed_terms.work.task == ZERO_BYTES32

    @property
    def owed_units(self) -> int:
        """What the buyer owes and has not paid: for the chunks, and for a result that is good."""
        due = self.due_units
        if self.result is not None and (self.side is Role.SELLER or self.verdict == "good"):
            due = max(due, int(self.result.to_seller_units))
        return max(0, due - self.paid_units)

    @property
    def other(self) -> Role:
        """The counterparty's role."""
        return Role.SELLER if self.side is Role.BUYER else Role.BUYER

    @property
    def over(self) -> bool:
        """Whether nothing can happen any more."""
        return self.state in TERMINAL

    @property
    def deliverable(self) -> bytes:
        """The hash of the result as the chain will carry it."""
        if self.result is None:
            raise LocalProtocolError(f"no result in thread {self.deal}")
        return commitment(bytes.fromhex(self.result.salt[2:]), self.result.result.encode())


def check_terms(terms: Terms, thread: Thread, *, now_ms: int) -> None:
    """Return if ``terms`` fit the request and the contract's own rules.

    :raises RemoteProtocolError: naming the field that does not
    """
    request, work, now_s = thread.request, terms.work, now_ms // 1000
    buyer, seller = (
        (thread.holder, thread.counterparty)
        if thread.side is Role.BUYER
        else (thread.counterparty, thread.holder)
    )
    windows = (terms.dispute_s, terms.answer_s, terms.rule_s)
    arbitrated = terms.arbiter != ZERO_ADDRESS
    streamed, free = work.settlement in STREAMED, work.settlement == "none"
    split = terms.bond_units or terms.default_to_seller_units or terms.stake_units
    rules: tuple[tuple[bool, str], ...] = (
        (terms.buyer == buyer, "buyer"),
        (terms.seller == seller and seller != buyer, "seller"),
        (terms.asset == request.asset, "asset"),
        (0 < terms.price_units <= UNITS_MAX or free, "price_units"),
        (terms.price_units == 0 or not free, "price_units"),
        (terms.bond_units <= terms.price_units, "bond_units"),
        (terms.default_to_seller_units <= terms.price_units, "default_to_seller_units"),
        (not arbitrated or terms.arbiter in request.arbiters, "arbiter"),
        (terms.arbiter not in (buyer, seller, thread.domain.contract), "arbiter"),
        (arbitrated or (terms.bond_units == 0 and terms.stake_units == 0), "bond_units"),
        (terms.vault == (request.vault if terms.stake_units else ZERO_ADDRESS), "vault"),
        (terms.stake_units * 1_000 >= terms.price_units * request.stake_permille, "stake_units"),
        (not terms.stake_units or terms.vault != ZERO_ADDRESS, "stake_units"),
        (now_s - 60 <= terms.lock_by_s <= now_s + LOCK_BY_MAX_S, "lock_by_s"),
        (terms.lock_by_s < terms.deliver_by_s <= now_s + WINDOW_MAX_S, "deliver_by_s"),
        (all(window <= WINDOW_MAX_S for window in windows), "dispute_s, answer_s, rule_s"),
        (terms.dispute_s > 0, "dispute_s"),
        (not arbitrated or (terms.answer_s > 0 and terms.rule_s > 0), "answer_s, rule_s"),
        (work.capability == request.capability, "work.capability"),
        (work.schemas.hex() == request.schemas[2:], "work.schemas"),
        (work.task.hex() == request.task[2:], "work.task"),
        (work.settlement in request.settlements, "work.settlement"),
        (work.settlement == "escrow" or streamed, "work.settlement"),
        # Only what costs nothing before it is delivered can be agreed before it is known.
        (streamed or work.task != ZERO_BYTES32, "work.task"),
        # What a voucher paid nobody can split, so nothing may wait for an arbiter.
        (not streamed or not arbitrated, "arbiter"),
        (not streamed or not split, "bond_units, default_to_seller_units, stake_units"),
        (work.verification in request.verifications, "work.verification"),
        (work.quality >= request.quality_min, "work.quality"),
    )
    for holds, name in rules:
        if not holds:
            raise RemoteProtocolError(f"terms.{name} does not fit the request or the contract")
    if thread.terms is not None and terms.nonce != thread.terms.nonce:
        raise RemoteProtocolError("terms.nonce changed within one thread")


def receive(thread: Thread, message: Message, *, now_ms: int, verify: Verify) -> Thread:
    """Return the thread after the counterparty's message.

    :raises RemoteProtocolError: if it may not say that now, or says it wrongly
    :raises BadSignature: if a signature inside it is not the counterparty's
    """
    if message.sender != thread.counterparty:
        raise RemoteProtocolError(f"{message.sender} is not a side of this thread")
    return _move(thread, thread.other, message, now_ms=now_ms, verify=verify, ours=False)


def say(thread: Thread, message: Message, *, now_ms: int) -> Thread:
    """Return the thread after the holder's own message, held to the same rules.

    :raises LocalProtocolError: if the holder may not say that now
    """
    try:
        return _move(thread, thread.side, message, now_ms=now_ms, verify=lambda *_: None, ours=True)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"refused to say {message.kind}: {error}") from error


def _move(
    thread: Thread, role: Role, message: Message, *, now_ms: int, verify: Verify, ours: bool
) -> Thread:
    after = advance(thread.state, role, message.kind, method=thread.method, ours=ours)
    body = message.body
    changed = thread
    match body:
        case Offer() | Counter():
            changed = _propose(thread, message, body, now_ms=now_ms)
        case Accept():
            changed = _accept(thread, message, body, now_ms=now_ms)
        case Agreed():
            signature = bytes.fromhex(body.signature[2:])
            if body.terms_digest[2:] != thread.job_id.hex():
                raise RemoteProtocolError("agreed to other terms than were accepted")
            if message.re != thread.accept_id:
                raise RemoteProtocolError("agreed answers another accept")
            verify(thread.job_id, signature, thread.agreed_terms.seller)
            changed = replace(thread, seller_signature=signature)
        case Task():
            salt, task = bytes.fromhex(body.salt[2:]), body.task.encode()
            if commitment(salt, task) != thread.agreed_terms.work.task:
                raise RemoteProtocolError("the task is not the one that the terms commit to")
            if thread.task is not None and thread.task != body:
                # It names the channel as well, and what was paid for lies in the first one.
                raise RemoteProtocolError("a second task that differs from the first")
            changed = replace(thread, task=body, task_id=message.id)
        case Result():
            changed = _result(thread, message, body, now_ms=now_ms, verify=verify)
        case Settle():
            changed = _settle(thread, body, verify=verify)
        case Chunk():
            return _chunk(thread, message, body)
        case Voucher():
            changed = _voucher(thread, message, body)
            if not _covered(changed):
                return changed  # Of many the history would only say that there were many.
        case Withdraw() if thread.streamed and thread.state in BOUND:
            why = f"the {role} stopped: {body.reason}"
            how = How.DECLINED if role is Role.SELLER else How.SETTLED
            return _end(replace(thread, why=why), role, "withdraw", how, now_ms=now_ms)
        case Nack():
            changed = replace(thread, why=f"{body.reason}: {body.detail}".rstrip(": "))
        case _:
            reason = getattr(body, "reason", "")
            changed = replace(thread, why=f"{role} said {message.kind}: {reason}".rstrip(": "))
    price = changed.terms.price_units if changed.terms is not None else 0
    changed = _enter(changed, after, role, message.kind, now_ms=now_ms, price_units=price)
    if thread.streamed and role is Role.BUYER and not ours and _covered(changed):
        # The buyer waits for our word that it came; we have all that we can get.
        return _end(changed, Role.SELLER, "ack", How.SETTLED, now_ms=now_ms)
    return changed


def _covered(thread: Thread) -> bool:
    """Return whether a stream is delivered and paid in full."""
    if thread.state is not State.DELIVERED or thread.result is None:
        return False
    return thread.paid_units >= int(thread.result.to_seller_units)


def _end(thread: Thread, role: Role, move: str, how: How, *, now_ms: int) -> Thread:
    """End a deal without an escrow: what was paid is paid, and nothing else is owed."""
    after = advance(thread.state, role, move, method=thread.method, ours=True)
    if after is State.REFUNDED and thread.paid_units:
        after = State.SETTLED
    paid = thread.paid_units
    if after is not State.LAPSED:
        rest = thread.agreed_terms.price_units - paid
        view = JobView(Phase.CLOSED, how=how, to_seller_units=paid, to_buyer_units=rest)
        thread = replace(thread, view=view, why=thread.why or how.name.lower().replace("_", " "))
    return _enter(thread, after, role, move, now_ms=now_ms, price_units=paid)


def acknowledged(thread: Thread, *, now_ms: int) -> Thread:
    """Return the buyer's thread after the seller's word that the last payment came."""
    good = thread.side is Role.BUYER and thread.verdict == "good"
    if not thread.streamed or not good or not _covered(thread):
        return thread
    return _end(thread, Role.SELLER, "ack", How.SETTLED, now_ms=now_ms)


def _chunk(thread: Thread, message: Message, body: Chunk) -> Thread:
    if body.at != len(thread.shown):
        raise RemoteProtocolError(f"a chunk at {body.at}, where {len(thread.shown)} is next")
    if not thread.due_units <= int(body.due_units) <= thread.agreed_terms.price_units:
        raise RemoteProtocolError("a chunk that makes the deal cheaper, or dearer than its price")
    if thread.chunks >= CHUNKS_MAX:
        raise RemoteProtocolError("too many chunks")
    return replace(
        thread,
        shown=thread.shown + body.text,
        due_units=int(body.due_units),
        chunks=thread.chunks + 1,
        last_id=message.id,
    )


def _voucher(thread: Thread, message: Message, body: Voucher) -> Thread:
    paid = thread.paid_units + int(body.units)
    if not int(body.units) or paid > thread.agreed_terms.price_units:
        raise RemoteProtocolError("a voucher for nothing, or above the price")
    return replace(thread, paid_units=paid, last_id=message.id)


def _enter(
    thread: Thread,
    after: State,
    role: Role,
    move: str,
    *,
    now_ms: int,
    price_units: int = 0,
    tx_hash: str = "",
) -> Thread:
    entry = Entry(now_ms, after, role, move, price_units, tx_hash)
    return replace(thread, state=after, history=(*thread.history, entry))


def _propose(thread: Thread, message: Message, body: Offer | Counter, *, now_ms: int) -> Thread:
    if body.answers != thread.proposal_id:
        raise RemoteProtocolError("the proposal does not answer the last one of this thread")
    if thread.rounds >= 2 * ROUNDS_MAX:
        raise RemoteProtocolError(f"more than {ROUNDS_MAX} proposals of each side")
    if not now_ms < body.valid_until_ms <= now_ms + LOCK_BY_MAX_S * 1000:
        raise RemoteProtocolError("valid_until_ms is in the past or too far away")
    terms = body.terms.terms()
    check_terms(terms, thread, now_ms=now_ms)
    key = thread.their_key
    if isinstance(body, Offer) and thread.side is Role.BUYER:
        key = body.key
    return replace(
        thread,
        terms=terms,
        proposal_id=message.id,
        valid_until_ms=body.valid_until_ms,
        rounds=thread.rounds + 1,
        their_key=key,
        opened_ms=thread.opened_ms or now_ms,
    )


def _accept(thread: Thread, message: Message, body: Accept, *, now_ms: int) -> Thread:
    digest = thread.agreed_terms.digest(thread.domain)
    if body.offer != thread.proposal_id or body.terms_digest[2:] != digest.hex():
        raise RemoteProtocolError("accepted other terms than were last offered")
    if now_ms >= thread.valid_until_ms:
        raise Refused("expired", f"the offer expired {now_ms - thread.valid_until_ms} ms ago")
    if now_ms >= body.agree_by_ms:
        raise Refused("expired", "the time to agree has passed")
    return replace(thread, accept_id=message.id, agree_by_ms=body.agree_by_ms, job_id=digest)


def _result(
    thread: Thread, message: Message, body: Result, *, now_ms: int, verify: Verify
) -> Thread:
    terms = thread.agreed_terms
    if int(body.to_seller_units) > terms.price_units:
        raise RemoteProtocolError("the result costs more than the terms allow")
    if thread.result is not None and thread.result != body:
        raise RemoteProtocolError("a second result that differs from the first")
    changed = replace(thread, result=body, result_id=message.id)
    digest = settlement_digest(
        thread.domain, thread.job_id, changed.deliverable, int(body.to_seller_units)
    )
    verify(digest, bytes.fromhex(body.signature[2:]), terms.seller)
    return replace(changed, result_ms=thread.result_ms or now_ms)


def _settle(thread: Thread, body: Settle, *, verify: Verify) -> Thread:
    if thread.result is None:
        raise RemoteProtocolError("settle before there was a result")
    if body.deliverable[2:] != thread.deliverable.hex():
        raise RemoteProtocolError("settle names another deliverable")
    if body.to_seller_units != thread.result.to_seller_units:
        raise RemoteProtocolError("settle names another amount than the result")
    digest = settlement_digest(
        thread.domain, thread.job_id, thread.deliverable, int(body.to_seller_units)
    )
    verify(digest, bytes.fromhex(body.signature[2:]), thread.agreed_terms.buyer)
    return replace(thread, settle=body)


def see(thread: Thread, view: JobView, *, chain_s: int, now_ms: int) -> Thread:
    """Return the thread after a look at the chain, at the depth that the holder trusts."""
    if thread.state not in BOUND or not thread.job_id:
        return thread
    if thread.streamed:
        return _see_stream(thread, view, chain_s=chain_s, now_ms=now_ms)
    if view.phase is Phase.NONE:
        if thread.state is State.AGREED:
            if chain_s > thread.agreed_terms.lock_by_s:
                lapsed = replace(thread, why="the buyer did not lock in time")
                return _enter(lapsed, State.LAPSED, Role.CLOCK, "lock_by", now_ms=now_ms)
            return thread
        # The lock was reorganised away: whoever holds the bytes may open it again.
    if view == thread.view:
        return thread
    if view.phase is Phase.CLOSED:
        move = "paid" if view.to_seller_units > 0 else "refunded"
    else:
        move = _STATE_PHASE[view.phase]
    after = advance(thread.state, Role.CHAIN, move, ours=True)
    changed = replace(thread, view=view)
    if after in TERMINAL:
        changed = replace(changed, why=view.how.name.lower().replace("_", " "))
        move = view.how.name.lower() if view.how is not How.OPEN else move
    if after is thread.state:
        return changed
    return _enter(
        changed,
        after,
        Role.CHAIN,
        move,
        now_ms=now_ms,
        price_units=view.to_seller_units,
        tx_hash=view.tx_hash,
    )


def _see_stream(thread: Thread, view: JobView, *, chain_s: int, now_ms: int) -> Thread:
    """Return the thread after a look at its channel; the clock ends it, since no chain does."""
    limit = limit_s(thread)
    if limit is not None and chain_s > limit:
        match thread.state:
            case State.AGREED:
                why = "the channel did not hold the price in time"
                late = replace(thread, why="its time is over" if thread.is_contract else why)
                return _end(late, Role.CLOCK, "lock_by", How.OPEN, now_ms=now_ms)
            case State.LOCKED:
                return _end(thread, Role.CLOCK, "deliver_by", How.UNDELIVERED, now_ms=now_ms)
            case _:
                # A buyer has said that it is good, or why not: then it is no silence of his.
                good = thread.verdict == "good" and thread.paid_units
                how = How.SETTLED if good else How.SILENT_BUYER
                return _end(thread, Role.CLOCK, "pay_by", how, now_ms=now_ms)
    if thread.state is State.AGREED and view.phase is Phase.WORKING:
        after = advance(thread.state, Role.CHAIN, "working", method=thread.method, ours=True)
        return _enter(replace(thread, view=view), after, Role.CHAIN, "working", now_ms=now_ms)
    return thread


def tick(thread: Thread, *, now_ms: int) -> Thread:
    """Return the thread after the deadlines of the wire that have passed by ``now_ms``."""
    for states, name, limit_ms in (
        ((State.REQUESTED,), "reply_by", thread.request.reply_by_ms),
        ((State.OFFERED, State.COUNTERED), "valid_until", thread.valid_until_ms),
        ((State.ACCEPTED,), "agree_by", thread.agree_by_ms),
    ):
        if thread.state in states and now_ms >= limit_ms:
            after = advance(thread.state, Role.CLOCK, name, ours=True)
            lapsed = replace(thread, why=f"{name} passed in silence")
            return _enter(lapsed, after, Role.CLOCK, name, now_ms=now_ms)
    return thread


def deadline_ms(thread: Thread) -> int | None:
    """Return when ``tick`` has something to do next, by the wall clock; None for never."""
    if thread.state is State.REQUESTED:
        return thread.request.reply_by_ms
    if thread.state in (State.OFFERED, State.COUNTERED):
        return thread.valid_until_ms
    if thread.state is State.ACCEPTED:
        return thread.agree_by_ms
    return None


def taken(thread: Thread, signature: bytes, *, verify: Verify) -> Thread:
    """Return the buyer's thread with the seller's word that it has the task.

    :raises BadSignature: if it is not the seller's
    """
    if thread.side is not Role.BUYER or not thread.task_id or thread.ack:
        return thread
    terms = thread.agreed_terms
    verify(ack_digest(thread.domain, thread.job_id, terms.work.task), signature, terms.seller)
    return replace(thread, ack=signature)


def judge(thread: Thread, verdict: str) -> Thread:
    """Return the thread with the buyer's finding on the result: ``good`` or what is wrong."""
    return replace(thread, verdict=verdict)


def fail(thread: Thread, why: str) -> Thread:
    """Return the thread whose seller cannot deliver, and will decline."""
    return replace(thread, failed=why)


@dataclass(frozen=True, slots=True)
class Duty:
    """One thing that the holder owes now: a call to the chain, or something to say or do.

    ``name`` is unique within the deal; ``call`` is None for what is said or done off chain.
    """

    name: str
    call: Call | None = None


def limit_s(thread: Thread) -> int | None:
    """Return the chain time after which silence has its outcome in this state, or None."""
    if thread.terms is None:
        return None
    terms, clock = thread.terms, thread.view.clock_s
    match thread.state:
        case State.AGREED:
            return terms.lock_by_s
        case State.LOCKED:
            return terms.deliver_by_s
        case State.DELIVERED if thread.streamed:
            return terms.deliver_by_s + terms.dispute_s
        case State.DELIVERED:
            return clock + terms.dispute_s
        case State.DISPUTED:
            return clock + terms.answer_s
        case State.ANSWERED:
            return clock + terms.rule_s
    return None


def duties(thread: Thread, *, now_ms: int, chain_s: int, margins: Margins) -> list[Duty]:
    """Return what the holder owes now. The same thread and times give the same duties."""
    limit = limit_s(thread)
    if limit is None or thread.over:
        return []
    if thread.streamed:
        return _stream_duties(thread)
    terms = thread.agreed_terms
    cheque = thread.side is Role.SELLER and thread.settle is not None
    if chain_s > limit and thread.state is not State.AGREED:
        # Whoever holds the buyer's consent has something better than the outcome of silence,
        # and the escrow takes it until the whole deal expires.
        if not cheque or chain_s >= terms.expires_at_s:
            return [Duty("poke:" + thread.state, Poke(terms))]
    in_time = chain_s <= limit - margins.chain_s
    if thread.side is Role.BUYER:
        return _buyer_duties(thread, in_time=in_time, chain_s=chain_s)
    late = thread.state is State.LOCKED and not in_time and chain_s <= limit
    impatient = late or now_ms >= thread.result_ms + margins.settle_patience_ms
    return _seller_duties(thread, in_time=in_time, late=late, impatient=impatient)


def _stream_duties(thread: Thread) -> list[Duty]:
    """Return what is owed in a deal without an escrow; who pays how is not the thread's affair."""
    if thread.side is Role.SELLER:
        if thread.failed and thread.state in (State.AGREED, State.LOCKED):
            return [Duty("say:withdraw")]
        ready = thread.state is State.LOCKED and thread.task is not None
        return [Duty("work")] if ready and thread.result is None else []
    if thread.state is State.AGREED:
        return []
    if thread.verdict not in ("", "good"):
        return [Duty("say:withdraw")]
    owed = [] if thread.task_id else [Duty("say:task")]
    if thread.result is not None and not thread.verdict:
        owed.append(Duty("check"))
    if thread.owed_units:
        owed.append(Duty(f"say:voucher:{thread.paid_units}"))
    elif thread.verdict == "good" and thread.settle is None and not _paid_last(thread):
        owed.append(Duty("say:settle"))
    return owed


def _paid_last(thread: Thread) -> bool:
    """Return whether a voucher has told the seller already that its result is good."""
    if thread.result is None:
        return False
    return thread.due_units < int(thread.result.to_seller_units) <= thread.paid_units


def _buyer_duties(thread: Thread, *, in_time: bool, chain_s: int) -> list[Duty]:
    terms = thread.agreed_terms
    if thread.state is State.AGREED:
        return [Duty("open", Open(terms, thread.seller_signature))] if in_time else []
    owed = [] if thread.task_id else [Duty("say:task")]
    if thread.result is not None and not thread.verdict:
        owed.append(Duty("check"))
    if thread.verdict == "good" and thread.settle is None:
        owed.append(Duty("say:settle"))
    disputable = thread.state is State.DELIVERED and terms.arbiter != ZERO_ADDRESS
    if disputable and in_time and _bad(thread, chain_s=chain_s):
        owed.append(Duty("dispute", Dispute(terms, evidence_hash(thread))))
    if thread.state in (State.DISPUTED, State.ANSWERED):
        owed.append(Duty("say:evidence"))
    return owed


def _bad(thread: Thread, *, chain_s: int) -> bool:
    """Return whether the buyer has reason to dispute what was put on chain."""
    if thread.verdict not in ("", "good"):
        return True
    if thread.result is None:
        # It may be on its way still: wait for half of the window before calling it missing.
        return 2 * (chain_s - thread.view.clock_s) > thread.agreed_terms.dispute_s
    return thread.deliverable != thread.view.deliverable


def _seller_duties(thread: Thread, *, in_time: bool, late: bool, impatient: bool) -> list[Duty]:
    terms = thread.agreed_terms
    if thread.settle is not None and thread.state is not State.AGREED:
        result = thread.result
        if result is None:
            raise LocalProtocolError(f"settled without a result in thread {thread.deal}")
        call = SettleCall(
            terms,
            thread.deliverable,
            int(result.to_seller_units),
            bytes.fromhex(thread.settle.signature[2:]),
            b"",
        )
        owed = [Duty("settle", call)]
        if late:
            # Consent is no payment until it is in a block, and the refund is near.
            owed.append(Duty("submit", Submit(terms, thread.deliverable)))
        return owed
    match thread.state:
        case State.LOCKED if thread.failed:
            return [Duty("decline", DeclineCall(terms))]
        case State.LOCKED if thread.task is not None and thread.result is None:
            return [Duty("work")]
        case State.LOCKED if thread.result is not None:
            if impatient:
                return [Duty("submit", Submit(terms, thread.deliverable))]
        case State.DISPUTED if thread.result is not None and in_time:
            return [
                Duty("answer", Answer(terms, evidence_hash(thread))),
                Duty("say:evidence"),
            ]
        case State.ANSWERED if thread.result is not None:
            return [Duty("say:evidence")]
    return []


def evidence_hash(thread: Thread) -> bytes:
    """Return the hash of what a side shows in a dispute: the job, the task and the result."""
    shown = thread.deliverable if thread.result is not None else b"\0" * 32
    return keccak256(b"coase/evidence/v1\0" + thread.job_id + thread.agreed_terms.work.task + shown)


def require_signer_of(digest: bytes, signature: bytes, signer: str) -> None:
    """Verify with the real curve: what ``receive`` is given everywhere but in a simulation."""
    require_signer(digest, signature, signer)
