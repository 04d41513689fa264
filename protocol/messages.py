"""The closed set of messages: what each may carry, and the limits on all of it.

Every field is signed. Unknown fields and unknown kinds are refused. Amounts are decimal text of
the smallest unit; times are Unix milliseconds, except in terms, where the chain counts seconds.
"""

from __future__ import annotations

import json
from functools import cached_property
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic_core import from_json

from .identity import keccak256
from .terms import Terms, Work
from .types import (
    AddressText,
    Bytes32Text,
    CapabilityText,
    IdText,
    NetText,
    SignatureText,
    UnitsText,
)

# NATS refuses more than 1 MiB by default, and a flood of large messages must cost its sender.
ENVELOPE_SIZE_MAX_BYTES: Final = 64 * 1024
# In base64 this fills an envelope: 44 KiB become 59 KiB, and the header needs about 1 KiB.
PIECE_SIZE_MAX_BYTES: Final = 44 * 1024
PIECES_MAX: Final = 1024
BODY_SIZE_MAX_BYTES: Final = PIECE_SIZE_MAX_BYTES * PIECES_MAX
# A body above this goes in pieces; what is below fits an envelope after sealing and base64.
BODY_INLINE_MAX_BYTES: Final = 40 * 1024
ENVELOPE_LIFE_MAX_MS: Final = 300_000  # Ids seen must be remembered for as long.
CLOCK_SKEW_MAX_MS: Final = 30_000  # NTP keeps within a second; a laptop out of sleep may not.
ROUNDS_MAX: Final = 16  # Proposals of each side; then the thread ends without agreement.
STAKE_PERMILLE_MAX: Final = 100_000  # A hundred times the price: more than anybody will stake.
BIDS_MAX: Final = 256  # A buyer ranks offers before it verifies; this bounds what it ranks.
ARBITERS_MAX: Final = 8
# More models than one machine has on disk, and they still fit an envelope with two schemas.
MODELS_MAX: Final = 32
FEATURES_MAX: Final = 16
CHUNK_MAX_CHARS: Final = 4_096
CHUNKS_MAX: Final = 65_536  # Of one deal: a token each is more than any context holds.
# Two of them fit the envelope of a description.
SCHEMA_MAX_CHARS: Final = 16_384
WINDOW_MAX_S: Final = 30 * 24 * 3600  # The contract's own cap on every window.
LOCK_BY_MAX_S: Final = 600  # A signed deal holds the seller's capacity until then: keep it short.
RESEND_FIRST_MS: Final = 250
RESEND_MAX_MS: Final = 5_000
REQUEST_REPEATS_MS: Final = (0, 250, 1_000)

VERIFICATIONS: Final = ("none", "schema", "hash", "replay")
SETTLEMENTS: Final = ("escrow", "channel", "x402", "none")
STREAMED: Final = frozenset(("channel", "none"))
"""Methods without an escrow: what is delivered is paid chunk by chunk, or not at all."""
CALLS_MAX: Final = 10_000
"""Calls of one rate contract: whoever sells keeps the numbers of all in mind."""
ZERO_BYTES32_TEXT: Final = "0x" + "0" * 64

NackReason = Literal[
    "unknown_kind",
    "unknown_deal",
    "unsupported",
    "malformed",
    "not_sealed",
    "wrong_state",
    "wrong_terms",
    "wrong_net",
    "clock",
    "expired",
    "capacity",
    "funds",
    "too_large",
    "handler_failed",
    "bad_result",
    "internal",
]
Millis = Annotated[int, Field(ge=0, lt=2**53)]
Seconds = Annotated[int, Field(ge=0, lt=2**40)]
Count = Annotated[int, Field(ge=0, lt=2**40)]
ShortText = Annotated[str, StringConstraints(max_length=200)]
ProofText = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")]
NameText = Annotated[str, StringConstraints(max_length=128)]
_CURVE: Final = 2**255 - 19
# The points of small order on X25519 and its twist (RFC 7748, section 6.1): whoever gives one as
# a key knows the shared secret, and libraries refuse to seal to it.
_SMALL_ORDER: Final = frozenset(
    (
        0,
        1,
        325606250916557431795983626356110631294008115727848805560023387167927233504,
        39382357235489614581723060781553021112529911719440698176882885853963445705823,
        _CURVE - 1,
        _CURVE,
        _CURVE + 1,
    )
)


