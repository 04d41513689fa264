"""The vectors say what the code says, and what an implementation that is not ours says."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_utils.crypto import keccak

from coase.protocol.calls import call_id
from coase.protocol.envelope import check_signature, open_body, read_header, unseal
from coase.protocol.identity import Identity, recover
from coase.protocol.messages import TermsBody, schemas_hash, thread_id
from coase.protocol.terms import Domain
from tests.vectors.make import HERE, VECTORS


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    return found


def raw(text: str) -> bytes:
    return bytes.fromhex(text[2:])


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_the_files_are_what_the_code_makes(name: str) -> None:
    assert load(name) == json.loads(json.dumps(VECTORS[name]()))


def test_there_are_no_other_files() -> None:
    assert {path.stem for path in Path(HERE).glob("*.json")} == set(VECTORS)


def test_signatures_are_those_of_ethereum() -> None:
    vectors = load("signing")
    assert raw(vectors["keccak256_of_nothing"]) == keccak(b"")
    for case in vectors["cases"]:
        theirs = Account.from_key(case["secret"])
        assert theirs.address.lower() == case["address"]
        signed = theirs.unsafe_sign_hash(raw(case["digest"]))
        assert signed.signature == raw(case["signature"])
        assert recover(raw(case["digest"]), raw(case["signature"])) == case["address"]
        assert Identity(raw(case["secret"])).address == case["address"]


def test_terms_hash_to_the_digest_that_wallets_sign() -> None:
    vectors = load("terms")
    wire, domain = vectors["terms"], vectors["domain"]
    parsed = TermsBody.model_validate_json(json.dumps(wire)).terms()
    assert parsed.digest(Domain(domain["chain_id"], domain["contract"])) == raw(vectors["job_id"])
    digest = keccak(b"\x19\x01" + raw(domain["separator"]) + raw(vectors["terms_hash"]))
    assert digest == raw(vectors["job_id"])
    seller = recover(digest, raw(vectors["seller_signature"]))
    assert seller == wire["seller"]


def test_an_envelope_is_its_signature_and_the_bytes_signed() -> None:
    vectors = load("envelope")
    signed, wire = vectors["signed"].encode(), bytes.fromhex(vectors["wire"])
    assert wire == raw(vectors["signature"]) + signed
    assert keccak(b"coase/envelope/v1\0" + signed) == raw(vectors["digest"])
    header = read_header(wire)
    check_signature(wire, header)
    assert open_body(header, header.body.encode()).kind == "ack"


def test_names_follow_from_what_they_name() -> None:
    vectors = load("names")
    assert raw(vectors["schemas_hash"]) == schemas_hash(
        vectors["input_schema"], vectors["output_schema"]
    )
    text = '{"properties":{"text":{"type":"string"}},"type":"object"}'
    assert raw(vectors["schemas_hash"]) == keccak(f"[{text},{text}]".encode())
    assert vectors["capability"] == f"upper-{vectors['schemas_hash'][2:10]}"
    assert raw(vectors["commitment"]) == keccak(raw(vectors["salt"]) + vectors["task"].encode())
    sides = bytes.fromhex(vectors["request_id"] + vectors["buyer"][2:] + vectors["seller"][2:])
    assert vectors["thread_id"] == keccak(b"coase/thread/v1\0" + sides)[:16].hex()
    assert vectors["thread_id"] == thread_id(
        vectors["request_id"], vectors["buyer"], vectors["seller"]
    )
    assert [call["number"] for call in vectors["calls"]] == [1, 2, 10_000]
    for call in vectors["calls"]:
        named = bytes.fromhex(vectors["thread_id"]) + call["number"].to_bytes(8, "big")
        assert call["deal"] == keccak(b"coase/call/v1\0" + named)[:16].hex()
        assert call["deal"] == call_id(vectors["thread_id"], call["number"])
    for seq, piece in enumerate(vectors["piece_ids"]):
        whole = b"coase/piece/v1\0" + bytes.fromhex("01" * 16) + seq.to_bytes(4, "big")
        assert piece == keccak(whole)[:16].hex()
    digits = keccak(raw(vectors["seller"])).hex()
    for level, prefix in vectors["prefixes"]:
        assert prefix == (digits[: level // 4] or "-")


def test_a_sealed_body_opens() -> None:
    vectors = load("seal")
    deal, kind, seq = vectors["info"].split("|")
    plain = unseal(vectors["body"], raw(vectors["secret"]), deal=deal, kind=kind, seq=int(seq))
    assert plain.decode() == vectors["plain"]
    sealed = base64.b64decode(vectors["body"])
    assert len(sealed) == vectors["sealed_bytes"] == 32 + len(plain) + 16


def test_the_fixed_capabilities_are_named_by_their_schemas() -> None:
    vectors = load("schemas")
    assert set(vectors) == {"embedding", "inference", "summarise"}
    for name, ware in vectors.items():
        schemas = schemas_hash(ware["input_schema"], ware["output_schema"])
        assert raw(ware["schemas_hash"]) == schemas
        assert ware["capability"] == f"{name}-{schemas.hex()[:8]}"
