"""Keys, addresses and signatures: one secp256k1 key per agent signs everything it says.

A signature is 65 bytes, ``r | s | v`` with v of 27 or 28, the form that Solidity's ``ecrecover``
takes. The upper half of s is refused, so that every signature has one spelling only.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import coincurve
import sha3

from .errors import BadSignature, ConfigurationError

SIGNATURE_SIZE_BYTES: Final = 65
_ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
_HALF_ORDER: Final = _ORDER // 2


def keccak256(data: bytes) -> bytes:
    """Return the 32-byte Keccak-256 hash that Ethereum uses (not NIST SHA3-256)."""
    return bytes(sha3.keccak_256(data).digest())


@lru_cache(maxsize=8192)
def _address_of_point(point: bytes) -> str:
    return "0x" + keccak256(point)[-20:].hex()


class Identity:
    """A signing key and its address. Never prints its secret."""

    __slots__ = ("_key", "address")

    def __init__(self, secret: bytes) -> None:
        if len(secret) != 32 or not 0 < int.from_bytes(secret, "big") < _ORDER:
            raise ConfigurationError("a secret key is 32 bytes, above zero and below the order")
        self._key = coincurve.PrivateKey(secret)
        self.address: str = _address_of_point(self._key.public_key.format(compressed=False)[1:])

    def sign(self, digest: bytes) -> bytes:
        """Return the 65-byte signature of a 32-byte digest. Deterministic (RFC 6979)."""
        signature = self._key.sign_recoverable(digest, hasher=None)
        return signature[:64] + bytes((27 + signature[64],))

    def secret_for_keystore(self) -> bytes:
        """Return the secret itself, for an encrypted keystore or a transaction signer only."""
        return bytes(self._key.secret)

    def derive(self, name: str) -> Identity:
        """Return the key of the agent ``name`` under this seed; the same name, the same key."""
        seed = self._key.secret
        for counter in range(256):
            material = keccak256(b"coase/key/v1\0" + seed + name.encode() + bytes((counter,)))
            if 0 < int.from_bytes(material, "big") < _ORDER:
                return Identity(material)
        raise ConfigurationError("no key could be derived")  # Chance of 2**-32000.

    def subkey(self, purpose: str) -> bytes:
        """Return 32 secret bytes for ``purpose``: the same ones each time, and no signing key."""
        return keccak256(b"coase/subkey/v1\0" + self._key.secret + purpose.encode())

    def __repr__(self) -> str:
        return f"Identity({self.address})"


def recover(digest: bytes, signature: bytes) -> str:
    """Return the address that signed ``digest``.

    :raises BadSignature: if the signature is malformed, malleable or recovers to nothing
    """
    if len(signature) != SIGNATURE_SIZE_BYTES or signature[64] not in (27, 28):
        raise BadSignature("a signature is 65 bytes and ends with 27 or 28")
    if int.from_bytes(signature[32:64], "big") > _HALF_ORDER:
        raise BadSignature("the signature is malleable (s is in the upper half)")
    try:
        point = coincurve.PublicKey.from_signature_and_message(
            signature[:64] + bytes((signature[64] - 27,)), digest, hasher=None
        )
    except ValueError as error:
        raise BadSignature("the signature recovers to no key") from error
    return _address_of_point(point.format(compressed=False)[1:])


def require_signer(digest: bytes, signature: bytes, signer: str) -> None:
    """Return if ``signer`` signed ``digest``.

    :raises BadSignature: otherwise
    """
    if recover(digest, signature) != signer:
        raise BadSignature(f"the signature is not {signer}'s")
