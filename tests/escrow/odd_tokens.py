"""Tokens that are not as one would wish, as code for the first block of an embedded chain.

Each lends itself CoaseToken's code (and keeps its own storage), with something put before or after.
"""

from __future__ import annotations

from typing import Final

from coase.escrow.backends.devchain_engine import Account
from coase.escrow.backends.evm.transaction import created_address
from coase.protocol.identity import Identity, keccak256

SEED: Final = b"odd-tokens"
SUPPLY_UNITS: Final = 10**12
PLAIN: Final = "0x" + "a1" * 20
"""An ERC-20 and nothing more: no permit, no authorisations."""
TAXED: Final = "0x" + "a2" * 20
"""Takes one unit of whatever is moved by ``transferFrom``; an ERC-20 and nothing more."""
LYING: Final = "0x" + "a3" * 20
"""Says that it moved what it did not: ``transferFrom`` returns true and does nothing."""

_OPS: Final = {
    "sub": 0x03, "eq": 0x14, "iszero": 0x15, "shr": 0x1C, "sha3": 0x20,
    "dataload": 0x35, "datasize": 0x36, "datacopy": 0x37, "returnsize": 0x3D,
    "returncopy": 0x3E, "mstore": 0x52, "sload": 0x54, "sstore": 0x55,
    "jumpi": 0x57, "gas": 0x5A, "dest": 0x5B, "dup1": 0x80, "swap1": 0x90, "return": 0xF3,
    "delegate": 0xF4, "revert": 0xFD,
}  # fmt: skip
_WITH_SIGNATURES: Final = (
    "DOMAIN_SEPARATOR()",
    "eip712Domain()",
    "nonces(address)",
    "authorizationState(address,bytes32)",
)
_NAME: Final = int.from_bytes(b"Odd".ljust(31, b"\0") + bytes((2 * 3,)), "big")


def assemble(source: str) -> bytes:
    """Return the code of a text: names of operations, ``0x`` to push, ``@name`` and ``:name``."""
    code, places, holes = bytearray(), {}, {}
    for word in source.split():
        if word.startswith("0x"):
            data = bytes.fromhex(word[2:])
            code += bytes((0x5F + len(data),)) + data
        elif word.startswith("@"):
            holes[len(code) + 1] = word[1:]
            code += b"\x61\0\0"
        elif word.startswith(":"):
            places[word[1:]] = len(code)
            code.append(_OPS["dest"])
        else:
            code.append(_OPS[word])
    for place, name in holes.items():
        code[place : place + 2] = places[name].to_bytes(2, "big")
    return bytes(code)


def _selector(signature: str) -> str:
    return "0x" + keccak256(signature.encode())[:4].hex()


def code_of(kind: str, token: str) -> bytes:
    """Return the code of one of these tokens, which borrows that of the CoaseToken at ``token``."""
    move = _selector("transferFrom(address,address,uint256)")
    source = "0x00 dataload 0xe0 shr "
    for signature in _WITH_SIGNATURES:
        source += f"dup1 {_selector(signature)} eq @refuse jumpi "
    if kind == LYING:
        source += f"dup1 {move} eq @lie jumpi "
    source += f"""
        {move} eq
        datasize 0x00 0x00 datacopy
        0x00 0x00 datasize 0x00 {token} gas delegate
        returnsize 0x00 0x00 returncopy
        iszero @refuse jumpi
    """
    if kind == TAXED:  # One unit less for whoever was paid.
        source += """
            iszero @done jumpi
            0x24 dataload 0x0100 mstore 0x00 0x0120 mstore
            0x40 0x0100 sha3
            dup1 sload 0x01 swap1 sub swap1 sstore
        """
    source += """
        :done returnsize 0x00 return
        :refuse returnsize 0x00 revert
        :lie 0x01 0x00 mstore 0x20 0x00 return
    """
    return assemble(source)


def odd_tokens(owner: Identity) -> dict[str, Account]:
    """Return the accounts of all three, each with its whole supply in the hands of ``owner``.

    They are for a chain whose seed is ``SEED``.
    """
    deployer = Identity(keccak256(b"coase/devchain\0" + SEED)).address
    borrowed = created_address(deployer, 0)
    balance = keccak256(bytes.fromhex(owner.address[2:]).rjust(32, b"\0") + bytes(32))
    storage = ((int.from_bytes(balance, "big"), SUPPLY_UNITS), (2, SUPPLY_UNITS), (3, _NAME))
    return {
        kind: Account(code=code_of(kind, borrowed), storage=storage)
        for kind in (PLAIN, TAXED, LYING)
    }
