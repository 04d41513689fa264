"""EIP-1559 transactions: built and signed here, since a general library takes ten times as long.

The tests hold the bytes equal to eth-account's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import rlp  # type: ignore[import-untyped]

from coase.protocol.identity import Identity, keccak256

_TYPE: Final = b"\x02"


@dataclass(frozen=True, slots=True)
class SignedTransaction:
    """The bytes that the chain takes, and the hash by which it knows them."""

    raw: bytes
    tx_hash: str


def _minimal(value: int) -> bytes:
    return value.to_bytes((value.bit_length() + 7) // 8, "big")


def sign_transaction(
    identity: Identity,
    *,
    chain_id: int,
    nonce: int,
    to: str,
    data: bytes,
    value: int = 0,
    gas: int,
    fee_max: int,
    tip_max: int,
) -> SignedTransaction:
    """Return a signed transaction of type 2. An empty ``to`` creates a contract."""
    fields: list[object] = [
        _minimal(chain_id),
        _minimal(nonce),
        _minimal(tip_max),
        _minimal(fee_max),
        _minimal(gas),
        bytes.fromhex(to[2:]),
        _minimal(value),
        data,
        [],
    ]
    signature = identity.sign(keccak256(_TYPE + rlp.encode(fields)))
    fields += [
        _minimal(signature[64] - 27),
        _minimal(int.from_bytes(signature[:32], "big")),
        _minimal(int.from_bytes(signature[32:64], "big")),
    ]
    raw = _TYPE + rlp.encode(fields)
    return SignedTransaction(raw, "0x" + keccak256(raw).hex())


def created_address(sender: str, nonce: int) -> str:
    """Return the address of the contract that ``sender`` creates with ``nonce``."""
    return "0x" + keccak256(rlp.encode([bytes.fromhex(sender[2:]), _minimal(nonce)]))[12:].hex()