def _require_full_order(key: str) -> str:
    if int.from_bytes(bytes.fromhex(key), "little") % 2**255 in _SMALL_ORDER:
        raise ValueError("a point of small order is no key")
    return key


KeyText = Annotated[
    str, StringConstraints(pattern=r"^[0-9a-f]{64}$"), AfterValidator(_require_full_order)
]


class Wire(BaseModel):
    """Base of all that is sent: frozen, strict, and closed to unknown fields."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Header(Wire):
    """What every envelope says about itself, and its body."""

    v: Annotated[int, Field(ge=1, le=1)]  # Not a literal, which would take ``true`` for 1.
    net: NetText
    id: IdText
    kind: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,16}$")]
    sender: AddressText
    to: Annotated[str, StringConstraints(pattern=r"^(\*|0x[0-9a-f]{40})$")]
    deal: IdText
    re: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{32})?$")]
    """The id of the message that this one answers, or nothing."""
    seq: Count
    """Piece number for ``piece``; part of what the seal binds for every kind."""
    sent_ms: Millis
    expires_ms: Millis
    seal: Literal["", "hpke"]
    body: Annotated[str, StringConstraints(max_length=ENVELOPE_SIZE_MAX_BYTES)]


class WorkBody(Wire):
    """``Work`` of the terms, on the wire."""

    capability: CapabilityText
    schemas: Bytes32Text
    task: Bytes32Text
    pricing: Literal["fixed", "tokens", "seconds"]
    input_price_units: UnitsText
    cached_input_price_units: UnitsText
    output_price_units: UnitsText
    second_price_units: UnitsText
    input_max: Count
    output_max: Count
    quality: Annotated[int, Field(ge=0, le=100)]
    model: NameText
    verification: Literal["none", "schema", "hash", "replay"]
    tokenizer: NameText
    settlement: Literal["escrow", "channel", "x402", "none"]


class TermsBody(Wire):
    """``Terms`` on the wire; ``terms()`` gives the form that is hashed and signed."""

    buyer: AddressText
    seller: AddressText
    asset: AddressText
    price_units: UnitsText
    arbiter: AddressText
    bond_units: UnitsText
    default_to_seller_units: UnitsText
    lock_by_s: Seconds
    deliver_by_s: Seconds
    dispute_s: Seconds
    answer_s: Seconds
    rule_s: Seconds
    vault: AddressText
    stake_units: UnitsText
    work: WorkBody
    nonce: UnitsText

    def terms(self) -> Terms:
        """Return the same terms as the numbers that are hashed."""
        work = self.work
        return Terms(
            buyer=self.buyer,
            seller=self.seller,
            asset=self.asset,
            price_units=int(self.price_units),
            arbiter=self.arbiter,
            bond_units=int(self.bond_units),
            default_to_seller_units=int(self.default_to_seller_units),
            lock_by_s=self.lock_by_s,
            deliver_by_s=self.deliver_by_s,
            dispute_s=self.dispute_s,
            answer_s=self.answer_s,
            rule_s=self.rule_s,
            vault=self.vault,
            stake_units=int(self.stake_units),
            nonce=int(self.nonce),
            work=Work(
                capability=work.capability,
                schemas=bytes.fromhex(work.schemas[2:]),
                task=bytes.fromhex(work.task[2:]),
                pricing=work.pricing,
                input_price_units=int(work.input_price_units),
                cached_input_price_units=int(work.cached_input_price_units),
                output_price_units=int(work.output_price_units),
                second_price_units=int(work.second_price_units),
                input_max=work.input_max,
                output_max=work.output_max,
                quality=work.quality,
                model=work.model,
                verification=work.verification,
                tokenizer=work.tokenizer,
                settlement=work.settlement,
            ),
        )


def terms_to_wire(terms: Terms) -> dict[str, object]:
    """Return ``terms`` as the JSON object that ``TermsBody`` reads."""
    work = terms.work
    return {
        "buyer": terms.buyer,
        "seller": terms.seller,
        "asset": terms.asset,
        "price_units": str(terms.price_units),
        "arbiter": terms.arbiter,
        "bond_units": str(terms.bond_units),
        "default_to_seller_units": str(terms.default_to_seller_units),
        "lock_by_s": terms.lock_by_s,
        "deliver_by_s": terms.deliver_by_s,
        "dispute_s": terms.dispute_s,
        "answer_s": terms.answer_s,
        "rule_s": terms.rule_s,
        "vault": terms.vault,
        "stake_units": str(terms.stake_units),
        "nonce": str(terms.nonce),
        "work": {
            "capability": work.capability,
            "schemas": "0x" + work.schemas.hex(),
            "task": "0x" + work.task.hex(),
            "pricing": work.pricing,
            "input_price_units": str(work.input_price_units),
            "cached_input_price_units": str(work.cached_input_price_units),
            "output_price_units": str(work.output_price_units),
            "second_price_units": str(work.second_price_units),
            "input_max": work.input_max,
            "output_max": work.output_max,
            "quality": work.quality,
            "model": work.model,
            "verification": work.verification,
            "tokenizer": work.tokenizer,
            "settlement": work.settlement,
        },
    }


class Request(Wire):
    """A buyer asks for offers. Public: it never holds the buyer's cap or budget."""

    capability: CapabilityText
    schemas: Bytes32Text
    task: Bytes32Text
    features: Annotated[
        dict[Annotated[str, StringConstraints(max_length=32)], Count],
        Field(max_length=FEATURES_MAX),
    ]
    """What bidders may know of the task before they win it, such as a count of tokens."""
    chain_id: Count
    escrow: AddressText
    asset: AddressText
    settlements: Annotated[
        list[Literal["escrow", "channel", "x402", "none"]], Field(min_length=1, max_length=4)
    ]
    verifications: Annotated[
        list[Literal["none", "schema", "hash", "replay"]], Field(min_length=1, max_length=4)
    ]
    arbiters: Annotated[list[AddressText], Field(max_length=ARBITERS_MAX)]
    deliver_within_s: Seconds
    quality_min: Annotated[int, Field(ge=0, le=100)]
    input_max: Count
    output_max: Count
    model: NameText
    reply_by_ms: Millis
    bids_min: Annotated[int, Field(ge=1, le=BIDS_MAX)]
    bids_max: Annotated[int, Field(ge=1, le=BIDS_MAX)]
    key: KeyText
    """The buyer's X25519 key for this deal."""
    firm: ProofText
    """What proves to those of the buyer's firm that it is one of them; nothing without one."""
    vault: AddressText
    """Where sellers' stakes are; the zero address where none is asked for."""
    stake_permille: Annotated[int, Field(ge=0, le=STAKE_PERMILLE_MAX)]
    """How much of it a seller puts at stake, for each thousand of the price."""

    @property
    def is_standing(self) -> bool:
        """Whether a rate contract is asked for: its tasks are named later, call by call."""
        return self.task == ZERO_BYTES32_TEXT


