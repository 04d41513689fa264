"""Every digest that money obeys is what a general EIP-712 library computes for the same words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from eth_account.messages import encode_typed_data
from hypothesis import given
from hypothesis import strategies as st

from coase.protocol.errors import BadSignature
from coase.protocol.identity import Identity, keccak256, recover, require_signer
from coase.protocol.terms import (
    Domain,
    Terms,
    Work,
    ack_digest,
    answer_digest,
    delivery_digest,
    dispute_digest,
    permit_digest,
    receive_digest,
    ruling_digest,
    settlement_digest,
)

UINT256 = st.integers(min_value=0, max_value=2**256 - 1)
BYTES32 = st.binary(min_size=32, max_size=32)
ADDRESS = st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())
TEXT = st.text(max_size=40)

WORKS = st.builds(
    Work,
    capability=TEXT,
    schemas=BYTES32,
    task=BYTES32,
    pricing=TEXT,
    input_price_units=UINT256,
    cached_input_price_units=UINT256,
    output_price_units=UINT256,
    second_price_units=UINT256,
    input_max=UINT256,
    output_max=UINT256,
    quality=UINT256,
    model=TEXT,
    verification=TEXT,
    tokenizer=TEXT,
    settlement=TEXT,
)
TERMS = st.builds(
    Terms,
    buyer=ADDRESS,
    seller=ADDRESS,
    asset=ADDRESS,
    price_units=UINT256,
    work=WORKS,
    lock_by_s=UINT256,
    deliver_by_s=UINT256,
    dispute_s=UINT256,
    nonce=UINT256,
    arbiter=ADDRESS,
    bond_units=UINT256,
    default_to_seller_units=UINT256,
    answer_s=UINT256,
    rule_s=UINT256,
    vault=ADDRESS,
    stake_units=UINT256,
)
DOMAINS = st.builds(Domain, chain_id=UINT256, contract=ADDRESS, name=TEXT, version=TEXT)

DOMAIN_FIELDS = [
    ("name", "string"),
    ("version", "string"),
    ("chainId", "uint256"),
    ("verifyingContract", "address"),
]
# Written out again, from the contracts' interface, so that a slip in either place shows.
WORK_FIELDS = [
    ("capability", "string"),
    ("schemas", "bytes32"),
    ("task", "bytes32"),
    ("pricing", "string"),
    ("inputPrice", "uint256"),
    ("cachedInputPrice", "uint256"),
    ("outputPrice", "uint256"),
    ("secondPrice", "uint256"),
    ("inputMax", "uint256"),
    ("outputMax", "uint256"),
    ("quality", "uint256"),
    ("model", "string"),
    ("verification", "string"),
    ("tokenizer", "string"),
    ("settlement", "string"),
]
TERMS_FIELDS = [
    ("buyer", "address"),
    ("seller", "address"),
    ("asset", "address"),
    ("price", "uint256"),
    ("arbiter", "address"),
    ("bond", "uint256"),
    ("defaultToSeller", "uint256"),
    ("lockBy", "uint256"),
    ("deliverBy", "uint256"),
    ("disputeSecs", "uint256"),
    ("answerSecs", "uint256"),
    ("ruleSecs", "uint256"),
    ("vault", "address"),
    ("stake", "uint256"),
    ("work", "Work"),
    ("nonce", "uint256"),
]


def library_digest(
    domain: Domain,
    name: str,
    fields: list[tuple[str, str]],
    message: dict[str, Any],
    **more: list[tuple[str, str]],
) -> bytes:
    """Return what eth-account would sign."""
    kinds = {"EIP712Domain": DOMAIN_FIELDS, name: fields, **more}
    signable = encode_typed_data(
        full_message={
            "types": {
                kind: [{"name": field, "type": of} for field, of in members]
                for kind, members in kinds.items()
            },
            "primaryType": name,
            "domain": {
                "name": domain.name,
                "version": domain.version,
                "chainId": domain.chain_id,
                "verifyingContract": domain.contract,
            },
            "message": message,
        }
    )
    return keccak256(b"\x19" + signable.version + signable.header + signable.body)


def terms_message(terms: Terms) -> dict[str, Any]:
    work = terms.work
    return {
        "buyer": terms.buyer,
        "seller": terms.seller,
        "asset": terms.asset,
        "price": terms.price_units,
        "arbiter": terms.arbiter,
        "bond": terms.bond_units,
        "defaultToSeller": terms.default_to_seller_units,
        "lockBy": terms.lock_by_s,
        "deliverBy": terms.deliver_by_s,
        "disputeSecs": terms.dispute_s,
        "answerSecs": terms.answer_s,
        "ruleSecs": terms.rule_s,
        "vault": terms.vault,
        "stake": terms.stake_units,
        "work": {
            "capability": work.capability,
            "schemas": work.schemas,
            "task": work.task,
            "pricing": work.pricing,
            "inputPrice": work.input_price_units,
            "cachedInputPrice": work.cached_input_price_units,
            "outputPrice": work.output_price_units,
            "secondPrice": work.second_price_units,
            "inputMax": work.input_max,
            "outputMax": work.output_max,
            "quality": work.quality,
            "model": work.model,
            "verification": work.verification,
            "tokenizer": work.tokenizer,
            "settlement": work.settlement,
        },
        "nonce": terms.nonce,
    }


@given(DOMAINS, TERMS)
def test_terms_hash_as_the_library_hashes_them(domain: Domain, terms: Terms) -> None:
    expected = library_digest(domain, "Terms", TERMS_FIELDS, terms_message(terms), Work=WORK_FIELDS)
    assert terms.digest(domain) == expected


@given(DOMAINS, BYTES32, BYTES32, UINT256, UINT256)
def test_every_act_on_a_deal_hashes_as_the_library_hashes_it(
    domain: Domain, job_id: bytes, what: bytes, units: int, penalty: int
) -> None:
    number = int.from_bytes(job_id, "big")
    job = ("jobId", "uint256")
    evidence = [job, ("evidence", "bytes32")]
    told = {"jobId": number, "evidence": what}
    cases = [
        (
            settlement_digest(domain, job_id, what, units),
            "Settlement",
            [job, ("deliverable", "bytes32"), ("toSeller", "uint256")],
            {"jobId": number, "deliverable": what, "toSeller": units},
        ),
        (
            delivery_digest(domain, job_id, what),
            "Delivery",
            [job, ("deliverable", "bytes32")],
            {"jobId": number, "deliverable": what},
        ),
        (dispute_digest(domain, job_id, what), "Dispute", evidence, told),
        (answer_digest(domain, job_id, what), "Answer", evidence, told),
        (
            ack_digest(domain, job_id, what),
            "Ack",
            [job, ("input", "bytes32")],
            {"jobId": number, "input": what},
        ),
        (
            ruling_digest(domain, job_id, units, penalty, what),
            "Ruling",
            [job, ("toSeller", "uint256"), ("penalty", "uint256"), ("evidence", "bytes32")],
            {"jobId": number, "toSeller": units, "penalty": penalty, "evidence": what},
        ),
    ]
    for digest, name, fields, message in cases:
        assert digest == library_digest(domain, name, fields, message), name
    assert len({digest for digest, *_ in cases}) == len(cases)


@given(DOMAINS, ADDRESS, ADDRESS, UINT256, UINT256, UINT256, BYTES32)
def test_payments_by_signature_hash_as_the_library_hashes_them(
    token: Domain, owner: str, to: str, units: int, first: int, second: int, nonce: bytes
) -> None:
    assert permit_digest(token, owner, to, units, first, second) == library_digest(
        token,
        "Permit",
        [
            ("owner", "address"),
            ("spender", "address"),
            ("value", "uint256"),
            ("nonce", "uint256"),
            ("deadline", "uint256"),
        ],
        {"owner": owner, "spender": to, "value": units, "nonce": first, "deadline": second},
    )
    assert receive_digest(token, owner, to, units, first, second, nonce) == library_digest(
        token,
        "ReceiveWithAuthorization",
        [
            ("from", "address"),
            ("to", "address"),
            ("value", "uint256"),
            ("validAfter", "uint256"),
            ("validBefore", "uint256"),
            ("nonce", "bytes32"),
        ],
        {
            "from": owner,
            "to": to,
            "value": units,
            "validAfter": first,
            "validBefore": second,
            "nonce": nonce,
        },
    )


@given(TERMS, st.sampled_from([field for field in Terms.__dataclass_fields__ if field != "work"]))
def test_every_field_of_the_terms_is_signed(terms: Terms, field: str) -> None:
    old = getattr(terms, field)
    new: Any
    if isinstance(old, int):
        new = old ^ 1
    else:
        new = old[:-1] + ("0" if old[-1] != "0" else "1")
    changed = replace(terms, **{field: new})
    domain = Domain(1, "0x" + "11" * 20)
    assert changed.digest(domain) != terms.digest(domain)


@given(WORKS, st.sampled_from(list(Work.__dataclass_fields__)))
def test_every_field_of_the_work_is_signed(work: Work, field: str) -> None:
    old = getattr(work, field)
    new: Any
    if isinstance(old, int):
        new = old ^ 1
    elif isinstance(old, bytes):
        new = bytes((old[0] ^ 1,)) + old[1:]
    else:
        new = old + "x"
    assert replace(work, **{field: new}).struct_hash != work.struct_hash


@given(TERMS, UINT256, ADDRESS)
def test_chain_and_contract_are_in_the_digest(terms: Terms, chain_id: int, escrow: str) -> None:
    here = Domain(chain_id, escrow)
    elsewhere = Domain(chain_id ^ 1, escrow)
    other = Domain(chain_id, escrow[:-1] + ("0" if escrow[-1] != "0" else "1"))
    digests = {terms.digest(here), terms.digest(elsewhere), terms.digest(other)}
    assert len(digests) == 3


@given(st.integers(min_value=1, max_value=2**200), BYTES32, st.integers(0, 511))
def test_one_bit_flipped_is_another_signer_or_none(secret: int, digest: bytes, bit: int) -> None:
    identity = Identity(secret.to_bytes(32, "big"))
    signature = identity.sign(digest)
    assert recover(digest, signature) == identity.address
    flipped = bytearray(signature)
    flipped[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadSignature):
        require_signer(digest, bytes(flipped), identity.address)


def test_the_expiry_lies_behind_every_deadline() -> None:
    terms = Terms(
        buyer="0x" + "11" * 20,
        seller="0x" + "22" * 20,
        asset="0x" + "33" * 20,
        price_units=1,
        work=Work("x"),
        lock_by_s=10,
        deliver_by_s=20,
        dispute_s=3,
        answer_s=4,
        rule_s=5,
        nonce=1,
    )
    latest_submit, latest_dispute, latest_answer = 20, 23, 27
    assert terms.expires_at_s > latest_answer + terms.rule_s - 1
    assert terms.expires_at_s == latest_submit + 3 + 4 + 5 + 1
    assert latest_dispute < latest_answer < terms.expires_at_s
