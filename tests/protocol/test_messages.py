"""Bodies of messages: closed, strict, bounded; and the hashes that names are made of."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coase.protocol.envelope import parse_body, public_key, seal
from coase.protocol.errors import Refused
from coase.protocol.identity import keccak256
from coase.protocol.messages import (
    ARBITERS_MAX,
    AWAITED,
    BIDS_MAX,
    BODIES,
    BODY_INLINE_MAX_BYTES,
    BODY_SIZE_MAX_BYTES,
    ENVELOPE_SIZE_MAX_BYTES,
    FEATURES_MAX,
    PIECE_SIZE_MAX_BYTES,
    PIECES_MAX,
    SCHEMA_MAX_CHARS,
    SEALED,
    SETTLEMENTS,
    VERIFICATIONS,
    TermsBody,
    canonical_json,
    capability_id,
    commitment,
    schemas_hash,
    terms_to_wire,
    thread_id,
)
from tests.protocol.threads import MOVES, REQUEST, TERMS, Pair

B32 = "0x" + "0f" * 32
SIGNATURE = "0x" + "0a" * 65


def samples() -> dict[str, dict[str, Any]]:
    """One good body of each kind."""
    pair = Pair()
    found: dict[str, dict[str, Any]] = {
        kind: json.loads(json.dumps(pair.body(kind))) for kind in MOVES
    }
    found["request"] = json.loads(REQUEST.model_dump_json())
    found["ack"] = {"level": "taken", "signature": SIGNATURE}
    found["describe"] = {"name": "echo"}
    found["description"] = {
        "agent": "ann",
        "capability": "echo-00000000",
        "input_schema": "{}",
        "output_schema": "{}",
        "price": "1",
        "about": "",
        "models": ["small"],
        "traits": ["completion tools context:2048"],
        "key": "33" * 32,
        "firm": "",
    }
    found["chunk"] = {"text": "t", "tokens": 1, "at": 0, "due_units": "0"}
    found["voucher"] = {"units": "1", "total_units": "2", "signature": SIGNATURE}
    found["ruling"] = {
        "job_id": B32,
        "to_seller_units": "1",
        "penalty_units": "0",
        "evidence": B32,
        "signature": SIGNATURE,
    }
    found["call"] = {
        **found["task"],
        "number": 1,
        "lock_by_s": 1,
        "price_units": "1",
        "input_max": 1,
        "output_max": 1,
    }
    found["evidence"] = {
        "terms": found["offer"]["terms"],
        "task_salt": B32,
        "task": "t",
        "result_salt": B32,
        "result": "r",
        "input_schema": "{}",
        "output_schema": "{}",
        "claim": "",
    }
    return found


def parse(kind: str, body: Any) -> Any:
    return parse_body(kind, json.dumps(body).encode())


def test_there_is_a_sample_of_every_kind() -> None:
    assert samples().keys() == BODIES.keys()


@pytest.mark.parametrize("kind", sorted(BODIES))
def test_a_body_is_read_and_written_without_loss(kind: str) -> None:
    body = samples()[kind]
    assert json.loads(parse(kind, body).model_dump_json()) == body


@pytest.mark.parametrize("kind", sorted(BODIES))
def test_no_field_may_be_missing_added_or_of_another_type(kind: str) -> None:
    body = samples()[kind]
    with pytest.raises(Refused, match=f"{kind}"):
        parse(kind, {**body, "more": 1})
    for name in body:
        less = {key: value for key, value in body.items() if key != name}
        if (kind, name) != ("ack", "signature"):
            with pytest.raises(Refused, match=name):
                parse(kind, less)
        for other in (None, [None], 1.5, True, -1, {"a": None}):
            with pytest.raises(Refused, match=name):
                parse(kind, {**body, name: other})


@pytest.mark.parametrize("kind", ["offer", "counter"])
def test_terms_are_as_strict_as_the_rest(kind: str) -> None:
    body = samples()[kind]
    for part in ("terms", "work"):
        where = body["terms"] if part == "terms" else body["terms"]["work"]
        for name in list(where):
            kept = where[name]
            where[name] = None
            with pytest.raises(Refused, match=name):
                parse(kind, body)
            where[name] = kept
        where["more"] = 1
        with pytest.raises(Refused, match="more"):
            parse(kind, body)
        del where["more"]
    parse(kind, body)


@pytest.mark.parametrize("units", ["-1", "+1", "01", "1.0", "1e3", "", " 1", "1\n", "9" * 40, 5])
def test_units_are_plain_decimal_text(units: object) -> None:
    with pytest.raises(Refused, match="to_seller_units"):
        parse("settle", {**samples()["settle"], "to_seller_units": units})


@pytest.mark.parametrize(
    ("kind", "name", "good", "bad"),
    [
        ("request", "bids_max", BIDS_MAX, BIDS_MAX + 1),
        ("request", "bids_min", 1, 0),
        ("request", "quality_min", 100, 101),
        ("request", "arbiters", ["0x" + "0a" * 20] * ARBITERS_MAX, ["0x" + "0a" * 20] * 9),
        ("request", "features", dict.fromkeys(map(str, range(FEATURES_MAX)), 1), None),
        ("request", "features", {"x" * 32: 0}, {"x" * 33: 0}),
        ("request", "features", {"x": 2**40 - 1}, {"x": 2**40}),
        ("request", "features", {}, dict.fromkeys(map(str, range(FEATURES_MAX + 1)), 1)),
        ("result", "usage", {}, dict.fromkeys(map(str, range(FEATURES_MAX + 1)), 1)),
        ("request", "settlements", list(SETTLEMENTS), []),
        ("request", "verifications", list(VERIFICATIONS), ["luck"]),
        ("request", "model", "m" * 128, "m" * 129),
        ("request", "capability", "a" * 32 + "-00000000", "a" * 33 + "-00000000"),
        ("request", "capability", "echo-0123abcd", "Echo-0123abcd"),
        ("request", "reply_by_ms", 2**53 - 1, 2**53),
        ("reject", "reason", "r" * 200, "r" * 201),
        ("nack", "reason", "clock", "because"),
        ("ack", "level", "done", "seen"),
        ("ack", "signature", "", "0x"),
        ("describe", "name", "n" * 41, "n" * 42),
        ("description", "input_schema", "s" * SCHEMA_MAX_CHARS, "s" * (SCHEMA_MAX_CHARS + 1)),
        ("agreed", "signature", SIGNATURE, SIGNATURE[:-1]),
    ],
)
def test_the_limits_are_where_they_are_said_to_be(
    kind: str, name: str, good: object, bad: object
) -> None:
    parse(kind, {**samples()[kind], name: good})
    with pytest.raises(Refused, match=name):
        parse(kind, {**samples()[kind], name: bad})


@pytest.mark.parametrize(
    "point",
    [
        "00" * 32,
        "01" + "00" * 31,
        "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
        "ec" + "ff" * 30 + "7f",
        "ed" + "ff" * 30 + "7f",
        "ee" + "ff" * 30 + "7f",
        "00" * 31 + "80",
        "ec" + "ff" * 31,
    ],
)
def test_a_key_to_which_nothing_can_be_sealed_is_refused(point: str) -> None:
    with pytest.raises(ValueError, match="shared key"):
        seal(b"x", point, deal="", kind="task")
    with pytest.raises(Refused, match="key"):
        parse("request", {**samples()["request"], "key": point})


@given(st.binary(min_size=32, max_size=32))
def test_every_honest_key_is_taken(secret: bytes) -> None:
    parse("request", {**samples()["request"], "key": public_key(secret)})


def test_terms_come_back_from_the_wire_as_they_went() -> None:
    wire = terms_to_wire(TERMS)
    assert TermsBody.model_validate_json(json.dumps(wire)).terms() == TERMS


def test_what_waits_for_the_disk_is_sealed_or_public_but_known() -> None:
    assert AWAITED <= set(BODIES)
    assert SEALED - {"piece"} <= set(BODIES)
    assert set(BODIES) - SEALED == {
        *("request", "ack", "nack", "describe", "description", "ruling"),
    }


def test_the_sizes_fit_into_each_other() -> None:
    # HPKE adds 48 bytes, base64 a third, the header less than a kibibyte.
    for size in (PIECE_SIZE_MAX_BYTES, BODY_INLINE_MAX_BYTES):
        assert (size + 48 + 2) // 3 * 4 + 1_024 <= ENVELOPE_SIZE_MAX_BYTES
    assert BODY_SIZE_MAX_BYTES == PIECES_MAX * PIECE_SIZE_MAX_BYTES


# ---- hashes ----------------------------------------------------------------------------------


def test_schemas_are_the_same_whatever_they_are_called() -> None:
    plain = {"type": "object", "properties": {"title": {"type": "string"}}}
    called = {
        "title": "Input",
        "description": "what to say",
        "properties": {"title": {"title": "Title", "type": "string", "examples": ["x"]}},
        "type": "object",
        "$comment": "c",
    }
    assert schemas_hash(plain, {}) == schemas_hash(called, {})
    other = {"type": "object", "properties": {"description": {"type": "string"}}}
    assert schemas_hash(plain, {}) != schemas_hash(other, {})
    assert schemas_hash(plain, {}) != schemas_hash({}, plain)


def test_definitions_keep_their_names_and_lists_their_order() -> None:
    one = {"$defs": {"title": {"enum": ["a", "b"]}}}
    two = {"$defs": {"title": {"enum": ["b", "a"]}}}
    three = {"$defs": {"tale": {"enum": ["a", "b"]}}}
    assert len({schemas_hash(schema, {}) for schema in (one, two, three)}) == 3


def test_a_capability_is_its_name_and_its_schemas() -> None:
    schemas = schemas_hash({}, {})
    assert schemas == keccak256(b"[{},{}]")
    assert capability_id("echo", schemas) == f"echo-{schemas.hex()[:8]}"


def test_canonical_json_has_one_spelling() -> None:
    assert canonical_json({"b": [1, "é"], "a": None}) == '{"a":null,"b":[1,"é"]}'


def test_a_commitment_binds_salt_and_body() -> None:
    salt = b"\1" * 32
    assert commitment(salt, b"body") == keccak256(salt + b"body")
    assert len({commitment(salt, b"a"), commitment(b"\2" * 32, b"a"), commitment(salt, b"")}) == 3


def test_a_thread_belongs_to_one_request_one_buyer_and_one_seller() -> None:
    ann, bob, request = "0x" + "0a" * 20, "0x" + "0b" * 20, "01" * 16
    ids = {
        thread_id(request, ann, bob),
        thread_id(request, bob, ann),
        thread_id("02" * 16, ann, bob),
        thread_id(request, "0x" + "0c" * 20, bob),
    }
    assert len(ids) == 4
    assert all(len(found) == 32 for found in ids)