class Offer(Wire):
    """Terms that the seller proposes. Signed and priced; not executable."""

    request: IdText
    answers: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{32})?$")]
    """The id of the counter-offer that this answers; nothing in the first offer of a thread."""
    terms: TermsBody
    valid_until_ms: Millis
    key: KeyText
    """The seller's X25519 key for this deal."""
    firm: ProofText
    """What proves to a buyer of the same firm that the seller is of it; else nothing."""


class Counter(Wire):
    """Terms that the buyer proposes in answer to an offer. Signed; not executable."""

    answers: IdText
    terms: TermsBody
    valid_until_ms: Millis


class Accept(Wire):
    """The buyer's signed yes to the digest of an offer's terms."""

    offer: IdText
    terms_digest: Bytes32Text
    agree_by_ms: Millis


class Agreed(Wire):
    """The seller's EIP-712 signature on the terms. From here on there is a deal."""

    terms_digest: Bytes32Text
    signature: SignatureText


class Reject(Wire):
    """No to a proposal, which ends the thread."""

    proposal: IdText
    reason: ShortText


class Withdraw(Wire):
    """A side takes its interest back before anything was agreed, which ends the thread."""

    reason: ShortText


class Locked(Wire):
    """A hint that the price is locked; the chain's log is what counts."""

    tx_hash: Bytes32Text


