"""Write the test vectors from fixed keys: ``.venv/bin/python tests/vectors/make.py``.

Whoever writes a second implementation recomputes every value from the inputs beside it. A test
compares the files with what this code says today, so a changed digest cannot go unnoticed.
"""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
# Started as a script: what is imported must be the same modules as under pytest.
if __name__ == "__main__":
    sys.path[0] = str(HERE.parents[1])

from coase.agents.pieces import piece_id  # noqa: E402
from coase.agents.wares import FIXED  # noqa: E402
from coase.protocol.backends.mesh_tls import MeshAuthority  # noqa: E402
from coase.protocol.calls import call_id  # noqa: E402
from coase.protocol.envelope import digest, pack, public_key, seal, seal_info, unseal  # noqa: E402
from coase.protocol.errors import Refused  # noqa: E402
from coase.protocol.identity import Identity, keccak256  # noqa: E402
from coase.protocol.joincode import JoinCode  # noqa: E402
from coase.protocol.messages import (  # noqa: E402
    CALLS_MAX,
    canonical_json,
    capability_id,
    commitment,
    schemas_hash,
    terms_to_wire,
    thread_id,
)
from coase.protocol.subjects import inbox_subject, prefixes, request_subject  # noqa: E402
from coase.protocol.terms import (  # noqa: E402
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

NET: Final = "vectors"
NOW_S: Final = 1_700_000_000
BUYER: Final = Identity(keccak256(b"coase vectors: buyer"))
SELLER: Final = Identity(keccak256(b"coase vectors: seller"))
DOMAIN: Final = Domain(31337, "0x" + "44" * 20)
TOKEN: Final = Domain(31337, "0x" + "33" * 20, name="Coase")
REQUEST_ID: Final = "0f" * 16
TASK: Final = b'{"text":"hello"}'
RESULT: Final = b'{"text":"HELLO"}'
TASK_SALT: Final = b"\x05" * 32
RESULT_SALT: Final = b"\x06" * 32
SEAL_SECRET: Final = b"\x07" * 32
LAN_SECRET: Final = bytes(range(1, 17))
SCHEMA: Final = {"type": "object", "properties": {"text": {"type": "string", "title": "Text"}}}
SCHEMAS: Final = schemas_hash(SCHEMA, SCHEMA)
TERMS: Final = Terms(
    buyer=BUYER.address,
    seller=SELLER.address,
    asset="0x" + "33" * 20,
    price_units=1_234_567,
    arbiter="0x" + "a7" * 20,
    bond_units=123_456,
    default_to_seller_units=617_283,
    lock_by_s=NOW_S + 30,
    deliver_by_s=NOW_S + 90,
    dispute_s=40,
    answer_s=30,
    rule_s=20,
    nonce=2**64 - 1,
    work=Work(
        capability=capability_id("upper", SCHEMAS),
        schemas=SCHEMAS,
        task=commitment(TASK_SALT, TASK),
        pricing="tokens",
        input_price_units=150_000,
        cached_input_price_units=15_000,
        output_price_units=600_000,
        second_price_units=0,
        input_max=1_000,
        output_max=2_000,
        quality=50,
        model="smollm2-135m-instruct",
        verification="schema",
        tokenizer="cl100k",
        settlement="escrow",
    ),
)


def h(data: bytes) -> str:
    """Return bytes as the wire spells them."""
    return "0x" + data.hex()


def signing() -> dict[str, Any]:
    """Keys, addresses and signatures."""
    signed = keccak256(b"a digest")
    return {
        "about": "secp256k1, RFC 6979, 65 bytes r | s | v with v of 27 or 28, s in the lower half",
        "keccak256_of_nothing": h(keccak256(b"")),
        "cases": [
            {
                "secret": h(key.secret_for_keystore()),
                "address": key.address,
                "digest": h(signed),
                "signature": h(key.sign(signed)),
            }
            for key in (BUYER, SELLER)
        ],
    }


def terms() -> dict[str, Any]:
    """Terms, and every digest that money obeys."""
    job_id, deliverable = TERMS.digest(DOMAIN), commitment(RESULT_SALT, RESULT)
    evidence = keccak256(b"evidence")
    return {
        "about": "EIP-712; the job's id on chain is the digest of its terms",
        "domain": {
            "name": DOMAIN.name,
            "version": DOMAIN.version,
            "chain_id": DOMAIN.chain_id,
            "contract": DOMAIN.contract,
            "separator": h(DOMAIN.separator),
        },
        "terms": terms_to_wire(TERMS),
        "work_hash": h(TERMS.work.struct_hash),
        "terms_hash": h(TERMS.struct_hash),
        "job_id": h(job_id),
        "seller_signature": h(SELLER.sign(job_id)),
        "deliverable": h(deliverable),
        "evidence": h(evidence),
        "to_seller_units": "1000000",
        "penalty_units": "7",
        "digests": {
            "settlement": h(settlement_digest(DOMAIN, job_id, deliverable, 1_000_000)),
            "delivery": h(delivery_digest(DOMAIN, job_id, deliverable)),
            "dispute": h(dispute_digest(DOMAIN, job_id, evidence)),
            "answer": h(answer_digest(DOMAIN, job_id, evidence)),
            "ack": h(ack_digest(DOMAIN, job_id, TERMS.work.task)),
            "ruling": h(ruling_digest(DOMAIN, job_id, 1_000_000, 7, evidence)),
        },
        "funding": {
            "token_domain": {"name": TOKEN.name, "version": TOKEN.version},
            "permit": h(
                permit_digest(TOKEN, BUYER.address, DOMAIN.contract, TERMS.price_units, 3, NOW_S)
            ),
            "receive": h(
                receive_digest(
                    TOKEN, BUYER.address, DOMAIN.contract, TERMS.price_units, 0, 2**256 - 1, job_id
                )
            ),
        },
    }


def envelope() -> dict[str, Any]:
    """One public envelope, byte for byte."""
    body = '{"level":"taken","signature":""}'
    wire = pack(
        SELLER,
        net=NET,
        kind="ack",
        message_id="01" * 16,
        to=BUYER.address,
        deal=thread_id(REQUEST_ID, BUYER.address, SELLER.address),
        re="02" * 16,
        seq=0,
        sent_ms=NOW_S * 1000,
        expires_ms=NOW_S * 1000 + 300_000,
        sealed=False,
        body=body,
    )
    return {
        "about": "65 bytes of signature, then the JSON bytes that were signed",
        "signed": wire[65:].decode(),
        "digest": h(digest(wire[65:])),
        "signature": h(wire[:65]),
        "wire": wire.hex(),
    }


def names() -> dict[str, Any]:
    """Ids that both sides compute."""
    deal = thread_id(REQUEST_ID, BUYER.address, SELLER.address)
    capability = capability_id("upper", SCHEMAS)
    return {
        "input_schema": SCHEMA,
        "output_schema": SCHEMA,
        "schemas_hash": h(SCHEMAS),
        "capability": capability,
        "salt": h(TASK_SALT),
        "task": TASK.decode(),
        "commitment": h(commitment(TASK_SALT, TASK)),
        "request_id": REQUEST_ID,
        "buyer": BUYER.address,
        "seller": SELLER.address,
        "thread_id": deal,
        "calls": [{"number": n, "deal": call_id(deal, n)} for n in (1, 2, CALLS_MAX)],
        "piece_ids": [piece_id("01" * 16, seq) for seq in range(3)],
        "prefixes": [[level, prefix] for level, prefix in prefixes(SELLER.address)],
        "inbox": inbox_subject(NET, SELLER.address),
        "request_subjects": [
            request_subject(NET, capability, level, prefix)
            for level, prefix in prefixes(SELLER.address)
        ],
    }


def schemas() -> dict[str, Any]:
    """The capabilities whose schemas are fixed."""
    found: dict[str, Any] = {}
    for name, (task, result) in FIXED.items():
        given, made = task.model_json_schema(), result.model_json_schema()
        found[name] = {
            "capability": capability_id(name, schemas_hash(given, made)),
            "schemas_hash": h(schemas_hash(given, made)),
            "input_schema": json.loads(canonical_json(given)),
            "output_schema": json.loads(canonical_json(made)),
        }
    return found


def sealed() -> dict[str, Any]:
    """A sealed body to open. A seal draws a key by itself, so an old one is kept while it opens."""
    deal = thread_id(REQUEST_ID, BUYER.address, SELLER.address)
    path = HERE / "seal.json"
    body = json.loads(path.read_text())["body"] if path.exists() else ""
    try:
        same = unseal(body, SEAL_SECRET, deal=deal, kind="task", seq=2) == TASK
    except Refused:
        same = False
    if not same:
        body = seal(TASK, public_key(SEAL_SECRET), deal=deal, kind="task", seq=2)
    return {
        "about": "RFC 9180 base mode: X25519, HKDF-SHA256, ChaCha20-Poly1305; no additional data",
        "secret": h(SEAL_SECRET),
        "public_key": public_key(SEAL_SECRET),
        "info": seal_info(deal, "task", 2).decode(),
        "body": body,
        "encapsulated_key_bytes": 32,
        "sealed_bytes": len(base64.b64decode(body)),
        "plain": TASK.decode(),
    }


def lan() -> dict[str, Any]:
    """A join code and what follows from it."""
    code = JoinCode.of(LAN_SECRET)
    return {
        "about": "HMAC-SHA256 and HKDF-SHA256 of 16 bytes; an Ed25519 authority in DER",
        "secret": h(LAN_SECRET),
        "text": code.text,
        "also_read": [code.text.lower().replace("-", " "), code.text.replace("1", "l")],
        "network_tag": code.network_tag,
        "net": code.net,
        "ca_seed": h(code.ca_seed),
        "derived": {purpose: h(code.secret(purpose)) for purpose in ("ca", "other")},
        "ca_certificate": MeshAuthority(code).ca_pem.decode(),
    }


VECTORS: Final = {
    "signing": signing,
    "terms": terms,
    "envelope": envelope,
    "names": names,
    "schemas": schemas,
    "seal": sealed,
    "lan": lan,
}


def main() -> None:
    """Write all files."""
    for name, make in VECTORS.items():
        text = json.dumps(make(), indent=2, ensure_ascii=False)
        (HERE / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
