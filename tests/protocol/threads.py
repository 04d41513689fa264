"""Two sides of one thread, brought to any state by what may really be said and seen."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from coase.protocol.envelope import Message, parse_body
from coase.protocol.identity import Identity, keccak256
from coase.protocol.messages import (
    Request,
    capability_id,
    commitment,
    schemas_hash,
    terms_to_wire,
    thread_id,
)
from coase.protocol.session import Thread, receive, require_signer_of, say, see, tick
from coase.protocol.states import Role, State
from coase.protocol.terms import Domain, Terms, Work, settlement_digest
from coase.protocol.types import How, JobView, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator

BUYER: Final = Identity(keccak256(b"buyer"))
SELLER: Final = Identity(keccak256(b"seller"))
STRANGER: Final = Identity(keccak256(b"stranger"))
KEYS: Final = {Role.BUYER: BUYER, Role.SELLER: SELLER}
ARBITER: Final = "0x" + "a7" * 20
DOMAIN: Final = Domain(31337, "0x" + "44" * 20)
NOW_S: Final = 1_700_000_000
NOW_MS: Final = NOW_S * 1000
SALT: Final = b"\x05" * 32
TASK: Final = '{"text":"hello"}'
RESULT: Final = '{"text":"HELLO"}'
SCHEMAS: Final = schemas_hash({"type": "object"}, {"type": "object"})
REQUEST_ID: Final = "0f" * 16
DEAL_ID: Final = thread_id(REQUEST_ID, BUYER.address, SELLER.address)
REQUEST: Final = Request(
    capability=capability_id("echo", SCHEMAS),
    schemas="0x" + SCHEMAS.hex(),
    task="0x" + commitment(SALT, TASK.encode()).hex(),
    features={"tokens": 5},
    chain_id=DOMAIN.chain_id,
    escrow=DOMAIN.contract,
    asset="0x" + "33" * 20,
    settlements=["escrow"],
    verifications=["schema", "none"],
    arbiters=[ARBITER],
    deliver_within_s=60,
    quality_min=10,
    input_max=100,
    output_max=100,
    model="",
    reply_by_ms=NOW_MS + 1_500,
    bids_min=1,
    bids_max=4,
    key="11" * 32,
    firm="",
    vault="0x" + "00" * 20,
    stake_permille=0,
)
TERMS: Final = Terms(
    buyer=BUYER.address,
    seller=SELLER.address,
    asset=REQUEST.asset,
    price_units=1_000,
    arbiter=ARBITER,
    bond_units=100,
    default_to_seller_units=500,
    lock_by_s=NOW_S + 30,
    deliver_by_s=NOW_S + 90,
    dispute_s=40,
    answer_s=20,
    rule_s=20,
    nonce=7,
    work=Work(
        capability=REQUEST.capability,
        schemas=SCHEMAS,
        task=commitment(SALT, TASK.encode()),
        quality=50,
    ),
)
MOVES: Final = (
    "offer",
    "counter",
    "accept",
    "agreed",
    "reject",
    "withdraw",
    "locked",
    "task",
    "result",
    "settle",
    "nack",
)


class Pair:
    """Both sides' threads, and a pen that writes what either would say next."""

    def __init__(self) -> None:
        common = {"deal": DEAL_ID, "request_id": REQUEST_ID, "request": REQUEST, "domain": DOMAIN}
        self.now_ms = NOW_MS
        self.count = 0
        self.threads = {
            side: Thread(
                **common,  # type: ignore[arg-type]
                side=side,
                holder=KEYS[side].address,
                counterparty=KEYS[other].address,
            )
            for side, other in ((Role.BUYER, Role.SELLER), (Role.SELLER, Role.BUYER))
        }

    @property
    def state(self) -> State:
        """The state in which both are."""
        states = {thread.state for thread in self.threads.values()}
        assert len(states) == 1
        return states.pop()

    def body(self, kind: str, **changes: object) -> dict[str, object]:
        """Return what a message of ``kind`` would hold now, as far as it can be right."""
        thread = self.threads[Role.SELLER]
        terms = thread.terms or TERMS
        digest = terms.digest(DOMAIN)
        deliverable = commitment(SALT, RESULT.encode())
        bodies: dict[str, dict[str, object]] = {
            "offer": {
                "request": REQUEST_ID,
                "answers": thread.proposal_id,
                "terms": terms_to_wire(terms),
                "valid_until_ms": self.now_ms + 10_000,
                "key": "22" * 32,
                "firm": "",
            },
            "counter": {
                "answers": thread.proposal_id or "00" * 16,
                "terms": terms_to_wire(replace(terms, price_units=800)),
                "valid_until_ms": self.now_ms + 10_000,
            },
            "accept": {
                "offer": thread.proposal_id or "00" * 16,
                "terms_digest": "0x" + digest.hex(),
                "agree_by_ms": self.now_ms + 5_000,
            },
            "agreed": {
                "terms_digest": "0x" + digest.hex(),
                "signature": "0x" + SELLER.sign(digest).hex(),
            },
            "reject": {"proposal": thread.proposal_id or "00" * 16, "reason": "no"},
            "withdraw": {"reason": "no"},
            "locked": {"tx_hash": "0x" + "00" * 32},
            "task": {
                "salt": "0x" + SALT.hex(),
                "task": TASK,
                "withdraw_delay_s": 0,
                "channel_salt": "0x" + "00" * 32,
            },
            "result": {
                "salt": "0x" + SALT.hex(),
                "result": RESULT,
                "to_seller_units": "900",
                "usage": {"tokens": 3},
                "signature": "0x" + self._consent(SELLER, digest, deliverable, 900),
            },
            "settle": {
                "deliverable": "0x" + deliverable.hex(),
                "to_seller_units": "900",
                "signature": "0x" + self._consent(BUYER, digest, deliverable, 900),
            },
            "nack": {"reason": "capacity", "detail": "full", "now_ms": self.now_ms},
        }
        return {**bodies[kind], **changes}

    @staticmethod
    def _consent(key: Identity, job_id: bytes, deliverable: bytes, units: int) -> str:
        return key.sign(settlement_digest(DOMAIN, job_id, deliverable, units)).hex()

    def message(
        self, role: Role, kind: str, *, re: str | None = None, **changes: object
    ) -> Message:
        """Return a message from ``role`` with everything right but for ``changes``."""
        self.count += 1
        other = Role.SELLER if role is Role.BUYER else Role.BUYER
        plain = json.dumps(self.body(kind, **changes)).encode()
        answers = self.threads[Role.SELLER].accept_id if kind == "agreed" else ""
        return Message(
            kind=kind,
            id=f"{self.count:032x}",
            sender=KEYS[role].address,
            to=KEYS[other].address,
            deal=DEAL_ID,
            re=answers if re is None else re,
            sent_ms=self.now_ms,
            expires_ms=self.now_ms + 60_000,
            body=parse_body(kind, plain),
            plain=plain,
        )

    def speak(self, role: Role, kind: str, **changes: object) -> Message:
        """Let ``role`` say something and the other side hear it."""
        message = self.message(role, kind, re=None, **changes)
        other = Role.SELLER if role is Role.BUYER else Role.BUYER
        self.threads[role] = say(self.threads[role], message, now_ms=self.now_ms)
        self.threads[other] = self.hear(other, message)
        return message

    def hear(self, role: Role, message: Message) -> Thread:
        """Return the thread of ``role`` after a message, with the real curve."""
        return receive(self.threads[role], message, now_ms=self.now_ms, verify=require_signer_of)

    def show(self, view: JobView, *, chain_s: int = NOW_S) -> None:
        """Let both see the chain."""
        for role in KEYS:
            self.threads[role] = see(self.threads[role], view, chain_s=chain_s, now_ms=self.now_ms)

    def wait(self, until_ms: int) -> None:
        """Let time pass for both."""
        self.now_ms = until_ms
        for role in KEYS:
            self.threads[role] = tick(self.threads[role], now_ms=until_ms)