class Task(Wire):
    """The work itself, for the winner only, after the lock."""

    salt: Bytes32Text
    task: str
    withdraw_delay_s: Seconds
    """With ``channel_salt`` and the terms, the channel that pays; 0 where none does."""
    channel_salt: Bytes32Text

    @cached_property
    def texts_size_bytes(self) -> int:
        """The size in UTF-8 of all texts in the task, wherever they stand in its JSON.

        Names of fields, numbers and what is left at its default count nothing; where it is no JSON,
        all of it counts. It is kept, since every chunk of an answer asks for it.
        """
        try:
            parts: list[object] = [from_json(self.task)]  # A stranger's: this one bears any depth.
        except ValueError:
            parts = [self.task]
        size_bytes = 0
        while parts:
            match parts.pop():
                case str() as text:
                    size_bytes += len(text.encode("utf-8", "surrogatepass"))
                case list() as more:
                    parts += more
                case dict() as fields:
                    parts += fields.values()
        return size_bytes


class Result(Wire):
    """What was made, what it costs, and the seller's consent to end the deal at that."""

    salt: Bytes32Text
    result: str
    to_seller_units: UnitsText
    usage: Annotated[
        dict[Annotated[str, StringConstraints(max_length=32)], Count],
        Field(max_length=FEATURES_MAX),
    ]
    signature: SignatureText


class RateCall(Task):
    """One piece of work under a rate contract: with its task it opens a deal of its own.

    What it says of the deal is at most what the contract allows; all else is the contract's.
    """

    number: Annotated[int, Field(ge=1, le=CALLS_MAX)]
    """Which call of its contract it is; the deal's id follows from it."""
    lock_by_s: Seconds
    price_units: UnitsText
    input_max: Count
    output_max: Count


class Chunk(Wire):
    """A part of the result's text while it is made, ``seq`` its number.

    Where a channel pays, it is delivered with it and costs something; elsewhere the result counts.
    """

    text: Annotated[str, StringConstraints(max_length=CHUNK_MAX_CHARS)]
    tokens: Count
    at: Count
    """How many characters were delivered before it, where a channel pays."""
    due_units: UnitsText
    """What the deal costs up to its end, where a channel pays."""


class Voucher(Wire):
    """The buyer's signature over a growing total of its channel: ``units`` more for this deal."""

    units: UnitsText
    total_units: UnitsText
    signature: SignatureText


class Settle(Wire):
    """The buyer's consent to end the deal: with the seller's own it moves the money."""

    deliverable: Bytes32Text
    to_seller_units: UnitsText
    signature: SignatureText


class Ack(Wire):
    """What became of a message at its addressee."""

    level: Literal["taken", "handled", "done"]
    signature: Annotated[str, StringConstraints(pattern=r"^(0x[0-9a-f]{130})?$")] = ""
    """For a task: the seller's EIP-712 ``Ack`` of the very input. Nothing otherwise."""


class Nack(Wire):
    """Why a message was refused, and the refuser's time."""

    reason: NackReason
    detail: ShortText
    now_ms: Millis


class Describe(Wire):
    """Asks who sells a capability, or everything if the name is empty."""

    name: Annotated[str, StringConstraints(max_length=41)]


class Description(Wire):
    """What an agent sells or does, with its schemas, and the key to which it can be written."""

    agent: NameText
    capability: CapabilityText
    input_schema: Annotated[str, StringConstraints(max_length=SCHEMA_MAX_CHARS)]
    output_schema: Annotated[str, StringConstraints(max_length=SCHEMA_MAX_CHARS)]
    price: ShortText
    about: ShortText
    models: Annotated[list[NameText], Field(max_length=MODELS_MAX)]
    traits: Annotated[list[ShortText], Field(max_length=MODELS_MAX)]
    """What each of the models is and can, in their order; nothing where that is not told."""
    key: KeyText
    firm: ProofText
    """What proves to those of the seller's firm that it is one of them; nothing without one."""


