"""Contracts that everybody knows by their address: on a local chain their code is put there.

x402's clients and facilitators have its addresses built in, so a second deployment elsewhere
could not talk to them. On public chains the contracts stand there already; ERC-8004's registries
have these addresses on main chains, and others on test chains.
"""

from __future__ import annotations

from typing import Final

from coase.escrow.voucher import CHANNELS

from .artifacts import artifact

AUTHORIZATION_COLLECTOR: Final = "0x4020806089470a89826cb9fb1f4059150b550004"
PERMIT2_COLLECTOR: Final = "0x4020425faf3b746c082c2f942b4e5159887b0005"
PERMIT2: Final = "0x000000000022d473030f116ddee9f6b43ac78ba3"
MULTICALL3: Final = "0xca11bde05977b3631167028862be2a173976ca11"
IDENTITY_REGISTRY: Final = "0x8004a169fb4a3325136eb29fa0ceb6d2e539a432"
REPUTATION_REGISTRY: Final = "0x8004baa17c55a88189ae136b182e5fda19de9b63"

_CONTRACTS: Final = {
    CHANNELS: ("PaymentChannels", ""),
    AUTHORIZATION_COLLECTOR: ("ERC3009Collector", CHANNELS),
    PERMIT2_COLLECTOR: ("Permit2Collector", CHANNELS),
    PERMIT2: ("Permit2", ""),
    MULTICALL3: ("Multicall3", ""),
    IDENTITY_REGISTRY: ("IdentityRegistry", ""),
    REPUTATION_REGISTRY: ("ReputationRegistry", IDENTITY_REGISTRY),
}
"""What stands where, and the one address that a constructor would have put into its code."""


def code_at_fixed_addresses() -> dict[str, bytes]:
    """Return the code that a local chain carries from its first block, by address."""
    return {where: _code(name, value) for where, (name, value) in _CONTRACTS.items()}


def _code(name: str, value: str) -> bytes:
    made = artifact(name)
    code = bytearray(made.runtime)
    for start, length in made.holes:
        code[start : start + length] = bytes.fromhex(value[2:]).rjust(length, b"\0")
    return bytes(code)