WORKING: Final = JobView(Phase.WORKING, NOW_S + 90, tx_hash="0x01")
DELIVERABLE: Final = commitment(SALT, RESULT.encode())
DELIVERED: Final = JobView(Phase.DELIVERED, NOW_S + 20, DELIVERABLE, tx_hash="0x02")
DISPUTED: Final = JobView(Phase.DISPUTED, NOW_S + 25, DELIVERABLE, tx_hash="0x03")
ANSWERED: Final = JobView(Phase.ANSWERED, NOW_S + 30, DELIVERABLE, tx_hash="0x04")
CLOSED: Final = JobView(Phase.CLOSED, 0, DELIVERABLE, How.SETTLED, 900, 100, "0x05")
REFUNDED: Final = JobView(Phase.CLOSED, 0, b"\0" * 32, How.UNDELIVERED, 0, 1_000, "0x06")


def at(state: State) -> Pair:
    """Return a pair that talked itself into ``state``."""
    pair = Pair()
    for name in _path(state):
        _step(pair, name)
    assert pair.state is state
    return pair


def _path(state: State) -> Iterator[str]:
    if state is State.REQUESTED:
        return
    yield "offer"
    match state:
        case State.OFFERED:
            return
        case State.COUNTERED:
            yield "counter"
            return
        case State.REJECTED:
            yield "reject"
            return
        case State.LAPSED:
            yield "silence"
            return
    yield "accept"
    if state is State.ACCEPTED:
        return
    yield "agreed"
    views = {
        State.LOCKED: ("locked",),
        State.DELIVERED: ("locked", "delivered"),
        State.DISPUTED: ("locked", "disputed"),
        State.ANSWERED: ("locked", "answered"),
        State.SETTLED: ("locked", "settled"),
        State.REFUNDED: ("locked", "refunded"),
    }
    yield from views.get(state, ())


def _step(pair: Pair, name: str) -> None:
    views = {"locked": WORKING, "delivered": DELIVERED, "disputed": DISPUTED}
    views |= {"answered": ANSWERED, "settled": CLOSED, "refunded": REFUNDED}
    if name in views:
        pair.show(views[name])
    elif name == "silence":
        pair.wait(pair.threads[Role.BUYER].valid_until_ms)
    else:
        role = Role.SELLER if name in ("offer", "agreed") else Role.BUYER
        pair.speak(role, name)
