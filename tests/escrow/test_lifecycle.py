"""The table of the escrow, cell by cell: what is not listed here must be refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.escrow.lifecycle import (
    NO_JOB,
    SPAN_MAX_S,
    TABLE,
    DealCall,
    Job,
    Pull,
    Status,
    Step,
    Verify,
    apply,
    bond_nonce,
    check_owed,
    is_signed_by,
    nonce_bit,
)
from coase.protocol.effects import (
    Answer,
    Cancel,
    ClaimRefund,
    Decline,
    Dispute,
    Open,
    Poke,
    Rule,
    Settle,
    Submit,
)
from coase.protocol.errors import CallReverted
from coase.protocol.identity import Identity, keccak256
from coase.protocol.terms import (
    Domain,
    Terms,
    Work,
    answer_digest,
    delivery_digest,
    dispute_digest,
    ruling_digest,
    settlement_digest,
)
from coase.protocol.types import ZERO_ADDRESS, ZERO_BYTES32, How, Phase

TOKEN: Final = "0x" + "70" * 20
DOMAIN: Final = Domain(31337, "0x" + "e5" * 20)
KEYS: Final = {
    name: Identity(keccak256(name.encode())) for name in ("buyer", "seller", "arbiter", "stranger")
}
ROLES: Final = tuple(KEYS)
BUYER, SELLER, ARBITER, STRANGER = (KEYS[name].address for name in ROLES)
DELIVERABLE: Final = keccak256(b"the result")
EVIDENCE: Final = keccak256(b"the evidence")
LIVE: Final = (Phase.WORKING, Phase.DELIVERED, Phase.DISPUTED, Phase.ANSWERED)

TERMS: Final = Terms(
    buyer=BUYER,
    seller=SELLER,
    asset=TOKEN,
    price_units=100,
    work=Work("inference-00000000"),
    lock_by_s=1000,
    deliver_by_s=2000,
    dispute_s=300,
    nonce=5,
    arbiter=ARBITER,
    bond_units=10,
    default_to_seller_units=40,
    answer_s=400,
    rule_s=500,
)
JOB_ID: Final = TERMS.digest(DOMAIN)
EXPIRY_S: Final = 2000 + 300 + 400 + 500 + 1
SELLERS_YES: Final = KEYS["seller"].sign(JOB_ID)


def step(
    job: Job, call: DealCall, caller: str, now_s: int, signature: bytes = b"", **more: Any
) -> Step:
    return apply(
        job,
        call,
        caller=caller,
        now_s=now_s,
        domain=DOMAIN,
        asset=TOKEN,
        signature=signature,
        **more,
    )


def error_of(
    job: Job, call: DealCall, caller: str, now_s: int, signature: bytes = b"", **more: Any
) -> str:
    """Return the name with which a call is refused, or nothing if it goes through."""
    try:
        step(job, call, caller, now_s, signature, **more)
    except CallReverted as error:
        return error.error
    return ""


def signed_settle(terms: Terms, to_seller: int, *who: str) -> Settle:
    digest = settlement_digest(DOMAIN, terms.digest(DOMAIN), DELIVERABLE, to_seller)
    signatures = [KEYS[name].sign(digest) if name in who else b"" for name in ("buyer", "seller")]
    return Settle(terms, DELIVERABLE, to_seller, *signatures)


def limit_s_of(job: Job) -> int:
    """Return the last instant of the act that a deal waits for, as the specification has it."""
    windows = {Phase.WORKING: 0, Phase.DELIVERED: 300, Phase.DISPUTED: 400, Phase.ANSWERED: 500}
    return job.clock_s + windows[job.phase]


def job_in(phase: Phase, terms: Terms = TERMS) -> Job:
    """Lead a deal to ``phase`` by the shortest way, every step at its last moment."""
    if phase is Phase.NONE:
        return NO_JOB
    if phase is Phase.CANCELLED:
        return step(NO_JOB, Cancel(terms), SELLER, 1000).job
    signature = KEYS["seller"].sign(terms.digest(DOMAIN))
    job = step(NO_JOB, Open(terms, signature), BUYER, 1000).job
    if phase is Phase.CLOSED:
        return step(job, Decline(terms), SELLER, 1500).job
    for reached, call, caller in (
        (Phase.DELIVERED, Submit(terms, DELIVERABLE), SELLER),
        (Phase.DISPUTED, Dispute(terms, EVIDENCE), BUYER),
        (Phase.ANSWERED, Answer(terms, EVIDENCE), SELLER),
    ):
        if reached <= phase:
            job = step(job, call, caller, limit_s_of(job)).job
    assert job.phase is phase
    return job


# ------------------------------------------------------------------------------- the whole table

CALLS: Final[dict[str, DealCall]] = {
    "open": Open(TERMS, SELLERS_YES),
    "submit": Submit(TERMS, DELIVERABLE),
    "settle": signed_settle(TERMS, 60, "seller"),
    "decline": Decline(TERMS),
    "dispute": Dispute(TERMS, EVIDENCE),
    "answer": Answer(TERMS, EVIDENCE),
    "rule": Rule(TERMS, 30, 0, EVIDENCE),
    "poke": Poke(TERMS),
    "claim_refund": ClaimRefund(JOB_ID),
    "cancel": Cancel(TERMS),
}
PHASES: Final = (Phase.NONE, *LIVE, Phase.CLOSED, Phase.CANCELLED)


@dataclass(frozen=True)
class Cell:
    """What the specification says of one call in one phase."""

    callers: tuple[str, ...]
    relation: str
    to: Phase
    wrong_caller: str = ""


ANYBODY: Final = ROLES
# Written from the specification's table, not from the code's. Whose signature is at hand: the
# seller's on the terms and on the settlement, and nobody else's.
ALLOWED: Final[dict[tuple[str, Phase], Cell]] = {
    ("open", Phase.NONE): Cell(("buyer",), "<=lock_by", Phase.WORKING, "BadSignature"),
    ("cancel", Phase.NONE): Cell(("buyer", "seller"), "any", Phase.CANCELLED, "NotAllowed"),
    ("submit", Phase.WORKING): Cell(("seller",), "<=L", Phase.DELIVERED, "NotAllowed"),
    ("decline", Phase.WORKING): Cell(("seller",), "<=L", Phase.CLOSED, "NotAllowed"),
    ("dispute", Phase.DELIVERED): Cell(("buyer",), "<=L", Phase.DISPUTED, "BadSignature"),
    ("answer", Phase.DISPUTED): Cell(("seller",), "<=L", Phase.ANSWERED, "BadSignature"),
    ("rule", Phase.ANSWERED): Cell(("arbiter",), "<=L", Phase.CLOSED, "BadSignature"),
    **{("settle", phase): Cell(("buyer",), "any", Phase.CLOSED, "BadSignature") for phase in LIVE},
    **{("poke", phase): Cell(ANYBODY, ">L", Phase.CLOSED) for phase in LIVE},
    **{("claim_refund", phase): Cell(ANYBODY, ">=expiry", phase) for phase in LIVE},
}
REFUSED: Final = {
    "open": "JobExists",
    "cancel": "JobExists",
    "submit": "WrongStatus",
    "claim_refund": "WrongStatus",
}
TIMES: Final = ("L-1", "L", "L+1", "expiry-1", "expiry", "expiry+1")


def instant(name: str, job: Job) -> int:
    limit_s = limit_s_of(job) if job.phase in LIVE else TERMS.lock_by_s
    base, _, offset = name.partition("-" if "-" in name else "+")
    sign = -1 if "-" in name else 1
    return (limit_s if base == "L" else EXPIRY_S) + sign * int(offset or 0)


def expected(name: str, phase: Phase, role: str, now_s: int, job: Job) -> tuple[str, Phase]:
    """Return the error or nothing, and the phase after, as the specification has it."""
    cell = ALLOWED.get((name, phase))
    limit_s = limit_s_of(job) if phase in LIVE else 0
    if name == "open" and now_s > TERMS.lock_by_s:
        return "TooLate", phase
    if name in ("open", "cancel"):  # These two ask for consent before they look at the job.
        allowed = ("buyer",) if name == "open" else ("buyer", "seller")
        if role not in allowed:
            return ("BadSignature" if name == "open" else "NotAllowed"), phase
    if cell is None:
        return REFUSED.get(name, "WrongPhase"), phase
    late = cell.relation == "<=L" and now_s > limit_s
    # The standard's submit and decline look at the caller before the clock, signatures come last.
    if role not in cell.callers and not (late and cell.wrong_caller == "BadSignature"):
        return cell.wrong_caller, phase
    if late:
        return "TooLate", phase
    if cell.relation == ">L" and now_s <= limit_s:
        return "TooEarly", phase
    if cell.relation == ">=expiry" and now_s < EXPIRY_S:
        return "TooEarly", phase
    return "", cell.to


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name.lower())
@pytest.mark.parametrize("name", CALLS)
def test_every_cell(name: str, phase: Phase) -> None:
    """(call, phase) against each caller and each side of each deadline."""
    job, call = job_in(phase), CALLS[name]
    for role, time in product(ROLES, TIMES):
        now_s = instant(time, job)
        error, after = expected(name, phase, role, now_s, job)
        got = error_of(job, call, KEYS[role].address, now_s)
        assert got == error, (name, phase, role, time)
        if not error:
            done = step(job, call, KEYS[role].address, now_s)
            assert done.job.phase is after, (name, phase, role, time)


def test_the_table_has_the_rows_of_the_specification_and_no_other() -> None:
    kinds = {type(call): name for name, call in CALLS.items()}
    assert {(kinds[kind], phase): row.to for (kind, phase), row in TABLE.items()} == {
        key: cell.to for key, cell in ALLOWED.items()
    }


@pytest.mark.parametrize("phase", LIVE)
def test_at_every_instant_one_side_of_a_deadline_can_move(phase: Phase) -> None:
    job = job_in(phase)
    limit_s = limit_s_of(job)
    name, role = {
        Phase.WORKING: ("submit", "seller"),
        Phase.DELIVERED: ("dispute", "buyer"),
        Phase.DISPUTED: ("answer", "seller"),
        Phase.ANSWERED: ("rule", "arbiter"),
    }[phase]
    for now_s in (job.clock_s, limit_s - 1, limit_s, limit_s + 1, EXPIRY_S + 10**9):
        act = not error_of(job, CALLS[name], KEYS[role].address, now_s)
        silence = not error_of(job, CALLS["poke"], STRANGER, now_s)
        assert act != silence, now_s
    assert limit_s < job.expires_at_s == EXPIRY_S


# ----------------------------------------------------------------------------- opening and terms


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"asset": DOMAIN.contract}, "WrongAsset"),
        ({"price_units": 0}, "BadPrice"),
        ({"price_units": 2**128}, "BadPrice"),
        ({"price_units": 2**128 - 1}, ""),
        ({"price_units": 40}, ""),
        ({"price_units": 39}, "SplitAbovePrice"),
        ({"buyer": ZERO_ADDRESS}, "BadParties"),
        ({"seller": ZERO_ADDRESS}, "BadParties"),
        ({"seller": BUYER}, "BadParties"),
        ({"arbiter": BUYER}, "BadParties"),
        ({"arbiter": SELLER}, "BadParties"),
        ({"buyer": DOMAIN.contract}, "BadParties"),
        ({"seller": DOMAIN.contract}, "BadParties"),
        ({"arbiter": DOMAIN.contract}, "BadParties"),
        ({"default_to_seller_units": 100}, ""),
        ({"default_to_seller_units": 101}, "SplitAbovePrice"),
        ({"bond_units": 100}, ""),
        ({"bond_units": 101}, "BadBond"),
        ({"bond_units": 0}, ""),
        ({"arbiter": ZERO_ADDRESS}, "BadBond"),
        ({"arbiter": ZERO_ADDRESS, "bond_units": 0}, ""),
        ({"arbiter": ZERO_ADDRESS, "bond_units": 0, "answer_s": 0, "rule_s": 0}, ""),
        ({"arbiter": ZERO_ADDRESS, "bond_units": 0, "dispute_s": 0}, "BadWindows"),
        ({"stake_units": 1}, "BadStake"),
        ({"vault": STRANGER}, "BadStake"),
        ({"vault": STRANGER, "stake_units": 1}, ""),
        ({"vault": STRANGER, "stake_units": 2**128}, "BadStake"),
        (
            {"vault": STRANGER, "stake_units": 1, "arbiter": ZERO_ADDRESS, "bond_units": 0},
            "BadStake",
        ),
        ({"lock_by_s": 1000, "deliver_by_s": 1000}, "BadTimes"),
        ({"lock_by_s": 1000, "deliver_by_s": 1001}, ""),
        ({"deliver_by_s": 1000 + SPAN_MAX_S}, ""),
        ({"deliver_by_s": 1001 + SPAN_MAX_S}, "BadTimes"),
        ({"dispute_s": 0}, "BadWindows"),
        ({"dispute_s": SPAN_MAX_S}, ""),
        ({"dispute_s": SPAN_MAX_S + 1}, "BadWindows"),
        ({"answer_s": 0}, "BadWindows"),
        ({"answer_s": SPAN_MAX_S + 1}, "BadWindows"),
        ({"rule_s": 0}, "BadWindows"),
        ({"rule_s": SPAN_MAX_S}, ""),
        ({"rule_s": SPAN_MAX_S + 1}, "BadWindows"),
        ({"lock_by_s": 999}, "TooLate"),
    ],
)
def test_open_checks_the_terms(changes: dict[str, Any], error: str) -> None:
    terms = replace(TERMS, **changes)
    digest = terms.digest(DOMAIN)
    keys = {key.address: key for key in KEYS.values()}
    sign = {who: keys[who].sign(digest) if who in keys else b"" for who in (terms.seller,)}
    assert error_of(NO_JOB, Open(terms, sign[terms.seller]), BUYER, 1000) == error


def test_open_takes_the_price_and_names_the_authorisation() -> None:
    done = step(NO_JOB, CALLS["open"], BUYER, 1000)
    assert done.pull == Pull(BUYER, 100, JOB_ID)
    assert done.payouts == ()
    assert done.job == Job(
        phase=Phase.WORKING,
        status=Status.FUNDED,
        seller=SELLER,
        expires_at_s=EXPIRY_S,
        clock_s=2000,
        price_units=100,
    )
    assert done.job.locked_units == 100


def test_open_needs_an_unused_nonce() -> None:
    assert error_of(NO_JOB, CALLS["open"], BUYER, 1000, nonce_used=True) == "NonceUsed"
    assert nonce_bit(0) == (0, 1)
    assert nonce_bit(255) == (0, 1 << 255)
    assert nonce_bit(256 * 7 + 3) == (7, 8)


# ------------------------------------------------------------------------------------ signatures


@pytest.mark.parametrize("role", ROLES)
def test_open_by_anybody_with_the_buyers_signature(role: str) -> None:
    signature = KEYS["buyer"].sign(JOB_ID)
    assert error_of(NO_JOB, CALLS["open"], KEYS[role].address, 1000, signature) == ""


RELAYED: Final = {
    "submit": (Phase.WORKING, "seller", delivery_digest(DOMAIN, JOB_ID, DELIVERABLE)),
    "dispute": (Phase.DELIVERED, "buyer", dispute_digest(DOMAIN, JOB_ID, EVIDENCE)),
    "answer": (Phase.DISPUTED, "seller", answer_digest(DOMAIN, JOB_ID, EVIDENCE)),
    "rule": (Phase.ANSWERED, "arbiter", ruling_digest(DOMAIN, JOB_ID, 30, 0, EVIDENCE)),
}


@pytest.mark.parametrize("name", RELAYED)
def test_an_act_may_be_carried_by_anybody_with_its_signature(name: str) -> None:
    phase, role, digest = RELAYED[name]
    job = job_in(phase)
    now_s = limit_s_of(job)
    signature = KEYS[role].sign(digest)
    own = step(job, CALLS[name], KEYS[role].address, now_s)
    assert step(job, CALLS[name], STRANGER, now_s, signature) == own
    # Another's signature, another act's, another contract's, or one bit off: none of it.
    elsewhere = KEYS[role].sign(keccak256(b"\x19\x01" + digest))
    for wrong in (KEYS["stranger"].sign(digest), KEYS[role].sign(JOB_ID), elsewhere):
        assert error_of(job, CALLS[name], STRANGER, now_s, wrong) == "BadSignature"
    assert error_of(job, CALLS[name], STRANGER, now_s + 1, signature) == "TooLate"
    wrong_phase = job_in(Phase.CLOSED)
    assert error_of(wrong_phase, CALLS[name], STRANGER, now_s, signature) == "WrongPhase"


@given(bit=st.integers(0, 65 * 8 - 1))
def test_one_flipped_bit_of_a_signature_is_no_signature(bit: int) -> None:
    flipped = bytearray(SELLERS_YES)
    flipped[bit // 8] ^= 1 << (bit % 8)
    assert error_of(NO_JOB, Open(TERMS, bytes(flipped)), BUYER, 1000) == "BadSignature"


@given(
    field=st.sampled_from(["price_units", "lock_by_s", "deliver_by_s", "dispute_s", "nonce"]),
    bit=st.integers(0, 4),
)
def test_one_flipped_bit_of_the_terms_is_another_deal(field: str, bit: int) -> None:
    terms = replace(TERMS, **{field: getattr(TERMS, field) ^ (1 << bit)})
    now_s = min(1000, terms.lock_by_s)
    assert error_of(NO_JOB, Open(terms, SELLERS_YES), BUYER, now_s) in ("BadSignature", "BadTimes")


@pytest.mark.parametrize("elsewhere", [Domain(1, DOMAIN.contract), Domain(31337, TOKEN)])
def test_signatures_do_not_travel_between_chains_and_contracts(elsewhere: Domain) -> None:
    signature = KEYS["seller"].sign(TERMS.digest(elsewhere))
    assert error_of(NO_JOB, Open(TERMS, signature), BUYER, 1000) == "BadSignature"


def test_both_spellings_of_a_signature_are_not_accepted() -> None:
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    s = order - int.from_bytes(SELLERS_YES[32:64], "big")
    other = SELLERS_YES[:32] + s.to_bytes(32, "big") + bytes((55 - SELLERS_YES[64],))
    assert is_signed_by(JOB_ID, SELLERS_YES, SELLER)
    assert not is_signed_by(JOB_ID, other, SELLER)


@pytest.mark.parametrize("phase", LIVE)
@pytest.mark.parametrize("to_seller", [0, 1, 99, 100])
def test_who_must_consent_to_a_settlement(phase: Phase, to_seller: int) -> None:
    job = job_in(phase)
    for signers in ((), ("buyer",), ("seller",), ("buyer", "seller")):
        call = signed_settle(TERMS, to_seller, *signers)
        for role in ROLES:
            consents = {*signers, role}
            seller_asked = phase is Phase.WORKING or to_seller < 100
            fine = "buyer" in consents and ("seller" in consents or not seller_asked)
            got = error_of(job, call, KEYS[role].address, 1500)
            assert got == ("" if fine else "BadSignature"), (signers, role)


def test_a_settlement_is_for_one_deliverable_and_one_amount() -> None:
    job = job_in(Phase.DELIVERED)
    call = signed_settle(TERMS, 60, "buyer", "seller")
    assert error_of(job, call, STRANGER, 1500) == ""
    assert error_of(job, replace(call, to_seller_units=59), STRANGER, 1500) == "BadSignature"
    assert error_of(job, replace(call, deliverable=EVIDENCE), STRANGER, 1500) == "BadSignature"
    assert error_of(job, replace(call, to_seller_units=101), STRANGER, 1500) == "SplitAbovePrice"


def test_a_cheap_verifier_may_take_the_place_of_the_real_one() -> None:
    asked: list[str] = []

    def cheap(digest: bytes, signature: bytes, signer: str) -> bool:
        asked.append(signer)
        return signature == b"yes"

    verify: Verify = cheap
    assert error_of(NO_JOB, Open(TERMS, b"yes"), BUYER, 1000, verify=verify) == ""
    assert error_of(NO_JOB, Open(TERMS, b"no"), BUYER, 1000, verify=verify) == "BadSignature"
    assert asked == [SELLER, SELLER]


# ------------------------------------------------------------------------------------ the money


def paid(done: Step) -> dict[str, int]:
    names = {key.address: name for name, key in KEYS.items()}
    return {names[payout.to]: payout.units for payout in done.payouts}


@pytest.mark.parametrize(
    ("phase", "how", "payouts"),
    [
        (Phase.WORKING, How.UNDELIVERED, {"buyer": 100}),
        (Phase.DELIVERED, How.SILENT_BUYER, {"seller": 100}),
        (Phase.DISPUTED, How.SILENT_SELLER, {"buyer": 110}),
        (Phase.ANSWERED, How.SILENT_ARBITER, {"seller": 50, "buyer": 70}),
    ],
)
@pytest.mark.parametrize("refund", ["none", "before"])
@pytest.mark.parametrize("role", ROLES)
def test_silence_pays_the_same_whoever_says_so_and_whatever_expired(
    phase: Phase, how: How, payouts: dict[str, int], refund: str, role: str
) -> None:
    job = job_in(phase)
    if refund == "before":
        expired = step(job, CALLS["claim_refund"], STRANGER, EXPIRY_S)
        assert expired.payouts == () == expired.events
        assert expired.job == replace(job, status=Status.EXPIRED)
        assert error_of(expired.job, CALLS["claim_refund"], BUYER, EXPIRY_S) == "WrongStatus"
        assert error_of(expired.job, CALLS["settle"], BUYER, EXPIRY_S) == "WrongStatus"
        job = expired.job
    done = step(job, CALLS["poke"], KEYS[role].address, EXPIRY_S)
    assert paid(done) == payouts
    assert (done.job.phase, done.job.how) == (Phase.CLOSED, how)
    completed = Status.COMPLETED if done.job.to_seller_units else Status.REJECTED
    assert done.job.status is (Status.EXPIRED if refund == "before" else completed)


@pytest.mark.parametrize(
    ("price", "bond", "to_seller", "payouts"),
    [
        (100, 10, 100, {"seller": 110, "arbiter": 10}),
        (100, 10, 0, {"buyer": 110, "arbiter": 10}),
        (100, 10, 95, {"seller": 105, "buyer": 5, "arbiter": 10}),
        (100, 7, 50, {"seller": 54, "buyer": 53, "arbiter": 7}),
        (1, 1, 1, {"seller": 2, "arbiter": 1}),
        (1, 1, 0, {"buyer": 2, "arbiter": 1}),
        (7, 3, 2, {"seller": 3, "buyer": 7, "arbiter": 3}),
        (3, 0, 2, {"seller": 2, "buyer": 1}),
    ],
)
def test_a_ruling_rounds_once_and_the_dust_is_the_sellers(
    price: int, bond: int, to_seller: int, payouts: dict[str, int]
) -> None:
    terms = replace(TERMS, price_units=price, bond_units=bond, default_to_seller_units=0)
    job = job_in(Phase.DELIVERED, terms)
    job = step(job, Dispute(terms, EVIDENCE), BUYER, job.clock_s).job
    if bond:
        job = step(job, Answer(terms, EVIDENCE), SELLER, job.clock_s).job
    done = step(job, Rule(terms, to_seller, 0, EVIDENCE), ARBITER, job.clock_s)
    assert job.bonds_units == 2 * bond
    assert done.job.bonds_units == done.job.locked_units == 0
    assert paid(done) == payouts
    assert [told.kind for told in done.events] == ["ruled", "settled"]


def test_no_penalty_without_a_stake() -> None:
    job = job_in(Phase.ANSWERED)
    assert error_of(job, Rule(TERMS, 30, 1, EVIDENCE), ARBITER, 2000) == "PenaltyAboveStake"
    assert error_of(job, Rule(TERMS, 101, 0, EVIDENCE), ARBITER, 2000) == "SplitAbovePrice"


def test_bonds_have_authorisations_of_their_own() -> None:
    dispute = step(job_in(Phase.DELIVERED), CALLS["dispute"], BUYER, 2000)
    answer = step(job_in(Phase.DISPUTED), CALLS["answer"], SELLER, 2000)
    assert dispute.pull == Pull(BUYER, 10, bond_nonce(JOB_ID, 1))
    assert answer.pull == Pull(SELLER, 10, bond_nonce(JOB_ID, 2))
    assert len({JOB_ID, bond_nonce(JOB_ID, 1), bond_nonce(JOB_ID, 2)}) == 3


def test_without_a_bond_the_arbiters_time_starts_with_the_dispute() -> None:
    terms = replace(TERMS, bond_units=0)
    done = step(job_in(Phase.DELIVERED, terms), Dispute(terms, EVIDENCE), BUYER, 2000)
    assert (done.job.phase, done.job.clock_s, done.pull) == (Phase.ANSWERED, 2000, None)
    assert [told.kind for told in done.events] == ["disputed"]


def test_without_an_arbiter_nobody_hears_a_dispute() -> None:
    terms = replace(TERMS, arbiter=ZERO_ADDRESS, bond_units=0, answer_s=0, rule_s=0)
    job = job_in(Phase.DELIVERED, terms)
    assert error_of(job, Dispute(terms, EVIDENCE), BUYER, 2000) == "NoArbiter"
    assert paid(step(job, Poke(terms), STRANGER, 2301)) == {"seller": 100}


def test_paid_work_counts_as_submitted_when_it_is_settled_from_working() -> None:
    done = step(job_in(Phase.WORKING), signed_settle(TERMS, 60, "seller"), BUYER, 1500)
    assert [told.kind for told in done.events] == ["submitted", "settled"]
    assert (done.job.clock_s, done.job.deliverable) == (1500, DELIVERABLE)
    nothing = step(job_in(Phase.WORKING), signed_settle(TERMS, 0, "seller"), BUYER, 1500)
    assert [told.kind for told in nothing.events] == ["settled"]
    assert (nothing.job.status, nothing.job.deliverable) == (Status.REJECTED, ZERO_BYTES32)


def test_what_is_owed_is_paid_once() -> None:
    assert check_owed(BUYER, 7) == 7
    with pytest.raises(CallReverted, match="NothingOwed"):
        check_owed(BUYER, 0)


# --------------------------------------------------------------------------------- random walks

WALK: Final = st.lists(
    st.tuples(
        st.sampled_from(sorted(set(CALLS) - {"open", "cancel"})),
        st.sampled_from(ROLES),
        st.integers(0, 600),
    ),
    max_size=12,
)


@st.composite
def any_terms(draw: st.DrawFn) -> Terms:
    price = draw(st.integers(1, 50) | st.integers(1, 2**128 - 1))
    bond = draw(st.integers(0, min(price, 60)))
    default = draw(st.integers(0, price))
    return replace(TERMS, price_units=price, bond_units=bond, default_to_seller_units=default)


@given(terms=any_terms(), walk=WALK, share=st.fractions(0, 1))
def test_no_unit_is_created_or_lost_on_any_way(
    terms: Terms, walk: list[tuple[str, str, int]], share: Any
) -> None:
    """Balances of all parties and the escrow, over any calls by anybody at any time."""
    to_seller = int(share * terms.price_units)
    split = signed_settle(terms, to_seller, "seller")
    job, now_s = job_in(Phase.WORKING, terms), 1000
    balances = dict.fromkeys(KEYS, 0) | {"buyer": -terms.price_units}
    held = job.locked_units
    names = {key.address: name for name, key in KEYS.items()}

    def go(call: DealCall, role: str) -> None:
        nonlocal job, held
        try:
            done = step(job, call, KEYS[role].address, now_s)
        except CallReverted:
            return
        assert job.phase <= done.job.phase
        if done.pull is not None:
            balances[names[done.pull.owner]] -= done.pull.units
            held += done.pull.units
        for payout in done.payouts:
            balances[names[payout.to]] += payout.units
            held -= payout.units
        job = done.job
        assert held == job.locked_units
        assert sum(balances.values()) + held == 0
        assert balances["buyer"] >= -terms.price_units - terms.bond_units
        assert balances["seller"] >= -terms.bond_units
        assert balances["arbiter"] >= 0
        assert balances["stranger"] == 0

    for name, role, wait_s in walk:
        now_s += wait_s
        made: dict[str, DealCall] = {
            "submit": Submit(terms, DELIVERABLE),
            "settle": split,
            "decline": Decline(terms),
            "dispute": Dispute(terms, EVIDENCE),
            "answer": Answer(terms, EVIDENCE),
            "rule": Rule(terms, to_seller, 0, EVIDENCE),
            "poke": Poke(terms),
            "claim_refund": ClaimRefund(terms.digest(DOMAIN)),
        }
        go(made[name], role)
    now_s = max(now_s, EXPIRY_S)
    go(Poke(terms), "stranger")
    assert job.phase is Phase.CLOSED
    assert held == job.locked_units == job.bonds_units == 0
    assert job.to_seller_units + job.to_buyer_units == terms.price_units
