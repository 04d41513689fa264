"""Cheap keys for simulated worlds: digests in the place of curves, and still no tampering.

Whoever knows the scheme can forge these signatures; the strangers of a simulated world do not.
What they can do, flip, cut, copy, mix and sign with their own key, is found out as always.
"""

from __future__ import annotations

import base64
import binascii
import json
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING
from unittest.mock import patch

from coase.agents.ports import Codec
from coase.escrow import voucher
from coase.protocol.envelope import digest, pack
from coase.protocol.errors import BadSignature, Refused
from coase.protocol.identity import SIGNATURE_SIZE_BYTES, Identity, keccak256
from coase.protocol.messages import SEALED

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from coase.protocol.messages import Header

_TAG_BYTES = 16


class CheapIdentity(Identity):
    """An address whose signatures are keyed digests."""

    __slots__ = ()

    def __init__(self, name: str) -> None:
        self.address = "0x" + keccak256(b"coase/simulation/" + name.encode())[-20:].hex()

    def sign(self, digest: bytes) -> bytes:
        """Return 65 bytes that only this address and this digest give."""
        return cheap_signature(digest, self.address)


def cheap_signature(signed: bytes, signer: str) -> bytes:
    """Return what ``signer`` would sign a digest with."""
    proof = blake2b(signed, key=signer.encode(), digest_size=44).digest()
    return bytes.fromhex(signer[2:]) + proof + b"\x1b"


def cheap_signer(signed: bytes, signature: bytes) -> str:
    """Return who signed a digest: what is asked of a voucher.

    :raises BadSignature: if nobody did
    """
    signer = "0x" + signature[:20].hex()
    require_cheap_signer(signed, signature, signer)
    return signer


@contextmanager
def cheap_vouchers() -> Iterator[None]:
    """Let vouchers carry cheap signatures as well, for a while."""
    with patch.object(voucher, "recover", cheap_signer):
        yield


def is_cheaply_signed(signed: bytes, signature: bytes, signer: str) -> bool:
    """Return whether a signature is the signer's: what the chain asks."""
    return signature == cheap_signature(signed, signer)


def require_cheap_signer(signed: bytes, signature: bytes, signer: str) -> None:
    """Return if a signature is the signer's: what a desk asks.

    :raises BadSignature: otherwise
    """
    if signature != cheap_signature(signed, signer):
        raise BadSignature(f"the signature is not {signer}'s")


def _tag(plain: bytes, key: str, place: str) -> bytes:
    return blake2b(plain, key=bytes.fromhex(key), person=b"coase/sim", salt=_place(place)).digest()[
        :_TAG_BYTES
    ]


def _place(place: str) -> bytes:
    return blake2b(place.encode(), digest_size=16).digest()


class CheapCodec(Codec):
    """Seals with a tag that only the addressee's key gives, and signs with keyed digests."""

    def encode(
        self,
        *,
        kind: str,
        message_id: str,
        to: str,
        deal: str,
        re: str,
        sent_ms: int,
        expires_ms: int,
        plain: bytes,
        key: str,
        seq: int = 0,
    ) -> bytes:
        """Return the signed envelope around ``plain``."""
        sealed = kind in SEALED
        body = plain.decode() if not sealed else ""
        if sealed:
            tag = _tag(plain, key, f"{deal}|{kind}|{seq}")
            body = base64.b64encode(tag + plain).decode()
        return pack(
            self.identity,
            net=self.net,
            kind=kind,
            message_id=message_id,
            to=to,
            deal=deal,
            re=re,
            seq=seq,
            sent_ms=sent_ms,
            expires_ms=expires_ms,
            sealed=sealed,
            body=body,
        )

    def authenticate(self, wire: bytes, header: Header) -> None:
        """Return if the header's sender signed ``wire``."""
        signed = digest(wire[SIGNATURE_SIZE_BYTES:])
        require_cheap_signer(signed, wire[:SIGNATURE_SIZE_BYTES], header.sender)

    def unseal(self, header: Header, secret: bytes) -> bytes:
        """Return the plain bytes of a body."""
        if header.seal == "":
            return header.body.encode()
        try:
            sealed = base64.b64decode(header.body, validate=True)
        except (binascii.Error, ValueError) as error:
            raise Refused("malformed", "no base64") from error
        tag, plain = sealed[:_TAG_BYTES], sealed[_TAG_BYTES:]
        place = f"{header.deal}|{header.kind}|{header.seq}"
        if tag != _tag(plain, self.public_key(secret), place):
            raise Refused("malformed", "the body was not sealed to this deal's key")
        return plain

    def public_key(self, secret: bytes) -> str:
        """Return the public key of ``secret`` as hex."""
        return blake2b(secret, digest_size=32).hexdigest()


class TwistingCodec(CheapCodec):
    """Says of what it pays something else than its desk meant to."""

    def __init__(
        self, identity: Identity, *, net: str, twist: Callable[[str, bytes], bytes]
    ) -> None:
        super().__init__(identity, net=net)
        self._twist = twist

    def encode(self, *, kind: str, plain: bytes, deal: str, **rest: object) -> bytes:
        """Return an envelope whose voucher may be another."""
        if kind == "voucher":
            plain = self._twist(deal, plain)
        return super().encode(kind=kind, plain=plain, deal=deal, **rest)  # type: ignore[arg-type]


class LyingCodec(CheapCodec):
    """Signs and seals properly, but now and then something else than its desk meant to say."""

    def __init__(self, identity: Identity, *, net: str, rng: random.Random, chance: float) -> None:
        super().__init__(identity, net=net)
        self._rng, self._chance = rng, chance
        self.lies = 0

    def encode(self, *, kind: str, plain: bytes, **rest: object) -> bytes:
        """Return an envelope whose body may be a lie."""
        if kind not in ("request", "piece") and self._rng.random() < self._chance:
            plain = self._lie(plain)
            self.lies += 1
        return super().encode(kind=kind, plain=plain, **rest)  # type: ignore[arg-type]

    def _lie(self, plain: bytes) -> bytes:
        """Change one value somewhere in the body, or leave a field out, or add one."""
        body = json.loads(plain)
        level = body
        while True:
            field = self._rng.choice(list(level))
            if not isinstance(level[field], dict) or not level[field]:
                break
            level = level[field]
        match self._rng.randrange(5):
            case 0:
                del level[field]
            case 1:
                level["lie"] = 1
            case _:
                level[field] = self._other(level[field])
        return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode()

    def _other(self, value: object) -> object:
        match value:
            case int():
                return self._rng.choice((0, 1, value + 1, max(0, value - 1), value * 2, 2**52, -1))
            case str() if value.isdecimal():
                return self._rng.choice(("0", "1", str(int(value) + 1), str(int(value) * 2), "-1"))
            case str() if value:
                at = self._rng.randrange(len(value))
                return value[:at] + self._rng.choice("0123456789abcdefx") + value[at + 1 :]
        return None
