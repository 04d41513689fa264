"""Envelopes: 65 signature bytes, then the JSON bytes that were signed.

The signature is over keccak256(``coase/envelope/v1\\0`` | JSON bytes), and the bytes are kept as
they came: nobody ever re-serialises. A sealed body is HPKE (RFC 9180: X25519, HKDF-SHA256,
ChaCha20-Poly1305) with info = deal id | kind | sequence, so that a ciphertext cannot be replayed
in another place. The library draws the ephemeral key of a seal by itself; nothing else here
uses chance.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from pydantic import ValidationError

from .errors import MalformedEnvelope, Refused
from .identity import SIGNATURE_SIZE_BYTES, Identity, keccak256, require_signer
from .messages import (
    BODIES,
    BODY_SIZE_MAX_BYTES,
    CLOCK_SKEW_MAX_MS,
    ENVELOPE_LIFE_MAX_MS,
    ENVELOPE_SIZE_MAX_BYTES,
    SEALED,
    Body,
    Header,
)

_DOMAIN: Final = b"coase/envelope/v1\0"
_SUITE: Final = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


@dataclass(frozen=True, slots=True)
class Message:
    """One message, opened: who says what to whom, about which deal, in answer to what."""

    kind: str
    id: str
    sender: str
    to: str
    deal: str
    re: str
    sent_ms: int
    expires_ms: int
    body: Body
    plain: bytes
    """The body's JSON bytes as they were sealed or sent: what the journal keeps."""


def digest(signed: bytes) -> bytes:
    """Return what an envelope's signature signs."""
    return keccak256(_DOMAIN + signed)


def seal_info(deal: str, kind: str, seq: int) -> bytes:
    """Return the HPKE info that ties a ciphertext to its place."""
    return f"{deal}|{kind}|{seq}".encode()


def seal(plain: bytes, key: str, *, deal: str, kind: str, seq: int = 0) -> str:
    """Return ``plain`` sealed to the X25519 public key ``key`` (hex), as base64 text."""
    public = X25519PublicKey.from_public_bytes(bytes.fromhex(key))
    sealed = _SUITE.encrypt(plain, public, info=seal_info(deal, kind, seq))
    return base64.b64encode(sealed).decode()


def unseal(body: str, secret: bytes, *, deal: str, kind: str, seq: int = 0) -> bytes:
    """Return the plain bytes of a sealed body.

    :raises Refused: ``malformed``, if it was not sealed to this key for this place
    """
    try:
        private = X25519PrivateKey.from_private_bytes(secret)
        sealed = base64.b64decode(body, validate=True)
        return bytes(_SUITE.decrypt(sealed, private, info=seal_info(deal, kind, seq)))
    except (InvalidTag, binascii.Error, ValueError) as error:
        raise Refused("malformed", "the body was not sealed to this deal's key") from error


def public_key(secret: bytes) -> str:
    """Return the X25519 public key of ``secret`` as hex."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw().hex()


def pack(
    identity: Identity,
    *,
    net: str,
    kind: str,
    message_id: str,
    to: str,
    deal: str,
    re: str,
    seq: int,
    sent_ms: int,
    expires_ms: int,
    sealed: bool,
    body: str,
) -> bytes:
    """Return a signed envelope. ``body`` is already sealed if ``sealed`` says so."""
    signed = json.dumps(
        {
            "v": 1,
            "net": net,
            "id": message_id,
            "kind": kind,
            "sender": identity.address,
            "to": to,
            "deal": deal,
            "re": re,
            "seq": seq,
            "sent_ms": sent_ms,
            "expires_ms": expires_ms,
            "seal": "hpke" if sealed else "",
            "body": body,
        },
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()
    return identity.sign(digest(signed)) + signed


def read_header(wire: bytes) -> Header:
    """Return the header of an envelope without looking at its signature.

    :raises MalformedEnvelope: if the bytes are no envelope: count and drop, never answer
    """
    if not SIGNATURE_SIZE_BYTES < len(wire) <= ENVELOPE_SIZE_MAX_BYTES:
        raise MalformedEnvelope(
            f"{len(wire)} bytes; an envelope has {SIGNATURE_SIZE_BYTES + 1}"
            f" to {ENVELOPE_SIZE_MAX_BYTES}"
        )
    signed = wire[SIGNATURE_SIZE_BYTES:]
    try:
        header = Header.model_validate_json(signed)
        _require_single_keys(signed)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MalformedEnvelope(f"not an envelope: {where}: {first['msg']}") from None
    except _KeyTwice as error:
        raise MalformedEnvelope(f"not an envelope: {error}") from None
    return header


class _KeyTwice(ValueError):
    """JSON in which one object names a key twice: two readers could read two messages."""


def _single(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _KeyTwice("a key stands twice")
    return found


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_single)


def _require_single_keys(valid: bytes) -> None:
    """Return if no object in ``valid``, which has passed its model, names a key twice."""
    _DECODER.decode(valid.decode())


def check_times(header: Header, *, now_ms: int) -> None:
    """Return if the envelope is alive by our clock, within the skew that is allowed.

    :raises Refused: ``clock``, ``expired`` or ``malformed``
    """
    if header.expires_ms - header.sent_ms > ENVELOPE_LIFE_MAX_MS:
        raise Refused("malformed", f"an envelope lives at most {ENVELOPE_LIFE_MAX_MS} ms")
    if header.sent_ms > now_ms + CLOCK_SKEW_MAX_MS:
        raise Refused("clock", f"sent {header.sent_ms - now_ms} ms in the future")
    if header.expires_ms + CLOCK_SKEW_MAX_MS < now_ms:
        raise Refused("expired", f"expired {now_ms - header.expires_ms} ms ago")


def check_signature(wire: bytes, header: Header) -> None:
    """Return if the sender that the header names signed these very bytes.

    :raises BadSignature: otherwise
    """
    require_signer(digest(wire[SIGNATURE_SIZE_BYTES:]), wire[:SIGNATURE_SIZE_BYTES], header.sender)


def open_body(header: Header, plain: bytes) -> Message:
    """Return the message whose plain body is ``plain``.

    :raises Refused: ``unknown_kind``, ``malformed``, ``not_sealed`` or ``too_large``
    """
    model = BODIES.get(header.kind)
    if model is None:
        raise Refused("unknown_kind", header.kind)
    if (header.seal == "hpke") != (header.kind in SEALED):
        raise Refused("not_sealed", f"{header.kind} is {'' if header.seal == '' else 'not '}sealed")
    if len(plain) > BODY_SIZE_MAX_BYTES:
        raise Refused("too_large", f"{len(plain)} bytes")
    body = parse_body(header.kind, plain)
    try:
        _require_single_keys(plain)
    except _KeyTwice as error:
        raise Refused("malformed", f"{header.kind}: {error}") from None
    return Message(
        kind=header.kind,
        id=header.id,
        sender=header.sender,
        to=header.to,
        deal=header.deal,
        re=header.re,
        sent_ms=header.sent_ms,
        expires_ms=header.expires_ms,
        body=body,
        plain=plain,
    )


def parse_body(kind: str, plain: bytes) -> Body:
    """Return the body of ``kind`` that ``plain`` spells.

    :raises Refused: ``malformed``, naming the field and never its content
    """
    try:
        return BODIES[kind].model_validate_json(plain)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise Refused("malformed", f"{kind}.{where}: {first['msg']}"[:200]) from None