class Evidence(Wire):
    """What a side shows to the arbiter of a dispute: it must match the hashes that both signed."""

    terms: TermsBody
    task_salt: Bytes32Text
    task: str
    result_salt: Bytes32Text
    result: str
    input_schema: Annotated[str, StringConstraints(max_length=SCHEMA_MAX_CHARS)]
    output_schema: Annotated[str, StringConstraints(max_length=SCHEMA_MAX_CHARS)]
    claim: ShortText


class Ruling(Wire):
    """What a member of a panel finds in a dispute, signed as the escrow asks for it."""

    job_id: Bytes32Text
    to_seller_units: UnitsText
    penalty_units: UnitsText
    evidence: Bytes32Text
    signature: SignatureText


class Piece(Wire):
    """Announces how a body too large for one envelope continues; the bytes are the seal's."""

    message: IdText
    kind: Annotated[str, StringConstraints(pattern=r"^[a-z]{1,16}$")]
    count: Annotated[int, Field(ge=1, le=PIECES_MAX)]
    content: Bytes32Text


Body = (
    Request
    | Offer
    | Counter
    | Accept
    | Agreed
    | Reject
    | Withdraw
    | Locked
    | Task
    | RateCall
    | Chunk
    | Voucher
    | Result
    | Settle
    | Ack
    | Nack
    | Describe
    | Description
    | Evidence
    | Ruling
)

BODIES: Final[dict[str, type[Body]]] = {
    "request": Request,
    "offer": Offer,
    "counter": Counter,
    "accept": Accept,
    "agreed": Agreed,
    "reject": Reject,
    "withdraw": Withdraw,
    "locked": Locked,
    "task": Task,
    "call": RateCall,
    "chunk": Chunk,
    "voucher": Voucher,
    "result": Result,
    "settle": Settle,
    "ack": Ack,
    "nack": Nack,
    "describe": Describe,
    "description": Description,
    "evidence": Evidence,
    "ruling": Ruling,
}
SEALED: Final = frozenset(
    "offer counter accept agreed reject withdraw".split()
    + "locked task call chunk voucher result settle evidence piece".split()
)
"""Kinds whose body only the addressee may read. The others are public and refused if sealed."""

AWAITED: Final = frozenset(("accept", "agreed", "task", "call", "voucher", "result", "settle"))
"""Kinds that wait for the journal before they are sent: they bind, or they cost."""


def commitment(salt: bytes, body: bytes) -> bytes:
    """Return keccak256(salt32 | body): binds to the body, and short bodies cannot be guessed."""
    return keccak256(salt + body)


def canonical_json(value: object) -> str:
    """Return JSON with sorted keys and no white space: one spelling, so that it can be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


_ANNOTATIONS: Final = frozenset(("title", "description", "examples", "$comment", "deprecated"))


def _strip(schema: object, *, names: bool = False) -> object:
    """Drop what annotates and does not constrain; the keys of ``properties`` are names."""
    if isinstance(schema, dict):
        return {
            key: _strip(value, names=key in ("properties", "$defs") and not names)
            for key, value in schema.items()
            if names or key not in _ANNOTATIONS
        }
    if isinstance(schema, list):
        return [_strip(value) for value in schema]
    return schema


def schemas_hash(input_schema: object, output_schema: object) -> bytes:
    """Return the hash of the two canonical JSON schemas, without titles and descriptions."""
    return keccak256(canonical_json([_strip(input_schema), _strip(output_schema)]).encode())


def capability_id(name: str, schemas: bytes) -> str:
    """Return ``<name>-<8 hex of the schemas' hash>``; equal schemas, equal capability."""
    return f"{name}-{schemas[:4].hex()}"


def thread_id(request_id: str, buyer: str, seller: str) -> str:
    """Return the id of the thread between the buyer of a request and one seller.

    Requests are public, so the buyer is in it: who copies a request's id opens another thread.
    """
    sides = bytes.fromhex(request_id + buyer[2:] + seller[2:])
    return keccak256(b"coase/thread/v1\0" + sides)[:16].hex()
